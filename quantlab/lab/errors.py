"""Errors of types on a model's tensors: per tensor and type, as distributions, and by place."""

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd

from quantlab.files.model import LazyTensor, Model
from quantlab.quants import block_size, code_histogram, dequantize, grid, quantize, roundtrip
from quantlab.quants import errors as errors_of
from quantlab.quants.codebook import code_values
from quantlab.study.changes import kind_of
from quantlab.transform.mixture import is_quantizable, layer_of

_PERCENTILES = (50, 90, 99, 99.9, 100)


def matrices(model: Model, pattern: str = "", *, block: int = 1) -> list[LazyTensor]:
    """List the tensors that are quantized, by layer.

    Parameters
    ----------
    model : Model
        What `quantlab.open` returned.
    pattern : str
        Regular expression that is searched for in the name; empty for all.
    block : int
        Only tensors whose rows are whole blocks of that many weights.

    Raises
    ------
    ValueError
        If no tensor is left.

    Examples
    --------
    >>> import quantlab as ql
    >>> from quantlab.files.bundled import model_path
    >>> [tensor.name for tensor in matrices(ql.open(model_path("tiny")), r"blk.[01].ffn_down")]
    ['blk.0.ffn_down.weight', 'blk.1.ffn_down.weight']
    """
    kept = [t for t in model if is_quantizable(t.name, t.shape) and re.search(pattern, t.name)]
    kept = [tensor for tensor in kept if tensor.shape[-1] % block == 0]
    if not kept:
        raise ValueError(
            f"{model.path.name}: pattern={pattern!r} matches no matrix whose rows are whole blocks of {block}. "
            "Choose other tensors or types."
        )
    return sorted(kept, key=lambda tensor: (layer_of(tensor.name), tensor.name))


def _rms(x: np.ndarray) -> float:
    """Return the root mean square (zeros: 1, so that they stay zeros in units of it)."""
    return float(np.sqrt(np.square(x, dtype=np.float64).mean())) or 1.0


def tails(tensors: Iterable[LazyTensor]) -> pd.DataFrame:
    """Describe how heavy the tails of tensors are.

    Parameters
    ----------
    tensors : iterable of LazyTensor
        What `matrices` returned; one at a time is read.

    Returns
    -------
    pd.DataFrame
        A row per tensor: `tensor`, `layer` (-1 outside), `kind`, `n_weights`, `rms`, `kurtosis` (excess: 0 for normal
        numbers, 3 for Laplace's), `peak` (largest magnitude in rms), `row_spread` and `column_spread` (99th over 50th
        percentile of the rms of rows and columns), `crest` (rms of the largest magnitudes of blocks of 32, over `rms`:
        what a scale per block has to span; NaN if rows are not whole blocks).
    """
    rows = []
    for tensor in tensors:
        x = tensor.floats().reshape(-1, tensor.shape[-1])
        squares = np.square(x, dtype=np.float64)
        by_row, by_column = np.sqrt(squares.mean(axis=1)), np.sqrt(squares.mean(axis=0))
        rows.append(
            {
                "tensor": tensor.name,
                "layer": layer_of(tensor.name),
                "kind": kind_of(tensor.name),
                "n_weights": x.size,
                "rms": _rms(x),
                "kurtosis": _kurtosis(x),
                "peak": float(np.abs(x).max()) / _rms(x),
                "row_spread": np.percentile(by_row, 99) / np.median(by_row),
                "column_spread": np.percentile(by_column, 99) / np.median(by_column),
                "crest": _rms(np.abs(x).reshape(-1, 32).max(axis=1)) / _rms(x) if x.shape[1] % 32 == 0 else np.nan,
            }
        )
    return pd.DataFrame(rows)


def _kurtosis(x: np.ndarray) -> float:
    """Return the excess kurtosis: fourth central moment over the squared variance, minus 3."""
    squares = np.square(x - x.mean(dtype=np.float64), dtype=np.float64)
    return float(np.square(squares).mean() / squares.mean() ** 2 - 3) if squares.any() else 0.0


def by_type(tensors: Iterable[LazyTensor], qtypes: Iterable[str]) -> pd.DataFrame:
    """Measure the errors of each type on each tensor.

    Parameters
    ----------
    tensors : iterable of LazyTensor
        What `matrices` returned; one at a time is read.
    qtypes : iterable of str
        Types that can be encoded. A type whose blocks do not fit into a tensor's rows is left out for that tensor.

    Returns
    -------
    pd.DataFrame
        A row per tensor and type: `tensor`, `layer`, `kind`, `type`, `n_weights`, `bpw`, `rmse`, `relative` (rmse over
        the weights' rms), `snr_db`, `max_abs`.
    """
    rows, qtypes = [], list(qtypes)
    for tensor in tensors:
        x = tensor.floats()
        place = {"tensor": tensor.name, "layer": layer_of(tensor.name), "kind": kind_of(tensor.name)}
        for qtype in (q for q in qtypes if tensor.shape[-1] % block_size(q) == 0):
            lost = errors_of(x, qtype, name=tensor.name)
            measures = ("n_weights", "bpw", "rmse", "relative", "snr_db", "max_abs")
            rows.append(place | {"type": qtype} | {key: getattr(lost, key) for key in measures})
    return pd.DataFrame(rows)


def together(frame: pd.DataFrame) -> pd.DataFrame:
    """Add up the errors of `by_type`: one row per type, all tensors as one.

    Returns
    -------
    pd.DataFrame
        `type`, `n_weights`, `bpw`, `rmse`, `relative`, `snr_db`, `max_abs`, widest type first. All types must have been
        measured on the same tensors.
    """
    noise = frame["n_weights"] * frame["rmse"] ** 2
    signal = (noise / frame["relative"] ** 2).where(frame["relative"] > 0, other=np.nan)
    parts = frame.assign(noise=noise, signal=signal.groupby(frame["tensor"]).transform("max"))
    how = {"n_weights": "sum", "bpw": "first", "noise": "sum", "signal": "sum", "max_abs": "max"}
    rows = parts.groupby("type", sort=False).agg(how).reset_index()
    with np.errstate(divide="ignore"):
        rows = rows.assign(
            rmse=np.sqrt(rows["noise"] / rows["n_weights"]),
            relative=np.sqrt(rows["noise"] / rows["signal"]),
            snr_db=10 * np.log10(rows["signal"] / rows["noise"]),
        )
    order = ["type", "n_weights", "bpw", "rmse", "relative", "snr_db", "max_abs"]
    return rows.sort_values("bpw", ascending=False, kind="stable")[order].reset_index(drop=True)


def percentiles(tensors: Iterable[LazyTensor], qtype: str) -> pd.DataFrame:
    """Summarize the errors of a type in each tensor by percentiles of their magnitude.

    Returns
    -------
    pd.DataFrame
        A row per tensor: `tensor`, `layer`, `kind`, `p50` `p90` `p99` `p99.9` `p100`, in rms of the tensor's weights.
    """
    rows = []
    for tensor in tensors:
        x = tensor.floats()
        error = np.abs(roundtrip(x, qtype, name=tensor.name) - x) / _rms(x)
        values = dict(zip([f"p{p:g}" for p in _PERCENTILES], np.percentile(error, _PERCENTILES), strict=True))
        rows.append({"tensor": tensor.name, "layer": layer_of(tensor.name), "kind": kind_of(tensor.name)} | values)
    return pd.DataFrame(rows)


def histograms(tensor: LazyTensor, qtypes: Iterable[str], *, reach: float = 8) -> pd.DataFrame:
    """Count weights and errors by their size.

    Parameters
    ----------
    tensor : LazyTensor
        One of `matrices`.
    qtypes : iterable of str
        Types that fit the tensor's rows.
    reach : float
        Bins go from -`reach` to `reach` rms of the weights; what lies beyond is counted in the last ones.

    Returns
    -------
    pd.DataFrame
        A row per bin and quantity: `of` (`weights`, or a type whose errors they are), `left` and `right` edge of the
        bin in rms of the weights, `count`.
    """
    x = tensor.floats()
    edges = np.linspace(-reach, reach, 202)
    samples = {"weights": x} | {qtype: roundtrip(x, qtype, name=tensor.name) - x for qtype in qtypes}
    frames = []
    for name, values in samples.items():
        count, _ = np.histogram(np.clip(values / _rms(x), -reach, reach), edges)
        frames.append(pd.DataFrame({"of": name, "left": edges[:-1], "right": edges[1:], "count": count}))
    return pd.concat(frames, ignore_index=True)


def code_counts(tensor: LazyTensor, qtypes: Iterable[str]) -> pd.DataFrame:
    """Count how often a tensor uses each code of some types.

    Returns
    -------
    pd.DataFrame
        A row per type and code: `type`, `code` (Q8_0: from -128), `count`, `share`.
    """
    x = tensor.floats()
    frames = []
    for qtype in qtypes:
        count = code_histogram(quantize(x, qtype, name=tensor.name), qtype)
        code = np.sort(code_values(qtype))
        frames.append(pd.DataFrame({"type": qtype, "code": code, "count": count, "share": count / count.sum()}))
    return pd.concat(frames, ignore_index=True)


def entropy(counts: pd.DataFrame) -> pd.DataFrame:
    """Return the entropy of codes: the bits they would need with a length according to frequency.

    Returns
    -------
    pd.DataFrame
        Index `type`; `bits` that the type has for a code, `entropy` in bits per code, `unused` codes.
    """
    rows = {}
    for qtype, part in counts.groupby("type", sort=False):
        used = part["share"][part["count"] > 0]
        rows[qtype] = {
            "bits": np.log2(len(part)),
            "entropy": float(-(used * np.log2(used)).sum()),
            "unused": len(part) - len(used),
        }
    return pd.DataFrame(rows).T.rename_axis("type").astype({"unused": int})


def error_map(tensor: LazyTensor, qtype: str, *, cells: int = 64) -> pd.DataFrame:
    """Map a tensor's errors: their rms in each cell of a grid over rows and columns.

    Parameters
    ----------
    tensor : LazyTensor
        One of `matrices`.
    qtype : str
        A type that fits its rows.
    cells : int
        Cells in each direction, at most.

    Returns
    -------
    pd.DataFrame
        Index: first row of the cell; columns: first column; values in rms of the tensor's weights.
    """
    x = tensor.floats().reshape(-1, tensor.shape[-1])
    error = np.square(roundtrip(x, qtype, name=tensor.name) - x, dtype=np.float64)
    rows, columns = (np.unique(np.linspace(0, n, min(cells, n), endpoint=False).astype(int)) for n in x.shape)
    sums = np.add.reduceat(np.add.reduceat(error, rows, axis=0), columns, axis=1)
    areas = np.outer(np.diff([*rows, x.shape[0]]), np.diff([*columns, x.shape[1]]))
    return pd.DataFrame(np.sqrt(sums / areas) / _rms(x), index=rows, columns=columns)


def largest(tensor: LazyTensor, qtype: str, n: int = 10) -> pd.DataFrame:
    """List the weights with the largest errors, largest first.

    Returns
    -------
    pd.DataFrame
        `row`, `column`, `weight`, `decoded`, `error` in the weights' unit; `neighbours`: the largest magnitude among
        the 32 weights of the row around it; `steps`: the error in steps between its levels (beyond half a step: the
        weight lies outside the range of its levels); `share`: part of the whole squared error.
    """
    x = tensor.floats().reshape(-1, tensor.shape[-1])
    data = quantize(x, qtype, name=tensor.name)
    decoded = dequantize(data, qtype, x.shape)
    error, step = decoded - x, grid(data, qtype)[1].reshape(x.shape)
    places = np.argsort(-np.abs(error), axis=None)[:n]
    rows, columns = np.unravel_index(places, x.shape)
    peaks = np.abs(x).reshape(len(x), -1, 32).max(axis=2)
    return pd.DataFrame(
        {
            "row": rows,
            "column": columns,
            "weight": x[rows, columns],
            "decoded": decoded[rows, columns],
            "error": error[rows, columns],
            "neighbours": peaks[rows, columns // 32],
            "steps": np.abs(error / np.where(step, step, np.inf))[rows, columns],
            "share": error[rows, columns] ** 2 / np.square(error, dtype=np.float64).sum(),
        }
    )
