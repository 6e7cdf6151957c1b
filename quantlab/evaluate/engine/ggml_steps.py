"""The steps of a layer between its products, in the order of operations of ggml's CPU code.

The functions that share a name with one of `fused` stand in for it where llama.cpp's own numbers are wanted, to the
last bit (see `ggml_products`). No sum is reordered here, and a multiplication and an addition are one operation (`fma`)
exactly where they are one in ggml as gcc compiles it for x86-64 with AVX-512.

Source: ggml/src/ggml-cpu of llama.cpp 0c1e57098; the functions are named where they are followed.
"""

import math

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from quantlab.evaluate.engine.fused import add  # noqa: F401  (one addition per number: it has no order)

KEYS = 64  # keys that flash attention takes at a time (GGML_FA_TILE_KV)
_ZERO, _ONE = np.float32(0), np.float32(1)


@intrinsic
def fma(typing, a, b, c):
    """a · b + c, rounded once."""
    kind = types.float32
    return kind(kind, kind, kind), lambda context, builder, signature, args: builder.fma(*args)


@njit(nogil=True, cache=True)
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


@njit(nogil=True, cache=True)
def silu_mul(gate_up, out):
    """out = silu(gate) · up, where gate and up are the halves of each row (ggml_vec_swiglu_f32)."""
    n = out.shape[1]
    for r in range(out.shape[0]):
        for i in range(n):
            gate = gate_up[r, i]
            out[r, i] = np.float32(gate / np.float32(_ONE + exp32(-gate))) * gate_up[r, n + i]


@njit(inline="always")
def _total16(v, at):
    """Sum of 16 numbers, halves onto each other (_mm512_reduce_add_ps)."""
    s = np.empty(8, np.float32)
    for i in range(8):
        s[i] = v[at + 8 + i] + v[at + i]
    for i in range(4):
        s[i] = s[i + 4] + s[i]
    return np.float32(np.float32(s[2] + s[0]) + np.float32(s[3] + s[1]))


@njit(nogil=True, cache=True)
def flash_attention(q, k, v, first, scale, out):
    """Attention of the query heads that share one k and v head (ggml_compute_forward_flash_attn_ext_tiled).

    q, out : float32 [rows, heads, dim], row 0 at position `first`; k, v : float32 [first + rows, dim], the values
    that float16 has; scale : float32.
    """
    rows, heads, dim = q.shape
    turned, score = np.empty((dim, KEYS), np.float32), np.empty(KEYS, np.float32)
    top = np.full((rows, heads), -np.inf, np.float32)
    total = np.zeros((rows, heads), np.float32)
    value = np.zeros((rows, heads, dim), np.float32)
    for start in range(0, k.shape[0], KEYS):
        n_keys = min(KEYS, k.shape[0] - start)
        for j in range(n_keys):
            for i in range(dim):
                turned[i, j] = k[start + j, i]
        for r in range(max(0, start - first), rows):
            seen = min(KEYS, first + r + 1 - start)
            for h in range(heads):
                score[:] = _ZERO
                for i in range(dim):
                    query, keys = q[r, h, i], turned[i]
                    for j in range(KEYS):
                        score[j] = fma(query, keys[j], score[j])
                highest = np.float32(-np.inf)
                for j in range(seen):
                    score[j] = np.float32(score[j] * scale)
                    highest = max(highest, score[j])
                sums = value[r, h]
                if highest > top[r, h]:
                    shrink = np.float32(math.exp(np.float32(top[r, h] - highest)))
                    for i in range(dim):
                        sums[i] *= shrink
                    total[r, h] *= shrink
                    top[r, h] = highest
                for j in range(KEYS):
                    score[j] = exp32(np.float32(score[j] - top[r, h])) if j < seen else _ZERO
                whole = 0.0
                for j in range(0, KEYS, 16):
                    whole += np.float64(_total16(score, j))
                total[r, h] = np.float32(np.float64(total[r, h]) + whole)
                for j in range(seen):
                    weight = score[j]
                    for i in range(dim):
                        sums[i] = fma(weight, v[start + j, i], sums[i])
    for r in range(rows):
        for h in range(heads):
            inverse = _ONE / total[r, h]
            for i in range(dim):
                out[r, h, i] = value[r, h, i] * inverse
