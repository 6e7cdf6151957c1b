"""A cheap stand-in for measured damage: the squared error of the weights, weighted by what multiplies them.

The error of a tensor is Σ w_j (x̂_ij - x_ij)², over rows i and columns j, with w the importance matrix (ones without
one): what the rounding adds to the squares of the layer's outputs, if columns are independent. How much of that reaches
the logits differs by kind of tensor and by depth. A sample of measured damages tells:

    ln kld = scale(kind, layer) + exponent · ln error

with one scale per kind and sampled layer, straight lines between them, and one exponent, all by least squares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from quantlab import quants
from quantlab.files.model import open as open_model
from quantlab.study.damage import threads
from quantlab.study.damage_cache import DamageCache

_PIECE = 1 << 22  # weights at a time


@dataclass(frozen=True)
class ErrorTask:
    """The errors of one tensor in several types.

    Attributes
    ----------
    model : Path
    name : str
    keys : dict[str, dict]
        Type → what its error is kept under.
    weights : np.ndarray [shape=(n_per_row,), dtype=float32] or None
    cache : Path or None
    threads : int or None
    """

    model: Path
    name: str
    keys: dict[str, dict]
    weights: np.ndarray | None
    cache: Path | None
    threads: int | None

    def measure(self, bar: tqdm | None = None) -> list[dict]:
        """Return the error in each type; they are in the cache by then."""
        tensor, cache = open_model(self.model).tensor(self.name), DamageCache(self.cache)
        step = max(1, _PIECE // tensor.shape[-1])
        found = dict.fromkeys(self.keys, 0.0)
        with threads(self.threads):
            for start in range(0, tensor.nrows, step):
                x = tensor.floats(start, min(start + step, tensor.nrows))
                for qtype in self.keys:
                    found[qtype] += weighted_error(x, qtype, self.weights)
                    if bar is not None:
                        bar.update(x.size)
        for qtype, key in self.keys.items():
            cache.put(key, {"error": found[qtype]})
        return [{"error": error} for error in found.values()]


def weighted_error(x: np.ndarray, qtype: str, weights: np.ndarray | None = None) -> float:
    """Compute what quantizing costs the outputs of a matrix, squared and summed.

    Parameters
    ----------
    x : np.ndarray [shape=(nrows, n_per_row), dtype=float32]
    qtype : str
        ggml type.
    weights : np.ndarray [shape=(n_per_row,), dtype=float32], optional
        Mean squared input of each column, which also weights the quantization; ones by default.

    Returns
    -------
    float
        Σ weights_j (x̂_ij - x_ij)².
    """
    difference = quants.roundtrip(x, qtype, weights)
    difference -= x
    per_column = np.einsum("ij,ij->j", difference, difference, dtype=np.float64)
    return float(per_column.sum() if weights is None else per_column @ weights.astype(np.float64))


def sample(changes: Sequence, n_layer: int, n: int) -> list:
    """Return the changes of `n` layers, spread from the first to the last, and all those of tensors of no layer."""
    kept = set(np.unique(np.linspace(0, n_layer - 1, n).round().astype(int)).tolist()) | {-1}
    return [change for change in changes if change.layer in kept]


def calibrated(rows: Sequence[dict], n_layer: int) -> tuple[list[dict], dict]:
    """Predict the damage of the rows that were not measured from those that were.

    Parameters
    ----------
    rows : sequence of dict
        As `Sensitivity.rows`, each of one tensor.
    n_layer : int

    Returns
    -------
    list of dict, dict
        The rows, those predicted without standard errors; and how good the predictions are:
        `n_measured`, `exponent`; `spearman_error`, the rank correlation of error and measured damage; `spearman`, that
        of predicted and measured damage, and `factor`, by which they typically differ, each layer predicted from the
        others.
    """
    known = [row for row in rows if row["measured"] and row["layer"] >= 0 and row["delta_kld"] > 0 and row["error"] > 0]
    model = _fit(known)
    filled = []
    for row in rows:
        if not row["measured"]:
            kld = _predict(model, row)
            row = row | {"kld_mean": kld, "delta_kld": kld}
        filled.append(row)
    measured = pd.Series([row["delta_kld"] for row in known], dtype=float)
    held_out = _held_out(known)
    told = held_out.notna()
    spread = np.log(held_out[told] / measured[told])
    return filled, {
        "n_measured": len(known),
        "exponent": model[1],
        "spearman_error": _spearman(pd.Series([row["error"] for row in known], dtype=float), measured),
        "spearman": _spearman(held_out[told], measured[told]) if told.any() else None,
        "factor": float(np.exp(np.sqrt((spread**2).mean()))) if told.any() else None,
    }


def _held_out(known: Sequence[dict]) -> pd.Series:
    """Each layer's damages as predicted from the other layers; NaN for the first and the last layer."""
    layers = sorted({row["layer"] for row in known})
    found = pd.Series(np.nan, index=range(len(known)))
    for layer in layers[1:-1]:
        model = _fit([row for row in known if row["layer"] != layer])
        for i, row in enumerate(known):
            if row["layer"] == layer:
                found[i] = _predict(model, row)
    return found


def _fit(known: Sequence[dict]) -> tuple[dict[str, tuple[list, list]], float]:
    """Scales by kind (layers, logarithms) and the exponent, by least squares."""
    places = sorted({(row["kind"], row["layer"]) for row in known})
    a = np.zeros((len(known), len(places) + 1))
    for i, row in enumerate(known):
        a[i, places.index((row["kind"], row["layer"]))] = 1
        a[i, -1] = np.log(row["error"])
    *scales, exponent = np.linalg.lstsq(a, np.log([row["delta_kld"] for row in known]), rcond=None)[0]
    kinds: dict[str, tuple[list, list]] = {}
    for (kind, layer), scale in zip(places, scales, strict=True):
        layers, values = kinds.setdefault(kind, ([], []))
        layers.append(layer)
        values.append(float(scale))
    return kinds, float(exponent)


def _predict(model: tuple[Mapping, float], row: dict) -> float:
    """The damage of one row."""
    kinds, exponent = model
    if row["error"] == 0:
        return 0.0
    scale = np.interp(row["layer"], *kinds[row["kind"]])
    return float(np.exp(scale + exponent * np.log(row["error"])))


def _spearman(a: pd.Series, b: pd.Series) -> float:
    """Rank correlation."""
    return float(a.rank().corr(b.rank()))


def describe(calibration: Mapping) -> str:
    """One line about a calibration."""
    line = f"proxy: rank correlation of error and damage {calibration['spearman_error']:.3f}"
    if calibration["spearman"] is None:
        return line
    held_out, factor = calibration["spearman"], calibration["factor"]
    return f"{line}, of predicted and measured {held_out:.3f}, typically off by a factor of {factor:.2f}"
