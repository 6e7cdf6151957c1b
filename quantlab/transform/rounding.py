"""Recognition of blocks that come from the same search with another compiler's rounding.

Two things are held against a block that differs from what our encoders make of the same weights:

1. The encoders of `quantlab.quants.fused`, built as a compiler builds them that fuses products with sums. Their blocks
   are exact, however many of them differ from ours: nearly all do in Q5_K.
2. Compilers differ a little in what they fuse; measured against GCC's build, about one block of a thousand is neither
   ours nor the fused one, in no tensor of some size more than one of eighty. So few may be left over (`MAX_LEFT`),
   only in a file that has at least as many of the fused blocks, and each must be what a search can end with. The
   error that it minimizes may be several times ours, since a search that goes another way can end badly (4.9 times
   was seen); but:

   - K types: the search ends with scales that are rounded, and codes computed anew from them without anything that
     could be fused; so every code must be the nearest one to its weight under the block's own scales. A code changed
     by one step is not, unless its weight lay within `SLACK` of the middle.
   - Types with blocks of 32: the codes are those that the search ends with, each the nearest level on one straight
     line through the weights, though not quite the line that the stored scale gives; so such a line must exist.
"""

from __future__ import annotations

import numpy as np

from quantlab import quants
from quantlab.quants.fused import quantize_fused
from quantlab.quants.ggml_types import GGML_TYPES

# types whose blocks of a fused build were compared with what is said here
COMPARED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
MAX_LEFT = 0.02  # share of a tensor's blocks that may be neither ours nor the fused ones
FEW = 8  # so many may in any tensor
SLACK = 1e-3  # of a step, by which a weight may lie beyond the middle of two codes
MAX_ERROR = 10.0  # of a block that is left over, as a multiple of ours


def is_other_rounding(
    x: np.ndarray, ours: np.ndarray, theirs: np.ndarray, qtype: str, imatrix: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Tell which blocks of rows can come from another compiler's rounding.

    Parameters
    ----------
    x : np.ndarray [shape=(nrows, n_per_row), dtype=float32, C-contiguous]
        The weights.
    ours, theirs : np.ndarray [shape=(nrows, row_bytes), dtype=uint8]
        What our encoder makes of them, and what is to be judged.
    qtype : str
        A type of `COMPARED`.
    imatrix : np.ndarray [shape=(n_per_row,), dtype=float32] or None

    Returns
    -------
    fused, good : np.ndarray [shape=(nrows, blocks per row), dtype=bool]
        Blocks of `theirs` that are the fused encoder's, and blocks that are as good as ours without being that.
    """
    block, nbytes = quants.block_size(qtype), quants.block_bytes(qtype)
    shape = (len(x), x.shape[1] // block)
    ours, theirs, fused = (a.reshape(-1, nbytes) for a in (ours, theirs, quantize_fused(x, qtype, imatrix)))
    is_fused = (theirs == fused).all(axis=1)
    left = np.flatnonzero(~is_fused & (theirs != ours).any(axis=1))
    is_good = np.zeros(len(theirs), bool)
    if left.size:
        values = x.reshape(-1, block)[left]
        with np.errstate(invalid="ignore", over="ignore"):  # a stranger's scales may be infinite
            weights, power = _error_weights(x, qtype, imatrix)
            weights = np.broadcast_to(weights, x.shape).reshape(-1, block)[left]
            own, other, given = (_errors(values, a[left], qtype, weights, power) for a in (ours, fused, theirs))
            near = given <= MAX_ERROR * np.maximum(own, other)
        fits = _codes_are_nearest if block == 256 else _codes_are_on_a_line
        if near.any():
            is_good[left[near]] = fits(values[near], theirs[left[near]], qtype)
    return is_fused.reshape(shape), is_good.reshape(shape)


def allowed(left: int, n_blocks: int) -> bool:
    """Tell whether this number of blocks may be neither this package's nor the fused ones."""
    return left <= max(FEW, MAX_LEFT * n_blocks)


def _codes_are_nearest(x: np.ndarray, blocks: np.ndarray, qtype: str) -> np.ndarray:
    """Tell whether each block's codes are nearest under its own scales (ignored: scales of 0)."""
    first, step = quants.grid(blocks, qtype)
    top = len(GGML_TYPES[qtype].levels) - 1
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ideal = np.clip((x.astype(np.float64) - first) / step, 0, top)
    off = np.abs(ideal - quants.codes(blocks, qtype))
    return ((off <= 0.5 + SLACK) | (step == 0)).all(axis=1)


def _codes_are_on_a_line(x: np.ndarray, blocks: np.ndarray, qtype: str) -> np.ndarray:
    """Tell whether some `slope * x + shift` rounds to each block's codes (no minimum: code 0's shift)."""
    levels = np.array(GGML_TYPES[qtype].levels, np.float64)
    codes, lowest, highest = levels[quants.codes(blocks, qtype)], levels.min(), levels.max()
    low = np.where(codes == lowest, -np.inf, codes - 0.5)  # beyond the last codes everything is rounded to them
    high = np.where(codes == highest, np.inf, codes + 0.5)
    step = quants.grid(blocks, qtype)[1][:, :1].astype(np.float64)

    def room(slope):
        """Return the margin of the best shift to the middles between codes (negative: no shift works)."""
        floor, ceiling = (low - slope * x).max(axis=1), (high - slope * x).min(axis=1)
        return (ceiling - floor) / 2 if lowest == 0 else np.minimum(ceiling, -floor)

    with np.errstate(divide="ignore", invalid="ignore"):
        left, right = 0.7 / step, 1.4 / step
        for _ in range(60):  # the room is a concave function of the slope
            third = (right - left) / 3
            better = (room(left + third) > room(right - third))[:, None]
            left, right = np.where(better, left, left + third), np.where(better, right - third, right)
        return room((left + right) / 2) >= -SLACK


def _errors(x: np.ndarray, blocks: np.ndarray, qtype: str, weights: np.ndarray, power: int) -> np.ndarray:
    """Return the error of each block that the search minimizes."""
    difference = np.abs(x - quants.dequantize(blocks, qtype, x.shape)).astype(np.float64)
    return (weights * difference**power).sum(axis=1)


def _error_weights(x: np.ndarray, qtype: str, imatrix: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Return the weights of errors in a type's search, and the power of the errors.

    Source: `quantize_row_*_ref` and `quantize_row_*_impl` of ggml-quants.c.
    """
    if imatrix is None:
        if qtype in ("Q4_K", "Q5_K"):
            parts = x.reshape(-1, 32)
            return (np.sqrt((parts * parts).mean(axis=1, keepdims=True)) + np.abs(parts)).reshape(x.shape), 2
        weights = {"Q2_K": np.abs(x), "Q3_K": x * x, "Q6_K": x * x}.get(qtype, np.ones_like(x))
        return weights, 1 if qtype == "Q2_K" else 2
    if qtype == "Q6_K":
        return imatrix, 2
    length = 256 if qtype.endswith("_K") else x.shape[1]  # over which the mean square is taken
    parts = x.reshape(-1, length)
    mean = (parts * parts).mean(axis=1, keepdims=True) * (2 if qtype in ("Q3_K", "Q4_K", "Q5_K") else 1)
    return imatrix * np.sqrt(mean + parts * parts).reshape(x.shape), 2
