"""Matrix products as ggml's CPU code computes them, to the last bit.

llama.cpp rounds activations to 8 bits before each product with quantized weights. One activation that falls to the
other side changes all that come after it, so that sums in another order, equal but for their last bit, end as much as
0.3 % away in perplexity. llama-perplexity's figures thus belong to its order of operations. The order here is that of
a build for x86-64 with AVX-512 (`GGML_NATIVE`) at its defaults: weights repacked, k-quants tiled. A product is

    out[row, column] = Σ over groups, in order:  d_weight · d_activation · (sum of integers over the group's columns)

where the integers of a group are summed exactly, in any order, and the groups by fused multiply-add. What differs
between the types is the group, and into how many partial sums it goes.

The integers are the codes of the weights, for k-quants times the scales of their sub-blocks. All of them fit into 16
bits, and the sum over a super-block into 32. So one kernel serves every type: products of pairs, as `tiles` has them.

    codes[p, i, c] = two int16, of the columns 2i and 2i + 1 of row WIDTH · p + c of the weights

Source: ggml/src/ggml-cpu of llama.cpp 0c1e57098; the functions are named in ORDERS.
"""

from dataclasses import dataclass

import numpy as np
from numba.extending import intrinsic

from quantlab import quants
from quantlab.evaluate.engine.ggml_activations import Blocks
from quantlab.evaluate.engine.ggml_steps import fma
from quantlab.evaluate.engine.tiles import LANES, ROWS, WIDTH, add_pairs, tile
from quantlab.evaluate.engine.workers import blocks
from quantlab.quants.compiled import njit
from quantlab.quants.ggml_types import GGML_TYPES
from quantlab.quants.lanes import INTS, lanes, load, store, to_float

_PACKED_AT_ONCE = 1024  # rows of weights
_BLOCKS = 32  # blocks of a row that are summed at a time: their codes stay in the nearest cache
_NO_INTS, _NO_FLOATS = np.empty((0, 0, WIDTH), np.int32), np.empty((0, 0, WIDTH), np.float32)


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
    unit : int
        Power of two that makes the weights whole numbers, once they are divided by the scale of their block.
    """

    activations: str
    group: int = 0
    lanes: int = 1
    tiled: bool = False
    unit: int = 1


# type of the weights -> what is done to the activations, and how the product is summed
ORDERS = {
    **{qtype: Order(qtype) for qtype in ("F32", "F16", "BF16")},
    **dict.fromkeys(("Q5_0", "Q8_0"), Order("Q8_0", 4, lanes=8)),  # tinyBLAS_Q0_AVX
    **dict.fromkeys(("Q4_1", "Q5_1"), Order("Q8_1", 4, lanes=8)),  # ggml_vec_dot_q4_1_q8_1, ggml_vec_dot_q5_1_q8_1
    **dict.fromkeys(("Q4_0", "IQ4_NL", "MXFP4"), Order("Q8_0", 32)),  # gemm_q4_b32_8x8_q8_0_lut_avx
    "Q4_K": Order("Q8_K", 64),  # ggml_gemm_q4_K_8x8_q8_K
    "Q2_K": Order("Q8_K", 128),  # ggml_gemm_q2_K_8x8_q8_K
    # tiled_run_micro_vnni_8x16
    **dict.fromkeys(("Q3_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S"), Order("Q8_K", 256, tiled=True)),
    "IQ3_XXS": Order("Q8_K", 256, tiled=True, unit=4),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S"), Order("Q8_K", 256, tiled=True, unit=8)),
}


def read_scales(data: np.ndarray, qtype: str) -> list[np.ndarray]:
    """Read the scale of each block and the scale of its minima, where there is one (Q4_1, Q5_1: the minimum).

    Parameters
    ----------
    data : np.ndarray [shape=(n_out, blocks, bytes), dtype=uint8]
    qtype : str

    Returns
    -------
    list of np.ndarray [shape=(n_out, blocks), dtype=float32]
        The first divided by `unit`.
    """
    if not GGML_TYPES[qtype].halves:  # MXFP4: a power of two
        return [np.ldexp(np.float32(1), data[:, :, 0].astype(np.int32) - 128)]
    d, *dmin = (_halves(data, at) for at in GGML_TYPES[qtype].halves)
    return [d / np.float32(ORDERS[qtype].unit), *dmin]


def with_scales(data: np.ndarray, qtype: str, n_in: int, d: float, dmin: float = 0) -> np.ndarray:
    """Decode blocks [n_out, blocks, bytes] as if their scales were these; float32 [n_out, n_in], whole numbers."""
    data = data.copy()
    if not GGML_TYPES[qtype].halves:
        data[:, :, 0] = 128
    for at, scale in zip(GGML_TYPES[qtype].halves, (d * ORDERS[qtype].unit, dmin), strict=False):
        data[:, :, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    return quants.dequantize(data.reshape(-1), qtype, (len(data), n_in))


@dataclass(frozen=True)
class Packed:
    """A weight matrix taken apart into integers and scales, in panels of WIDTH rows.

    Attributes
    ----------
    qtype : str
    n_out : int
        Its rows.
    codes : np.ndarray [shape=(panels, n_in // 2, WIDTH), dtype=int32]
        Pairs of int16: the codes, of k-quants times the scales of their sub-blocks.
    d : np.ndarray [shape=(panels, blocks of a row, WIDTH), dtype=float32]
        Scale of each block.
    mins : np.ndarray [shape=(panels, n_in // 32, WIDTH) or empty, dtype=int32]
        Pairs of int16: the minimum of every 16 columns.
    dmin : np.ndarray [like d, or empty]
        Scale of the minima; of Q4_1 and Q5_1 the minima.
    """

    qtype: str
    n_out: int
    codes: np.ndarray
    d: np.ndarray
    mins: np.ndarray
    dmin: np.ndarray


def pack(stored: np.ndarray, qtype: str, shape: tuple[int, int], workers) -> Packed:
    """Take a weight matrix apart whose type has an order.

    Parameters
    ----------
    stored : np.ndarray [dtype=uint8]
        As `LazyTensor.load` and `quants.quantize` give it.
    qtype : str
    shape : tuple of int
        (n_out, n_in).
    workers : Workers
    """
    (n_out, n_in), order = shape, ORDERS[qtype]
    data, n_panels = stored.reshape(n_out, -1, quants.block_bytes(qtype)), -(-n_out // WIDTH)
    d, *dmin = read_scales(data, qtype)
    codes = np.empty((n_panels, n_in // 2, WIDTH), np.int32)
    with_mins = bool(dmin) and order.activations == "Q8_K"
    mins = np.empty((n_panels, n_in // 32, WIDTH), np.int32) if with_mins else _NO_INTS
    for rows in blocks(n_out, _PACKED_AT_ONCE):
        panels = slice(rows.start // WIDTH, -(-rows.stop // WIDTH))
        _fill(codes[panels], with_scales(data[rows], qtype, n_in, 1), workers)
        if with_mins:
            _fill(mins[panels], with_scales(data[rows], qtype, n_in, 0, -1)[:, ::16], workers)
    return Packed(qtype, n_out, codes, _panels(d), mins, _panels(*dmin) if dmin else _NO_FLOATS)


def _fill(panels: np.ndarray, integers: np.ndarray, workers) -> None:
    """Put integers [n_out, n_in] in float32 into panels of pairs."""
    pairs = panels.view(np.int16).reshape(*panels.shape, 2)
    workers.map(lambda p: _fill_panel(integers[p * WIDTH : (p + 1) * WIDTH], pairs[p]), range(len(panels)))


@njit(nogil=True, cache=True)
def _fill_panel(integers, pairs):
    """pairs[i, c] = integers[c, 2i], integers[c, 2i + 1]; zeros where there is no row c."""
    for start in range(0, pairs.shape[0], 16):
        stop = min(start + 16, pairs.shape[0])
        for c in range(pairs.shape[1]):
            for i in range(start, stop):
                for j in range(2):
                    pairs[i, c, j] = np.int16(integers[c, 2 * i + j]) if c < integers.shape[0] else np.int16(0)


def _halves(data: np.ndarray, at: int) -> np.ndarray:
    """Read a float16 of each block as float32."""
    return np.ascontiguousarray(data[:, :, at : at + 2]).view(np.float16)[..., 0].astype(np.float32)


def _panels(scales: np.ndarray) -> np.ndarray:
    """Put scales [n_out, blocks] into panels [panels, blocks, WIDTH]."""
    n_out, n_blocks = scales.shape
    padded = np.zeros((-(-n_out // WIDTH) * WIDTH, n_blocks), np.float32)
    padded[:n_out] = scales
    return np.ascontiguousarray(padded.reshape(-1, WIDTH, n_blocks).transpose(0, 2, 1))


def product(x: Blocks, part: Packed, out: np.ndarray) -> None:
    """Compute out = x · weightᵀ.

    Parameters
    ----------
    x : Blocks
        Rounded to the type that `part` asks for.
    part : Packed
    out : np.ndarray [shape=(nrows, n_out), dtype=float32]
    """
    order, codes = ORDERS[part.qtype], x.codes.view(np.int32)
    if order.lanes > 1:
        _sum_in_lanes(codes, x.d, x.sums, part.codes, part.d, part.dmin, out)
        return
    sums = x.sums.view(np.int32) if part.mins.size else _NO_INTS.reshape(0, WIDTH)
    _sum_groups(codes, x.d, sums, part.codes, part.d, part.mins, part.dmin, order.group // 2, order.tiled, out)


@njit(nogil=True, cache=True)
def _sum_groups(x, d, sums, codes, d_weight, mins, dmin, group, tiled, out):
    """One partial sum: the integers of each group, a tile at a time, then the groups in order."""
    integers, low = np.zeros((ROWS, WIDTH), np.int32), np.zeros((ROWS, WIDTH), np.int32)
    total, taken = np.empty((ROWS, WIDTH), np.float32), np.empty((ROWS, WIDTH), np.float32)
    flat = integers.reshape(-1), low.reshape(-1), total.reshape(-1), taken.reshape(-1)
    n_groups, with_mins = x.shape[1] // group, mins.shape[0] > 0
    per_block = n_groups // d_weight.shape[1]
    for p in range(codes.shape[0]):
        panel, scales, columns = codes[p], d_weight[p].reshape(-1), slice(p * WIDTH, min((p + 1) * WIDTH, out.shape[1]))
        for start in range(0, out.shape[0], ROWS):
            rows = slice(start, min(start + ROWS, out.shape[0]))
            some, scale = x[rows], d[rows]  # no slices in the loop: each would be counted
            total[:], taken[:] = np.float32(0), np.float32(0)
            if not with_mins:
                for g in range(n_groups):
                    tile(some, panel, g * group, (g + 1) * group, integers, False)
                    _add(flat[0], scale, scales, g // per_block, tiled, flat[2])
            else:
                fine, lows, low_scales = sums[rows], mins[p], dmin[p].reshape(-1)
                for g in range(n_groups):
                    b = g // per_block
                    tile(some, panel, g * group, (g + 1) * group, integers, False)
                    tile(fine, lows, g * group // 16, (g + 1) * group // 16, low, False)
                    if tiled:
                        _add_above_minimum(flat[0], flat[1], scale, scales, low_scales, b, flat[2])
                    else:
                        _add(flat[0], scale, scales, b, False, flat[2])
                        _add(flat[1], scale, low_scales, b, False, flat[3])
            for r in range(rows.stop - rows.start):
                for c in range(columns.stop - columns.start):
                    out[start + r, columns.start + c] = total[r, c] - taken[r, c]


@njit(nogil=True, forceinline=True)
def _add(integers, d, d_weight, b, tiled, total):
    """total += d · d_weight · integers of block b, `tiled` with the two scales one after the other."""
    for r in range(d.shape[0]):
        for c in range(0, WIDTH, LANES):
            at = r * WIDTH + c
            whole, scale, so_far = to_float(load(integers, at)), load(d_weight, b * WIDTH + c), load(total, at)
            if tiled:
                store(total, at, fma(scale * whole, lanes(d[r, b]), so_far))
            else:
                store(total, at, fma(scale * d[r, b], whole, so_far))


@njit(nogil=True, forceinline=True)
def _add_above_minimum(integers, low, d, d_weight, dmin, b, total):
    """total += d · (d_weight · integers - dmin · low) of block b."""
    for r in range(d.shape[0]):
        for c in range(0, WIDTH, LANES):
            at, scale = r * WIDTH + c, b * WIDTH + c
            term = load(d_weight, scale) * to_float(load(integers, at))
            term = fma(-load(dmin, scale), to_float(load(low, at)), term)
            store(total, at, fma(term, lanes(d[r, b]), load(total, at)))


@intrinsic
def _pairs(typing, x, weight):
    """x₀ · weight₀ + x₁ · weight₁ of pairs of int16, in every lane."""
    return INTS(INTS, INTS), lambda context, builder, signature, args: add_pairs(builder, args[0].type(None), *args)


@njit(nogil=True, forceinline=True)
def _four(x, i, codes, j):
    """The sum over a group of four columns, as floats."""
    first = _pairs(lanes(x[np.uint64(i)]), load(codes, j))  # numba would ask whether a signed index is negative
    second = _pairs(lanes(x[np.uint64(i + 1)]), load(codes, j + WIDTH))
    return to_float(first + second)


@njit(nogil=True, cache=True)
def _sum_in_lanes(x, d, sums, codes, d_weight, minima, out):
    """Eight partial sums, each of every eighth group of four columns; the minima of Q4_1 and Q5_1 apart."""
    n_rows, n_pairs, n_blocks = x.shape[0], x.shape[1], d.shape[1]
    parts, line = np.empty(n_rows * 8 * WIDTH, np.float32), np.empty(WIDTH, np.float32)
    x, d, no_minima = x.reshape(-1), d.reshape(-1), np.empty(0, np.float32)  # no slices in the loops, as above
    for p in range(codes.shape[0]):
        panel, scales, parts[:] = codes[p].reshape(-1), d_weight[p].reshape(-1), np.float32(0)
        lowest = minima[p].reshape(-1) if minima.shape[0] > 0 else no_minima
        for start in range(0, n_blocks, _BLOCKS):
            stop = min(start + _BLOCKS, n_blocks)
            for v in range(0, WIDTH, LANES):
                for r in range(n_rows):
                    for half in range(0, 8, 4):  # as many sums as stay in registers
                        at, i, j = r * 8 * WIDTH + half * WIDTH + v, r * n_pairs + 2 * half, 2 * half * WIDTH + v
                        _add_blocks(x, i, d, r * n_blocks, panel, j, scales, v, start, stop, parts, at)
        first = p * WIDTH
        width = min(WIDTH, out.shape[1] - first)
        for r in range(n_rows):
            for v in range(0, WIDTH, LANES):
                low, at = lanes(np.float32(0)), r * 8 * WIDTH + v
                if lowest.shape[0] > 0:
                    for b in range(n_blocks):
                        low = fma(load(lowest, b * WIDTH + v), lanes(sums[r, b]), low)
                even = (load(parts, at + 4 * WIDTH) + load(parts, at)) + (
                    load(parts, at + 6 * WIDTH) + load(parts, at + 2 * WIDTH)
                )
                odd = (load(parts, at + 5 * WIDTH) + load(parts, at + WIDTH)) + (
                    load(parts, at + 7 * WIDTH) + load(parts, at + 3 * WIDTH)
                )
                store(line, v, (even + odd) + low)
            for c in range(width):
                out[r, first + c] = line[c]


@njit(nogil=True, forceinline=True)
def _add_blocks(x, i, d, k, codes, j, d_weight, v, start, stop, parts, at):
    """Add some blocks of a row of x to four of its partial sums, for LANES rows of weights.

    i, j, k, v, at : where the row begins in x and in codes, the scales in d and in d_weight, and the sums in parts.
    """
    s0, s1 = load(parts, at), load(parts, at + WIDTH)
    s2, s3 = load(parts, at + 2 * WIDTH), load(parts, at + 3 * WIDTH)
    for b in range(start, stop):
        scale, m, n = load(d_weight, b * WIDTH + v) * d[np.uint64(k + b)], i + 16 * b, j + 16 * b * WIDTH
        s0 = fma(scale, _four(x, m, codes, n), s0)
        s1 = fma(scale, _four(x, m + 2, codes, n + 2 * WIDTH), s1)
        s2 = fma(scale, _four(x, m + 4, codes, n + 4 * WIDTH), s2)
        s3 = fma(scale, _four(x, m + 6, codes, n + 6 * WIDTH), s3)
    store(parts, at, s0)
    store(parts, at + WIDTH, s1)
    store(parts, at + 2 * WIDTH, s2)
    store(parts, at + 3 * WIDTH, s3)
