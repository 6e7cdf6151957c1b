"""The steps of a layer between its products, in the order of operations of ggml's CPU code.

The functions that share a name with one of `fused` stand in for it where llama.cpp's own numbers are wanted, to the
last bit (see `ggml_products`). No sum is reordered here, and a multiplication and an addition are one operation (`fma`)
exactly where they are one in ggml as gcc compiles it for x86-64 with AVX-512.

Source: ggml/src/ggml-cpu of llama.cpp 0c1e57098; the functions are named where they are followed.
"""

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from quantlab.evaluate.engine.fused import add, row_max  # noqa: F401  (`add`: one addition per number has no order)
from quantlab.evaluate.engine.tiles import ROWS, WIDTH, pack, tile
from quantlab.quants.compiled import intrinsic, njit
from quantlab.quants.lanes import FLOATS

KEYS = 64  # keys that flash attention takes at a time (GGML_FA_TILE_KV)
_ZERO, _ONE, _NO_SCORE = np.float32(0), np.float32(1), np.float32(-np.inf)


@intrinsic
def fma(typing, a, b, c):
    """a · b + c, rounded once; of numbers or lanes."""
    kind, name = (FLOATS, "llvm.fma.v16f32") if a == FLOATS else (types.float32, "llvm.fma.f32")

    def build(context, builder, signature, args):
        shape = ir.FunctionType(args[0].type, [args[0].type] * 3)
        return builder.call(cgutils.get_or_insert_function(builder.module, shape, name), args)

    return kind(kind, kind, kind), build


@njit(nogil=True, cache=True, error_model="numpy")
def rms_norm(x, weight, eps, out):
    """out = x / sqrt(mean(x²) + eps) · weight, row by row; `out` may be `x` (ggml_compute_forward_rms_norm)."""
    n = x.shape[1]
    for r in range(x.shape[0]):
        total = 0.0
        for i in range(n):
            total += np.float64(np.float32(x[r, i] * x[r, i]))
        scale = _ONE / np.sqrt(np.float32(np.float32(total / n) + eps))
        for i in range(n):
            out[r, i] = np.float32(x[r, i] * scale) * weight[i]


@njit(nogil=True, cache=True)
def head_norm(x, weight, eps):
    """Normalize every head in place: x [rows, heads, head_dim], weight [head_dim]."""
    for r in range(x.shape[0]):
        rms_norm(x[r], weight, eps, x[r])


@njit(nogil=True, cache=True)
def rope_pairs(x, cos, sin):
    """Rotate neighbours (0, 1), (2, 3), … in place (rotate_pairs)."""
    for r in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(cos.shape[1]):
                a, b = x[r, h, 2 * i], x[r, h, 2 * i + 1]
                x[r, h, 2 * i] = fma(a, cos[r, i], -np.float32(b * sin[r, i]))
                x[r, h, 2 * i + 1] = fma(a, sin[r, i], np.float32(b * cos[r, i]))


@njit(nogil=True, cache=True)
def rope_halves(x, cos, sin):
    """Rotate (0, n_rot / 2), (1, n_rot / 2 + 1), … in place (rotate_pairs)."""
    n = cos.shape[1]
    for r in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(n):
                a, b = x[r, h, i], x[r, h, i + n]
                x[r, h, i] = fma(a, cos[r, i], -np.float32(b * sin[r, i]))
                x[r, h, i + n] = fma(a, sin[r, i], np.float32(b * cos[r, i]))


_ROUND = np.float32(float.fromhex("0x1.8p23"))  # added and taken away again, it leaves the nearest integer
_LOG2E = np.float32(float.fromhex("0x1.715476p+0"))
_LN2_HIGH, _LN2_LOW = np.float32(float.fromhex("0x1.62e4p-1")), np.float32(float.fromhex("0x1.7f7d1cp-20"))
_C1, _C2 = np.float32(float.fromhex("0x1.ffffecp-1")), np.float32(float.fromhex("0x1.fffdb6p-2"))
_C3, _C4 = np.float32(float.fromhex("0x1.555e66p-3")), np.float32(float.fromhex("0x1.573e2ep-5"))
_C5, _FAR = np.float32(float.fromhex("0x1.0e4020p-7")), np.float32(192)


@njit(inline="always")
def _power_of_2(n):
    return np.int32((n + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always")
def exp32(x):
    """e^x (ggml_v_expf)."""
    n = np.float32(fma(x, _LOG2E, _ROUND) - _ROUND)
    b = fma(-n, _LN2_LOW, fma(-n, _LN2_HIGH, x))
    u = np.float32(b * b)
    j = fma(fma(fma(_C5, b, _C4), u, fma(_C3, b, _C2)), u, fma(_C1, b, _ONE))
    whole = np.int32(min(max(n, -_FAR), _FAR))
    some = whole >> np.int32(1)  # in two steps, for results too small for a normal number
    value = np.float32(np.float32(j * _power_of_2(some)) * _power_of_2(np.int32(whole - some)))
    if n < -_FAR:
        value = _ZERO
    if n > _FAR:
        value = np.float32(np.inf)
    return value


@njit(nogil=True, cache=True, error_model="numpy")
def silu_mul(gate_up, out):
    """out = silu(gate) · up, where gate and up are the halves of each row (ggml_vec_swiglu_f32)."""
    n = out.shape[1]
    for r in range(out.shape[0]):
        for i in range(n):
            gate = gate_up[r, i]
            out[r, i] = np.float32(gate / np.float32(_ONE + exp32(-gate))) * gate_up[r, n + i]


@njit(inline="always")
def total16(v, at, half):
    """Sum of 16 numbers, halves onto each other (_mm512_reduce_add_ps); `half` is scratch space of 8."""
    for i in range(8):
        half[i] = v[at + 8 + i] + v[at + i]
    for i in range(4):
        half[i] = half[i + 4] + half[i]
    return np.float32(np.float32(half[2] + half[0]) + np.float32(half[3] + half[1]))


@njit(nogil=True, cache=True, error_model="numpy")
def flash_attention(q, k, v, first, scale, out, keys, values):
    """Attention of the query heads that share one k and v head (ggml_compute_forward_flash_attn_ext_tiled).

    q, out : float32 [rows, heads, dim], row 0 at position `first`; k, v : float32 [first + rows, dim], the values
    that float16 has; scale : float32; keys, values : scratch space for panels of k and of vᵀ.
    """
    pack(k, keys, 0)
    for p in range(values.shape[0]):
        columns = v[:, p * WIDTH : (p + 1) * WIDTH]
        values[p, : len(v), : columns.shape[1]] = columns
    n_values = values.shape[0] * WIDTH
    score, half = np.empty((ROWS, KEYS), np.float32), np.empty(8, np.float32)
    top, total = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    value = np.empty((ROWS, n_values), np.float32)
    for h in range(q.shape[1]):
        for start in range(0, q.shape[0], ROWS):
            query = q[start : min(start + ROWS, q.shape[0]), h]
            n = query.shape[0]
            top[:], total[:], value[:] = -np.inf, _ZERO, _ZERO
            for key in range(0, first + start + n, KEYS):
                seen = first + start + 1 - key  # by the first of the rows
                n_keys = min(KEYS, k.shape[0] - key)
                for p in range(key // WIDTH, -(-(key + n_keys) // WIDTH)):
                    at = p * WIDTH - key
                    tile(query, keys[p], 0, k.shape[1], score[:n, at : at + WIDTH], False)
                for r in range(n):
                    shrink = _weigh(score[r], min(max(seen + r, 0), n_keys), scale, top, total, r, half)
                    if shrink != _ONE:
                        for i in range(n_values):
                            value[r, i] *= shrink
                for p in range(values.shape[0]):
                    sums = value[:n, p * WIDTH : (p + 1) * WIDTH]
                    tile(score[:n], values[p, key : key + n_keys], 0, n_keys, sums, True)
            for r in range(n):
                inverse = _ONE / total[r]
                for i in range(out.shape[2]):
                    out[start + r, h, i] = value[r, i] * inverse


@njit(inline="always")
def _weigh(score, seen, scale, top, total, r, half):
    """Turn scores of up to KEYS keys into weights and add them to the row's total; return what came before shrinks by.

    `seen` of the keys count; the others get no weight.
    """
    for j in range(KEYS):
        score[j] = np.float32(score[j] * scale) if j < seen else _NO_SCORE
    shrink, top_score = _ONE, row_max(score)
    if top_score > top[r]:
        shrink = np.float32(math.exp(np.float32(top[r] - top_score)))
        total[r] *= shrink
        top[r] = top_score
    for j in range(KEYS):
        score[j] = exp32(np.float32(score[j] - top[r]))
    whole = 0.0
    for j in range(0, KEYS, 16):
        whole += np.float64(total16(score, j, half))
    total[r] = np.float32(np.float64(total[r]) + whole)
    return shrink
