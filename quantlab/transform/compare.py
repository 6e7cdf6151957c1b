"""Comparison of two models, for `diff` and `verify`: metadata, tensor tables and blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlab import quants
from quantlab.files.byte_range import PLAIN_DTYPES
from quantlab.files.gguf_file import Strings
from quantlab.files.metadata_table import metadata_table
from quantlab.files.model import LazyTensor
from quantlab.quants import ggml_types
from quantlab.transform.slabs import row_ranges

# ---- metadata


@dataclass(frozen=True)
class Change:
    """One key of the metadata that differs."""

    key: str
    change: str  # "added", "removed", "type" (the same value in another type) or "changed"
    # a, b: type and value as short text; of two lists, from the first item that differs
    a: str | None
    b: str | None

    def __str__(self) -> str:
        return f"{self.key}: {self.change}, {' → '.join(side for side in (self.a, self.b) if side is not None)}"


def metadata_changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """Return the differences from metadata `a` to metadata `b`, in any order of the keys."""
    changes = [Change(key, "removed", _text(a[key]), None) for key in a if key not in b]
    for key in b:
        if key not in a:
            changes.append(Change(key, "added", None, _text(b[key])))
        elif not _equal(a[key], b[key]):
            one, other = _from_difference(a[key], b[key])
            kind = "type" if untyped(a[key]) == untyped(b[key]) else "changed"
            changes.append(Change(key, kind, one, other))
    return changes


def _equal(a: Any, b: Any) -> bool:
    """Tell whether two values have the same type and bits; NaN equals NaN."""
    if type(a) is not type(b):  # a file's strings, and those that a converter made
        a, b = _listed(a), _listed(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b


def _listed(value: Any) -> Any:
    """Return a file's strings as a list, and any other value unchanged."""
    return list(value) if isinstance(value, Strings) else value


def untyped(value: Any) -> Any:
    """Return a metadata value without its GGUF type, as a bool, int, float, str or list of these."""
    value = _listed(value)
    if isinstance(value, list):
        return [untyped(item) for item in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _from_difference(a: Any, b: Any) -> tuple[str, str]:
    """Return two values as text, two lists of the same length from their first different item on."""
    a, b = _listed(a), _listed(b)
    if isinstance(a, list | np.ndarray) and type(a) is type(b) and len(a) == len(b):
        first = next((i for i in range(len(a)) if not _equal(a[i], b[i])), 0)
        return f"{_text(a)} [{first}]={_text(a[first : first + 1])}", f"[{first}]={_text(b[first : first + 1])}"
    return _text(a), _text(b)


def _text(value: Any) -> str:
    row = metadata_table({"": value}).iloc[0]
    return f"{row['type']} {row['value']}"


# ---- tensors


@dataclass
class Tally:
    """The differences in one tensor, added up over its slabs."""

    # n_blocks, differing: blocks, and those of them with different bytes; weights, for types without blocks; 0 where
    # the types differ
    n_blocks: int = 0
    differing: int = 0
    noise: float = 0.0  # sum of the squared differences of the values
    largest: float = 0.0  # the largest difference

    def add(self, a: np.ndarray, b: np.ndarray, qtypes: tuple[str, str], n_per_row: int) -> np.ndarray | None:
        """Add stored rows of two tensors; return the blocks that differ.

        Returns
        -------
        np.ndarray [shape=(nrows, blocks per row), dtype=bool] or None
            None where no byte differs, and where the types do: then there are no blocks to compare, only values.
        """
        differing = None
        if qtypes[0] == qtypes[1]:
            per_row = n_per_row // quants.block_size(qtypes[0])
            self.n_blocks += len(a) * per_row
            a, b = (rows.view(np.uint8).reshape(len(rows), per_row, -1) for rows in (a, b))
            if np.array_equal(a, b):
                return None
            differing = (a != b).any(axis=2)
            rows = differing.any(axis=1)
            a, b = a[rows], b[rows]
            self.differing += int(differing.sum())
        if not all(map(can_decode, qtypes)):
            self.noise = self.largest = float("nan")
            return differing
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.abs(as_floats(a, qtypes[0], n_per_row) - as_floats(b, qtypes[1], n_per_row))
            self.noise += float(np.square(difference, dtype=np.float64).sum())
        self.largest = float(np.maximum(self.largest, difference.max(initial=0)))  # NaN stays
        return differing

    def rmse(self, n_weights: int) -> float:
        """Root mean square of the difference over all `n_weights` of the tensor."""
        return (self.noise / max(n_weights, 1)) ** 0.5


def as_floats(rows: np.ndarray, qtype: str, n_per_row: int) -> np.ndarray:
    """Decode stored rows to float32 (nrows, n_per_row), for a type that passes `can_decode`."""
    if qtype in PLAIN_DTYPES:
        return np.ascontiguousarray(rows).view(PLAIN_DTYPES[qtype]).reshape(len(rows), n_per_row).astype(np.float32)
    return quants.dequantize(rows.view(np.uint8), qtype, (len(rows), n_per_row))


Cut = tuple[Any, LazyTensor, LazyTensor, int, int]  # item, two tensors, first row and end


def cuts(pairs: Iterable[tuple[Any, LazyTensor, LazyTensor]]) -> Iterator[Cut]:
    """Cut pairs of tensors of one shape into unread slabs; the item is what a pair belongs to."""
    return ((item, a, b, start, stop) for item, a, b in pairs for start, stop in row_ranges(a))


def n_weights(cut: Cut) -> int:
    """Return the number of weights of each of a cut's two tensors."""
    _, a, _, start, stop = cut
    return a.shape[-1] * (stop - start)


def read(cut: Cut) -> tuple[Any, np.ndarray, np.ndarray, bool]:
    """Return a cut's item, the same rows of both tensors as they are stored, and whether they are the last."""
    item, a, b, start, stop = cut
    return item, a.rows(start, stop), b.rows(start, stop), stop == a.nrows


def root_mean_square(tensor: LazyTensor) -> float:
    """Return the root mean square of a tensor's weights, in their unit (NaN if a weight is NaN)."""
    with np.errstate(invalid="ignore", over="ignore"):
        parts = (tensor.floats(start, stop) for start, stop in row_ranges(tensor))
        total = sum(float(np.square(rows, dtype=np.float64).sum()) for rows in parts)
    return (total / max(tensor.n_weights, 1)) ** 0.5


def can_decode(qtype: str) -> bool:
    """Tell whether values of this type can be compared, and not only bytes."""
    return qtype in PLAIN_DTYPES or ggml_types.can_decode(qtype)
