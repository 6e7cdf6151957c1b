"""What ggml's CPU matrix product does to its right-hand side: round it to the type that the weights ask for.

Each function replaces rows by what is left of them after rounding. Products of the rounded numbers in float32 then
equal ggml's integer dot products up to the order of summation.

Source: `vec_dot_type` in ggml-cpu.c and `quantize_row_q8_0`, `_q8_1`, `_q8_K` of its x86 kernels, llama.cpp.
"""

import numpy as np
from numba import njit

# type of the weights -> type that the activations are rounded to
ROUNDED_TO = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4"), "Q8_0"),
    **dict.fromkeys(("Q4_1", "Q5_1"), "Q8_1"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "TQ1_0", "TQ2_0"), "Q8_K"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "Q8_K"),
}
_127 = np.float32(127)
_ZERO = np.float32(0)


def round_rows(x: np.ndarray, qtype: str, out: np.ndarray) -> np.ndarray:
    """Round rows as for a product with weights of `qtype`; return `x` itself where nothing is rounded.

    Parameters
    ----------
    x, out : np.ndarray [shape=(nrows, n_per_row), dtype=float32]
    qtype : str
        ggml type of the weights.
    """
    kind = ROUNDED_TO[qtype]
    if kind == "F32":
        return x
    _ROUND[kind](x, out)
    return out


@njit(inline="always")
def half(x):
    """The float32 nearest to `x` that float16 can hold, ties to even."""
    bits = np.float32(x).view(np.uint32)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    if magnitude < np.uint32(0x38800000):  # below 2^-14 float16 counts in steps of 2^-24, as float32 does beside 0.75
        small = np.float32(magnitude.view(np.float32) + np.float32(0.75) - np.float32(0.75))
        rounded = small.view(np.uint32)
    elif magnitude >= np.uint32(0x477FF000):  # 65520 and more
        rounded = np.uint32(0x7F800000)
    else:
        odd = (magnitude >> np.uint32(13)) & np.uint32(1)
        rounded = np.uint32((magnitude + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000))
    return np.uint32(rounded | (bits & np.uint32(0x80000000))).view(np.float32)


@njit(nogil=True, cache=True)
def round_f16(x, out):
    """Round to float16; `out` may be `x`."""
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            out[r, i] = half(x[r, i])


@njit(nogil=True, cache=True)
def _round_bf16(x, out):
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            bits = np.float32(x[r, i]).view(np.uint32)
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            out[r, i] = np.uint32((np.uint32(bits) + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)


@njit(nogil=True, cache=True)
def _round_q8_0(x, out):
    """Blocks of 32 with a float16 scale. Q8_1's numbers are the same; its block sums are dealt with in `dense`."""
    for r in range(x.shape[0]):
        for b in range(0, x.shape[1], 32):
            top = _ZERO
            for i in range(b, b + 32):
                top = max(top, abs(x[r, i]))
            d = half(top / _127)
            inverse = _127 / top if top > _ZERO else _ZERO
            for i in range(b, b + 32):
                out[r, i] = np.rint(x[r, i] * inverse) * d


@njit(nogil=True, cache=True)
def _round_q8_k(x, out):
    """Super-blocks of 256 with a float32 scale; the number of greatest magnitude becomes -127."""
    for r in range(x.shape[0]):
        for b in range(0, x.shape[1], 256):
            top = _ZERO
            for i in range(b, b + 256):
                top = max(top, abs(x[r, i]))
            signed = _ZERO
            for i in range(b + 255, b - 1, -1):
                if abs(x[r, i]) == top:
                    signed = x[r, i]
            if top == _ZERO:
                out[r, b : b + 256] = _ZERO
                continue
            inverse = -_127 / signed
            d = np.float32(1) / inverse
            for i in range(b, b + 256):
                out[r, i] = min(_127, np.rint(x[r, i] * inverse)) * d


_ROUND = {"F16": round_f16, "BF16": _round_bf16, "Q8_0": _round_q8_0, "Q8_1": _round_q8_0, "Q8_K": _round_q8_k}
