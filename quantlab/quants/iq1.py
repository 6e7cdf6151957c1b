"""IQ1_S and IQ1_M: about one and a half bits a weight, 8 weights at a time.

The levels of 8 weights, -1, 0 and 1, are one point of a grid of 2048. A weight is ``d * (2 l + 1) * (level ± 1/8)``,
the sign chosen for 32 weights in IQ1_S, for 8 in IQ1_M.

    byte     0      2         34                                            IQ1_S, 50 bytes
             d f16  qs u8[32] qh u16[8]
    byte     0         32        48                                         IQ1_M, 56 bytes
             qs u8[32] qh u8[16] scales u16[4]

    qs       the low byte of each position in the grid
    qh       IQ1_S: three high bits of each of four positions, then three bits of l, then the sign; IQ1_M: four bits for
             each position, three high bits and the sign
    scales   three bits of l for each of four sub-blocks of 16 weights, then four bits of d, a f16

Whether weights become -1, 0 or 1 follows from two limits between the sorted weights: all pairs of limits are tried.
Equal weights stay in their order, as in the merge sort behind glibc's `qsort`, so the bytes equal those of llama.cpp
(llama-cpp-python 0.3.36) where `qsort` is stable.

Source: `quantize_row_iq1_*_impl` and `dequantize_row_iq1_*` of ggml-quants.c.
"""

import numpy as np

from quantlab.quants.drivers import QK_K, on_grid
from quantlab.quants.lanes import (
    absolute,
    any_lane,
    from_half,
    inlined_kernel,
    item,
    kernel,
    lanes,
    load,
    maximum,
    put,
    scatter,
    select,
    store,
    to_float,
    to_half,
)
from quantlab.quants.lattice import (
    HEAD,
    LANE,
    LARGEST,
    LEVEL,
    MISSING,
    ORDER,
    POINTS,
    ROOT,
    SCALE,
    SIGNS,
    SIZE,
    SUM_W,
    SUM_X,
    TAIL,
    TERMS,
    TRIED,
    W,
    X,
    best_of_8,
    copy_blocks,
    largest_of,
    read_weights,
    scale_level,
    workspace,
)
from quantlab.quants.search import ONE, ZERO

S, M = 0, 1
HALF_SUMS = 16 * 33  # where the sums of the second half begin
EPS_S, EPS_M = np.float32(1e-12), np.float32(1e-7)  # GROUP_MAX_EPS_IQ1_S and GROUP_MAX_EPS_IQ1_M
DELTA = np.float32(0.125)
VALUES = np.array([-1 + 0.125, 0.125, 1 + 0.125, -1 - 0.125, -0.125, 1 - 0.125], np.float32)  # of 3 levels, twice
SQUARES = VALUES * VALUES
PLUS_NEAR, PLUS_FAR = SQUARES[0] - SQUARES[1], SQUARES[1] - SQUARES[2]
MINUS_NEAR, MINUS_FAR = SQUARES[3] - SQUARES[4], SQUARES[4] - SQUARES[5]
FACTOR_S, FACTOR_M = np.float32(1.125), np.float32(1.1125)


@kernel
def _size(kind):
    """Return the bytes of a block."""
    return 50 if kind == S else 56


# ---- encode


def _network(n):
    """Return the pairs that Batcher's odd-even merge sort compares and exchanges, in turn, to sort `n` numbers."""
    pairs, run = [], 1
    while run < n:
        step = run
        while step:
            for start in range(step % run, n - step, 2 * step):
                for i in range(start, min(start + step, n - step)):
                    if i // (2 * run) == (i + step) // (2 * run):
                        pairs.append((i, i + step))
            step //= 2
        run *= 2
    return np.array(pairs)


NETWORK_32, NETWORK_16 = _network(32), _network(16)


@kernel
def _sort(ws, first, n, network):
    """Sort `n` columns from column `first` on in each lane, equal weights in their order: into SIZE and ORDER."""
    for i in range(n):
        store(ws.floats, SIZE + 16 * i, load(ws.floats, X + 16 * (first + i)))
        store(ws.ints, ORDER + 16 * i, lanes(np.int64(i)))
    for pair in range(network.shape[0]):
        i, j = 16 * network[pair, 0], 16 * network[pair, 1]
        a, b, p, q = (
            load(ws.floats, SIZE + i),
            load(ws.floats, SIZE + j),
            load(ws.ints, ORDER + i),
            load(ws.ints, ORDER + j),
        )
        wrong = (a > b) | ((a == b) & (p > q))
        store(ws.floats, SIZE + i, select(wrong, b, a))
        store(ws.floats, SIZE + j, select(wrong, a, b))
        store(ws.ints, ORDER + i, select(wrong, q, p))
        store(ws.ints, ORDER + j, select(wrong, p, q))


@kernel
def _sum_up(ws, first, n, halves):
    """Sum w * x and w of the sorted weights up to each limit; if `halves` is 2, apart for weights 0-7 and 8-15."""
    for i in range(n):
        for lane in range(16):
            at = 16 * (first + item(ws.ints, ORDER + 16 * i + lane)) + lane
            put(ws.floats, ROOT + 16 * i + lane, item(ws.floats, W + at))
    for h in range(halves):
        sum_x, sum_w = lanes(ZERO), lanes(ZERO)
        store(ws.floats, SUM_X + HALF_SUMS * h, sum_x)
        store(ws.floats, SUM_W + HALF_SUMS * h, sum_w)
        for i in range(0, 16 * n, 16):
            w = load(ws.floats, ROOT + i)
            mine = lanes(halves == 1) | ((load(ws.ints, ORDER + i) >> 3) == h)
            sum_x = select(mine, sum_x + w * load(ws.floats, SIZE + i), sum_x)
            sum_w = select(mine, sum_w + w, sum_w)
            store(ws.floats, SUM_X + HALF_SUMS * h + i + 16, sum_x)
            store(ws.floats, SUM_W + HALF_SUMS * h + i + 16, sum_w)


@kernel
def _limits_s(ws):
    """Try all pairs of limits between 32 sorted weights, with both signs; return the scale and the best try.

    A try is limits and sign in bits, ``i1 << 8 | i2 << 2 | minus``; -1 if none fits.
    """
    all_x, all_w = load(ws.floats, SUM_X + 16 * 32), load(ws.floats, SUM_W + 16 * 32)
    for i2 in range(33):
        above_x, above_w = all_x - load(ws.floats, SUM_X + 16 * i2), all_w - load(ws.floats, SUM_W + 16 * i2)
        for minus in range(2):
            high = VALUES[3 * minus + 2]
            store(ws.floats, TAIL + 64 * i2 + 32 * minus, above_x * high)
            store(ws.floats, TAIL + 64 * i2 + 32 * minus + 16, above_w * high * high)
    low_0, mid_0, low_1, mid_1 = VALUES[0], VALUES[1], VALUES[3], VALUES[4]
    scale, best, found = lanes(ZERO), lanes(-LARGEST), lanes(-1)
    for i1 in range(33):
        x1, w1 = load(ws.floats, SUM_X + 16 * i1), load(ws.floats, SUM_W + 16 * i1)
        for i2 in range(i1, 33):
            tail = TAIL + 64 * i2
            between_x, between_w = load(ws.floats, SUM_X + 16 * i2) - x1, load(ws.floats, SUM_W + 16 * i2) - w1
            qx_0 = x1 * low_0 + between_x * mid_0 + load(ws.floats, tail)
            q2_0 = w1 * low_0 * low_0 + between_w * mid_0 * mid_0 + load(ws.floats, tail + 16)
            qx_1 = x1 * low_1 + between_x * mid_1 + load(ws.floats, tail + 32)
            q2_1 = w1 * low_1 * low_1 + between_w * mid_1 * mid_1 + load(ws.floats, tail + 48)
            if any_lane((qx_0 * qx_0 > best * q2_0) | (qx_1 * qx_1 > best * q2_1)):
                scale, best, found = _keep_better(scale, best, found, qx_0, q2_0, i1 << 8 | i2 << 2)
                scale, best, found = _keep_better(scale, best, found, qx_1, q2_1, i1 << 8 | i2 << 2 | 1)
    return scale, found


@inlined_kernel
def _keep_better(scale, best, found, sum_qx, sum_q2, limits):
    """Keep scale, score and limits of a try where it is better than the best before."""
    better = (sum_q2 > ZERO) & (sum_qx * sum_qx > best * sum_q2)
    this = sum_qx / sum_q2
    return select(better, this, scale), select(better, this * sum_qx, best), select(better, limits, found)


@kernel
def _limits_m(ws):
    """Try all pairs of limits between 16 sorted weights, with a sign for each half; return the scale and the best try.

    The signs are two bits, the first half's the higher one.
    """
    for i2 in range(17):
        for h in range(2):
            w2 = load(ws.floats, SUM_W + HALF_SUMS * h + 16 * i2)
            store(ws.floats, TAIL + 64 * i2 + 32 * h, w2 * PLUS_FAR)
            store(ws.floats, TAIL + 64 * i2 + 32 * h + 16, w2 * MINUS_FAR)
    scale, best, found = lanes(ZERO), lanes(-LARGEST), lanes(-1)
    for i1 in range(17):
        x1, w1 = load(ws.floats, SUM_X + 16 * i1), load(ws.floats, SUM_W + 16 * i1)
        y1, v1 = load(ws.floats, SUM_X + HALF_SUMS + 16 * i1), load(ws.floats, SUM_W + HALF_SUMS + 16 * i1)
        a_plus, a_minus, p_plus, p_minus = _half_sums(ws, SUM_X + 16 * 16, SUM_W + 16 * 16, w1)
        b_plus, b_minus, q_plus, q_minus = _half_sums(ws, SUM_X + HALF_SUMS + 16 * 16, SUM_W + HALF_SUMS + 16 * 16, v1)
        for i2 in range(i1, 17):
            tail = TAIL + 64 * i2
            x = x1 + load(ws.floats, SUM_X + 16 * i2)
            y = y1 + load(ws.floats, SUM_X + HALF_SUMS + 16 * i2)
            x_plus, x_minus, y_plus, y_minus = a_plus - x, a_minus - x, b_plus - y, b_minus - y
            w_plus, w_minus = p_plus + load(ws.floats, tail), p_minus + load(ws.floats, tail + 16)
            v_plus, v_minus = q_plus + load(ws.floats, tail + 32), q_minus + load(ws.floats, tail + 48)
            qx_0, qx_1, qx_2, qx_3 = x_plus + y_plus, x_plus + y_minus, x_minus + y_plus, x_minus + y_minus
            q2_0, q2_1, q2_2, q2_3 = w_plus + v_plus, w_plus + v_minus, w_minus + v_plus, w_minus + v_minus
            better = (qx_0 * qx_0 > best * q2_0) | (qx_1 * qx_1 > best * q2_1)
            if any_lane(better | (qx_2 * qx_2 > best * q2_2) | (qx_3 * qx_3 > best * q2_3)):
                limits = i1 << 8 | i2 << 2
                scale, best, found = _keep_better(scale, best, found, qx_0, q2_0, limits)
                scale, best, found = _keep_better(scale, best, found, qx_1, q2_1, limits | 1)
                scale, best, found = _keep_better(scale, best, found, qx_2, q2_2, limits | 2)
                scale, best, found = _keep_better(scale, best, found, qx_3, q2_3, limits | 3)
    return scale, found


@inlined_kernel
def _half_sums(ws, all_x, all_w, w1):
    """Return what all pairs with a first limit have in common, in one half: of x and of w, with plus and with minus."""
    x, w = load(ws.floats, all_x), load(ws.floats, all_w)
    plus, minus = VALUES[2], VALUES[5]
    return (
        x * plus,
        x * minus,
        w * plus * plus + w1 * PLUS_NEAR,
        w * minus * minus + w1 * MINUS_NEAR,
    )


@kernel
def _values_of(level, minus):
    """Return the values of levels 0, 1, 2 with the sign plus or minus."""
    value = to_float(level - 1)
    return select(minus != 0, value - DELTA, value + DELTA)


@kernel
def _points(ws, n, found, turned):
    """Convert the best limits to levels, and the levels to the points of each group of 8."""
    i1, i2 = found >> 8, (found >> 2) & 63
    for i in range(n):
        level = select(i1 > i, 0, select(i2 > i, 1, 2))
        store(ws.ints, TRIED, select(turned, 2 - level, level))
        for lane in range(16):
            at = 16 * item(ws.ints, ORDER + 16 * i + lane) + lane
            put(ws.ints, LEVEL + at, item(ws.ints, TRIED + lane))
    for k in range(n // 8):
        point = lanes(0)
        for i in range(8):
            point = point | (load(ws.ints, LEVEL + 16 * (8 * k + i)) << (2 * i))
        store(ws.ints, TRIED + 16 * k, point)


@kernel
def _to_grid(ws, grid, group, k, scale, minus):
    """Use the best neighbour if the point of group `k` is not on the grid; return the lanes that did."""
    for i in range(8):
        v, w = load(ws.floats, X + 128 * group + 16 * i), load(ws.floats, W + 128 * group + 16 * i)
        for level in range(3):
            diff = scale * _values_of(lanes(level), minus) - v
            store(ws.floats, TERMS + 48 * i + 16 * level, w * diff * diff)
    for lane in range(16):
        p = item(ws.ints, TRIED + 16 * k + lane)
        missing = item(grid.index, p) < 0
        put(ws.ints, MISSING + lane, np.int32(missing))
        if missing:
            put(ws.ints, TRIED + 16 * k + lane, best_of_8(grid, p, ws.floats, TERMS + lane))
    return load(ws.ints, MISSING) != 0


@kernel
def _search(ws, grid, kind, j, n):
    """Find scale, signs and points of sub-block `j` of `n` weights."""
    peak = ZERO * load(ws.floats, X)
    for i in range(16 * n * j, 16 * n * (j + 1), 16):
        peak = maximum(peak, absolute(load(ws.floats, X + i)))
    _sort(ws, n * j, n, NETWORK_32 if kind == S else NETWORK_16)
    _sum_up(ws, n * j, n, 1 if kind == S else 2)
    scale, found = _limits_s(ws) if kind == S else _limits_m(ws)
    zero = (peak < (EPS_S if kind == S else EPS_M)) | (found < 0)
    turned = scale < ZERO
    scale = select(turned, -scale, scale)
    signs = select(turned, found ^ 3, found)
    found = maximum(0, found)
    _points(ws, n, found, turned)
    missing = lanes(False)
    for k in range(n // 8):
        minus = select(zero, 0, signs & 1 if kind == S or k == 1 else signs >> 1 & 1)
        store(ws.ints, SIGNS + 16 * (n // 8 * j + k), minus)
        missing = missing | _to_grid(ws, grid, n // 8 * j + k, k, scale, minus)
    sum_qx, sum_q2 = lanes(ZERO), lanes(ZERO)
    for k in range(n // 8):
        group = n // 8 * j + k
        point = load(ws.ints, TRIED + 16 * k)
        store(ws.ints, POINTS + 16 * group, select(zero, np.int32(grid.points[0]), point))
        for i in range(8):
            v, w = load(ws.floats, X + 128 * group + 16 * i), load(ws.floats, W + 128 * group + 16 * i)
            q = _values_of((point >> (2 * i)) & 3, load(ws.ints, SIGNS + 16 * group))
            sum_qx = sum_qx + w * q * v
            sum_q2 = sum_q2 + w * q * q
    scale = select(missing & (sum_qx > ZERO) & (sum_q2 > ZERO), sum_qx / sum_q2, scale)
    return select(zero, ZERO, scale)


@kernel
def _pack_s(ws, d, none):
    """Lay out qh and d of IQ1_S."""
    half, iscale = select(none, 0, to_half(d * FACTOR_S)), ONE / d
    scatter(ws.head, 0, HEAD, half)
    scatter(ws.head, 1, HEAD, half >> 8)
    for j in range(8):
        l = scale_level(load(ws.floats, SCALE + 16 * j), iscale, none, 7)
        high = select(none, 0, (l | (load(ws.ints, SIGNS + 64 * j) << 3)) << 12)
        for k in range(4):
            high = high | (load(ws.ints, TRIED + 16 * (4 * j + k)) >> 8 << (3 * k))
        scatter(ws.head, 34 + 2 * j, HEAD, high)
        scatter(ws.head, 35 + 2 * j, HEAD, high >> 8)


@kernel
def _pack_m(ws, d, none):
    """Quantize the scales of IQ1_M, fit d to the result, lay out qh and scales."""
    iscale, sum_qx, sum_q2 = ONE / d, lanes(ZERO), lanes(ZERO)
    for j in range(16):
        l = scale_level(load(ws.floats, SCALE + 16 * j), iscale, none, 7)
        store(ws.ints, LEVEL + 16 * j, l)
        for k in range(2 * j, 2 * j + 2):
            point, minus = load(ws.ints, POINTS + 16 * k), load(ws.ints, SIGNS + 16 * k)
            for i in range(8):
                v, w = load(ws.floats, X + 128 * k + 16 * i), load(ws.floats, W + 128 * k + 16 * i)
                q = _values_of((point >> (2 * i)) & 3, minus) * to_float(2 * l + 1)
                sum_qx = sum_qx + w * q * v
                sum_q2 = sum_q2 + w * q * q
        high = lanes(0)
        for k in range(2):
            position, minus = load(ws.ints, TRIED + 16 * (2 * j + k)), load(ws.ints, SIGNS + 16 * (2 * j + k))
            high = high | ((position >> 8 | select(none, 0, minus << 3)) << (4 * k))
        scatter(ws.head, 32 + j, HEAD, high)
    d = select(sum_q2 > ZERO, sum_qx / sum_q2, d)
    half = select(none, 0, to_half(d * FACTOR_M))
    for j in range(4):
        packed = (half >> (4 * j) & 15) << 12
        for k in range(4):
            packed = packed | (load(ws.ints, LEVEL + 16 * (4 * j + k)) << (3 * k))
        scatter(ws.head, 48 + 2 * j, HEAD, packed)
        scatter(ws.head, 49 + 2 * j, HEAD, packed >> 8)


@kernel
def _span(x, importance, grid, kind, out, start, stop):
    ws = workspace()
    weights, qs = (32, 2) if kind == S else (16, 0)
    for first in range(start, stop, 16):
        read_weights(ws, x, importance, first, stop, np.float32(2), ZERO)
        for j in range(256 // weights):
            store(ws.floats, SCALE + 16 * j, _search(ws, grid, kind, j, weights))
        peak = largest_of(ws.floats, SCALE, 256 // weights)
        d, none = peak / np.float32(15), peak == ZERO
        for i in range(32 * 16):
            put(ws.ints, TRIED + i, item(grid.index, item(ws.ints, POINTS + i)))
        for k in range(32):
            scatter(ws.head, qs + k, HEAD, load(ws.ints, TRIED + 16 * k))
        if kind == S:
            _pack_s(ws, d, none)
        else:
            _pack_m(ws, d, none)
        copy_blocks(ws.head, first, stop, _size(kind), out)


# ---- decode


@kernel
def _decode_block(data, block, kind, words, values, levels, delta):
    """Read the levels of 32 groups, 8 bytes in an int64 each, the delta of each, and l of 16 halves of sub-blocks."""
    for j in range(8):
        if kind == S:
            high = np.int64(data[block + 34 + 2 * j]) | np.int64(data[block + 35 + 2 * j]) << 8
            levels[2 * j] = levels[2 * j + 1] = high >> 12 & 7
        else:
            at = block + 48 + j // 2 * 2
            packed = (np.int64(data[at]) | np.int64(data[at + 1]) << 8) >> (6 * (j & 1))
            levels[2 * j], levels[2 * j + 1] = packed & 7, packed >> 3 & 7
            high = np.int64(data[block + 32 + 2 * j]) | np.int64(data[block + 33 + 2 * j]) << 8
        for k in range(4):
            if kind == S:
                above, minus, qs = high >> (3 * k) & 7, high >> 15, 2
            else:
                above, minus, qs = high >> (4 * k) & 7, high >> (4 * k + 3) & 1, 0
            values[4 * j + k] = words[np.int64(data[block + qs + 4 * j + k]) | above << 8]
            delta[4 * j + k] = DELTA - np.float32(0.25) * np.float32(minus)


@kernel
def _decode_span(data, words, kind, out, start, stop):
    values, levels, delta = np.empty(32, np.int64), np.empty(16, np.int32), np.empty(32, np.float32)
    db, half = np.empty(16, np.float32), np.int32(0)
    for b in range(start, stop):
        block = b * _size(kind)
        _decode_block(data, block, kind, words, values, levels, delta)
        if kind == S:
            half = np.int32(data[block]) | np.int32(data[block + 1]) << 8
        else:
            half = np.int32(0)
            for j in range(4):
                half = half | np.int32(data[block + 49 + 2 * j] >> 4) << (4 * j)
        store(db, 0, from_half(lanes(half)) * to_float(2 * load(levels, 0) + 1))
        signed = values.view(np.int8)
        for j in range(16):
            d = select(load(LANE, 0) < 8, delta[2 * j], delta[2 * j + 1])
            store(out, b * QK_K + 16 * j, db[j] * (to_float(load(signed, 16 * j)) + d))


_functions = on_grid(_span, _decode_span)
_, encode_iq1_s_imatrix, decode_iq1_s = _functions("IQ1_S", S)
encode_iq1_m, encode_iq1_m_imatrix, decode_iq1_m = _functions("IQ1_S", M)
