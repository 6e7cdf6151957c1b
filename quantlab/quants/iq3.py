"""IQ3_XXS and IQ3_S: about three bits a weight, 4 weights at a time.

The levels of 4 weights without their signs, 0 to 7, are one point of a grid of 256 (IQ3_XXS) or 512 points (IQ3_S). A
weight is ``d * (l + 1/2) / 2 * value * sign`` in IQ3_XXS, its values 4, 12 … 62. In IQ3_S it is
``d * (2 l + 1) * value * sign``, its values 1, 3 … 15. IQ3_XXS keeps 7 signs of 8: the number of minus signs is even,
and where it is not, the weight that costs least changes its sign.

    byte     0      2          66                                           IQ3_XXS, 98 bytes
             d f16  qs u8[64]  u32[8]: four times 7 signs, l in the highest four bits
    byte     0      2          66        74            106                  IQ3_S, 110 bytes
             d f16  qs u8[64]  qh u8[8]  signs u8[32]  scales u8[4]

    qs       the low byte of each position in the grid
    qh       bit k of byte j: the ninth bit of position 8 j + k
    scales   l of sub-blocks of 32 weights, the first of two in the low bits

Source: `quantize_row_iq3_*_impl` and `dequantize_row_iq3_*` of ggml-quants.c, llama-cpp-python 0.3.36.
"""

import numpy as np

from quantlab.quants.drivers import QK_K, on_grid
from quantlab.quants.grids import ALL_SIGNS, EVEN_SIGNS
from quantlab.quants.lanes import (
    item,
    kernel,
    lanes,
    load,
    put,
    scatter,
    select,
    store,
    to_float,
    to_half,
)
from quantlab.quants.lattice import (
    EMPTY,
    HALF,
    HEAD,
    MISSING,
    POINTS,
    SCALE,
    SIGNS,
    SIZE,
    TRIED,
    TRIED_MISSING,
    W,
    copy_blocks,
    keep_tried,
    largest_of,
    read_weights,
    read_word,
    round_to_grid,
    scale_level,
    split_signs,
    start_tries,
    store_word,
    want_missing,
    with_signs,
    workspace,
    write_values,
)
from quantlab.quants.search import ONE, ZERO
from quantlab.quants.superblock import half_at

XXS, S = 0, 1
EPS_XXS = np.float32(1e-8)  # GROUP_MAX_EPS_IQ3_XXS
FIFTH, FIFTEEN = np.float32(0.2), np.float32(15)
FACTOR_XXS, FACTOR_S = np.float32(1.0125), np.float32(1.033)


@kernel
def _size(kind):
    """Return the bytes of a block."""
    return 110 if kind == S else 98


# ---- encode


@kernel
def _round_to_grid(ws, grid, j, iscale, scale, most):
    """Round the 8 groups of sub-block `j` to points of the grid."""
    round_to_grid(ws, grid, 4, 8 * j, 8, iscale, scale, most)


@kernel
def _fit(ws, j):
    """Return the weighted sums of x * q and of q * q, q the values of the points tried."""
    sum_qx, sum_q2 = lanes(ZERO), lanes(ZERO)
    for k in range(8):
        point = load(ws.ints, TRIED + 16 * k)
        for i in range(4):
            at = 512 * j + 64 * k + 16 * i
            w, q = load(ws.floats, W + at), to_float(((point >> (3 * i)) & 7) * 2 + 1)
            sum_qx = sum_qx + w * load(ws.floats, SIZE + at) * q
            sum_q2 = sum_q2 + w * q * q
    return sum_qx, sum_q2


@kernel
def _search(ws, grid, kind, j, steps):
    """Find scale and points of sub-block `j`, 8 groups of 4.

    After 2 * `steps` + 1 scales around the one that fits the largest weight, the best one's groups that were not on the
    grid (IQ3_S: all, if there is such a one) are rounded once more with the scale that fits them.
    """
    for k in range(4 * j, 4 * j + 4):
        split_signs(ws, k, kind == XXS)
    for k in range(0, 128, 16):
        store(ws.ints, POINTS + 128 * j + k, lanes(0))
        store(ws.ints, MISSING + 128 * j + k, lanes(np.int64(kind)))
    peak = largest_of(ws.floats, SIZE + 512 * j, 32)
    zero = peak < EPS_XXS if kind == XXS else peak == ZERO
    peak = select(zero, ONE, peak)
    start_tries(ws, 4, 8 * j, 8, zero)
    scale, best, again = peak / FIFTEEN, lanes(ZERO), lanes(False)
    most = (FIFTEEN + np.float32(steps) * FIFTH) / peak
    for step in range(-steps, steps + 2):
        last = step > steps
        iscale = ONE / scale if last else (FIFTEEN + np.float32(step) * FIFTH) / peak
        if last:
            again = want_missing(ws, 8 * j, 8, scale > ZERO, kind == S, False)
            most = iscale
        _round_to_grid(ws, grid, j, iscale, scale if last else ONE / iscale, most)
        if last:
            keep_tried(ws, 8 * j, 8)
        sum_qx, sum_q2 = _fit(ws, j)
        better = (sum_q2 > ZERO) & (again if last else sum_qx * sum_qx > best * sum_q2)
        scale = select(better, sum_qx / sum_q2, scale)
        best = select(better, scale * sum_qx, best)
        for k in range(0, 0 if last else 128, 16):
            at = 128 * j + k
            store(ws.ints, POINTS + at, select(better, load(ws.ints, TRIED + k), load(ws.ints, POINTS + at)))
            store(ws.ints, MISSING + at, select(better, load(ws.ints, TRIED_MISSING + k), load(ws.ints, MISSING + at)))
    store(ws.ints, EMPTY + 16 * j, select(zero, 1, 0))
    for k in range(64 * j, 64 * j + 64, 16):
        signs = load(ws.ints, SIGNS + k)
        signs = select(zero, 0, select(scale < ZERO, signs ^ 0xFF, signs))
        store(ws.ints, SIGNS + k, signs if kind == S else signs & 127)
    for k in range(128 * j, 128 * j + 128, 16):
        store(ws.ints, POINTS + k, select(zero, 0, load(ws.ints, POINTS + k)))
    return select(zero, ZERO, select(scale < ZERO, -scale, scale))


@kernel
def _pack(ws, grid, kind):
    """Lay out the blocks."""
    peak = largest_of(ws.floats, SCALE, 8)
    d = peak / np.float32(31)
    iscale, none = ONE / d, peak == ZERO
    half = select(none, 0, to_half(d * (FACTOR_S if kind == S else FACTOR_XXS)))
    scatter(ws.head, 0, HEAD, half)
    scatter(ws.head, 1, HEAD, half >> 8)
    for i in range(64 * 16):
        put(ws.ints, POINTS + i, item(grid.index, item(ws.ints, POINTS + i)))
    for j in range(8):
        high = lanes(0)
        for k in range(8):
            position = load(ws.ints, POINTS + 128 * j + 16 * k)
            scatter(ws.head, 2 + 8 * j + k, HEAD, position if kind == S else select(none, 0, position))
            high = high | (position >> 8 << k)
        l = scale_level(load(ws.floats, SCALE + 16 * j), iscale, none, 15)
        tail = l << 28
        for k in range(4):
            signs = load(ws.ints, SIGNS + 64 * j + 16 * k)
            tail = tail | (signs << (7 * k))
            if kind == S:
                scatter(ws.head, 74 + 4 * j + k, HEAD, signs)
        if kind == XXS:
            store_word(ws.head, 66 + 4 * j, select(none, 0, tail))
        else:
            scatter(ws.head, 66 + j, HEAD, high)
            if j & 1:
                l = scale_level(load(ws.floats, SCALE + 16 * j - 16), iscale, none, 15) | (l << 4)
                scatter(ws.head, 106 + (j >> 1), HEAD, l)


@kernel
def _move_up(ws):
    """Close the gaps that sub-blocks of zeros leave in qs and signs of IQ3_S.

    The C code's pointers stay where they are when it skips such a sub-block, so what follows lands in its place, and a
    decoder reads it as another sub-block's. Files that llama.cpp writes are like this.
    """
    for lane in range(16):
        to = 0
        for j in range(8):
            if not item(ws.ints, EMPTY + 16 * j + lane):
                for i in range(8 * (to < j)):
                    ws.head[HEAD * lane + 2 + 8 * to + i] = ws.head[HEAD * lane + 2 + 8 * j + i]
                for i in range(4 * (to < j)):
                    ws.head[HEAD * lane + 74 + 4 * to + i] = ws.head[HEAD * lane + 74 + 4 * j + i]
                to += 1
        for i in range(8 * to, 64):
            ws.head[HEAD * lane + 2 + i] = 0
        for i in range(4 * to, 32):
            ws.head[HEAD * lane + 74 + i] = 0


@kernel
def _span(x, importance, grid, kind, out, start, stop):
    ws = workspace()
    for first in range(start, stop, 16):
        read_weights(ws, x, importance, first, stop, np.float32(2), ZERO)
        for j in range(8):
            store(ws.floats, SCALE + 16 * j, _search(ws, grid, kind, j, 15 if kind == XXS else 9))
        _pack(ws, grid, kind)
        if kind == S:
            _move_up(ws)
        copy_blocks(ws.head, first, stop, _size(kind), out)


# ---- decode


@kernel
def _read_block(data, block, kind, words, minus, values, levels):
    """Read the signed values of 64 groups, 8 bytes of two in an int64, and l of both halves of the sub-blocks."""
    for j in range(8):
        if kind == XXS:
            tail = read_word(data, block + 66 + 4 * j)
            l = tail >> 28
            high = np.int64(0)
        else:
            tail = np.int64(0)
            l = np.int64(data[block + 106 + j // 2]) >> (4 * (j & 1)) & 15
            high = np.int64(data[block + 66 + j])
        levels[2 * j] = levels[2 * j + 1] = l
        for k in range(4):
            at = block + 2 + 8 * j + 2 * k
            first = np.int64(data[at]) | (high >> (2 * k) & 1) << 8
            second = np.int64(data[at + 1]) | (high >> (2 * k + 1) & 1) << 8
            signs = tail >> (7 * k) & 127 if kind == XXS else np.int64(data[block + 74 + 4 * j + k])
            values[4 * j + k] = with_signs(words[first] | words[second] << 32, minus[signs])


@kernel
def _decode_span(data, words, kind, out, start, stop):
    minus = ALL_SIGNS if kind == S else EVEN_SIGNS
    values, levels, db = np.empty(32, np.int64), np.empty(16, np.int32), np.empty(16, np.float32)
    for b in range(start, stop):
        block = b * _size(kind)
        _read_block(data, block, kind, words, minus, values, levels)
        l = load(levels, 0)
        if kind == XXS:
            store(db, 0, half_at(data, block) * (HALF + to_float(l)) * HALF)
        else:
            store(db, 0, half_at(data, block) * to_float(2 * l + 1))
        write_values(values.view(np.int8), db, out, b * QK_K)


_functions = on_grid(_span, _decode_span)
encode_iq3_xxs, encode_iq3_xxs_imatrix, decode_iq3_xxs = _functions("IQ3_XXS", XXS)
encode_iq3_s, encode_iq3_s_imatrix, decode_iq3_s = _functions("IQ3_S", S)
