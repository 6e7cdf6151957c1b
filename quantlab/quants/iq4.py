"""IQ4_NL and IQ4_XS: four bits a weight that stand for 16 unevenly spaced values.

    byte     0      2                                                       IQ4_NL: 32 weights, 18 bytes
             d f16  qs u8[16]
    byte     0      2             4               8                         IQ4_XS: 256 weights, 136 bytes
             d f16  scales_h u16  scales_l u8[4]  qs u8[128]

    qs       byte 16 j + i holds weight i of sub-block j of 32 in its low four bits, weight i + 16 in the high ones
    scales   six bits of each sub-block, the low four in scales_l, the high two in scales_h; x = d * (l - 32) * value

Source: `quantize_row_iq4_nl_impl` and `dequantize_row_iq4_*` of ggml-quants.c, llama-cpp-python 0.3.36.
"""

import numpy as np

from quantlab.quants.drivers import NO_WEIGHTS, QK_K, decoder, encoders
from quantlab.quants.ggml_types import GGML_TYPES
from quantlab.quants.lanes import (
    kernel,
    lanes,
    load,
    look_up,
    maximum,
    minimum,
    nearest_int,
    scatter,
    select,
    sqrt,
    store,
    to_float,
    to_half,
)
from quantlab.quants.search import GROUP_MAX_EPS, ONE, ZERO, largest
from quantlab.quants.superblock import half_at, read_columns

QK4_NL = 32
SIZE_NL, SIZE_XS = 18, 136  # bytes of a block
TRIES = 7
VALUES = np.array(GGML_TYPES["IQ4_NL"].levels, np.int8)
MIDDLES = (VALUES[1:].astype(np.float32) + VALUES[:-1]) / np.float32(2)  # exact, and so are the differences from them
FIRST = np.float32(-127)


@kernel
def _level(v):
    """Return the level whose value is nearest, the higher one of two."""
    l = lanes(15)
    for k in range(15):
        l = l - select(v < MIDDLES[k], 1, 0)
    return l


@kernel
def _sums(x, w, at, iscale):
    """Return the weighted sums of x * q and of q * q over 32 columns, q the values nearest to `iscale` * x."""
    sum_qx, sum_q2 = lanes(ZERO), lanes(ZERO)
    for i in range(at, at + 512, 16):
        v, weight = load(x, i), load(w, i)
        q = to_float(look_up(VALUES, _level(iscale * v)))
        sum_qx = sum_qx + weight * q * v
        sum_q2 = sum_q2 + weight * q * q
    return sum_qx, sum_q2


@kernel
def _search(x, w, at):
    """Find the scale of 32 columns from element `at` on, of 16 that give the largest weight one of the first values."""
    peak, magnitude = largest(x, at, 32)
    scale, best = lanes(ZERO), lanes(ZERO)
    for step in range(-TRIES - 1, TRIES + 1):
        first = step < -TRIES
        iscale = ONE / (-peak / FIRST) if first else (np.float32(step) + FIRST) / peak
        sum_qx, sum_q2 = _sums(x, w, at, iscale)
        better = (sum_q2 > ZERO) & (lanes(first) | (sum_qx * sum_qx > best * sum_q2))
        scale = select(better, sum_qx / sum_q2, scale)
        best = select(better, scale * sum_qx, best)
    return select(magnitude < GROUP_MAX_EPS, ZERO, scale)


@kernel
def _weigh(x, w, has_weights, block):
    """Turn importance into weights of errors: times ``sqrt(sigma2 + x * x)``; without importance, take the squares."""
    sum_x2 = lanes(ZERO)
    for i in range(0, 16 * block, 16):
        v = load(x, i)
        sum_x2 = sum_x2 + v * v
    sigma2 = sum_x2 * (np.float32(2) / np.float32(block))
    for i in range(0, 16 * block, 16):
        v = load(x, i)
        store(w, i, load(w, i) * sqrt(sigma2 + v * v) if has_weights else v * v)


@kernel
def _inverse(v):
    return select(v == ZERO, ZERO, ONE / v)


@kernel
def _pack_codes(x, at, iscale, head, byte):
    """Write the 16 bytes of 32 columns."""
    for i in range(0, 256, 16):
        low, high = _level(iscale * load(x, at + i)), _level(iscale * load(x, at + 256 + i))
        scatter(head, byte + i // 16, SIZE_XS, low | (high << 4))


@kernel
def _pack_nl(x, scale, head):
    half = to_half(load(scale, 0))
    scatter(head, 0, SIZE_XS, half)
    scatter(head, 1, SIZE_XS, half >> 8)
    _pack_codes(x, 0, _inverse(load(scale, 0)), head, 2)


@kernel
def _pack_xs(x, scale, head):
    peak, _ = largest(scale, 0, 8)
    d = -peak / np.float32(32)
    half, iscale = to_half(d), _inverse(d)
    scatter(head, 0, SIZE_XS, half)
    scatter(head, 1, SIZE_XS, half >> 8)
    low, high = lanes(0), lanes(0)
    for j in range(8):
        l = maximum(-32, minimum(31, nearest_int(iscale * load(scale, 16 * j))))
        _pack_codes(x, 512 * j, _inverse(d * to_float(l)), head, 8 + 16 * j)
        l = l + 32
        low, high = low | ((l & 15) << (4 * j)), high | (l >> 4 << (2 * j))
    scatter(head, 2, SIZE_XS, high)
    scatter(head, 3, SIZE_XS, high >> 8)
    for byte in range(4):
        scatter(head, 4 + byte, SIZE_XS, low >> (8 * byte))


@kernel
def _encode_span(x, importance, block, size, out, start, stop):
    rows, columns, w = np.empty(16, np.int64), np.empty(16 * block, np.float32), np.empty(16 * block, np.float32)
    scale, head = np.empty(8 * 16, np.float32), np.empty(16 * SIZE_XS, np.uint8)
    for first in range(start, stop, 16):
        read_columns(x, first, stop, stop, columns, rows, block)
        if importance.size:
            read_columns(importance, first, stop, importance.size // block, w, rows, block)
        _weigh(columns, w, importance.size > 0, block)
        for j in range(block // 32):
            store(scale, 16 * j, _search(columns, w, 512 * j))
        if block == QK4_NL:
            _pack_nl(columns, scale, head)
        else:
            _pack_xs(columns, scale, head)
        for k in range(min(16, stop - first)):
            for byte in range(size):
                out[(first + k) * size + byte] = head[SIZE_XS * k + byte]


@kernel
def _span_nl(x, importance, out, start, stop):
    _encode_span(x, importance, QK4_NL, SIZE_NL, out, start, stop)


@kernel
def _span_xs(x, importance, out, start, stop):
    _encode_span(x, importance, QK_K, SIZE_XS, out, start, stop)


encode_iq4_nl, encode_iq4_nl_imatrix = encoders(_span_nl, block=QK4_NL, unweighted=NO_WEIGHTS)
encode_iq4_xs, encode_iq4_xs_imatrix = encoders(_span_xs, unweighted=NO_WEIGHTS)


# ---- decode


@kernel
def _decode_block(data, at, d, out, o):
    codes = load(data, at)
    store(out, o, d * to_float(look_up(VALUES, codes & 15)))
    store(out, o + 16, d * to_float(look_up(VALUES, codes >> 4)))


@kernel
def _decode_span_nl(data, out, start, stop):
    for k in range(start, stop):
        at = k * SIZE_NL
        _decode_block(data, at + 2, half_at(data, at), out, k * QK4_NL)


@kernel
def _decode_span_xs(data, out, start, stop):
    for k in range(start, stop):
        at = k * SIZE_XS
        d = half_at(data, at)
        high = np.int32(data[at + 2]) | np.int32(data[at + 3]) << 8
        for j in range(8):
            l = np.int32(data[at + 4 + j // 2]) >> (4 * (j & 1)) & 15 | (high >> (2 * j) & 3) << 4
            _decode_block(data, at + 8 + 16 * j, d * np.float32(l - 32), out, k * QK_K + 32 * j)


decode_iq4_nl = decoder(_decode_span_nl, block=QK4_NL)
decode_iq4_xs = decoder(_decode_span_xs)
