"""What types with super-blocks of 256 weights share: drivers over arrays; 16 super-blocks, one in each lane."""

from collections.abc import Callable
from types import FunctionType
from typing import NamedTuple

import numpy as np
from numba import prange

from quantlab.quants.lanes import (
    from_half,
    gather,
    inlined_kernel,
    kernel,
    lanes,
    load,
    maximum,
    minimum,
    nearest_int,
    parallel_kernel,
    scatter,
    select,
    sqrt,
    store,
    transpose,
)
from quantlab.quants.search import FOUND, ZERO

QK_K = 256  # weights of a super-block
SPAN = 128  # super-blocks that one task of a parallel loop handles: 32 Ki weights


# ---- drivers: blocks never cross the end of a row, so that an array is one sequence of super-blocks


def _encode(x, importance, out):
    """Encode an array; `_span` is a type's own."""
    x, out = x.reshape(-1), out.reshape(-1)
    n = x.size // QK_K
    for span in prange((n + SPAN - 1) // SPAN):
        _span(x, importance, out, span * SPAN, n)  # noqa: F821


def _decode(data, out):
    """Decode an array; `_span` is a type's own."""
    data, out = data.reshape(-1), out.reshape(-1)
    n = out.size // QK_K
    for span in prange((n + SPAN - 1) // SPAN):
        _span(data, out, span * SPAN, min(span * SPAN + SPAN, n))  # noqa: F821


def _driver(template: FunctionType, span) -> Callable:
    """Compile a template around a type's kernel.

    The kernel is a global of the copy, not a closure's cell, which numba's cache could not know again in another
    process. The copy is filed under the kernel's module, so that an edit there is noticed.
    """
    of = getattr(span, "py_func", span)  # without the compiler, a kernel is its function
    code = template.__code__.replace(co_filename=of.__code__.co_filename, co_firstlineno=of.__code__.co_firstlineno)
    copy = FunctionType(code, template.__globals__ | {"_span": span}, of.__name__)
    copy.__qualname__ = f"{template.__name__}{of.__name__}"
    copy.__module__ = of.__module__
    return parallel_kernel(copy)


def encoders(span) -> tuple[Callable, Callable]:
    """Make a type's encoders from its kernel.

    Parameters
    ----------
    span : kernel (x, importance or None, out, start, n)
        Encodes up to `SPAN` super-blocks of a flat array from super-block `start` on; the array has `n`.

    Returns
    -------
    encode : function (x, out)
        Fills uint8 rows (nrows, row_bytes) from float32 rows (nrows, n_per_row).
    encode_imatrix : function (x, importance, out)
        The same, errors of column j weighted with `importance[j]`.
    """
    encode = _driver(_encode, span)

    def encode_plain(x, out):
        encode(x, None, out)

    return encode_plain, encode


def decoder(span) -> Callable:
    """Make a type's decoder (data, out) from a kernel (data, out, start, stop) for a stretch of super-blocks."""
    return _driver(_decode, span)


# ---- 16 super-blocks in the lanes


class Workspace(NamedTuple):
    """Arrays of one task. Columns of 16 lanes, a super-block in each; scales have a column for each sub-block."""

    rows: np.ndarray  # int64 (16,): where each super-block starts
    x: np.ndarray  # float32 (256 * 16,): the weights
    w: np.ndarray  # float32 (256 * 16,): weights of their errors
    sum_w: np.ndarray  # float32 (16 * 16,): the same, summed over each sub-block
    found: np.ndarray  # float32 (FOUND,): what a search knows
    levels: np.ndarray  # uint8 (256 * 16,): levels that the search ends with
    scale: np.ndarray  # float32 (16 * 16,): the scale that the search found
    low: np.ndarray  # float32 (16 * 16,): and the minimum, its sign changed
    ls: np.ndarray  # uint8 (16 * 16,): the scale, quantized
    lm: np.ndarray  # uint8 (16 * 16,): the minimum, quantized
    d: np.ndarray  # float32 (16 * 16,): the scale that a decoder will see
    m: np.ndarray  # float32 (16 * 16,): the minimum that a decoder will see
    head: np.ndarray  # uint8 (16 * 32,): 32 bytes for each super-block: its scales, packed


@kernel
def workspace():
    """Make room for one task."""
    sub_blocks, weights = 16 * 16, QK_K * 16
    return Workspace(
        np.empty(16, np.int64),
        np.empty(weights, np.float32),
        np.empty(weights, np.float32),
        np.empty(sub_blocks, np.float32),
        np.empty(FOUND, np.float32),
        np.empty(weights, np.uint8),
        np.empty(sub_blocks, np.float32),
        np.empty(sub_blocks, np.float32),
        np.empty(sub_blocks, np.uint8),
        np.empty(sub_blocks, np.uint8),
        np.empty(sub_blocks, np.float32),
        np.empty(sub_blocks, np.float32),
        np.empty(32 * 16, np.uint8),
    )


@kernel
def read_columns(source, first, n, per_row, target, rows):
    """Put 16 super-blocks of weights side by side; beyond the last one, repeat it.

    `per_row` is the number of super-blocks after which `source` starts anew.
    """
    for lane in range(16):
        rows[lane] = min(first + lane, n - 1) % per_row * QK_K
    for i in range(0, QK_K, 16):
        transpose(source, rows, i, target, 16 * i)


@kernel
def weigh(ws, importance, first, n, factor, size):
    """Set the error weights ``importance * sqrt(sigma2 + x * x)``, and their sums over sub-blocks of `size` weights."""
    read_columns(importance, first, n, importance.size // QK_K, ws.w, ws.rows)
    sum_x2 = lanes(ZERO)
    for i in range(0, 16 * QK_K, 16):
        v = load(ws.x, i)
        sum_x2 = sum_x2 + v * v
    sigma2 = factor * sum_x2 / np.float32(QK_K)
    for j in range(QK_K // size):
        sum_w = lanes(ZERO)
        for i in range(16 * size * j, 16 * size * (j + 1), 16):
            v = load(ws.x, i)
            weight = load(ws.w, i) * sqrt(sigma2 + v * v)
            store(ws.w, i, weight)
            sum_w = sum_w + weight
        store(ws.sum_w, 16 * j, sum_w)


@kernel
def largest_positive(scales, n):
    """Return the largest of the first `n` columns, 0 if none is positive."""
    peak = lanes(ZERO)
    for j in range(0, 16 * n, 16):
        v = load(scales, j)
        peak = select(v > peak, v, peak)
    return peak


@kernel
def put_half(head, at, half):
    """Write float16 bits at byte `at` of each super-block's head."""
    scatter(head, at, 32, half)
    scatter(head, at + 1, 32, half >> 8)


@inlined_kernel
def signed_byte(v):
    """Return what an int becomes when it is stored as int8."""
    return ((v & 0xFF) ^ 0x80) - 0x80


@inlined_kernel
def offset_levels(x, at, ws, k, i, size, nmax):
    """Return the levels of 16 weights of super-block `k`, from weight `i` on, where ``x ≈ d * l - m``."""
    d = ws.d[i // size * 16 + k]
    if d == 0:  # C leaves what the search found
        return gather(ws.levels, 16 * i + k, 16)
    return maximum(0, minimum(nmax, nearest_int((load(x, at + i) + ws.m[i // size * 16 + k]) / d)))


@inlined_kernel
def signed_levels(x, at, ws, k, i, nmax):
    """Return the levels, made positive, of 16 weights of super-block `k`, from weight `i` on, where ``x ≈ d * l``."""
    d = ws.d[i + k]
    if d == 0:
        return gather(ws.levels, 16 * i + k, 16)
    return maximum(-nmax, minimum(nmax - 1, nearest_int(load(x, at + i) / d))) + nmax


@kernel
def half_at(data, at):
    """Read a float16 into all lanes."""
    return from_half(lanes(np.int32(data[at]) | (np.int32(data[at + 1]) << 8)))
