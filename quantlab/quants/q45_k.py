"""Q4_K and Q5_K, the k-quants with 8 sub-blocks of 32 weights: x = d * sc * l - dmin * m.

    byte     0      2         4              16                              Q4_K, 144 bytes
             d f16  dmin f16  scales u8[12]  qs u8[128]
    byte     0      2         4              16         48                   Q5_K, 176 bytes
             d f16  dmin f16  scales u8[12]  qh u8[32]  qs u8[128]

    scales   bytes 0-3 and 4-7: sc and m of sub-blocks 0-3, six bits, and above them the two high bits of those of
             sub-blocks 4-7; bytes 8-11: the four low bits of sub-blocks 4-7, sc below m
    qs       byte 32 p + i holds weight i of sub-block 2 p in its low four bits, of sub-block 2 p + 1 in the high ones
    qh       bit j of byte i is the fifth bit of weight i of sub-block j

The three steps of an encoder are those of `kquants`.

Source: ggml-quants.c of llama.cpp, commit 0c1e57098.
"""

import numpy as np

from quantlab.quants.drivers import QK_K, decoder, encoders
from quantlab.quants.lanes import (
    absolute,
    from_half,
    kernel,
    lanes,
    load,
    minimum,
    nearest_int,
    scatter,
    select,
    sqrt,
    store,
    to_float,
    to_half,
)
from quantlab.quants.search import LOW, SCALE, ZERO, make_qkx_quants, make_qp_quants
from quantlab.quants.superblock import (
    half_at,
    largest_positive,
    offset_levels,
    put_half,
    read_columns,
    weigh,
    workspace,
)

TWO = np.float32(2)


@kernel
def _search_q45_k(ws, nmax, rmin, rdelta, nstep):
    make_qkx_quants(ws.x, ws.w, ws.levels, ws.found, np.int64(32), nmax, rmin, rdelta, nstep, np.bool_(False))
    for j in range(0, 8 * 16, 16):
        store(ws.scale, j, load(ws.found, SCALE + j))
        store(ws.low, j, -load(ws.found, LOW + j))


@kernel
def _fit_q45_k(ws, nmax, rmin, nstep):
    """Search without an importance matrix; return scale and minimum of the super-blocks."""
    for j in range(0, 16 * QK_K, 512):
        sum_x2 = lanes(ZERO)
        for i in range(j, j + 512, 16):
            v = load(ws.x, i)
            sum_x2 = sum_x2 + v * v
        av_x = sqrt(sum_x2 / np.float32(32))
        for i in range(j, j + 512, 16):
            store(ws.w, i, av_x + absolute(load(ws.x, i)))
    _search_q45_k(ws, nmax, rmin, np.float32(0.1), nstep)
    top = np.float32(63)
    max_scale, max_low = largest_positive(ws.scale, 8), largest_positive(ws.low, 8)
    inv_scale = select(max_scale > ZERO, top / max_scale, ZERO)
    inv_low = select(max_low > ZERO, top / max_low, ZERO)
    for j in range(0, 8 * 16, 16):
        store(ws.ls, j, minimum(63, nearest_int(inv_scale * load(ws.scale, j)) & 0xFF))
        store(ws.lm, j, minimum(63, nearest_int(inv_low * load(ws.low, j)) & 0xFF))
    return max_scale / top, max_low / top


@kernel
def _fit_q45_k_weighted(ws, importance, first, stop, nmax):
    """Search with an importance matrix; return scale and minimum of the super-blocks."""
    weigh(ws, importance, first, stop, TWO, 32)
    _search_q45_k(ws, nmax, np.float32(-0.9), np.float32(0.05), np.int64(36))
    scale = make_qp_quants(ws.scale, ws.sum_w, ws.ls, 8, 63)
    low = make_qp_quants(ws.low, ws.sum_w, ws.lm, 8, 63)
    return scale, low


@kernel
def _pack_scales_q45_k(ws, scale, low, most):
    """Lay out the first 16 bytes of the blocks; quantized scales are limited to `most` before."""
    put_half(ws.head, 0, to_half(scale))
    put_half(ws.head, 2, to_half(low))
    d, dmin = from_half(to_half(scale)), from_half(to_half(low))
    for j in range(4):
        ls, lm = minimum(most, load(ws.ls, 16 * j)), minimum(most, load(ws.lm, 16 * j))
        ls_4, lm_4 = minimum(most, load(ws.ls, 16 * j + 64)), minimum(most, load(ws.lm, 16 * j + 64))
        ls, lm = ls | (ls_4 >> 4 << 6), lm | (lm_4 >> 4 << 6)
        scatter(ws.head, 4 + j, 32, ls)
        scatter(ws.head, 8 + j, 32, lm)
        scatter(ws.head, 12 + j, 32, (ls_4 & 15) | ((lm_4 & 15) << 4))
        store(ws.d, 16 * j, d * to_float(ls & 63))
        store(ws.m, 16 * j, dmin * to_float(lm & 63))
        store(ws.d, 16 * j + 64, d * to_float((ls_4 & 15) | ((ls & 0xC0) >> 2)))
        store(ws.m, 16 * j + 64, dmin * to_float((lm_4 & 15) | ((lm & 0xC0) >> 2)))


@kernel
def _pack_q4_k(x, ws, first, stop, out):
    for k in range(min(16, stop - first)):
        at, block = (first + k) * QK_K, (first + k) * 144
        store(out, block, load(ws.head, 32 * k))
        for part in range(4):
            for i in range(64 * part, 64 * part + 32, 16):
                low, high = offset_levels(x, at, ws, k, i, 32, 15), offset_levels(x, at, ws, k, i + 32, 32, 15)
                store(out, block + 16 + i - 32 * part, low | (high << 4))


@kernel
def _span_q4_k(x, importance, out, start, stop):
    ws = workspace()
    for first in range(start, stop, 16):
        read_columns(x, first, stop, stop, ws.x, ws.rows)
        if importance is None:
            scale, low = _fit_q45_k(ws, np.int64(15), np.float32(-1), np.int64(20))
        else:
            scale, low = _fit_q45_k_weighted(ws, importance, first, stop, np.int64(15))
        _pack_scales_q45_k(ws, scale, low, 255)
        _pack_q4_k(x, ws, first, stop, out)


encode_q4_k, encode_q4_k_imatrix = encoders(_span_q4_k)


@kernel
def _scale_and_min(data, at, j):
    """Read the six-bit sc and m of sub-block `j` from the scales at `at`."""
    if j < 4:
        return np.int32(data[at + j]) & 63, np.int32(data[at + j + 4]) & 63
    low = np.int32(data[at + j + 4])
    sc = (low & 15) | (np.int32(data[at + j - 4]) >> 6 << 4)
    return sc, (low >> 4) | (np.int32(data[at + j]) >> 6 << 4)


@kernel
def _decode_span_q4_k(data, out, start, stop):
    for k in range(start, stop):
        at, block = k * QK_K, k * 144
        d, dmin = half_at(data, block), half_at(data, block + 2)
        for j in range(8):
            sc, m = _scale_and_min(data, block + 4, j)
            scale, low = d * np.float32(sc), dmin * np.float32(m)
            for i in range(0, 32, 16):
                l = (load(data, block + 16 + j // 2 * 32 + i) >> (j % 2 * 4)) & 15
                store(out, at + 32 * j + i, scale * to_float(l) - low)


decode_q4_k = decoder(_decode_span_q4_k)


@kernel
def _pack_q5_k(x, ws, first, stop, out):
    for k in range(min(16, stop - first)):
        at, block = (first + k) * QK_K, (first + k) * 176
        store(out, block, load(ws.head, 32 * k))
        for i in range(0, 32, 16):
            fifth = lanes(0)
            for part in range(4):
                low = offset_levels(x, at, ws, k, 64 * part + i, 32, 31)
                high = offset_levels(x, at, ws, k, 64 * part + 32 + i, 32, 31)
                store(out, block + 48 + 32 * part + i, (low & 15) | ((high & 15) << 4))
                fifth = fifth | (low >> 4 << (2 * part)) | (high >> 4 << (2 * part + 1))
            store(out, block + 16 + i, fifth)


@kernel
def _span_q5_k(x, importance, out, start, stop):
    ws = workspace()
    for first in range(start, stop, 16):
        read_columns(x, first, stop, stop, ws.x, ws.rows)
        if importance is None:
            scale, low = _fit_q45_k(ws, np.int64(31), np.float32(-0.5), np.int64(15))
        else:
            scale, low = _fit_q45_k_weighted(ws, importance, first, stop, np.int64(31))
        _pack_scales_q45_k(ws, scale, low, 63)
        _pack_q5_k(x, ws, first, stop, out)


encode_q5_k, encode_q5_k_imatrix = encoders(_span_q5_k)


@kernel
def _decode_span_q5_k(data, out, start, stop):
    for k in range(start, stop):
        at, block = k * QK_K, k * 176
        d, dmin = half_at(data, block), half_at(data, block + 2)
        for j in range(8):
            sc, m = _scale_and_min(data, block + 4, j)
            scale, low = d * np.float32(sc), dmin * np.float32(m)
            for i in range(0, 32, 16):
                l = (load(data, block + 48 + j // 2 * 32 + i) >> (j % 2 * 4)) & 15
                l = l | (((load(data, block + 16 + i) >> j) & 1) << 4)
                store(out, at + 32 * j + i, scale * to_float(l) - low)


decode_q5_k = decoder(_decode_span_q5_k)
