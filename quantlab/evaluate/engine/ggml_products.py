"""Matrix products as ggml's CPU code computes them, to the last bit.

llama.cpp rounds activations to 8 bits before each product with quantized weights. One activation that falls to the
other side changes all that come after it, so that sums in another order, equal but for their last bit, end as much as
0.3 % away in perplexity. llama-perplexity's figures thus belong to its order of operations. The order here is that of
a build for x86-64 with AVX-512 (`GGML_NATIVE`) at its defaults: weights repacked, k-quants tiled. A product is

    out[row, column] = Σ over groups, in order:  d_weight · d_activation · (sum of integers over the group's columns)

where the integers of a group are summed exactly, in any order (a float32 holds them, and BLAS may do it), and the
groups by fused multiply-add. What differs between the types is the group, and into how many partial sums it goes.

Source: ggml/src/ggml-cpu of llama.cpp 0c1e57098; the functions are named in ORDERS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from quantlab import quants
from quantlab.evaluate.engine.ggml_activations import Blocks, round_bf16, round_f16
from quantlab.evaluate.engine.ggml_steps import fma

PANEL = 64  # rows of weights that stand side by side for `_sum_in_lanes`
_ROWS = 128  # rows of activations that `_sum_groups` takes at a time
_PACKED_AT_ONCE = 1024  # rows of weights
_NONE = np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class Order:
    """What a product with weights of some type does.

    Attributes
    ----------
    activations : str
        Type that they are rounded to.
    group : int
        Columns whose integers make one summand; 0: rounded activations times weights in float32, in no fixed order.
    lanes : int
        Partial sums that the groups go to in turn.
    tiled : bool
        The two scales are applied one after the other, instead of multiplied with each other first.
    """

    activations: str
    group: int = 0
    lanes: int = 1
    tiled: bool = False


# type of the weights -> what is done to the activations, and how the product is summed
ORDERS = {
    **{qtype: Order(qtype) for qtype in ("F32", "F16", "BF16")},
    **dict.fromkeys(("Q5_0", "Q8_0"), Order("Q8_0", 4, lanes=8)),  # tinyBLAS_Q0_AVX
    **dict.fromkeys(("Q4_1", "Q5_1"), Order("Q8_1", 4, lanes=8)),  # ggml_vec_dot_q4_1_q8_1, ggml_vec_dot_q5_1_q8_1
    **dict.fromkeys(("Q4_0", "IQ4_NL"), Order("Q8_0", 32)),  # gemm_q4_b32_8x8_q8_0_lut_avx
    "Q4_K": Order("Q8_K", 64),  # ggml_gemm_q4_K_8x8_q8_K
    "Q2_K": Order("Q8_K", 128),  # ggml_gemm_q2_K_8x8_q8_K
    **dict.fromkeys(("Q3_K", "Q5_K", "Q6_K", "IQ4_XS"), Order("Q8_K", 256, tiled=True)),  # tiled_run_micro_vnni_8x16
    "MXFP4": Order("Q8_0"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), Order("Q8_K")),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), Order("Q8_K")),
}
# type -> byte offset in its block of the scale and of the minimum's scale (Q4_1, Q5_1: of the minimum), as float16
_SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0, None)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108, None),
    "Q6_K": (208, None),
}


@dataclass(frozen=True)
class Packed:
    """A weight matrix taken apart into integers and scales.

    Attributes
    ----------
    qtype : str
    n_out : int
        Its rows.
    codes : np.ndarray [shape=(n_in, n_out), with several lanes (panels, n_in, PANEL), dtype=float32]
        Integers: the codes, of k-quants times the scales of their sub-blocks. Where no order is kept: the weights.
    d : np.ndarray [shape=(blocks of a row, n_out), dtype=float32]
        Scale of each block.
    dmin : np.ndarray [like d, or empty]
        Scale of the minima; of Q4_1 and Q5_1 the minima.
    mins : np.ndarray [shape=(n_in // 16, n_out) or empty, dtype=float32]
        Integer minimum of every 16 columns.
    """

    qtype: str
    n_out: int
    codes: np.ndarray
    d: np.ndarray
    dmin: np.ndarray
    mins: np.ndarray


def pack(stored: np.ndarray, qtype: str, shape: tuple[int, int]) -> Packed:
    """Take a weight matrix apart.

    Parameters
    ----------
    stored : np.ndarray
        As `LazyTensor.load` and `quants.quantize` give it.
    qtype : str
    shape : tuple of int
        (n_out, n_in).
    """
    (n_out, n_in), order = shape, ORDERS[qtype]
    if not order.group:
        floats = quants.dequantize(stored, qtype, shape) if stored.dtype == np.uint8 else stored.astype(np.float32)
        return Packed(qtype, n_out, floats.T, _NONE, _NONE, _NONE)
    blocks = stored.reshape(n_out, -1, quants.block_bytes(qtype))
    at, at_min = _SCALES[qtype]
    panelled, with_mins = order.lanes > 1, at_min is not None and order.activations == "Q8_K"
    codes = np.zeros((-(-n_out // PANEL), n_in, PANEL) if panelled else (n_in, n_out), np.float32)
    mins = np.empty((n_in // 16, n_out), np.float32) if with_mins else _NONE
    for start in range(0, n_out, _PACKED_AT_ONCE):
        rows = slice(start, start + _PACKED_AT_ONCE)
        integers = _with_scales(blocks[rows], qtype, n_in, 1, 0)
        if panelled:
            for first in range(0, len(integers), PANEL):
                panel = integers[first : first + PANEL]
                codes[(start + first) // PANEL, :, : len(panel)] = panel.T
        else:
            codes[:, rows] = integers.T
        if with_mins:
            mins[:, rows] = _with_scales(blocks[rows], qtype, n_in, 0, -1)[:, ::16].T
    return Packed(qtype, n_out, codes, _halves(blocks, at), _NONE if at_min is None else _halves(blocks, at_min), mins)


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """Read a float16 of each block [n_out, blocks, bytes]: float32 [blocks, n_out]."""
    return np.ascontiguousarray(blocks[:, :, at : at + 2]).view(np.float16)[..., 0].T.astype(np.float32, order="C")


def _with_scales(blocks: np.ndarray, qtype: str, n_in: int, d: float, dmin: float) -> np.ndarray:
    """Decode blocks as if their scales were these, which leaves integers; float32 [n_out, n_in]."""
    blocks = blocks.copy()
    for at, scale in zip(_SCALES[qtype], (d, dmin), strict=True):
        if at is not None:
            blocks[:, :, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    return quants.dequantize(blocks.reshape(-1), qtype, (len(blocks), n_in))


def product(x: np.ndarray, parts: Sequence[Packed], out: np.ndarray, workers) -> None:
    """Compute out = x · weightᵀ, for matrices over the same input side by side.

    Parameters
    ----------
    x : np.ndarray [shape=(nrows, n_in), dtype=float32]
    parts : sequence of Packed
    out : np.ndarray [shape=(nrows, their rows), dtype=float32]
    workers : Workers
        For scratch space.
    """
    column, blocks = 0, None
    for part in parts:
        order, target = ORDERS[part.qtype], out[:, column : column + part.n_out]
        column += part.n_out
        if not order.group:
            np.matmul(_rounded(x, order.activations, workers), part.codes, out=target)
            continue
        if blocks is None or blocks.qtype != order.activations:
            blocks = Blocks(x, order.activations, workers)
        if order.lanes > 1:
            _sum_in_lanes(blocks.codes, blocks.d, blocks.sums, part.codes, part.d, part.dmin, target)
        else:
            _sum_groups(blocks, part, order, target, workers)


def _rounded(x: np.ndarray, qtype: str, workers) -> np.ndarray:
    """What is left of activations after rounding to `qtype`."""
    if qtype == "F32":
        return x
    if qtype.startswith("Q8"):
        return Blocks(x, qtype, workers).floats()
    out = workers.scratch("rounded", *x.shape)
    (round_f16 if qtype == "F16" else round_bf16)(x, out)
    return out


def _sum_groups(blocks: Blocks, part: Packed, order: Order, out: np.ndarray, workers) -> None:
    """One partial sum: the integers of each group by BLAS, then the groups in order."""
    exact = np.float64 if order.tiled else np.float32  # what holds the sums of integers
    n_in, n_out = part.codes.shape
    sums = workers.scratch("group", _ROWS, n_out, dtype=exact)
    low = workers.scratch("low", _ROWS, n_out)
    taken = workers.scratch("taken", _ROWS, n_out)
    for start in range(0, len(out), _ROWS):
        rows = slice(start, min(start + _ROWS, len(out)))
        n, total = rows.stop - start, out[rows]
        total[:], taken[:n] = 0, 0
        for at in range(0, n_in, order.group):
            columns, b = slice(at, at + order.group), at * len(part.d) // n_in
            d = blocks.d[rows, b]
            np.matmul(blocks.codes[rows, columns].astype(exact), part.codes[columns].astype(exact), out=sums[:n])
            if part.mins.size:
                fine = slice(at // 16, (at + order.group) // 16)
                np.matmul(blocks.sums[rows, fine], part.mins[fine], out=low[:n])
            if order.tiled:
                _add_tile(sums[:n], d, part.d[b], low[:n], part.dmin[b : b + 1], total)
                continue
            _add_group(sums[:n], d, part.d[b], total)
            if part.mins.size:
                _add_group(low[:n], d, part.dmin[b], taken[:n])
        if part.mins.size and not order.tiled:
            total -= taken[:n]


@njit(nogil=True, cache=True)
def _add_group(sums, d, d_weight, out):
    """out += d · d_weight · sums."""
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[r, c] = fma(np.float32(d_weight[c] * d[r]), sums[r, c], out[r, c])


@njit(nogil=True, cache=True)
def _add_tile(sums, d, d_weight, low, dmin, out):
    """out += d · (d_weight · sums - dmin · low), the minima only where there are any."""
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            term = np.float32(d_weight[c] * np.float32(sums[r, c]))
            if dmin.shape[1] > 0:
                term = fma(-dmin[0, c], low[r, c], term)
            out[r, c] = fma(term, d[r], out[r, c])


@njit(nogil=True, cache=True)
def _sum_in_lanes(x, d, sums, panels, d_weight, minima, out):
    """Eight partial sums, each of every eighth group of four columns; the minima of Q4_1 and Q5_1 apart."""
    lanes, scale, low = np.empty((8, PANEL), np.float32), np.empty(PANEL, np.float32), np.empty(PANEL, np.float32)
    for p in range(panels.shape[0]):
        first = p * PANEL
        width = min(PANEL, out.shape[1] - first)
        for r in range(out.shape[0]):
            lanes[:] = np.float32(0)
            low[:] = np.float32(0)
            for b in range(d.shape[1]):
                for c in range(width):
                    scale[c] = d_weight[b, first + c] * d[r, b]
                for j in range(8):
                    k = 32 * b + 4 * j
                    x0, x1, x2, x3 = x[r, k], x[r, k + 1], x[r, k + 2], x[r, k + 3]
                    w, lane = panels[p, k : k + 4], lanes[j]
                    for c in range(PANEL):
                        total = fma(x3, w[3, c], fma(x2, w[2, c], fma(x1, w[1, c], np.float32(x0 * w[0, c]))))
                        lane[c] = fma(scale[c], total, lane[c])
                if minima.shape[0] > 0:
                    for c in range(width):
                        low[c] = fma(minima[b, first + c], sums[r, b], low[c])
            for c in range(width):
                even = np.float32(lanes[4, c] + lanes[0, c]) + np.float32(lanes[6, c] + lanes[2, c])
                odd = np.float32(lanes[5, c] + lanes[1, c]) + np.float32(lanes[7, c] + lanes[3, c])
                out[r, first + c] = np.float32(even + odd) + low[c]
