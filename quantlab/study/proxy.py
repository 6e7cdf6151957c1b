"""A cheap estimate of damage: the squared error of the weights, weighted by their inputs.

The error of a tensor is Σ w_j (x̂_ij - x_ij)², over rows i and columns j, with w the importance matrix (ones without
one): what the rounding adds to the squares of the layer's outputs, if columns are independent. How much of that reaches
the logits differs by kind of tensor and by depth. A sample of measured damages tells:

    ln kld = scale(kind, layer) + exponent · ln error

with one scale per kind and sampled layer, straight lines between them, and one exponent, all by least squares.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from quantlab import quants
from quantlab.files.model import open as open_model
from quantlab.study.damage import threads
from quantlab.study.damage_cache import DamageCache
from quantlab.transform.plan import bits_per_weight

_PIECE = 1 << 22  # weights at a time
LOOK = 1 << 19  # weights of a tensor that tell which types are worth a measurement
_SPANS = 16  # places of a tensor that they are from


@dataclass(frozen=True)
class ErrorTask:
    """The errors of one tensor in several types."""

    model: Path
    name: str
    keys: dict[str, dict]  # type → what its error is kept under
    weights: np.ndarray | None  # float32 (n_per_row,), of experts one after the other
    cache: Path | None
    threads: int | None
    most: int | None = None  # weights to look at, None for all

    def measure(self, bar: tqdm | None = None) -> list[dict]:
        """Return the error in each type, and store it in the cache."""
        tensor, cache = open_model(self.model).tensor(self.name), DamageCache(self.cache)
        rows = tensor.shape[-2]  # of an expert
        each = None if self.weights is None else self.weights.reshape(tensor.nrows // rows, -1)
        found = dict.fromkeys(self.keys, 0.0)
        with threads(self.threads):
            for start, stop in pieces(tensor.shape, self.most):
                x = tensor.floats(start, stop)
                for qtype in self.keys:
                    found[qtype] += weighted_error(x, qtype, None if each is None else each[start // rows])
                    if bar is not None:
                        bar.update(x.size)
        for qtype, key in self.keys.items():
            cache.put(key, {"error": found[qtype]})
        return [{"error": error} for error in found.values()]


def pieces(shape: tuple[int, ...], most: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield spans of a tensor's rows, each of one expert: all rows, or some from everywhere with `most` weights.

    Examples
    --------
    >>> list(pieces((2, 3, 64))), list(pieces((64, 64), most=1024))[:2]
    ([(0, 3), (3, 6)], [(0, 1), (4, 5)])
    """
    *lead, rows, width = shape
    nrows = math.prod(lead) * rows
    wanted = nrows if most is None else min(nrows, most // width)
    places = 1 if wanted == nrows else min(_SPANS, max(1, wanted))
    for place in range(places):
        start = place * nrows // places
        stop = start + max(1, wanted // places)
        while start < stop:
            end = min(stop, start + max(1, _PIECE // width), (start // rows + 1) * rows)
            yield start, end
            start = end


def weighted_error(x: np.ndarray, qtype: str, weights: np.ndarray | None = None) -> float:
    """Compute the squared error that quantizing causes in a matrix's outputs, summed.

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
    """Choose the changes, of single tensors, to measure, so that the rest can be predicted.

    They are the tensors of `n` layers, spread from the first to the last, at one type each, the second narrowest; those
    of the middle one of these layers, and those of no layer, at every type.
    """
    layers = np.unique(np.linspace(0, n_layer - 1, n).round().astype(int)).tolist()
    whole = (-1, layers[len(layers) // 2])
    widths: dict[str, list] = {}
    for change in changes:
        widths.setdefault(change.group, []).append(bits_per_weight(change.qtype))
    # not the narrowest: of less than three bits damage follows another law
    one = {group: next((b for b in sorted(bits)[1:] if b >= 3), sorted(bits)[:2][-1]) for group, bits in widths.items()}
    return [
        change
        for change in changes
        if change.layer in whole or change.layer in layers and bits_per_weight(change.qtype) == one[change.group]
    ]


def calibrated(rows: Sequence[dict], n_layer: int) -> tuple[list[dict], dict]:
    """Predict the damage of unmeasured rows from measured ones.

    Parameters
    ----------
    rows : sequence of dict
        As `Sensitivity.rows`, each of one tensor.
    n_layer : int

    Returns
    -------
    list of dict, dict
        The rows, those predicted without standard errors; and how good the predictions are: `n_measured`, `exponent`,
        `spearman_error` (rank correlation of error and measured damage), `spearman` (of predicted and measured damage)
        and `factor` (by which the two typically differ), where `n_held_out` rows are predicted from the others: a
        layer from the other layers, or where all are measured, types of a layer from another type.

    Raises
    ------
    ValueError
        If all measured damages of a kind are zero or less.
    """
    known = [row for row in rows if row["measured"] and row["delta_kld"] > 0 and row["error"] > 0]
    model = _fit(known)
    filled = []
    for row in rows:
        if not row["measured"]:
            kld = _predict(model, row)
            row = row | {"kld_mean": kld, "delta_kld": kld}
        filled.append(row)
    pairs = [(row["delta_kld"], predicted) for row, predicted in _held_out(known, n_layer)]
    measured, predicted = pd.DataFrame(pairs, columns=["measured", "predicted"], dtype=float).T.to_numpy()
    return filled, {
        "n_measured": len(known),
        "exponent": model[1],
        "spearman_error": _spearman([row["error"] for row in known], [row["delta_kld"] for row in known]),
        "n_held_out": len(pairs),
        "spearman": _spearman(predicted, measured) if len(pairs) > 1 else None,
        "factor": float(np.exp(np.sqrt((np.log(predicted / measured) ** 2).mean()))) if pairs else None,
    }


def _held_out(known: Sequence[dict], n_layer: int) -> list[tuple[dict, float]]:
    """Return measured rows, each with a prediction that ignores its own measurement."""
    layers = sorted({row["layer"] for row in known} - {-1})
    if len(layers) == n_layer:
        first = {row["group"]: row for row in reversed(known)}
        kept = [row for row in known if row["layer"] < 0 or row is first[row["group"]]]
        cuts = [(kept, [row for row in known if row["layer"] >= 0 and row is not first[row["group"]]])]
    else:
        cuts = [([r for r in known if r["layer"] != i], [r for r in known if r["layer"] == i]) for i in layers[1:-1]]
    found = []
    for kept, left_out in cuts:
        model = _fit(kept)
        found += [(row, _predict(model, row)) for row in left_out]
    return found


def _fit(known: Sequence[dict]) -> tuple[dict[str, tuple[list, list]], float]:
    """Fit scales by kind (layers, logarithms) and the exponent by least squares."""
    places = sorted({(row["kind"], row["layer"]) for row in known})
    a = np.zeros((len(known), len(places) + 1))
    for i, row in enumerate(known):
        a[i, places.index((row["kind"], row["layer"]))] = 1
        a[i, -1] = np.log(row["error"])
    b = np.log([row["delta_kld"] for row in known])
    if len(known) == len(places):  # one type of each tensor says nothing of the exponent
        scales, exponent = np.linalg.lstsq(a[:, :-1], b - a[:, -1], rcond=None)[0], 1.0
    else:
        *scales, exponent = np.linalg.lstsq(a, b, rcond=None)[0]
    kinds: dict[str, tuple[list, list]] = {}
    for (kind, layer), scale in zip(places, scales, strict=True):
        layers, values = kinds.setdefault(kind, ([], []))
        layers.append(layer)
        values.append(float(scale))
    return kinds, float(exponent)


def _predict(model: tuple[Mapping, float], row: dict) -> float:
    """Return the predicted damage of one row."""
    kinds, exponent = model
    if row["error"] == 0:
        return 0.0
    if row["kind"] not in kinds:
        raise ValueError(
            f"{row['kind']}: measured damages must be above zero, none is. Give more chunks, or no sample."
        )
    scale = np.interp(row["layer"], *kinds[row["kind"]])
    return float(np.exp(scale + exponent * np.log(row["error"])))


def _spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Return the rank correlation."""
    return float(pd.Series(a).rank().corr(pd.Series(b).rank()))


def describe(calibration: Mapping) -> str:
    """Return one line about a calibration."""
    line = f"proxy: rank correlation of error and damage {calibration['spearman_error']:.3f}"
    if calibration["spearman"] is None:
        return line
    held_out, factor = calibration["spearman"], calibration["factor"]
    return f"{line}, of predicted and measured {held_out:.3f}, typically off by a factor of {factor:.2f}"
