"""Refined files: their marks, their refined tensors, and bounds on the distance from the source.

`quantlab refine` chooses codes and scales for the outputs of a layer, on a text. Without that text nobody can say which
codes it must choose, so blocks are held against the source by distance alone. Two things move a weight:

- Its own rounding, which makes up for that of the columns before it. With H damped by δ of its diagonal, feedback alone
  leaves e H eᵀ ≤ Σ H_ii step² / 4, and H ≥ δ / (1 + δ) · diag(H): errors of (1 + δ) / δ times the square of half a step
  at most, 4.6 half steps for the least damping. Sweeps only lower that.
- The drift of the layers before it, which it makes up for too. It is of the size of what their rounding did: of the
  coarsest type in the file, not of the tensor's own type. More than `MOVED` times that is cut off.

So a block may be a few times as far from its weights as ordinary encoding of the file's coarsest type is. Measured over
all blocks of the bundled model at Q2_K, Q3_K_M, Q4_K_M, Q5_K_M, IQ2_XXS and IQ3_XXS: 1.9 times, so `FAR` is 3. In any
case it must be nearer to them than nothing at all is. `refine` gives a block that would be farther its ordinary bytes.
A block of other weights is 1.4 times as far as nothing; a single code off by a step stays unseen.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from quantlab import quants
from quantlab.files.model import LazyTensor, Model
from quantlab.files.recognize import short
from quantlab.quants.block_numbers import GRIDS
from quantlab.quants.ggml_types import GGML_TYPES, block_size
from quantlab.transform.compare import as_floats, untyped

_ROWS = 64  # rows of a tensor by which ordinary encoding is judged
PREFIX = "quantlab.refined."  # of the metadata that declares a refined file
FAR = 3.0  # a block's distance from its weights, over that of ordinary encoding to the file's coarsest type
MOVED = 1.5  # the same of what a block is asked to be, at most: `limited` cuts the rest
NOTHING = 0.9  # the same over the weights' own size, at most
# shares of both up to which `refine` keeps a block: it knows the ordinary distance from some rows only
_SAFE_FAR, _SAFE_NOTHING = 0.8, 0.99


def has_refined_bytes(tensor: LazyTensor, qtype: str) -> bool:
    """Tell whether a tensor gets refined bytes at a type: matrices of a layer or the output, on a grid."""
    is_matrix = len(tensor.shape) > 1 and (tensor.name.startswith("blk.") or tensor.name == "output.weight")
    return is_matrix and qtype in GRIDS and qtype != tensor.qtype


def equal_weights(qtype: str, n_per_row: int) -> np.ndarray | None:
    """Return an importance of 1 for each input if the type is not encoded without one."""
    return None if GGML_TYPES[qtype].encoder else np.ones(n_per_row, np.float32)


def declaration(model: Model) -> str:
    """Return a file's metadata about refinement (empty: none)."""
    said = {key.removeprefix(PREFIX): value for key, value in model.metadata.items() if key.startswith(PREFIX)}
    return ", ".join(f"{key} {short(untyped(value))}" for key, value in said.items())


class Distance:
    """The distance of a refined tensor's blocks from their weights, compared with ordinary encoding.

    `tensor` is the refined one, `source` the type of the weights.

    Attributes
    ----------
    largest : float
        Over all blocks: the distance from the weights, over the size of these or of the row's blocks on average,
        whichever is larger.
    """

    def __init__(self, tensor: LazyTensor, source: str):
        self.largest, self._place, self._rows = 0.0, (0, 0), 0
        self._tensor, self._source, self._size = tensor, source, block_size(tensor.qtype)
        self._signal = self._noise = 0.0

    def add(self, x: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> float:
        """Add stored rows of the weights, ordinary encoding and the file; return the weights' square."""
        qtype, n_per_row = self._tensor.qtype, self._tensor.shape[-1]
        weights = as_floats(x, self._source, n_per_row)
        own, far = (as_floats(rows, qtype, n_per_row) - weights for rows in (ours, theirs))
        square = float(np.square(weights, dtype=np.float64).sum())
        self._signal, self._noise = self._signal + square, self._noise + np.square(own, dtype=np.float64).sum()
        relative = _relative(far, weights, self._size)
        row, block = np.unravel_index(relative.argmax(), relative.shape)
        if relative[row, block] > self.largest:
            self.largest, self._place = float(relative[row, block]), (self._rows + int(row), int(block))
        self._rows += len(x)
        return square

    @property
    def misfit(self) -> str:
        """A description of the fault if the largest distance is too large."""
        row, block = self._place
        return (
            f"{self._tensor.name}: the block in row {row}, weights {block * self._size}:{(block + 1) * self._size}, is "
            f"{self.largest:.2f} of their size from the source's, more than refining causes"
        )

    @property
    def ordinary(self) -> float:
        """Distance of ordinary encoding for the whole tensor, relative to the weights' size."""
        return float(np.sqrt(self._noise / self._signal)) if self._signal else 0.0


def _relative(far: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """Return the size of each block of `far` [shape=(nrows, n / size)], over that of the weights.

    The weights' size is that of the block, or of the row's blocks on average, whichever is larger.
    """
    squares = (np.square(x, dtype=np.float64).reshape(len(x), -1, size).sum(axis=2) for x in (far, weights))
    far, weights = squares
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(far == 0, 0, np.sqrt(far / np.maximum(weights, weights.mean(axis=1, keepdims=True))))


def ordinary_distance(model: Model, types: Mapping[str, str]) -> float:
    """Return the distance of ordinary encoding for the coarsest of the types that refined tensors get.

    It is relative to the weights' size, and measured on the first rows of the first tensor of each type.
    """
    firsts, found = {types[t.name]: t for t in reversed(list(model)) if has_refined_bytes(t, types[t.name])}, [0.0]
    for qtype, tensor in firsts.items():
        weights = tensor.floats(0, min(_ROWS, tensor.nrows))
        ordinary = quants.roundtrip(weights, qtype, equal_weights(qtype, weights.shape[-1]))
        far = np.square(ordinary - weights, dtype=np.float64).sum()
        found.append(float(np.sqrt(far / (np.square(weights, dtype=np.float64).sum() or 1))))
    return max(found)


def limited(move: np.ndarray, weights: np.ndarray, qtype: str, farthest: float) -> np.ndarray:
    """Shorten moves of blocks to at most `farthest`, relative to the size of their weights as in `Distance`."""
    size = block_size(qtype)
    share = farthest / np.maximum(_relative(move, weights, size), np.finfo(np.float64).tiny)
    return move * np.repeat(np.minimum(1, share), size, axis=1).astype(np.float32)


def near(data: np.ndarray, weights: np.ndarray, qtype: str, ordinary: float) -> np.ndarray:
    """Return chosen bytes [shape=(nrows, row_bytes)], with ordinary ones for blocks that are farther than allowed.

    `ordinary` is the file's `ordinary_distance`.
    """
    far = _relative(quants.dequantize(data, qtype, weights.shape) - weights, weights, block_size(qtype))
    far = far > min(_SAFE_NOTHING * NOTHING, _SAFE_FAR * FAR * ordinary)
    if not far.any():
        return data
    others = quants.quantize(weights, qtype, equal_weights(qtype, weights.shape[-1]))
    parts = (rows.reshape(*far.shape, -1) for rows in (others, data))
    return np.where(far[:, :, None], *parts).reshape(data.shape)


def bound(distances: list[Distance]) -> float:
    """Return the largest allowed distance of a block in a file with these tensors."""
    return min(NOTHING, FAR * max((distance.ordinary for distance in distances), default=0.0))
