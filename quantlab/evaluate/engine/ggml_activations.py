"""What ggml's CPU code does to the activations before a product: round them to the type that the weights ask for.

Source: `quantize_row_q8_0` and `_q8_1` of ggml-cpu/arch/x86/quants.c, `ggml_quantize_mat_q8_K_4x8` of repack.cpp,
llama.cpp.
"""

import numpy as np

from quantlab.quants.compiled import njit

_ZERO, _ONE, _127 = np.float32(0), np.float32(1), np.float32(127)


class Blocks:
    """Activations rounded to blocks of 8-bit integers.

    Parameters
    ----------
    x : np.ndarray [shape=(nrows, n_per_row), dtype=float32]
    qtype : str
        `Q8_0`, `Q8_1` or `Q8_K`.
    workers : Workers
        For scratch space.

    Attributes
    ----------
    qtype : str
    codes : np.ndarray [shape=(nrows, n_per_row), dtype=int16]
        Integers -127 … 127.
    d : np.ndarray [shape=(nrows, blocks of a row), dtype=float32]
        Scale of each block.
    sums : np.ndarray [shape=(nrows, n_per_row // 32), dtype=float32; of Q8_K (nrows, n_per_row // 16), int16]
        Of Q8_1 scale times sum of a block's codes, in float16; of Q8_K the sums of every 16 codes.
    """

    def __init__(self, x: np.ndarray, qtype: str, workers):
        self.qtype, is_super = qtype, qtype == "Q8_K"
        self.codes = workers.scratch("codes", *x.shape, dtype=np.int16)
        self.d = workers.scratch("d", len(x), x.shape[1] // (256 if is_super else 32))
        if is_super:
            self.sums = workers.scratch("sums_16", len(x), x.shape[1] // 16, dtype=np.int16)
        else:
            self.sums = workers.scratch("sums_32", len(x), x.shape[1] // 32)
        (_round_q8_k if is_super else _round_q8_0)(x, self.codes, self.d, self.sums)

    def floats(self, out: np.ndarray) -> np.ndarray:
        """Put the numbers that the blocks hold into `out` [shape=codes.shape, dtype=float32], and return it."""
        np.multiply(self.codes.reshape(*self.d.shape, -1), self.d[..., None], out=out.reshape(*self.d.shape, -1))
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
def round_bf16(x, out):
    """Round to bfloat16; `out` may be `x`."""
    for r in range(x.shape[0]):
        for i in range(x.shape[1]):
            bits = np.float32(x[r, i]).view(np.uint32)
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            out[r, i] = np.uint32((np.uint32(bits) + np.uint32(0x7FFF) + odd) & np.uint32(0xFFFF0000)).view(np.float32)


@njit(inline="always")
def _largest(row):
    """The greatest magnitude of a row, by way of integers, of which many are compared at once."""
    top = np.int32(0)
    for bits in row.view(np.int32):
        top = max(top, bits & np.int32(0x7FFFFFFF))
    return np.int32(top).view(np.float32)


@njit(nogil=True, cache=True)
def _round_q8_0(x, codes, d, sums):
    """Blocks of 32 with a float16 scale; Q8_1's are the same, but for the sums."""
    row = np.empty(32, np.float32)  # contiguous, whatever `x` is a part of
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // 32):
            row[:] = x[r, 32 * b : 32 * b + 32]
            code, total = codes[r, 32 * b : 32 * b + 32], np.int32(0)
            top = _largest(row)
            inverse = _127 / top if top > _ZERO else _ZERO
            for i in range(32):
                whole = np.int32(np.rint(row[i] * inverse))
                code[i] = whole
                total += whole
            d[r, b] = half(top / _127)
            sums[r, b] = half(np.float32(top / _127) * np.float32(total))


@njit(nogil=True, cache=True)
def _round_q8_k(x, codes, d, sums):
    """Super-blocks of 256 with a float32 scale; the number of greatest magnitude becomes -127."""
    row = np.empty(256, np.float32)
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // 256):
            row[:] = x[r, 256 * b : 256 * b + 256]
            code, top, is_positive = codes[r, 256 * b : 256 * b + 256], _largest(row), False
            for i in range(256):
                is_positive |= row[i] == top
            inverse = _ZERO
            if top > _ZERO:
                inverse = -_127 / top if is_positive else _127 / top
            d[r, b] = _ONE / inverse if top > _ZERO else _ZERO
            for i in range(256):
                code[i] = min(np.int32(127), np.int32(np.rint(row[i] * inverse)))
            for j in range(16):
                total = np.int32(0)
                for i in range(16 * j, 16 * j + 16):
                    total += np.int32(code[i])
                sums[r, 16 * b + j] = total
