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

from quantlab.evaluate.engine.fused import add  # noqa: F401  (one addition per number has no order)
from quantlab.evaluate.engine.ggml_activations import half
from quantlab.quants.compiled import intrinsic, njit
from quantlab.quants.lanes import FLOATS

_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_GELU_1, _GELU_3, _GELU_END = np.float32(0.79788456080286535588), np.float32(0.044715), np.float32(10)
_OAI_ALPHA, _OAI_LIMIT = np.float32(1.702), np.float32(7)


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


@njit(nogil=True, cache=True, error_model="numpy")
def swiglu_oai_mul(gate_up, out):
    """out = gate · sigmoid(1.702 · gate) · (up + 1), of clamped halves (ggml_compute_forward_swiglu_oai_f32)."""
    n = out.shape[1]
    for r in range(out.shape[0]):
        for i in range(n):
            gate, up = min(gate_up[r, i], _OAI_LIMIT), min(max(gate_up[r, n + i], -_OAI_LIMIT), _OAI_LIMIT)
            out[r, i] = gate / (_ONE + np.float32(math.exp(_OAI_ALPHA * -gate))) * (up + _ONE)


@njit(nogil=True, cache=True, error_model="numpy")
def gelu_mul(gate_up, out):
    """out = gelu(gate) · up, where gelu takes and gives float16 between -10 and 10 (ggml_vec_geglu_f32)."""
    n = out.shape[1]
    for r in range(out.shape[0]):
        for i in range(n):
            gate = gate_up[r, i]
            if abs(gate) < _GELU_END:
                x = half(gate)
                inner = np.float32(_GELU_1 * x) * fma(np.float32(_GELU_3 * x), x, _ONE)
                gate = half(np.float32(_HALF * x) * (_ONE + np.float32(math.tanh(inner))))
            out[r, i] = (gate if gate > -_GELU_END else _ZERO) * gate_up[r, n + i]


@njit(nogil=True, cache=True)
def softcap(x, cap):
    """x = cap · tanh(x / cap), row by row."""
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            x[r, i] = np.float32(math.tanh(np.float32(x[r, i] * (_ONE / cap)))) * cap


@njit(inline="always")
def total16(v, at, half):
    """Sum of 16 numbers, halves onto each other (_mm512_reduce_add_ps); `half` is scratch space of 8."""
    for i in range(8):
        half[i] = v[at + 8 + i] + v[at + i]
    for i in range(4):
        half[i] = half[i + 4] + half[i]
    return np.float32(np.float32(half[2] + half[0]) + np.float32(half[3] + half[1]))
