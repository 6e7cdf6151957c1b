"""IQ2_XXS, IQ2_XS and IQ2_S: about two bits a weight, 8 weights at a time.

The levels of 8 weights without their signs, 0 to 2, are one point of a grid of 256 (IQ2_XXS), 512 (IQ2_XS) or 1024
points (IQ2_S); a weight is ``d * (l + 1/2) / 4 * value * sign``, its values 8, 25 and 43. The encoder counts with 1, 3
and 5 instead. IQ2_XXS and IQ2_XS keep 7 signs of 8: the number of minus signs is even, and where it is not, the weight
that costs least changes its sign.

    byte     0      2                                                       IQ2_XXS, 66 bytes
             d f16  u32[8][2]: four positions of 8 bits; four times 7 signs, l in the highest four bits
    byte     0      2            66                                         IQ2_XS, 74 bytes
             d f16  qs u16[32]   scales u8[8]
    byte     0      2         34            66        74                    IQ2_S, 82 bytes
             d f16  qs u8[32] signs u8[32]  qh u8[8]  scales u8[8]

    qs       IQ2_XS: position, and from bit 9 on 7 signs; IQ2_S: the low byte of the position
    qh       bits 2 k and 2 k + 1 of byte j: the high bits of position 4 j + k
    scales   l of sub-blocks of 16 weights, the first of two in the low bits

Source: `quantize_row_iq2_*_impl` and `dequantize_row_iq2_*` of ggml-quants.c, llama-cpp-python 0.3.36.
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
from quantlab.quants.search import GROUP_MAX_EPS, ONE, TENTH, ZERO, make_qp_quants
from quantlab.quants.superblock import half_at

XXS, XS, S = 0, 1, 2
EPS_S = np.float32(1e-8)  # GROUP_MAX_EPS_IQ2_S
THREE, FIVE = np.float32(3), np.float32(5)
FACTOR_S = np.float32(0.9875)


@kernel
def _size(kind):
    """Return the bytes of a block."""
    return 66 + 8 * kind


# ---- encode


@kernel
def _round_to_grid(ws, grid, first, groups, iscale, scale, most):
    """Round the weights of `groups` groups, from group `first` on, to points of the grid."""
    round_to_grid(ws, grid, 8, first, groups, iscale, scale, most)


@kernel
def _fit(ws, first, groups):
    """Return the weighted sums of x * q and of q * q, q the values of the points tried."""
    sum_qx, sum_q2 = lanes(ZERO), lanes(ZERO)
    for k in range(groups):
        point = load(ws.ints, TRIED + 16 * k)
        for i in range(8):
            at = 128 * (first + k) + 16 * i
            w, q = load(ws.floats, W + at), to_float(((point >> (2 * i)) & 3) * 2 + 1)
            sum_qx = sum_qx + w * load(ws.floats, SIZE + at) * q
            sum_q2 = sum_q2 + w * q * q
    return sum_qx, sum_q2


@kernel
def _search(ws, grid, kind, first, groups, steps):
    """Find scale and points of a sub-block of `groups` groups, from group `first` on.

    After 2 * `steps` + 1 scales around the one that fits the largest weight, the best one's groups that were not on the
    grid (IQ2_XXS: all) are rounded once more with the scale that fits them.
    """
    for k in range(first, first + groups):
        split_signs(ws, k, kind != S)
        store(ws.ints, POINTS + 16 * k, lanes(0))
        store(ws.ints, MISSING + 16 * k, lanes(0))
    peak = largest_of(ws.floats, SIZE + 128 * first, 8 * groups)
    zero = peak < (EPS_S if kind == S else GROUP_MAX_EPS)
    scale = peak / FIVE
    if kind == XXS:
        size, w = (
            ws.floats[SIZE + 128 * first : SIZE + 128 * first + 512],
            ws.floats[W + 128 * first : W + 128 * first + 512],
        )
        scale = make_qp_quants(size, w, ws.head[16 * HEAD :], np.int64(32), np.int64(4))
        peak = scale * THREE
        zero = zero | (peak <= ZERO)
    peak = select(zero, ONE, peak)
    start_tries(ws, 8, first, groups, zero)
    best, again = lanes(ZERO), lanes(False)
    most = (FIVE + np.float32(steps) * TENTH) / peak
    for step in range(-steps, steps + 2):
        last = step > steps
        iscale = ONE / scale if last else (FIVE + np.float32(step) * TENTH) / peak
        if last:
            again = want_missing(ws, first, groups, scale > ZERO, kind == XXS, kind == XXS)
            most = iscale
        _round_to_grid(ws, grid, first, groups, iscale, scale if last else ONE / iscale, most)
        if last:
            keep_tried(ws, first, groups)
        sum_qx, sum_q2 = _fit(ws, first, groups)
        better = (sum_q2 > ZERO) & (again if last else sum_qx * sum_qx > best * sum_q2)
        scale = select(better, sum_qx / sum_q2, scale)
        best = select(better, scale * sum_qx, best)
        for k in range(0 if last else groups):
            at = 16 * (first + k)
            store(ws.ints, POINTS + at, select(better, load(ws.ints, TRIED + 16 * k), load(ws.ints, POINTS + at)))
            store(
                ws.ints,
                MISSING + at,
                select(better, load(ws.ints, TRIED_MISSING + 16 * k), load(ws.ints, MISSING + at)),
            )
    for k in range(16 * first, 16 * (first + groups), 16):
        signs = load(ws.ints, SIGNS + k)
        signs = select(zero, 0, select(scale < ZERO, signs ^ 0xFF, signs))
        store(ws.ints, SIGNS + k, signs if kind == S else signs & 127)
        store(ws.ints, POINTS + k, select(zero, 0, load(ws.ints, POINTS + k)))
    return select(zero, ZERO, select(scale < ZERO, -scale, scale))


@kernel
def _pack(ws, grid, kind, groups):
    """Lay out the blocks."""
    peak = largest_of(ws.floats, SCALE, 32 // groups)
    d = peak / np.float32(31)
    iscale, none = ONE / d, peak == ZERO
    half = select(none, 0, to_half(d * FACTOR_S if kind == S else d))
    scatter(ws.head, 0, HEAD, half)
    scatter(ws.head, 1, HEAD, half >> 8)
    for k in range(32):
        for lane in range(16):
            put(ws.ints, TRIED + lane, item(grid.index, item(ws.ints, POINTS + 16 * k + lane)))
        store(ws.ints, POINTS + 16 * k, load(ws.ints, TRIED))
    for j in range(8):
        l = scale_level(load(ws.floats, SCALE + (32 * j if groups == 2 else 16 * j)), iscale, none, 15)
        if groups == 2:
            l = l | (scale_level(load(ws.floats, SCALE + 32 * j + 16), iscale, none, 15) << 4)
        low, high = lanes(0), l << 28
        for k in range(4):
            position, signs = load(ws.ints, POINTS + 64 * j + 16 * k), load(ws.ints, SIGNS + 64 * j + 16 * k)
            if kind == XS:
                position = select(none, 0, position | (signs << 9))
                scatter(ws.head, 2 + 8 * j + 2 * k, HEAD, position)
                scatter(ws.head, 3 + 8 * j + 2 * k, HEAD, position >> 8)
            elif kind == S:
                scatter(ws.head, 2 + 4 * j + k, HEAD, position)
                scatter(ws.head, 34 + 4 * j + k, HEAD, signs)
                low = low | (position >> 8 << (2 * k))
            else:
                low = low | (position << (8 * k))
                high = high | (signs << (7 * k))
        if kind == XXS:
            store_word(ws.head, 2 + 8 * j, select(none, 0, low))
            store_word(ws.head, 6 + 8 * j, select(none, 0, high))
        elif kind == S:
            scatter(ws.head, 66 + j, HEAD, low)
        if kind != XXS:
            scatter(ws.head, (66 if kind == XS else 74) + j, HEAD, l)


@kernel
def _span(x, importance, grid, kind, out, start, stop):
    ws = workspace()
    groups, steps = (4, 6) if kind == XXS else (2, 9)
    for first in range(start, stop, 16):
        read_weights(ws, x, importance, first, stop, np.float32(2) if kind == S else ONE, np.float32(0.25))
        for j in range(32 // groups):
            store(ws.floats, SCALE + 16 * j, _search(ws, grid, kind, groups * j, groups, steps))
        _pack(ws, grid, kind, groups)
        copy_blocks(ws.head, first, stop, _size(kind), out)


# ---- decode


@kernel
def _read_block(data, block, kind, words, minus, values, levels):
    """Read the signed values of 32 groups, 8 bytes in an int64 each, and l of 16 half groups of sub-blocks."""
    for j in range(8):
        at = block + 2 + 8 * j
        tail = read_word(data, at + 4) if kind == XXS else 0
        if kind == XXS:
            levels[2 * j] = levels[2 * j + 1] = tail >> 28
        else:
            l = np.int32(data[block + (66 if kind == XS else 74) + j])
            levels[2 * j], levels[2 * j + 1] = l & 15, l >> 4
        for k in range(4):
            if kind == XXS:
                position, signs = np.int64(data[at + k]), tail >> (7 * k) & 127
            elif kind == XS:
                q = np.int64(data[at + 2 * k]) | np.int64(data[at + 2 * k + 1]) << 8
                position, signs = q & 511, q >> 9
            else:
                high = np.int64(data[block + 66 + j]) << (8 - 2 * k) & 0x300
                position, signs = np.int64(data[block + 2 + 4 * j + k]) | high, np.int64(data[block + 34 + 4 * j + k])
            values[4 * j + k] = with_signs(words[position], minus[signs])


@kernel
def _decode_span(data, words, kind, out, start, stop):
    minus = ALL_SIGNS if kind == S else EVEN_SIGNS
    values, levels, db = np.empty(32, np.int64), np.empty(16, np.int32), np.empty(16, np.float32)
    for b in range(start, stop):
        block = b * _size(kind)
        _read_block(data, block, kind, words, minus, values, levels)
        store(db, 0, half_at(data, block) * (HALF + to_float(load(levels, 0))) * np.float32(0.25))
        write_values(values.view(np.int8), db, out, b * QK_K)


_functions = on_grid(_span, _decode_span)
_, encode_iq2_xxs_imatrix, decode_iq2_xxs = _functions("IQ2_XXS", XXS)
_, encode_iq2_xs_imatrix, decode_iq2_xs = _functions("IQ2_XS", XS)
encode_iq2_s, encode_iq2_s_imatrix, decode_iq2_s = _functions("IQ2_S", S)
