"""What the encoders of the I-quants share: 16 super-blocks, one in each lane, and the search on a grid.

Weights are handled in groups of 8 (4 for IQ3) whose levels together must be a point of a grid. Scales, levels and sums
are computed for 16 super-blocks at once. Only the search for the best neighbour goes through the lanes one by one: it
compares 16 neighbours at once, with each weight's error at each level looked up in `terms`.

The C code gives up (`GGML_ASSERT`) where no neighbour's error is finite, which takes weights beyond 1e19; here the
first neighbour is taken.

Source: ggml-quants.c of llama.cpp, as in llama-cpp-python 0.3.36.
"""

from typing import NamedTuple

import numpy as np

from quantlab.quants.drivers import QK_K
from quantlab.quants.lanes import (
    bits,
    inlined_kernel,
    kernel,
    lanes,
    load,
    lowest,
    maximum,
    minimum,
    nearest_int,
    scatter,
    select,
    sqrt,
    store,
    to_float,
)
from quantlab.quants.search import ONE, ZERO
from quantlab.quants.superblock import read_columns

LARGEST = np.float32(3.4028234663852886e38)  # FLT_MAX
HALF = np.float32(0.5)
HEAD = 128  # room for the bytes of a block
LANE = np.arange(16, dtype=np.int32)


class Workspace(NamedTuple):
    """Arrays of one task. Columns of 16 lanes, a super-block in each."""

    rows: np.ndarray  # int64 (16,): where each super-block starts
    x: np.ndarray  # float32 (256 * 16,): the weights
    w: np.ndarray  # float32 (256 * 16,): weights of their errors
    root: np.ndarray  # float32 (256 * 16,): the square roots of those
    size: np.ndarray  # float32 (256 * 16,): the weights without their signs
    signs: np.ndarray  # int32 (32 * 16,): the signs of 8 weights, one bit each
    points: np.ndarray  # int32 (64 * 16,): the best points of the groups
    tried: np.ndarray  # int32 (32 * 16,): the points of one try
    missing: np.ndarray  # int32 (64 * 16,): whether the rounded levels were no grid point, for the best try
    tried_missing: np.ndarray  # int32 (8 * 16,): and for this one
    terms: np.ndarray  # float32 (32 * 16,): the error of each weight of a group at each level
    scale: np.ndarray  # float32 (16 * 16,): the scales of the sub-blocks
    empty: np.ndarray  # int32 (8 * 16,): whether a sub-block is all zero
    order: np.ndarray  # int32 (32 * 16,): where sorted weights come from
    level: np.ndarray  # int32 (32 * 16,): their levels
    sum_x: np.ndarray  # float32 (66 * 16,): sums of w * x up to each limit between sorted weights
    sum_w: np.ndarray  # float32 (66 * 16,): sums of w
    levels: np.ndarray  # uint8 (32 * 16,): what a search by levels needs room for
    head: np.ndarray  # uint8 (16 * HEAD,): the bytes of each block


@kernel
def workspace():
    """Make room for one task."""
    return Workspace(
        np.empty(16, np.int64),
        np.empty(QK_K * 16, np.float32),
        np.empty(QK_K * 16, np.float32),
        np.empty(QK_K * 16, np.float32),
        np.empty(QK_K * 16, np.float32),
        np.empty(32 * 16, np.int32),
        np.empty(64 * 16, np.int32),
        np.empty(32 * 16, np.int32),
        np.empty(64 * 16, np.int32),
        np.empty(8 * 16, np.int32),
        np.empty(32 * 16, np.float32),
        np.empty(16 * 16, np.float32),
        np.zeros(8 * 16, np.int32),
        np.empty(32 * 16, np.int32),
        np.empty(32 * 16, np.int32),
        np.empty(66 * 16, np.float32),
        np.empty(66 * 16, np.float32),
        np.empty(32 * 16, np.uint8),
        np.empty(16 * HEAD, np.uint8),
    )


@kernel
def read_weights(ws, x, importance, first, stop, factor, floor):
    """Read 16 super-blocks and set their error weights, ``importance * sqrt(sigma2 + x * x)``, and the roots of those.

    `sigma2` is `factor` times the mean square. Without importance (an empty array), the weights are the squares, plus
    `floor` times `sigma2`.
    """
    read_columns(x, first, stop, stop, ws.x, ws.rows)
    sum_x2 = lanes(ZERO)
    for i in range(0, 16 * QK_K, 16):
        v = load(ws.x, i)
        sum_x2 = sum_x2 + v * v
    sigma2 = factor * sum_x2 / np.float32(QK_K)
    if importance.size:
        read_columns(importance, first, stop, importance.size // QK_K, ws.w, ws.rows)
    for i in range(0, 16 * QK_K, 16):
        v = load(ws.x, i)
        if importance.size:
            weight = load(ws.w, i) * sqrt(sigma2 + v * v)
        elif floor > ZERO:
            weight = floor * sigma2 + v * v
        else:
            weight = v * v
        store(ws.w, i, weight)
        store(ws.root, i, sqrt(weight))


@kernel
def split_signs(ws, group, even):
    """Take the signs off 8 weights. With `even`, an odd one out is made up for where it costs least."""
    first = 128 * group
    signs = lanes(0)
    for i in range(8):
        v = load(ws.x, first + 16 * i)
        negative = v < ZERO
        signs = signs | select(negative, 1 << i, 0)
        store(ws.size, first + 16 * i, select(negative, -v, v))
    if even:
        odd = signs ^ (signs >> 4)
        odd = odd ^ (odd >> 2)
        odd = odd ^ (odd >> 1)
        v = load(ws.x, first)
        least = load(ws.w, first) * v * v
        flipped = lanes(1)
        for i in range(1, 8):
            v = load(ws.x, first + 16 * i)
            cost = load(ws.w, first + 16 * i) * v * v
            less = cost < least
            least = select(less, cost, least)
            flipped = select(less, 1 << i, flipped)
        flipped = select((odd & 1) != 0, flipped, 0)
        for i in range(8):
            v = load(ws.size, first + 16 * i)
            store(ws.size, first + 16 * i, select((flipped & (1 << i)) != 0, -v, v))
        signs = signs ^ flipped
    store(ws.signs, 16 * group, signs)


@kernel
def largest_of(values, first, n):
    """Return the largest of `n` columns."""
    peak = load(values, first)
    for i in range(first + 16, first + 16 * n, 16):
        peak = maximum(peak, load(values, i))
    return peak


@inlined_kernel
def _error_of_8(c, terms, lane):
    """Sum the errors of 8 weights at the levels of 16 points."""
    e = select((c & 2) != 0, terms[lane + 32], select((c & 1) != 0, terms[lane + 16], terms[lane]))
    for i in range(1, 8):
        low, mid, high = terms[lane + 48 * i], terms[lane + 48 * i + 16], terms[lane + 48 * i + 32]
        e = e + select((c & (2 << 2 * i)) != 0, high, select((c & (1 << 2 * i)) != 0, mid, low))
    return e


@inlined_kernel
def best_of_8(grid, point, terms, lane):
    """Return the neighbour with the smallest error, the first of equals."""
    best = lanes(LARGEST)
    where = lanes(grid.start[point])
    for at in range(grid.start[point], grid.start[point + 1], 16):
        error = _error_of_8(load(grid.codes, at), terms, lane)
        better = error < best
        best = select(better, error, best)
        where = select(better, at + load(LANE, 0), where)
    least = lowest(bits(best))
    return np.int32(grid.codes[lowest(select(bits(best) == least, where, 0x7FFFFFFF))])


@inlined_kernel
def best_of_4(grid, point, size, root, at, lane, scale):
    """Return the neighbour with the smallest error of 4 weights from column `at` on, the first of equals."""
    best = lanes(LARGEST)
    where = lanes(grid.start[point])
    for run in range(grid.start[point], grid.start[point + 1], 16):
        c = load(grid.codes, run)
        error = lanes(ZERO)
        for i in range(4):
            diff = scale * to_float(((c >> (3 * i)) & 7) * 2 + 1) - size[at + 16 * i + lane]
            error = error + root[at + 16 * i + lane] * diff * diff
        better = error < best
        best = select(better, error, best)
        where = select(better, run + load(LANE, 0), where)
    least = lowest(bits(best))
    return np.int32(grid.codes[lowest(select(bits(best) == least, where, 0x7FFFFFFF))])


@kernel
def scale_level(scale, iscale, none, top):
    """Return l = 0 … `top` of scales ``(2 l + 1) / iscale``; 0 where there is nothing to scale."""
    l = maximum(0, minimum(top, nearest_int(HALF * (iscale * scale - ONE))))
    return select(none, 0, l)


@kernel
def store_word(head, at, v):
    """Write 32 bits to byte `at` of each super-block's head."""
    for byte in range(4):
        scatter(head, at + byte, HEAD, v >> (8 * byte))


@kernel
def copy_blocks(head, first, stop, size, out):
    """Write the blocks of up to 16 super-blocks out."""
    for k in range(min(16, stop - first)):
        for byte in range(size):
            out[(first + k) * size + byte] = head[HEAD * k + byte]


# ---- decode


@kernel
def read_word(data, at):
    """Read 32 bits, without sign, into an int64."""
    low = np.int64(data[at]) | np.int64(data[at + 1]) << 8
    return low | np.int64(data[at + 2]) << 16 | np.int64(data[at + 3]) << 24


@kernel
def with_signs(values, minus):
    """Negate those bytes of `values`, all positive, where `minus` has the byte 255."""
    return (values ^ minus) + (minus & 0x0101010101010101)


@kernel
def write_values(values, db, out, at):
    """Write a super-block: 256 bytes with sign, each 16 times a scale."""
    for j in range(16):
        store(out, at + 16 * j, db[j] * to_float(load(values, 16 * j)))
