"""Shared parts of types with super-blocks of 256 weights: 16 super-blocks, one in each lane."""

from typing import NamedTuple

import numpy as np

from quantlab.quants.drivers import QK_K
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
    scatter,
    select,
    sqrt,
    store,
    transpose,
)
from quantlab.quants.search import FOUND, ZERO


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
def read_columns(source, first, stop, per_row, target, rows, block=QK_K):
    """Put 16 blocks of weights side by side; from `stop` on, repeat the last one.

    `per_row` is the number of blocks after which `source` starts over.
    """
    for lane in range(16):
        rows[lane] = min(first + lane, stop - 1) % per_row * block
    for i in range(0, block, 16):
        transpose(source, rows, i, target, 16 * i)


@kernel
def weigh(ws, importance, first, stop, factor, size):
    """Set the error weights ``importance * sqrt(sigma2 + x * x)``, and their sums over sub-blocks of `size` weights."""
    read_columns(importance, first, stop, importance.size // QK_K, ws.w, ws.rows)
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
