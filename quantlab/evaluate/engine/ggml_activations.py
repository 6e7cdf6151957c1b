"""What ggml's CPU code does to the activations before a product: round them to the type that the weights ask for.

Source: `quantize_row_q8_0` and `_q8_1` of ggml-cpu/arch/x86/quants.c, `ggml_quantize_mat_q8_K_4x8` of repack.cpp,
llama.cpp.
"""

import numpy as np
from numba import njit

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
    codes : np.ndarray [shape=(nrows, n_per_row), dtype=float32]
        Integers -127 … 127.
    d : np.ndarray [shape=(nrows, blocks of a row), dtype=float32]
        Scale of each block.
    sums : np.ndarray [shape=(nrows, n_per_row // 32 or, of Q8_K, // 16), dtype=float32]
        Of Q8_1 scale times sum of a block's codes, in float16; of Q8_K the sums of every 16 codes.
    """

    def __init__(self, x: np.ndarray, qtype: str, workers):
        self.qtype = qtype
        block, step, round_ = (256, 16, _round_q8_k) if qtype == "Q8_K" else (32, 32, _round_q8_0)
        self.codes = workers.scratch("codes", *x.shape)
        self.d = workers.scratch("d", len(x), x.shape[1] // block)
        self.sums = workers.scratch("sums", len(x), x.shape[1] // step)
        round_(x, self.codes, self.d, self.sums)

    def floats(self) -> np.ndarray:
        """Return the numbers that the blocks hold [like `codes`], in place of the codes."""
        blocks = self.codes.reshape(*self.d.shape, -1)
        blocks *= self.d[..., None]
        return self.codes


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


@njit(nogil=True, cache=True)
def _round_q8_0(x, codes, d, sums):
    """Blocks of 32 with a float16 scale; Q8_1's are the same, but for the sums."""
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // 32):
            row, code = x[r, 32 * b : 32 * b + 32], codes[r, 32 * b : 32 * b + 32]
            top, total = _ZERO, _ZERO
            for i in range(32):
                top = max(top, abs(row[i]))
            inverse = _127 / top if top > _ZERO else _ZERO
            for i in range(32):
                code[i] = np.rint(row[i] * inverse)
                total += code[i]
            d[r, b] = half(top / _127)
            sums[r, b] = half(np.float32(top / _127) * total)


@njit(nogil=True, cache=True)
def _round_q8_k(x, codes, d, sums):
    """Super-blocks of 256 with a float32 scale; the number of greatest magnitude becomes -127."""
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // 256):
            row, code = x[r, 256 * b : 256 * b + 256], codes[r, 256 * b : 256 * b + 256]
            top, highest = _ZERO, _ZERO
            for i in range(256):
                top = max(top, abs(row[i]))
                highest = max(highest, row[i])
            inverse = _ZERO
            if top > _ZERO:
                inverse = -_127 / top if highest == top else _127 / top
            d[r, b] = _ONE / inverse if top > _ZERO else _ZERO
            for i in range(256):
                code[i] = min(_127, np.rint(row[i] * inverse))
            for j in range(16):
                total = _ZERO
                for i in range(16 * j, 16 * j + 16):
                    total += code[i]
                sums[r, 16 * b + j] = total
