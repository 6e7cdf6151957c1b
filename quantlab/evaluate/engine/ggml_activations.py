"""Activations as ggml's CPU code rounds them before a product, to the type that belongs to the weights.

Source: `quantize_row_q8_0` and `_q8_1` of ggml-cpu/arch/x86/quants.c, `ggml_quantize_mat_q8_K_4x8` of repack.cpp,
llama.cpp.
"""

import numpy as np

from quantlab.evaluate.engine.integer_tiles import VNNI
from quantlab.quants.compiled import njit
from quantlab.quants.lanes import absolute, any_lane, bits, highest, lanes, load, maximum, nearest_int, store, total

_ZERO, _ONE, _127 = np.float32(0), np.float32(1), np.float32(127)
_TOO_LARGE, _INFINITY = np.float32(65536), np.float32(np.inf)  # for float16


class Blocks:
    """Activations rounded to blocks of 8-bit integers.

    Parameters
    ----------
    x : np.ndarray [shape=(nrows, n_per_row), dtype=float32]
    qtype : str
        `Q8_0`, `Q8_1` or `Q8_K`.
    run : int
        Columns whose products `integer_tiles` sums at a time.
    workers : Workers
        For scratch space.

    Attributes
    ----------
    codes : np.ndarray [shape=(nrows, n_per_row), dtype=int8 or, without VNNI, int16]
        Integers -127 … 127.
    d : np.ndarray [shape=(nrows, blocks of a row), dtype=float32]
        Scale of each block.
    sums : np.ndarray [shape=(nrows, n_per_row // 32), dtype=float32; of Q8_K (nrows, n_per_row // run), int16]
        Of Q8_1 scale times sum of a block's codes, in float16; of Q8_K the sums of runs. Of Q8_0 there are none.
    starts : np.ndarray [shape=(nrows, n_per_row // run or, without VNNI, 0), dtype=int32]
        Minus 128 times the sums of runs.
    """

    def __init__(self, x: np.ndarray, qtype: str, run: int, workers):
        n_rows, n_in = x.shape
        self.codes = workers.scratch("codes", n_rows, n_in, dtype=np.int8 if VNNI else np.int16)
        self.starts = workers.scratch("starts", n_rows, n_in // run if VNNI else 0, dtype=np.int32)
        if qtype == "Q8_K":
            self.d = workers.scratch("d", n_rows, n_in // 256)
            self.sums = workers.scratch("sums_of_runs", n_rows, n_in // run, dtype=np.int16)
            _round_q8_k(x, self.codes, self.d)
            _sum_runs(self.codes, run, np.int16(1), self.sums)
        else:
            self.d = workers.scratch("d", n_rows, n_in // 32)
            self.sums = workers.scratch("sums_of_blocks", n_rows, n_in // 32 if qtype == "Q8_1" else 0)
            _round_q8_0(x, self.codes, self.d, self.sums)
        if VNNI:
            _sum_runs(self.codes, run, np.int32(-128), self.starts)


@njit(inline="always")
def half(x):
    """The float32 nearest to `x` that float16 can hold, ties to even."""
    exponent = max(np.float32(x).view(np.int32) & np.int32(0x7F800000), np.int32(0x38800000))  # float16's least: 2^-14
    # added and taken away, a power of two 2^13 times as large leaves 13 bits fewer
    power = np.int32(exponent + np.int32(13 << 23)).view(np.float32)
    rounded = np.float32(np.float32(abs(x) + power) - power)
    return np.copysign(rounded if rounded < _TOO_LARGE else _INFINITY, x)


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
def _code_lanes(row, at, n, inverse, codes):
    """Round n numbers times `inverse` to whole ones, at most 127; return the sum of them."""
    whole = lanes(0)
    for i in range(at, at + n, 16):
        code = nearest_int(load(row, i) * inverse)
        store(codes, i, code)
        whole = whole + code
    return total(whole)


@njit(inline="always")
def _largest(row, at, n):
    """The greatest magnitude of n numbers, by way of integers, which compare as they do."""
    top = lanes(0)
    for i in range(at, at + n, 16):
        top = maximum(top, bits(absolute(load(row, i))))
    return np.int32(highest(top)).view(np.float32)


@njit(nogil=True, cache=True, error_model="numpy")
def _round_q8_0(x, codes, d, sums):
    """Blocks of 32 with a float16 scale; Q8_1's are the same, but for the sums."""
    row = np.empty(x.shape[1], np.float32)  # contiguous, whatever `x` is a part of
    for r in range(x.shape[0]):
        row[:] = x[r]
        code = codes[r]
        for b in range(d.shape[1]):
            top = _largest(row, 32 * b, 32)
            inverse = _127 / top if top > _ZERO else _ZERO
            whole = _code_lanes(row, 32 * b, 32, inverse, code)
            d[r, b] = half(top / _127)
            if sums.shape[1] > 0:
                sums[r, b] = half(np.float32(top / _127) * np.float32(whole))


@njit(nogil=True, cache=True, error_model="numpy")
def _round_q8_k(x, codes, d):
    """Super-blocks of 256 with a float32 scale; the number of greatest magnitude becomes -127."""
    row = np.empty(x.shape[1], np.float32)
    for r in range(x.shape[0]):
        row[:] = x[r]
        code = codes[r]
        for b in range(d.shape[1]):
            top, is_positive, inverse = _largest(row, 256 * b, 256), False, _ZERO
            for i in range(256 * b, 256 * b + 256, 16):
                is_positive |= any_lane(load(row, i) == top)
            if top > _ZERO:
                inverse = -_127 / top if is_positive else _127 / top
            d[r, b] = _ONE / inverse if top > _ZERO else _ZERO
            _code_lanes(row, 256 * b, 256, inverse, code)


@njit(nogil=True, cache=True)
def _sum_runs(codes, run, factor, out):
    """out[r, i] = factor · Σ codes over the i-th run of each row; to know the length of a run makes a fast loop."""
    if run == 4:
        _sum_runs_of(codes, 4, factor, out)
    elif run == 16:
        _sum_runs_of(codes, 16, factor, out)
    else:
        _sum_runs_of(codes, 32, factor, out)


@njit(nogil=True, forceinline=True)
def _sum_runs_of(codes, run, factor, out):
    for r in range(out.shape[0]):
        for i in range(out.shape[1]):
            whole = np.int32(0)
            for j in range(run):
                whole += np.int32(codes[r, i * run + j])
            out[r, i] = np.int32(factor) * whole
