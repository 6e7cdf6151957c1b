"""Blocks of 32 weights: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0, and Q8_1 for activations.

A block is two lanes wide: weights 0..15 in one, 16..31 in the other, and byte j of a block of nibbles holds weight j
in its low half and weight j+16 in its high half. Without an importance matrix the scale follows from the block's
extremes; with one it is searched for, 16 blocks at a time.

Source: `quantize_row_q*_ref`, `quantize_row_q*_impl` and `dequantize_row_q*` of llama.cpp's ggml-quants.c.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import prange

from quantlab.quants.lanes import (
    absolute,
    bits,
    from_half,
    highest,
    kernel,
    lane_bits,
    lanes,
    load,
    lowest,
    maximum,
    minimum,
    parallel_kernel,
    scatter,
    select,
    sqrt,
    store,
    to_float,
    to_half,
    to_int,
    total,
    transpose,
)
from quantlab.quants.search import FOUND, LOW, SCALE, make_qkx_quants, make_qx_quants

QK = 32  # weights per block
SPAN = 128  # blocks that one task of a parallel loop takes
COLUMNS = 256  # weights of a row that a search takes at a time: 8 blocks, which wait for each other's divisions
HALF = np.float32(0.5)
BELOW_HALF = np.float32(0.49999997)
ONE_BIT = np.left_shift(1, np.arange(16), dtype=np.int32)  # bit i in lane i


def _with(kernel, *flags) -> Callable:
    """Make a type's encoder (x, out) or (x, importance, out), or its decoder (data, out), from a shared one."""

    def function(*arrays):
        kernel(*arrays[:-1], *flags, arrays[-1])

    return function


# ---- parts of a block


@kernel
def _extreme(a, b):
    """The value of largest magnitude among 32 floats; the first of equals, and +0 if all are zero."""
    sizes_a, sizes_b = bits(absolute(a)), bits(absolute(b))
    top = np.int32(highest(maximum(sizes_a, sizes_b)))
    found = lane_bits(sizes_a == top) | lane_bits(sizes_b == top) << 16
    negative = lane_bits(a < np.float32(0)) | lane_bits(b < np.float32(0)) << 16
    value = top.view(np.float32)
    return -value if found & -found & negative else value


@kernel
def _ordered(v):
    """Ints that are in the same order as the floats; applied to its own result's bits it gives the float's bits."""
    return v ^ ((v >> 31) & 0x7FFFFFFF)


@kernel
def _first_minimum(a, b):
    """The smallest of 32 floats; where zeros of both signs are smallest, the first of them."""
    smallest = np.int32(_ordered(np.int32(lowest(minimum(_ordered(bits(a)), _ordered(bits(b)))))))
    value = smallest.view(np.float32)
    if value == 0:
        found = lane_bits(a == value) | lane_bits(b == value) << 16
        negative = lane_bits(bits(a) < 0) | lane_bits(bits(b) < 0) << 16
        value = np.float32(-0.0) if found & -found & negative else np.float32(0)
    return value


@kernel
def _maximum_of(a, b):
    """The largest of 32 floats; +0 where zeros are largest and one of them is positive."""
    return np.int32(_ordered(np.int32(highest(maximum(_ordered(bits(a)), _ordered(bits(b))))))).view(np.float32)


@kernel
def _reciprocal(d):
    """1/d, or 0 where d is 0 and where 1/d overflows: C's casts then make every code 0."""
    if d == 0:
        return np.float32(0)
    inverse = np.float32(1) / d
    return inverse if abs(inverse) <= np.float32(3.4028235e38) else np.float32(0)


@kernel
def _around_zero(x, i, nmax):
    """Scale and codes 0..2*nmax-1 of a block; the weight of largest magnitude gets code 0, an exact -nmax."""
    a, b = load(x, i), load(x, i + 16)
    d = _extreme(a, b) / np.float32(-nmax)
    inverse = _reciprocal(d)
    shift = np.float32(0) if d != 0 and inverse == 0 else np.float32(nmax) + HALF
    top = 2 * nmax - 1
    return d, minimum(to_int(a * inverse + shift), top), minimum(to_int(b * inverse + shift), top)


@kernel
def _above_minimum(x, i, nmax):
    """Scale, minimum and codes 0..nmax of a block."""
    a, b = load(x, i), load(x, i + 16)
    m = _first_minimum(a, b)
    d = (_maximum_of(a, b) - m) / np.float32(nmax)
    inverse = _reciprocal(d)
    low, high = to_int((a - m) * inverse + HALF), to_int((b - m) * inverse + HALF)
    return d, m, minimum(low, nmax), minimum(high, nmax)


@kernel
def _bytes_around_zero(x, i):
    """Scale and codes -127..127 of a block, halves rounded away from zero."""
    a, b = load(x, i), load(x, i + 16)
    d = np.int32(highest(maximum(bits(absolute(a)), bits(absolute(b))))).view(np.float32) / np.float32(127)
    inverse = _reciprocal(d)
    a, b = a * inverse, b * inverse
    low = to_int(a + select(a < np.float32(0), -BELOW_HALF, BELOW_HALF))
    high = to_int(b + select(b < np.float32(0), -BELOW_HALF, BELOW_HALF))
    return d, low, high


@kernel
def _store_codes(out, o, low, high, fifth):
    """Write 32 codes: fifth bits first, as a little-endian uint32, if the type has them."""
    if fifth:
        qh = lane_bits((low & 16) != 0) | lane_bits((high & 16) != 0) << 16
        for byte in range(4):
            out[o + byte] = (qh >> 8 * byte) & 255
        o += 4
    store(out, o, (low & 15) | (high & 15) << 4)


@kernel
def _load_codes(data, o, fifth):
    """Read 32 codes."""
    fifth_low, fifth_high = lanes(0), lanes(0)
    if fifth:
        bits_low = np.int32(data[o]) | np.int32(data[o + 1]) << 8
        bits_high = np.int32(data[o + 2]) | np.int32(data[o + 3]) << 8
        ones = load(ONE_BIT, 0)
        fifth_low, fifth_high = select((ones & bits_low) != 0, 16, 0), select((ones & bits_high) != 0, 16, 0)
        o += 4
    q = load(data, o)
    return (q & 15) | fifth_low, (q >> 4) | fifth_high


@kernel
def _store_halves(values, n, out, o, step):
    """Write `n` floats as float16, `step` bytes apart; `values` has room for whole lanes."""
    halves = np.empty(SPAN, np.int32)
    for b in range(0, n, 16):
        store(halves, b, to_half(load(values, b)))
    for b in range(n):
        out[o + b * step] = halves[b] & 255
        out[o + b * step + 1] = halves[b] >> 8


@kernel
def _load_halves(data, o, step, n, values):
    """Read `n` float16 that lie `step` bytes apart."""
    halves = np.zeros(SPAN, np.int32)
    for b in range(n):
        halves[b] = np.int32(data[o + b * step]) | np.int32(data[o + b * step + 1]) << 8
    for b in range(0, n, 16):
        store(values, b, from_half(load(halves, b)))


@kernel
def _spans(n_weights):
    return (n_weights // QK + SPAN - 1) // SPAN


# ---- Q4_0, 18 bytes: d float16 @0, qs 16 bytes @2 (two codes per byte).          weight = (code - 8) * d
#      Q5_0, 22 bytes: d float16 @0, qh 4 bytes @2 (bit j is the fifth bit of code j), qs 16 bytes @6.
#                                                                                  weight = (code - 16) * d


@parallel_kernel
def _encode_around_zero(x, fifth, out):
    x, out = x.reshape(-1), out.reshape(-1)
    size, nmax = (22, 16) if fifth else (18, 8)
    for span in prange(_spans(x.size)):
        first = span * SPAN
        n = min(SPAN, x.size // QK - first)
        d = np.zeros(SPAN, np.float32)
        for b in range(n):
            d[b], low, high = _around_zero(x, (first + b) * QK, nmax)
            _store_codes(out, (first + b) * size + 2, low, high, fifth)
        _store_halves(d, n, out, first * size, size)


@parallel_kernel
def _decode_around_zero(data, fifth, out):
    data, out = data.reshape(-1), out.reshape(-1)
    size, nmax = (22, 16) if fifth else (18, 8)
    for span in prange(_spans(out.size)):
        first = span * SPAN
        n = min(SPAN, out.size // QK - first)
        d = np.empty(SPAN, np.float32)
        _load_halves(data, first * size, size, n, d)
        for b in range(n):
            low, high = _load_codes(data, (first + b) * size + 2, fifth)
            store(out, (first + b) * QK, to_float(low - nmax) * d[b])
            store(out, (first + b) * QK + 16, to_float(high - nmax) * d[b])


encode_q4_0 = _with(_encode_around_zero, False)
decode_q4_0 = _with(_decode_around_zero, False)
encode_q5_0 = _with(_encode_around_zero, True)
decode_q5_0 = _with(_decode_around_zero, True)


# ---- Q4_1, 20 bytes: d float16 @0, m float16 @2, qs 16 bytes @4.                 weight = code * d + m
#      Q5_1, 24 bytes: d float16 @0, m float16 @2, qh 4 bytes @4, qs 16 bytes @8.  weight = code * d + m


@parallel_kernel
def _encode_above_minimum(x, fifth, out):
    x, out = x.reshape(-1), out.reshape(-1)
    size, nmax = (24, 31) if fifth else (20, 15)
    for span in prange(_spans(x.size)):
        first = span * SPAN
        n = min(SPAN, x.size // QK - first)
        d, m = np.zeros(SPAN, np.float32), np.zeros(SPAN, np.float32)
        for b in range(n):
            d[b], m[b], low, high = _above_minimum(x, (first + b) * QK, nmax)
            _store_codes(out, (first + b) * size + 4, low, high, fifth)
        _store_halves(d, n, out, first * size, size)
        _store_halves(m, n, out, first * size + 2, size)


@parallel_kernel
def _decode_above_minimum(data, fifth, out):
    data, out = data.reshape(-1), out.reshape(-1)
    size = 24 if fifth else 20
    for span in prange(_spans(out.size)):
        first = span * SPAN
        n = min(SPAN, out.size // QK - first)
        d, m = np.empty(SPAN, np.float32), np.empty(SPAN, np.float32)
        _load_halves(data, first * size, size, n, d)
        _load_halves(data, first * size + 2, size, n, m)
        for b in range(n):
            low, high = _load_codes(data, (first + b) * size + 4, fifth)
            store(out, (first + b) * QK, to_float(low) * d[b] + m[b])
            store(out, (first + b) * QK + 16, to_float(high) * d[b] + m[b])


encode_q4_1 = _with(_encode_above_minimum, False)
decode_q4_1 = _with(_decode_above_minimum, False)
encode_q5_1 = _with(_encode_above_minimum, True)
decode_q5_1 = _with(_decode_above_minimum, True)


# ---- Q8_0, 34 bytes: d float16 @0, qs 32 int8 @2.                                weight = code * d
#      Q8_1, 36 bytes: d float16 @0, s float16 @2 (d times the sum of the codes), qs 32 int8 @4.


@parallel_kernel
def _encode_bytes(x, sums, out):
    x, out = x.reshape(-1), out.reshape(-1)
    size = 36 if sums else 34
    for span in prange(_spans(x.size)):
        first = span * SPAN
        n = min(SPAN, x.size // QK - first)
        d, s = np.zeros(SPAN, np.float32), np.zeros(SPAN, np.float32)
        for b in range(n):
            d[b], low, high = _bytes_around_zero(x, (first + b) * QK)
            s[b] = np.float32(total(low + high)) * d[b]
            store(out, (first + b + 1) * size - 32, low)
            store(out, (first + b + 1) * size - 16, high)
        _store_halves(d, n, out, first * size, size)
        if sums:
            _store_halves(s, n, out, first * size + 2, size)


@parallel_kernel
def _decode_bytes(data, size, out):
    data, out = data.reshape(-1), out.reshape(-1)
    codes = data.view(np.int8)
    for span in prange(_spans(out.size)):
        first = span * SPAN
        n = min(SPAN, out.size // QK - first)
        d = np.empty(SPAN, np.float32)
        _load_halves(data, first * size, size, n, d)
        for b in range(n):
            store(out, (first + b) * QK, to_float(load(codes, (first + b + 1) * size - 32)) * d[b])
            store(out, (first + b) * QK + 16, to_float(load(codes, (first + b + 1) * size - 16)) * d[b])


encode_q8_0 = _with(_encode_bytes, False)
decode_q8_0 = _with(_decode_bytes, 34)
encode_q8_1 = _with(_encode_bytes, True)
decode_q8_1 = _with(_decode_bytes, 36)


# ---- with an importance matrix: scale (and minimum) are searched for, in 16 rows side by side


class Workspace(NamedTuple):
    """Arrays of one task, in columns of 16 lanes, a row in each lane; up to `COLUMNS` weights of it at once."""

    starts: np.ndarray  # int64 (16,): where each row starts in x
    x: np.ndarray  # float32 (COLUMNS * 16,): the weights
    w: np.ndarray  # float32 (COLUMNS * 16,): importance of their errors
    codes: np.ndarray  # uint8 (COLUMNS * 16,)
    found: np.ndarray  # float32 (FOUND,): what the search found


@kernel
def _workspace():
    columns = COLUMNS * 16
    return Workspace(
        np.empty(16, np.int64),
        np.zeros(columns, np.float32),
        np.zeros(columns, np.float32),
        np.empty(columns, np.uint8),
        np.empty(FOUND, np.float32),
    )


@kernel
def _read_columns(x, i, n, ws):
    """Put weights i..i+n of 16 rows side by side."""
    for column in range(0, n, 16):
        transpose(x, ws.starts, i + column, ws.x, 16 * column)


@kernel
def _mean_squares(x, n_per_row, ws):
    """The mean square of each of 16 rows, summed from left to right."""
    sum_x2 = lanes(np.float32(0))
    for i in range(0, n_per_row, QK):
        _read_columns(x, i, QK, ws)
        for j in range(0, QK * 16, 16):
            v = load(ws.x, j)
            sum_x2 = sum_x2 + v * v
    return sum_x2 / np.float32(n_per_row)


@kernel
def _put_16(out, o, step, v):
    """Write the low 16 bits of each lane, `step` bytes apart."""
    scatter(out, o, step, v)
    scatter(out, o + 1, step, v >> 8)


@kernel
def _put_codes(codes, at, fifth, out, o, step):
    """Write a block's codes (column `at` on) to each of 16 rows: fifth bits first, if there are any."""
    if fifth:
        low, high = lanes(0), lanes(0)
        for j in range(16):
            low = low | (load(codes, at + 16 * j) >> 4) << j
            high = high | (load(codes, at + 256 + 16 * j) >> 4) << j
        _put_16(out, o, step, low)
        _put_16(out, o + 2, step, high)
        o += 4
    for j in range(16):
        low, high = load(codes, at + 16 * j), load(codes, at + 256 + 16 * j)
        scatter(out, o + j, step, (low & 15) | (high & 15) << 4)


@kernel
def _encode_16_rows(x, first, n_per_row, importance, fifth, offset, out, o, row_bytes):
    """Encode the 16 rows of `x` from element `first` on; `fifth` and `offset` say what the type has."""
    ws = _workspace()
    for row in range(16):
        ws.starts[row] = first + row * n_per_row
    sigma2 = _mean_squares(x, n_per_row, ws)
    nmax = 31 if fifth else 15
    for i in range(0, n_per_row, COLUMNS):
        n = min(COLUMNS, n_per_row - i)
        _read_columns(x, i, n, ws)
        for column in range(n):
            v = load(ws.x, 16 * column)
            store(ws.w, 16 * column, importance[i + column] * sqrt(sigma2 + v * v))
        if offset:
            ws.x[16 * n :] = 0  # the search takes all columns
            steps = np.float32(-0.9), np.float32(0.05), 36
            make_qkx_quants(ws.x, ws.w, ws.codes, ws.found, QK, nmax, *steps, False)
        for at in range(0, 16 * n, 16 * QK):
            if offset:
                _put_16(out, o, row_bytes, to_half(load(ws.found, SCALE + at // QK)))
                _put_16(out, o + 2, row_bytes, to_half(load(ws.found, LOW + at // QK)))
                o += 4
            else:
                d = make_qx_quants(ws.x, at, ws.w, ws.found, ws.codes, QK, (nmax + 1) // 2)
                _put_16(out, o, row_bytes, to_half(d))
                o += 2
            _put_codes(ws.codes, at, fifth, out, o, row_bytes)
            o += 20 if fifth else 16


@kernel
def _encode_rows(x, first, importance, fifth, offset, out):
    """Encode up to 16 rows of `x` from row `first` on; fewer are filled up with zeros."""
    n_per_row, row_bytes = x.shape[1], out.shape[1]
    n = min(16, x.shape[0] - first)
    flat, data = x.reshape(-1), out.reshape(-1)
    if n == 16:
        _encode_16_rows(
            flat, first * n_per_row, n_per_row, importance, fifth, offset, data, first * row_bytes, row_bytes
        )
    else:
        rows, encoded = np.zeros(16 * n_per_row, np.float32), np.empty(16 * row_bytes, np.uint8)
        rows[: n * n_per_row] = flat[first * n_per_row :]
        _encode_16_rows(rows, 0, n_per_row, importance, fifth, offset, encoded, 0, row_bytes)
        data[first * row_bytes :] = encoded[: n * row_bytes]


@parallel_kernel
def _encode_weighted(x, importance, fifth, offset, out):
    for group in prange((x.shape[0] + 15) // 16):
        _encode_rows(x, 16 * group, importance, fifth, offset, out)


encode_q4_0_imatrix = _with(_encode_weighted, False, False)
encode_q4_1_imatrix = _with(_encode_weighted, False, True)
encode_q5_0_imatrix = _with(_encode_weighted, True, False)
encode_q5_1_imatrix = _with(_encode_weighted, True, True)
