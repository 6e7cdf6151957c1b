"""Points of a grid and signs for 8 weights at a time, chosen under a quadratic form.

The form is the error that feedback or descent counts, ``Σ D_i r_i²`` with r = F (q - z): z the 8 values that would be
best if all were allowed, q those chosen, both over the block's scale, and F unit lower triangular. F and D are the same
for all rows. IQ3 takes 4 weights after the other 4, which make up for what the first ones lack.

With the signs kept, all points of the grid are tried. A point's cost is that of its first half, that of its second
half, and a product of the two, so that a point takes as many products as it has weights in its second half.
"""

from typing import NamedTuple

import numpy as np

from quantlab.quants.lanes import inlined_kernel, kernel, lanes, load, select, store, to_float

BLOCK = 8  # weights with a byte of signs
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
LARGEST = np.float32(3e38)


class Block(NamedTuple):
    """Eight columns of 16 rows: number `i` of the row in lane `k` is element 16 * i + k."""

    z: np.ndarray  # the values wanted, over the scale
    q: np.ndarray  # the values chosen, over the scale
    code: np.ndarray  # their codes
    sign: np.ndarray  # 1 or -1
    target: np.ndarray  # z, moved by the errors of the weights chosen before
    pull: np.ndarray  # of one point: how the cost falls with each value
    pairs: np.ndarray  # of one point, 8 * 8: how it grows with products of two values
    costs: np.ndarray  # a number for each second half
    factor: np.ndarray  # F, the same in all lanes: 8 * 8
    weight: np.ndarray  # D, 8
    form: np.ndarray  # Fᵀ D F of one point, or of 8 columns


@kernel
def new_block(points):
    eight, f = 16 * BLOCK, np.float32
    return Block(
        np.empty(eight, f), np.empty(eight, f), np.empty(eight, f), np.empty(eight, f), np.empty(eight, f),
        np.empty(eight, f), np.empty(8 * eight, f), np.empty(16 * max(1, points.start.size), f),
        np.empty(64, f), np.empty(8, f), np.empty(64, f),
    )  # fmt: skip


@kernel
def split(block, moments, n, first):
    """Split H of 8 columns of `n` from `first` on into Fᵀ D F."""
    for i in range(8):
        for j in range(8):
            block.form[8 * i + j] = moments[(first + i) * n + first + j]
    for k in range(7, -1, -1):
        block.weight[k] = block.form[8 * k + k]
        for j in range(8):
            block.factor[8 * k + j] = block.form[8 * k + j] / block.weight[k] if j <= k else ZERO
        for i in range(k):
            for j in range(k):
                block.form[8 * i + j] -= block.form[8 * k + i] * block.factor[8 * k + j]


@kernel
def solve(block, g, first):
    """Write H⁻¹ g of 8 columns to `block.target`; `g` from column `first` on."""
    for i in range(7, -1, -1):
        v = load(g, 16 * (first + i))
        for k in range(i + 1, 8):
            v = v - block.factor[8 * k + i] * load(block.target, 16 * k)
        store(block.target, 16 * i, v)
    for i in range(8):
        v = load(block.target, 16 * i) / block.weight[i]
        for k in range(i):
            v = v - block.factor[8 * i + k] * load(block.target, 16 * k)
        store(block.target, 16 * i, v)


@kernel
def cost_of(block, values):
    """Return the error of `values`."""
    total = lanes(ZERO)
    for i in range(8):
        r = lanes(ZERO)
        for j in range(i + 1):
            r = r + block.factor[8 * i + j] * (load(values, 16 * j) - load(block.z, 16 * j))
        total = total + block.weight[i] * (r * r)
    return total


@kernel
def _take_signs(block, target, first, stop, even):
    """Take the signs of the columns `first` to `stop` of `target`; if the number must be even, change the cheapest."""
    parity = lanes(ONE)
    for i in range(stop):
        if i >= first:
            store(block.sign, 16 * i, select(load(target, 16 * i) < ZERO, -ONE, ONE))
        parity = parity * load(block.sign, 16 * i)
    if not even:
        return
    least, cheapest = lanes(LARGEST), lanes(-1)
    for i in range(first, stop):
        price, v = ZERO, load(target, 16 * i)
        for k in range(i, stop):
            price += block.weight[k] * block.factor[8 * k + i] * block.factor[8 * k + i]
        less = price * (v * v) < least
        least, cheapest = select(less, price * (v * v), least), select(less, i, cheapest)
    for i in range(first, stop):
        sign = load(block.sign, 16 * i)
        store(block.sign, 16 * i, select((parity < ZERO) & (cheapest == i), ZERO - sign, sign))


@kernel
def choose(block, points, levels, signs_too):
    """Choose the points of 8 weights, and their signs unless those in `block` shall stay."""
    weights = points.weights
    if signs_too:
        _take_signs(block, block.z, 0, 8, points.even)
    for first in range(0, 8, weights):
        for i in range(first, first + weights):
            e = lanes(ZERO)
            for j in range(i):
                y = load(block.q, 16 * j) if j < first else load(block.target, 16 * j)
                e = e + block.factor[8 * i + j] * (y - load(block.z, 16 * j))
            store(block.target, 16 * i, load(block.z, 16 * i) - e)
        if signs_too and first > 0:
            _take_signs(block, block.target, first, first + weights, points.even)
        _set_form(block, first, weights)
        code = _best_point(block, points, first)
        _set_values(block, levels, weights, first, code)


@kernel
def _set_form(block, first, weights):
    """Set the quadratic form of one point's values without signs: values · (pairs · values - 2 pull)."""
    for i in range(weights):
        for j in range(weights):
            v = ZERO
            for k in range(first + max(i, j), first + weights):
                v += block.weight[k] * block.factor[8 * k + first + i] * block.factor[8 * k + first + j]
            block.form[8 * i + j] = v
    for i in range(weights):
        pull, sign = lanes(ZERO), load(block.sign, 16 * (first + i))
        for j in range(weights):
            v, other = block.form[8 * i + j], load(block.sign, 16 * (first + j))
            pull = pull + v * load(block.target, 16 * (first + j))
            store(block.pairs, 16 * (8 * i + j), v * (sign * other))
        store(block.pull, 16 * i, sign * pull)


@kernel
def _best_point(block, points, first):
    """Return the point with the lowest cost, the first of equals."""
    half = points.weights // 2
    n_halves, halves = points.start.size - 1, points.halves
    for h in range(n_halves):
        cost = lanes(ZERO)
        for i in range(half):
            moved = lanes(ZERO)
            for j in range(half):
                moved = moved + halves[half * h + j] * load(block.pairs, 16 * (8 * (half + i) + half + j))
            cost = cost + halves[half * h + i] * (moved - TWO * load(block.pull, 16 * (half + i)))
        store(block.costs, 16 * h, cost)
    best, code = lanes(LARGEST), lanes(np.int64(points.code[0]))
    for h in range(n_halves):
        if points.start[h] == points.start[h + 1]:
            continue
        cost = lanes(ZERO)
        for i in range(half):
            moved, lean = lanes(ZERO), lanes(ZERO)
            for j in range(half):
                moved = moved + halves[half * h + j] * load(block.pairs, 16 * (8 * i + j))
                lean = lean + halves[half * h + j] * load(block.pairs, 16 * (8 * (half + i) + j))
            cost = cost + halves[half * h + i] * (moved - TWO * load(block.pull, 16 * i))
            store(block.q, 16 * (first + i), TWO * lean)
        best, code = _best_second_half(block, points, h, first, cost, best, code)
    return code


@inlined_kernel
def _best_second_half(block, points, h, first, cost_of_first, best, code):
    """Try the points that begin with half `h`; `block.q` tells how the cost leans on the second half's values."""
    halves = points.halves
    a, b = load(block.q, 16 * first), load(block.q, 16 * (first + 1))
    if points.weights == 4:
        for p in range(points.start[h], points.start[h + 1]):
            second = np.int64(points.second[p])
            lean = halves[2 * second] * a + halves[2 * second + 1] * b
            cost = (cost_of_first + load(block.costs, 16 * second)) + lean
            better = cost < best
            best, code = select(better, cost, best), select(better, np.int64(points.code[p]), code)
    else:
        c, d = load(block.q, 16 * (first + 2)), load(block.q, 16 * (first + 3))
        for p in range(points.start[h], points.start[h + 1]):
            second = np.int64(points.second[p])
            lean = halves[4 * second] * a + halves[4 * second + 1] * b
            lean = lean + (halves[4 * second + 2] * c + halves[4 * second + 3] * d)
            cost = (cost_of_first + load(block.costs, 16 * second)) + lean
            better = cost < best
            best, code = select(better, cost, best), select(better, np.int64(points.code[p]), code)
    return best, code


@kernel
def _set_values(block, levels, weights, first, point):
    """Set values and codes of one point."""
    n_levels = np.int64(levels.size // 2)
    width = 16 // weights - weights // 4 % 2
    for i in range(weights):
        level, sign = (point >> (width * i)) & ((1 << width) - 1), load(block.sign, 16 * (first + i))
        value = lanes(levels[n_levels])
        for k in range(1, n_levels):
            value = select(level == k, levels[n_levels + k], value)
        store(block.q, 16 * (first + i), sign * value)
        code = select(sign < ZERO, (n_levels - 1) - level, n_levels + level)
        store(block.code, 16 * (first + i), to_float(code))
