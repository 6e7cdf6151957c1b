"""Types of one and two bits: TQ1_0 and TQ2_0 with the levels -1, 0 and 1, Q1_0 with signs alone, Q2_0 with -1 to 2.

    byte     0         48       52                                          TQ1_0: 256 weights, 54 bytes
             qs u8[48] qh u8[4] d f16
    byte     0         64                                                   TQ2_0: 256 weights, 66 bytes
             qs u8[64] d f16
    byte     0     2                                                        Q1_0: 128 weights, 18 bytes
             d f16 qs u8[16]: bit i % 8 of byte i / 8 is set where weight i is not negative
    byte     0     2                                                        Q2_0: 64 weights, 18 bytes
             d f16 qs u8[16]: two bits a weight, four neighbours in a byte

    qs, qh   TQ1_0: a byte is a number of five ternary digits n, as the fraction ceil(256 n / 243); byte i of the first
             32 holds weights i, i + 32 … i + 128, of the next 16 weights 160 + i, 176 + i … 224 + i; qh those of the
             last 16 weights four apart. TQ2_0: two bits a weight, laid out as in Q2_K

The scale is the largest magnitude, of Q1_0 the mean magnitude; there is no search, and importance is not used.

Source: `quantize_row_tq*_ref`, `quantize_row_q[12]_0_ref` and `dequantize_row_*` of ggml-quants.c, llama-cpp-python
0.3.36.
"""

import numpy as np

from quantlab.quants.drivers import QK_K, decoder, encoders
from quantlab.quants.lanes import (
    absolute,
    bits,
    highest,
    kernel,
    lane_bits,
    lanes,
    load,
    maximum,
    select,
    store,
    to_float,
    to_half,
    total,
)
from quantlab.quants.superblock import half_at, read_columns

QK1_0, QK2_0 = 128, 64
ZERO, HALF, ONE, TWO = np.float32(0), np.float32(0.5), np.float32(1), np.float32(2)
ONE_BIT = np.left_shift(1, np.arange(16), dtype=np.int32)  # bit i in lane i
TWO_BITS = 2 * np.arange(16, dtype=np.int32)  # the place of two bits in each lane


@kernel
def _largest(x, at, n):
    """Return the largest magnitude of `n` weights."""
    peak = lanes(0)
    for i in range(at, at + n, 16):
        peak = maximum(peak, bits(absolute(load(x, i))))
    return np.int32(highest(peak)).view(np.float32)


@kernel
def _inverse(d):
    return ONE / d if d > ZERO else ZERO


@kernel
def _put_half(out, at, d):
    half = highest(to_half(lanes(d)))
    out[at] = half & 255
    out[at + 1] = half >> 8


@kernel
def _ternary(v):
    """Round to 0, 1, 2 for -1, 0, 1, halves away from zero; 1 for what is infinite or NaN, as in C."""
    return select((v >= HALF) & (v < TWO), 2, select((v <= -HALF) & (v > -TWO), 0, 1))


# ---- TQ1_0


@kernel
def _digits(x, at, step, n, iscale):
    """Return numbers whose `n` ternary digits are 16 neighbours and those `step` weights on, the first one highest."""
    number = lanes(0)
    for i in range(n):
        number = number * 3 + _ternary(load(x, at + step * i) * iscale)
    return number


@kernel
def _fraction(number):
    """Return ceil(256 * number / 243): (256 n + 242) // 243, the division by a product and a shift."""
    return (number * 256 + 242) * 17261 >> 22


@kernel
def _span_tq1_0(x, importance, out, start, stop):
    last = np.empty(16, np.int32)
    for k in range(start, stop):
        at, block = k * QK_K, k * 54
        d = _largest(x, at, QK_K)
        iscale = _inverse(d)
        _put_half(out, block + 52, d)
        for i in range(0, 32, 16):
            store(out, block + i, _fraction(_digits(x, at + i, 32, 5, iscale)))
        store(out, block + 32, _fraction(_digits(x, at + 160, 16, 5, iscale)))
        store(last, 0, _ternary(load(x, at + 240) * iscale))
        for i in range(4):
            number = ((last[i] * 3 + last[i + 4]) * 3 + last[i + 8]) * 3 + last[i + 12]
            out[block + 48 + i] = (number * 3 * 256 + 242) // 243


encode_tq1_0, _ = encoders(_span_tq1_0)


@kernel
def _digit(byte, power):
    """Return the digit that `power` brings to the front, as a level."""
    return to_float(((byte * power & 255) * 3 >> 8) - 1)


@kernel
def _decode_span_tq1_0(data, out, start, stop):
    last = np.empty(16, np.int32)
    for k in range(start, stop):
        at, block = k * QK_K, k * 54
        d = half_at(data, block + 52)
        power = 1
        for n in range(5):
            for i in range(0, 32, 16):
                store(out, at + 32 * n + i, _digit(load(data, block + i), power) * d)
            store(out, at + 160 + 16 * n, _digit(load(data, block + 32), power) * d)
            if n < 4:
                for i in range(4):
                    last[4 * n + i] = (np.int32(data[block + 48 + i]) * power & 255) * 3 >> 8
            power *= 3
        store(out, at + 240, to_float(load(last, 0) - 1) * d)


decode_tq1_0 = decoder(_decode_span_tq1_0)


# ---- TQ2_0


@kernel
def _span_tq2_0(x, importance, out, start, stop):
    for k in range(start, stop):
        at, block = k * QK_K, k * 66
        d = _largest(x, at, QK_K)
        iscale = _inverse(d)
        _put_half(out, block + 64, d)
        for half in range(2):
            for i in range(0, 32, 16):
                packed = lanes(0)
                for part in range(4):
                    packed = packed | (_ternary(load(x, at + 128 * half + 32 * part + i) * iscale) << (2 * part))
                store(out, block + 32 * half + i, packed)


encode_tq2_0, _ = encoders(_span_tq2_0)


@kernel
def _decode_span_tq2_0(data, out, start, stop):
    for k in range(start, stop):
        at, block = k * QK_K, k * 66
        d = half_at(data, block + 64)
        for half in range(2):
            for i in range(0, 32, 16):
                packed = load(data, block + 32 * half + i)
                for part in range(4):
                    store(out, at + 128 * half + 32 * part + i, to_float((packed >> (2 * part) & 3) - 1) * d)


decode_tq2_0 = decoder(_decode_span_tq2_0)


# ---- Q1_0


@kernel
def _span_q1_0(x, importance, out, start, stop):
    rows, columns, d = np.empty(16, np.int64), np.empty(16 * QK1_0, np.float32), np.empty(16, np.float32)
    for first in range(start, stop, 16):
        read_columns(x, first, stop, stop, columns, rows, QK1_0)
        sums = lanes(ZERO)
        for i in range(0, 16 * QK1_0, 16):
            sums = sums + absolute(load(columns, i))
        store(d, 0, sums / np.float32(QK1_0))
        for k in range(first, min(first + 16, stop)):
            _put_half(out, 18 * k, d[k - first])
            for j in range(8):
                signs = lane_bits(load(x, QK1_0 * k + 16 * j) >= ZERO)
                out[18 * k + 2 + 2 * j] = signs & 255
                out[18 * k + 3 + 2 * j] = signs >> 8


encode_q1_0, _ = encoders(_span_q1_0, block=QK1_0)


@kernel
def _decode_span_q1_0(data, out, start, stop):
    for k in range(start, stop):
        d = half_at(data, 18 * k)
        for j in range(8):
            signs = np.int32(data[18 * k + 2 + 2 * j]) | np.int32(data[18 * k + 3 + 2 * j]) << 8
            store(out, QK1_0 * k + 16 * j, select((load(ONE_BIT, 0) & signs) != 0, d, -d))


decode_q1_0 = decoder(_decode_span_q1_0, block=QK1_0)


# ---- Q2_0


@kernel
def _span_q2_0(x, importance, out, start, stop):
    for k in range(start, stop):
        d = _largest(x, QK2_0 * k, QK2_0)
        iscale = _inverse(d)
        _put_half(out, 18 * k, d)
        for j in range(4):
            v = load(x, QK2_0 * k + 16 * j) * iscale
            level = select(absolute(v) < TWO, _ternary(v), 0)  # C rounds infinities to the lowest level
            word = total(level << load(TWO_BITS, 0))
            for byte in range(4):
                out[18 * k + 2 + 4 * j + byte] = word >> (8 * byte) & 255


encode_q2_0, _ = encoders(_span_q2_0, block=QK2_0)


@kernel
def _decode_span_q2_0(data, out, start, stop):
    for k in range(start, stop):
        d = half_at(data, 18 * k)
        for j in range(4):
            at = 18 * k + 2 + 4 * j
            word = np.int32(data[at]) | np.int32(data[at + 1]) << 8
            word = np.int32(word | np.int32(data[at + 2]) << 16 | np.int32(data[at + 3]) << 24)
            store(out, QK2_0 * k + 16 * j, to_float((lanes(word) >> load(TWO_BITS, 0) & 3) - 1) * d)


decode_q2_0 = decoder(_decode_span_q2_0, block=QK2_0)
