"""Shared parts of the I-quants' encoders: 16 super-blocks, one in each lane, and the search on a grid.

Weights are handled in groups of 8 (4 for IQ3) whose levels together must be a point of a grid. Scales, levels and sums
are computed for 16 super-blocks at once. Only the search for the best neighbour goes through the lanes one by one: it
compares 16 neighbours at once. The scales tried follow one another closely, so most groups keep their neighbour from
one try to the next. A search says up to which scale that is certain, and is repeated only beyond it.

The C code gives up (`GGML_ASSERT`) where no neighbour's error is finite, which takes weights beyond 1e19; here the
first neighbour is taken.

Source: ggml-quants.c of llama.cpp, as in llama-cpp-python 0.3.36.
"""

from typing import NamedTuple

import numpy as np

from quantlab.quants.drivers import QK_K
from quantlab.quants.lanes import (
    any_lane,
    first_lane,
    inlined_kernel,
    item,
    kernel,
    lane_bits,
    lanes,
    load,
    lowest,
    maximum,
    minimum,
    multiply_add,
    nearest_int,
    put,
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
LONGEST = 320  # no run of neighbours is longer, IQ1's aside
INFINITE = np.float32(np.inf)
MARGIN = np.float32(2.0**-17)  # twice what rounding can amount to, as a part of the sums that were rounded
TINY = np.float32(1e-30)  # below it, sums may have lost digits


class Workspace(NamedTuple):
    """Arrays of one task: few, as each costs time wherever a kernel hands the workspace to another."""

    rows: np.ndarray  # int64 (16,): where each super-block starts
    floats: np.ndarray  # float32 (N_FLOATS,)
    ints: np.ndarray  # int32 (N_INTS,)
    head: np.ndarray  # uint8 (16 * HEAD + 512,): the bytes of each block; then the levels of a search by levels


# Fields of `floats`: columns of 16 lanes, a super-block in each.
X = 0  # 256 columns: the weights
W = X + 4096  # 256: weights of their errors
ROOT = W + 4096  # 256: the square roots of those
SIZE = ROOT + 4096  # 256: the weights without their signs
PULL = SIZE + 4096  # 256: root * size
TERMS = PULL + 4096  # 32: the error of each weight of a group at each level
SCALE = TERMS + 512  # 16: the scales of the sub-blocks
SUM_X = SCALE + 256  # 66: sums of w * x up to each limit between sorted weights
SUM_W = SUM_X + 1056  # 66: sums of w
TAIL = SUM_W + 1056  # 132: what lies above the second limit adds to a try
UNTIL = TAIL + 2112  # 8: below this iscale, and with ROUNDED as it is, TRIED remains the best
SLACK = UNTIL + 128  # 16: how far estimates may be off: a constant, and what goes with iscale squared
ESTIMATE = SLACK + 256  # the estimated error of each neighbour
LEAN = ESTIMATE + LONGEST  # how fast it falls while iscale grows
TRY = LEAN + LONGEST  # 3: iscale, scale and the largest iscale of the tries to come
N_FLOATS = TRY + 48

# Fields of `ints`.
SIGNS = 0  # 32 columns: the signs of 8 weights, one bit each
POINTS = SIGNS + 512  # 64: the best points of the groups
TRIED = POINTS + 1024  # 32: the points of one try
ROUNDED = TRIED + 512  # 8: the points that its weights were rounded to
WANTED = ROUNDED + 128  # 8: whether a group takes part in a try
MISSING = WANTED + 128  # 64: whether the rounded levels were no grid point, for the best try
TRIED_MISSING = MISSING + 1024  # 8: and for this one
EMPTY = TRIED_MISSING + 128  # 8: whether a sub-block is all zero
ORDER = EMPTY + 128  # 32: where sorted weights come from
LEVEL = ORDER + 512  # 32: their levels
WHERE = LEVEL + 512  # 1: the place of the best neighbour in each lane
WORK = WHERE + 16  # columns of the groups whose best point is to be found
N_INTS = WORK + 144


@kernel
def workspace():
    """Make room for one task."""
    return Workspace(
        np.empty(16, np.int64),
        np.empty(N_FLOATS, np.float32),
        np.zeros(N_INTS, np.int32),
        np.empty(16 * HEAD + 512, np.uint8),
    )


@kernel
def read_weights(ws, x, importance, first, stop, factor, floor):
    """Read 16 super-blocks and set their error weights, ``importance * sqrt(sigma2 + x * x)``, and the roots of those.

    `sigma2` is `factor` times the mean square. Without importance (an empty array), the weights are the squares, plus
    `floor` times `sigma2`.
    """
    read_columns(x, first, stop, stop, ws.floats[X:], ws.rows)
    sum_x2 = lanes(ZERO)
    for i in range(0, 16 * QK_K, 16):
        v = load(ws.floats, X + i)
        sum_x2 = sum_x2 + v * v
    sigma2 = factor * sum_x2 / np.float32(QK_K)
    if importance.size:
        read_columns(importance, first, stop, importance.size // QK_K, ws.floats[W:], ws.rows)
    for i in range(0, 16 * QK_K, 16):
        v = load(ws.floats, X + i)
        if importance.size:
            weight = load(ws.floats, W + i) * sqrt(sigma2 + v * v)
        elif floor > ZERO:
            weight = floor * sigma2 + v * v
        else:
            weight = v * v
        store(ws.floats, W + i, weight)
        store(ws.floats, ROOT + i, sqrt(weight))


@kernel
def split_signs(ws, group, even):
    """Split 8 weights into signs and magnitudes. With `even`, flip the cheapest sign if their number is odd."""
    first = 128 * group
    signs = lanes(0)
    for i in range(8):
        v = load(ws.floats, X + first + 16 * i)
        negative = v < ZERO
        signs = signs | select(negative, 1 << i, 0)
        store(ws.floats, SIZE + first + 16 * i, select(negative, -v, v))
    if even:
        odd = signs ^ (signs >> 4)
        odd = odd ^ (odd >> 2)
        odd = odd ^ (odd >> 1)
        v = load(ws.floats, X + first)
        least = load(ws.floats, W + first) * v * v
        flipped = lanes(1)
        for i in range(1, 8):
            v = load(ws.floats, X + first + 16 * i)
            cost = load(ws.floats, W + first + 16 * i) * v * v
            less = cost < least
            least = select(less, cost, least)
            flipped = select(less, 1 << i, flipped)
        flipped = select((odd & 1) != 0, flipped, 0)
        for i in range(8):
            v = load(ws.floats, SIZE + first + 16 * i)
            store(ws.floats, SIZE + first + 16 * i, select((flipped & (1 << i)) != 0, -v, v))
        signs = signs ^ flipped
    store(ws.ints, SIGNS + 16 * group, signs)


@kernel
def largest_of(values, first, n):
    """Return the largest of `n` columns."""
    peak = load(values, first)
    for i in range(first + 16, first + 16 * n, 16):
        peak = maximum(peak, load(values, i))
    return peak


@inlined_kernel
def _error_of_8(c, terms, at):
    """Sum the errors of 8 weights at the levels of 16 points."""
    e = select((c & 2) != 0, item(terms, at + 32), select((c & 1) != 0, item(terms, at + 16), item(terms, at)))
    for i in range(1, 8):
        low, mid, high = item(terms, at + 48 * i), item(terms, at + 48 * i + 16), item(terms, at + 48 * i + 32)
        e = e + select((c & (2 << 2 * i)) != 0, high, select((c & (1 << 2 * i)) != 0, mid, low))
    return e


@inlined_kernel
def best_of_8(grid, point, terms, at):
    """Return the neighbour with the smallest error, the first of equals; `terms` hold the errors from `at` on."""
    start, stop = item(grid.start, point), item(grid.start, point + 1)
    best = lanes(LARGEST)
    where = lanes(start)
    for run in range(start, stop, 16):
        error = _error_of_8(load(grid.codes, run), terms, at)
        better = error < best
        best = select(better, error, best)
        where = select(better, run + load(LANE, 0), where)
    return item(grid.codes, lowest(select(best == lowest(best), where, 0x7FFFFFFF)))


# ---- tries of IQ2 and IQ3: the neighbour with the smallest error
#
# With levels l the values are 2 l + 1, and the error of a group is a sum of root * (scale * (2 l + 1) - size)². Divided
# by 4 scale², without what all points have in common, it is
#
#     sum of root * (l * l + l)  -  iscale * sum of root * size * l        iscale = 1 / scale
#
# a straight line over iscale for each neighbour. Where two lines cross, one neighbour takes over from another, and once
# the lines are known, so is the next crossing: up to there the best neighbour need not be searched again. Where the
# lowest two are so close that rounding might decide, it is decided by the error as C computes it.


@inlined_kernel
def start_tries(ws, weights, first, groups, zero):
    """Get `groups` groups of `weights` weights ready, from group `first` on, in the lanes that are not zero."""
    for k in range(groups):
        sum_root, sum_x2 = lanes(ZERO), lanes(ZERO)
        for i in range(16 * weights * (first + k), 16 * weights * (first + k + 1), 16):
            root, v = load(ws.floats, ROOT + i), load(ws.floats, SIZE + i)
            store(ws.floats, PULL + i, root * v)
            sum_root = sum_root + root
            sum_x2 = sum_x2 + root * v * v
        store(ws.floats, SLACK + 16 * k, MARGIN * np.float32(0.25) * sum_root)
        store(ws.floats, SLACK + 128 + 16 * k, MARGIN * HALF * sum_x2)
        store(ws.ints, ROUNDED + 16 * k, lanes(-1))
        store(ws.ints, TRIED + 16 * k, lanes(0))
        store(ws.ints, TRIED_MISSING + 16 * k, lanes(0))
        store(ws.ints, WANTED + 16 * k, select(zero, 0, 1))


@inlined_kernel
def round_to_grid(ws, grid, weights, first, groups, iscale, scale, most):
    """Round the wanted groups to points of the grid. Until ROUNDED is cleared, iscale may only grow, up to `most`."""
    width = 2 if weights == 8 else 3
    store(ws.floats, TRY, iscale)
    store(ws.floats, TRY + 16, scale)
    store(ws.floats, TRY + 32, most)
    n = 0
    for k in range(groups):
        point = lanes(0)
        for i in range(weights):
            v = load(ws.floats, SIZE + 16 * (weights * (first + k) + i))
            l = nearest_int(HALF * (iscale * v - ONE))
            point = point | (maximum(0, minimum(2 if weights == 8 else 7, l)) << (width * i))
        same = (point == load(ws.ints, ROUNDED + 16 * k)) & (iscale < load(ws.floats, UNTIL + 16 * k))
        stale = lane_bits((load(ws.ints, WANTED + 16 * k) != 0) & ~same)
        store(ws.ints, ROUNDED + 16 * k, point)
        for lane in range(16):
            put(ws.ints, WORK + n, 16 * k + lane)
            n += stale >> lane & 1
    for i in range(n):
        _find_best(ws, grid, weights, first, item(ws.ints, WORK + i))


@inlined_kernel
def want_missing(ws, first, groups, positive, whole, every):
    """Want the groups alone whose best points came from beside the grid; return in which lanes there are any.

    With `whole`, if there is one such group, for all of them; with `every`, for all in any case.
    """
    again = lanes(every)
    for k in range(16 * first, 16 * (first + groups), 16):
        again = again | (load(ws.ints, MISSING + k) != 0)
    again = again & positive
    for k in range(groups):
        new = again & ((load(ws.ints, MISSING + 16 * (first + k)) != 0) | lanes(whole))
        store(ws.ints, WANTED + 16 * k, select(new, 1, 0))
        store(ws.ints, ROUNDED + 16 * k, lanes(-1))
    return again


@inlined_kernel
def keep_tried(ws, first, groups):
    """Make the points of a try the best ones where they were wanted; put the best ones in their place elsewhere."""
    for k in range(groups):
        new, best = load(ws.ints, WANTED + 16 * k) != 0, load(ws.ints, POINTS + 16 * (first + k))
        point = select(new, load(ws.ints, TRIED + 16 * k), best)
        store(ws.ints, TRIED + 16 * k, point)
        store(ws.ints, POINTS + 16 * (first + k), point)


@inlined_kernel
def _find_best(ws, grid, weights, first, column):
    """Find the best point of one group, and how long it stays the best."""
    point = item(ws.ints, ROUNDED + column)
    start, stop = item(grid.start, point), item(grid.start, point + 1)
    put(ws.ints, TRIED_MISSING + column, np.int32(stop > start))
    if stop == start:
        put(ws.ints, TRIED + column, point)
        put(ws.floats, UNTIL + column, INFINITE)
        return
    lane = column & 15
    at = 16 * weights * (first + (column >> 4)) + lane
    iscale, most = item(ws.floats, TRY + lane), item(ws.floats, TRY + 32 + lane)
    best = _estimate(ws, grid, weights, start, stop, at, iscale)
    cost, lean, code = item(ws.floats, ESTIMATE + best), item(ws.floats, LEAN + best), item(grid.codes, start + best)
    slack = item(ws.floats, SLACK + column) + item(ws.floats, SLACK + 128 + column) * most * most
    limit = cost + slack + np.float32(2.125) * MARGIN * (cost + iscale * lean)
    free, near = lanes(INFINITE), lanes(False)
    for i in range(0, stop - start, 16):
        gap, lead = load(ws.floats, ESTIMATE + i) - limit, load(ws.floats, LEAN + i) - lean
        near = near | (~(gap > ZERO) & (load(grid.codes, start + i) != code))
        free = minimum(select(lead > ZERO, gap / lead, INFINITE), free)
    if any_lane(near) or not slack > TINY + TINY * most * most:
        put(ws.ints, TRIED + column, best_as_in_c(ws, grid, weights, start, stop, at, item(ws.floats, TRY + 16 + lane)))
        put(ws.floats, UNTIL + column, ZERO)
    else:
        put(ws.ints, TRIED + column, code)
        put(ws.floats, UNTIL + column, iscale + lowest(free))


@inlined_kernel
def _estimate(ws, grid, weights, start, stop, at, iscale):
    """Estimate the errors of the neighbours; return the place of the smallest among them."""
    width = 2 if weights == 8 else 3
    least, where = lanes(LARGEST), load(LANE, 0)
    for run in range(0, stop - start, 16):
        c = load(grid.codes, start + run)
        bend, lean = lanes(ZERO), lanes(ZERO)
        for i in range(weights):
            root, l = lanes(item(ws.floats, ROOT + at + 16 * i)), to_float((c >> (width * i)) & ((1 << width) - 1))
            bend = multiply_add(multiply_add(root, l, root), l, bend)
            lean = multiply_add(item(ws.floats, PULL + at + 16 * i), l, lean)
        cost = (ONE - MARGIN) * bend - iscale * lean
        store(ws.floats, ESTIMATE + run, cost)
        store(ws.floats, LEAN + run, lean)
        less = cost < least
        least = select(less, cost, least)
        where = select(less, run + load(LANE, 0), where)
    store(ws.ints, WHERE, where)
    return item(ws.ints, WHERE + first_lane(least == lowest(least)))


@kernel
def best_as_in_c(ws, grid, weights, start, stop, at, scale):
    """Return the neighbour with the smallest error of the weights from column `at` on, the first of equals."""
    width = 2 if weights == 8 else 3
    best, where = lanes(LARGEST), lanes(start)
    for run in range(start, stop, 16):
        c = load(grid.codes, run)
        error = lanes(ZERO)
        for i in range(weights):
            l = (c >> (width * i)) & ((1 << width) - 1)
            diff = scale * to_float(l * 2 + 1) - item(ws.floats, SIZE + at + 16 * i)
            error = error + item(ws.floats, ROOT + at + 16 * i) * diff * diff
        better = error < best
        best = select(better, error, best)
        where = select(better, run + load(LANE, 0), where)
    return item(grid.codes, lowest(select(best == lowest(best), where, 0x7FFFFFFF)))


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
