"""MXFP4 and NVFP4: floats of four bits (E2M1) with a scale of eight bits for 32 or 16 weights.

    byte     0     1                                                        MXFP4: 32 weights, 17 bytes
             e u8  qs u8[16]
    byte     0        4                                                     NVFP4: 64 weights, 36 bytes
             d u8[4]  qs u8[32]

    e        the scale is 2**(e - 127) (E8M0); the largest weight gets the exponent of the largest value, 4
    d        four scales, floats without sign of four and three bits (UE4M3); the largest weight gets the value 6
    qs       byte i holds weight i in its low four bits, weight i + 16 in the high ones; NVFP4: 8 bytes for each scale,
             weights i and i + 8

Source: `quantize_row_mxfp4_ref`, `quantize_row_nvfp4_ref` and `dequantize_row_*` of ggml-quants.c and ggml-impl.h,
llama-cpp-python 0.3.36.
"""

from math import floor, log2

import numpy as np

from quantlab.quants.drivers import decoder, encoders
from quantlab.quants.ggml_types import GGML_TYPES
from quantlab.quants.lanes import (
    absolute,
    bits,
    highest,
    kernel,
    lanes,
    load,
    look_up,
    maximum,
    select,
    store,
    to_float,
)

QK_MXFP4, QK_NVFP4 = 32, 64
ZERO = np.float32(0)
VALUES = np.array(GGML_TYPES["MXFP4"].levels, np.int8)  # twice what E2M1 says


def _unsigned_floats():
    """Return half of what each byte says as UE4M3; 127, its NaN, counts as 0, and the highest bit for nothing."""
    exponent, mantissa = np.divmod(np.arange(256) & 127, 8)
    values = np.where(exponent > 0, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 1, -9)) / 2
    values[127] = 0
    return values.astype(np.float32)


UE4M3 = _unsigned_floats()


@kernel
def _power(e):
    """Return 2**(e - 128), of which the values are multiples."""
    return np.int32(0x00200000 << e if e < 2 else (e - 1) << 23).view(np.float32)


@kernel
def _nearest(v, d):
    """Return the codes whose values times `d` are nearest, the first of equals."""
    code, least = lanes(0), absolute(ZERO * d - v)
    for k in range(1, 16):
        error = absolute(np.float32(VALUES[k]) * d - v)
        less = error < least
        least = select(less, error, least)
        code = select(less, k, code)
    return code


@kernel
def _exponent(peak):
    """Return e for the largest magnitude. It is a byte: C lets tiny weights' exponents wrap."""
    if peak == ZERO:
        return 0
    return (int(floor(np.float32(log2(np.float64(peak))))) + 125) & 255


@kernel
def _span_mxfp4(x, importance, out, start, stop):
    for k in range(start, stop):
        low, high = load(x, QK_MXFP4 * k), load(x, QK_MXFP4 * k + 16)
        peak = np.int32(highest(maximum(bits(absolute(low)), bits(absolute(high))))).view(np.float32)
        e = _exponent(peak)
        d = _power(e)
        out[17 * k] = e
        store(out, 17 * k + 1, _nearest(low, d) | (_nearest(high, d) << 4))


encode_mxfp4, _ = encoders(_span_mxfp4, block=QK_MXFP4)


@kernel
def _decode_span_mxfp4(data, out, start, stop):
    for k in range(start, stop):
        d, packed = _power(np.int64(data[17 * k])), load(data, 17 * k + 1)
        store(out, QK_MXFP4 * k, to_float(look_up(VALUES, packed & 15)) * d)
        store(out, QK_MXFP4 * k + 16, to_float(look_up(VALUES, packed >> 4)) * d)


decode_mxfp4 = decoder(_decode_span_mxfp4, block=QK_MXFP4)


@kernel
def _to_ue4m3(v):
    """Round a positive float to UE4M3, half up, at most 448."""
    if not v > ZERO:
        return 0
    word = np.int64(np.float32(min(v, np.float32(448))).view(np.int32))
    exponent = (word >> 23) - 120
    if exponent <= 0:
        mantissa = int(v * np.float32(512) + np.float32(0.5))
        return min(mantissa, 7)
    rounded = (exponent << 3 | (word >> 20 & 7)) + (word >> 19 & 1)
    return rounded if rounded < 0x78 else 0x7E


@kernel
def _span_nvfp4(x, importance, out, start, stop):
    codes = np.empty(16, np.uint8)
    for k in range(start, stop):
        for s in range(4):
            v = load(x, QK_NVFP4 * k + 16 * s)
            peak = np.int32(highest(bits(absolute(v)))).view(np.float32)
            e = _to_ue4m3(peak / np.float32(6))
            out[36 * k + s] = e
            store(codes, 0, _nearest(v, UE4M3[e]))
            for i in range(8):
                out[36 * k + 4 + 8 * s + i] = codes[i] | codes[i + 8] << 4


encode_nvfp4, _ = encoders(_span_nvfp4, block=QK_NVFP4)


@kernel
def _decode_span_nvfp4(data, out, start, stop):
    codes = np.empty(32, np.uint8)
    for k in range(start, stop):
        for s in range(4):
            d = UE4M3[data[36 * k + s]]
            packed = load(data, 36 * k + 4 + 16 * (s // 2))
            if s % 2 == 0:
                store(codes, 0, packed & 15)
                store(codes, 16, packed >> 4)
            for i in range(8):
                out[QK_NVFP4 * k + 16 * s + i] = np.float32(VALUES[codes[8 * (s % 2) + i]]) * d
                out[QK_NVFP4 * k + 16 * s + 8 + i] = np.float32(VALUES[codes[16 + 8 * (s % 2) + i]]) * d


decode_nvfp4 = decoder(_decode_span_nvfp4, block=QK_NVFP4)
