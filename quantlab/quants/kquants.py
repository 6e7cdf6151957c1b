"""The k-quants with sub-blocks of 16 weights, Q2_K Q3_K Q6_K, and Q8_K for activations; the others are in `q45_k`.

An encoder takes rows ``x`` (float32, C order) and fills ``out`` (uint8, one row of blocks per row);
``encode_*_imatrix`` also takes the importance of each column. A decoder turns such bytes back into float32. The loop
over an array's super-blocks is in `superblock`; a type has a kernel for a span of them, to encode and to decode.

Encoders handle 16 super-blocks at a time, one in each lane, in three steps: *search* scale and minimum of every
sub-block, *quantize the scales* of the super-block, then, with what the scales have become, *pack* the levels, for
which the 16 super-blocks are gone through one after another. Bytes equal those of ggml-quants.c.

Source: ggml-quants.c of llama.cpp, commit 0c1e57098.
"""

import numpy as np

from quantlab.quants.drivers import QK_K, decoder, encoders
from quantlab.quants.lanes import (
    absolute,
    any_lane,
    bits,
    from_bits,
    from_half,
    kernel,
    lanes,
    load,
    maximum,
    minimum,
    nearest_int,
    scatter,
    select,
    store,
    to_float,
    to_half,
    total,
)
from quantlab.quants.search import (
    GROUP_MAX_EPS,
    LOW,
    ONE,
    SCALE,
    ZERO,
    largest,
    make_q3_quants,
    make_qkx_quants,
    make_qp_quants,
    make_qx_quants,
)
from quantlab.quants.superblock import (
    half_at,
    largest_positive,
    offset_levels,
    put_half,
    read_columns,
    signed_byte,
    signed_levels,
    weigh,
    workspace,
)

# Constants of searches are passed as np.int64(15), not as 15: numba would compile a search again for every literal.
TWO = np.float32(2)


# ---------------------------------------------------------------------------------------------------------------------
# Q2_K: 16 sub-blocks of 16 weights, x = d * sc * l - dmin * m
#
#   byte     0              16         80     82                             84 bytes
#            scales u8[16]  qs u8[64]  d f16  dmin f16
#
#   scales   low four bits sc, high four bits m
#   qs       byte 32 h + i holds, two bits each, weights i, i + 32, i + 64, i + 96 of half h of the super-block
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def _search_q2_k(ws, rmin, rdelta, nstep, use_mad):
    make_qkx_quants(
        ws.x, ws.w, ws.levels, ws.found, np.int64(16), np.int64(3), rmin, rdelta, np.int64(nstep), np.bool_(use_mad)
    )
    for j in range(0, 16 * 16, 16):
        store(ws.scale, j, load(ws.found, SCALE + j))
        store(ws.low, j, -load(ws.found, LOW + j))


@kernel
def _quantize_scales_q2_k(ws):
    """Quantize scales and minima to four bits by the largest of them."""
    top = np.float32(15)
    max_scale, max_low = largest_positive(ws.scale, 16), largest_positive(ws.low, 16)
    for j in range(0, 16 * 16, 16):
        ls, lm = nearest_int(top / max_scale * load(ws.scale, j)), nearest_int(top / max_low * load(ws.low, j))
        store(ws.ls, j, select(max_scale > ZERO, ls, 0))
        store(ws.lm, j, select(max_low > ZERO, lm, 0))
    return max_scale / top, max_low / top


@kernel
def _pack_scales_q2_k(ws, scale, low):
    d, dmin = to_half(scale), to_half(low)
    put_half(ws.head, 16, d)
    put_half(ws.head, 18, dmin)
    for j in range(16):
        packed = (load(ws.ls, 16 * j) | (load(ws.lm, 16 * j) << 4)) & 0xFF
        scatter(ws.head, j, 32, packed)
        store(ws.d, 16 * j, from_half(d) * to_float(packed & 15))
        store(ws.m, 16 * j, from_half(dmin) * to_float(packed >> 4))


@kernel
def _pack_q2_k(x, ws, first, stop, out):
    for k in range(min(16, stop - first)):
        at, block = (first + k) * QK_K, (first + k) * 84
        store(out, block, load(ws.head, 32 * k))
        for half in range(2):
            for i in range(128 * half, 128 * half + 32, 16):
                packed = lanes(0)
                for part in range(4):
                    packed = packed | (offset_levels(x, at, ws, k, i + 32 * part, 16, 3) << (2 * part))
                store(out, block + 16 + i - 96 * half, packed)
        for byte in range(4):
            out[block + 80 + byte] = ws.head[32 * k + 16 + byte]


@kernel
def _span_q2_k(x, importance, out, start, stop):
    ws = workspace()
    for first in range(start, stop, 16):
        read_columns(x, first, stop, stop, ws.x, ws.rows)
        if importance is None:
            for i in range(0, 16 * QK_K, 16):
                store(ws.w, i, absolute(load(ws.x, i)))
            _search_q2_k(ws, np.float32(-0.5), np.float32(0.1), 15, True)
            scale, low = _quantize_scales_q2_k(ws)
        else:
            weigh(ws, importance, first, stop, ONE, 16)
            _search_q2_k(ws, np.float32(-0.9), np.float32(0.05), 36, False)
            scale = make_qp_quants(ws.scale, ws.sum_w, ws.ls, 16, 15)
            low = make_qp_quants(ws.low, ws.sum_w, ws.lm, 16, 15)
        _pack_scales_q2_k(ws, scale, low)
        _pack_q2_k(x, ws, first, stop, out)


encode_q2_k, encode_q2_k_imatrix = encoders(_span_q2_k)


@kernel
def _decode_span_q2_k(data, out, start, stop):
    for k in range(start, stop):
        at, block = k * QK_K, k * 84
        d, dmin = half_at(data, block + 80), half_at(data, block + 82)
        for half in range(2):
            for part in range(4):
                for i in range(0, 32, 16):
                    sc = np.int32(data[block + 8 * half + 2 * part + i // 16])
                    l = (load(data, block + 16 + 32 * half + i) >> (2 * part)) & 3
                    v = d * np.float32(sc & 15) * to_float(l) - dmin * np.float32(sc >> 4)
                    store(out, at + 128 * half + 32 * part + i, v)


decode_q2_k = decoder(_decode_span_q2_k)


# ---------------------------------------------------------------------------------------------------------------------
# Q3_K: 16 sub-blocks of 16 weights, x = d * (sc - 32) * (l - 4)
#
#   byte     0             32         96              108                    110 bytes
#            hmask u8[32]  qs u8[64]  scales u8[12]   d f16
#
#   hmask    bit p of byte i is the third bit of weight 32 p + i
#   qs       the two low bits, as in Q2_K
#   scales   bytes 0-7: low four bits of sc 0-7, and of sc 8-15 above them; byte 8 + i: the two high bits of
#            sc i, i + 4, i + 8, i + 12
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def _quantize_scales_q3_k(ws):
    """Quantize the scales to six bits by the one of largest magnitude."""
    max_scale, _ = largest(ws.scale, 0, 16)
    iscale = np.float32(-32) / max_scale
    for j in range(0, 16 * 16, 16):
        l = maximum(-32, minimum(31, signed_byte(nearest_int(iscale * load(ws.scale, j))))) + 32
        store(ws.ls, j, select(max_scale != ZERO, l, 0))
    return select(max_scale != ZERO, ONE / iscale, ZERO)


@kernel
def _pack_scales_q3_k(ws, scale):
    half = to_half(scale)
    put_half(ws.head, 12, half)
    d = from_half(half)
    for j in range(0, 16 * 16, 16):
        store(ws.d, j, d * to_float(load(ws.ls, j) - 32))
    for j in range(8):
        scatter(ws.head, j, 32, (load(ws.ls, 16 * j) & 15) | ((load(ws.ls, 16 * j + 128) & 15) << 4))
    for j in range(4):
        packed = lanes(0)
        for part in range(4):
            packed = packed | ((load(ws.ls, 16 * j + 64 * part) >> 4) << (2 * part))
        scatter(ws.head, 8 + j, 32, packed)


@kernel
def _pack_q3_k(x, ws, first, stop, out):
    for k in range(min(16, stop - first)):
        at, block = (first + k) * QK_K, (first + k) * 110
        for i in range(0, 32, 16):
            mask = lanes(0)
            for half in range(2):
                packed = lanes(0)
                for part in range(4):
                    l = signed_levels(x, at, ws, k, 128 * half + 32 * part + i, 4)
                    packed = packed | ((l & 3) << (2 * part))
                    mask = mask | ((l >> 2) << (4 * half + part))
                store(out, block + 32 + 32 * half + i, packed)
            store(out, block + i, mask)
        for byte in range(14):
            out[block + 96 + byte] = ws.head[32 * k + byte]


@kernel
def _span_q3_k(x, importance, out, start, stop):
    ws = workspace()
    for first in range(start, stop, 16):
        read_columns(x, first, stop, stop, ws.x, ws.rows)
        if importance is None:
            for i in range(0, 16 * QK_K, 16):
                v = load(ws.x, i)
                store(ws.w, i, v * v)
            make_q3_quants(ws.x, ws.w, ws.found, ws.levels, 4)
            for j in range(0, 16 * 16, 16):
                store(ws.scale, j, load(ws.found, SCALE + j))
            scale = _quantize_scales_q3_k(ws)
        else:
            weigh(ws, importance, first, stop, TWO, 16)
            for j in range(16):
                store(ws.scale, 16 * j, make_qx_quants(ws.x, 256 * j, ws.w, ws.found, ws.levels, 16, 4))
            scale = make_qx_quants(ws.scale, 0, ws.sum_w, ws.found, ws.ls, 16, 32)
        _pack_scales_q3_k(ws, scale)
        _pack_q3_k(x, ws, first, stop, out)


encode_q3_k, encode_q3_k_imatrix = encoders(_span_q3_k)


@kernel
def _decode_span_q3_k(data, out, start, stop):
    for k in range(start, stop):
        at, block = k * QK_K, k * 110
        d = half_at(data, block + 108)
        for j in range(16):
            low = np.int32(data[block + 96 + j % 8]) >> (j // 8 * 4)
            high = np.int32(data[block + 104 + j % 4]) >> (j // 4 * 2)
            sc = (low & 15) | ((high & 3) << 4)
            part, i = j // 2, j % 2 * 16
            l = (load(data, block + 32 + part // 4 * 32 + i) >> (part % 4 * 2)) & 3
            l = l + (((load(data, block + i) >> part) & 1) << 2) - 4
            store(out, at + 16 * j, d * np.float32(sc - 32) * to_float(l))


decode_q3_k = decoder(_decode_span_q3_k)


# ---------------------------------------------------------------------------------------------------------------------
# Q6_K: 16 sub-blocks of 16 weights, x = d * sc * (l - 32)
#
#   byte     0           128        192            208                       210 bytes
#            ql u8[128]  qh u8[64]  scales i8[16]  d f16
#
#   ql       bytes 64 h + i and 64 h + 32 + i hold the low four bits of weights i and i + 32 of half h of the
#            super-block, and above them those of weights i + 64 and i + 96
#   qh       the two high bits, laid out as qs of Q2_K
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def _quantize_scales_q6_k(ws):
    """Quantize the scales to eight bits by the one of largest magnitude, and lay them out."""
    max_scale, magnitude = largest(ws.scale, 0, 16)
    zero = magnitude < GROUP_MAX_EPS
    iscale = np.float32(-128) / max_scale
    half = select(zero, 0, to_half(ONE / iscale))
    put_half(ws.head, 16, half)
    d = from_half(half)
    for j in range(16):
        l = select(zero, 0, signed_byte(minimum(127, nearest_int(iscale * load(ws.scale, 16 * j)))))
        scatter(ws.head, j, 32, l)
        store(ws.d, 16 * j, d * to_float(l))
    if any_lane(zero):  # C clears these blocks, levels of the search and all
        for i in range(0, 16 * QK_K, 16):
            store(ws.levels, i, select(zero, 0, load(ws.levels, i)))


@kernel
def _pack_q6_k(x, ws, first, stop, out):
    for k in range(min(16, stop - first)):
        at, block = (first + k) * QK_K, (first + k) * 210
        for half in range(2):
            for i in range(0, 32, 16):
                l1 = signed_levels(x, at, ws, k, 128 * half + i, 32)
                l2 = signed_levels(x, at, ws, k, 128 * half + 32 + i, 32)
                l3 = signed_levels(x, at, ws, k, 128 * half + 64 + i, 32)
                l4 = signed_levels(x, at, ws, k, 128 * half + 96 + i, 32)
                store(out, block + 64 * half + i, (l1 & 15) | ((l3 & 15) << 4))
                store(out, block + 64 * half + 32 + i, (l2 & 15) | ((l4 & 15) << 4))
                high = (l1 >> 4) | (l2 >> 4 << 2) | (l3 >> 4 << 4) | (l4 >> 4 << 6)
                store(out, block + 128 + 32 * half + i, high)
        store(out, block + 192, load(ws.head, 32 * k))
        for byte in range(2):
            out[block + 208 + byte] = ws.head[32 * k + 16 + byte]


@kernel
def _span_q6_k(x, importance, out, start, stop):
    ws = workspace()
    for first in range(start, stop, 16):
        read_columns(x, first, stop, stop, ws.x, ws.rows)
        if importance is None:
            for i in range(0, 16 * QK_K, 16):
                v = load(ws.x, i)
                store(ws.w, i, v * v)
        else:
            read_columns(importance, first, stop, importance.size // QK_K, ws.w, ws.rows)
        for j in range(16):
            store(ws.scale, 16 * j, make_qx_quants(ws.x, 256 * j, ws.w, ws.found, ws.levels, 16, 32))
        _quantize_scales_q6_k(ws)
        _pack_q6_k(x, ws, first, stop, out)


encode_q6_k, encode_q6_k_imatrix = encoders(_span_q6_k)


@kernel
def _decode_span_q6_k(data, out, start, stop):
    for k in range(start, stop):
        at, block = k * QK_K, k * 210
        d = half_at(data, block + 208)
        for j in range(16):
            half, part, i = j // 8, j % 8 // 2, j % 2 * 16
            sc = (np.int32(data[block + 192 + j]) ^ 0x80) - 0x80
            l = (load(data, block + 64 * half + part % 2 * 32 + i) >> (part // 2 * 4)) & 15
            l = l | (((load(data, block + 128 + 32 * half + i) >> (2 * part)) & 3) << 4)
            store(out, at + 16 * j, d * np.float32(sc) * to_float(l - 32))


decode_q6_k = decoder(_decode_span_q6_k)


# ---------------------------------------------------------------------------------------------------------------------
# Q8_K, which llama.cpp uses for activations: x = d * q
#
#   byte     0      4           260                                          292 bytes
#            d f32  qs i8[256]  bsums i16[16]: sums of 16 neighbouring q
# ---------------------------------------------------------------------------------------------------------------------


@kernel
def _span_q8_k(x, importance, out, start, stop):
    ws = workspace()
    for first in range(start, stop, 16):
        read_columns(x, first, stop, stop, ws.x, ws.rows)
        peak, magnitude = largest(ws.x, 0, QK_K)
        iscale = np.float32(-127) / peak
        store(ws.scale, 0, select(magnitude > ZERO, iscale, ZERO))
        d = bits(select(magnitude > ZERO, ONE / iscale, ZERO))
        for byte in range(4):
            scatter(ws.head, byte, 32, d >> (8 * byte))
        for k in range(min(16, stop - first)):
            at, block = (first + k) * QK_K, (first + k) * 292
            for byte in range(4):
                out[block + byte] = ws.head[32 * k + byte]
            for j in range(16):
                q = signed_byte(minimum(127, nearest_int(load(x, at + 16 * j) * ws.scale[k])))
                store(out, block + 4 + 16 * j, q)
                bsum = total(q)
                out[block + 260 + 2 * j] = bsum & 0xFF
                out[block + 261 + 2 * j] = (bsum >> 8) & 0xFF


encode_q8_k, _ = encoders(_span_q8_k)


@kernel
def _decode_span_q8_k(data, out, start, stop):
    for k in range(start, stop):
        at, block = k * QK_K, k * 292
        word = np.int32(0)
        for byte in range(4):
            word |= np.int32(data[block + byte]) << np.int32(8 * byte)
        d = from_bits(lanes(word))
        for i in range(0, QK_K, 16):
            store(out, at + i, d * to_float(signed_byte(load(data, block + 4 + i))))


decode_q8_k = decoder(_decode_span_q8_k)
