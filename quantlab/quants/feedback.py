"""Codes chosen with knowledge of the layer's inputs, on a type's own grid.

An ordinary encoder rounds every weight by itself. The kernels here lower the error that a layer's outputs get,
``tr(E H Eᵀ)`` with E = decoded - wanted weights and H = E[x xᵀ] the second moments of the layer's inputs, in two ways:

    feed back    round column after column, each weight moved by the errors of the columns before it
    descend      move codes, sub-block scales and super-block scales in turn, each to where the error is lowest

Codes of IQ2 and IQ3 are chosen for 8 weights at a time, see `points.py`.

Both work on up to 256 columns (a *span*) of 16 rows at a time, a row in each lane. What a span's errors mean for other
columns is a matrix product, which `evaluate/refine.py` makes. Rows do not depend on each other.

Source: feedback as in GPTQ (Frantar et al. 2022) in the form of LDLQ (Chee et al. 2023).
"""

from typing import NamedTuple

import numpy as np

from quantlab.quants.compiled import njit
from quantlab.quants.lanes import (
    any_lane,
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
    store,
    to_float,
    to_half,
)
from quantlab.quants.points import BLOCK, choose, cost_of, new_block, solve, split

span_kernel = njit(nogil=True, cache=True, error_model="numpy")  # called by several threads, each on its own rows

SPAN = 256  # columns that a kernel works on at a time
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
FAR = np.float32(1e6)  # what is asked for beyond this is cut before it is rounded

# ---- a span of 16 rows, a row in each lane: number `c` of the row in lane `k` is element 16 * c + k


@inlined_kernel
def _read(source, first, stride, n, target):
    """Put `n` numbers of 16 rows side by side."""
    for c in range(n):
        store(target, 16 * c, gather(source, first + c, stride))


@inlined_kernel
def _write(target, first, stride, n, source):
    """Put them back into their rows."""
    for c in range(n):
        scatter(target, first + c, stride, load(source, 16 * c))


@inlined_kernel
def _nearest(wanted, levels, edges):
    """Return the codes of the levels nearest to what is wanted."""
    if edges.size == 0:
        l = nearest_int(maximum(-FAR, minimum(FAR, wanted - levels[0])))
        return to_float(maximum(0, minimum(levels.size - 1, l)))
    code = lanes(0)
    for i in range(edges.size):
        code = code + select(wanted > edges[i], 1, 0)
    return to_float(code)


@inlined_kernel
def _level(code, levels, edges):
    """Return the levels that codes stand for."""
    if edges.size == 0:
        return code + levels[0]
    found = lanes(levels[0])
    for i in range(edges.size):
        found = select(code > np.float32(i), levels[i + 1], found)
    return found


@span_kernel
def feed_back(wanted, moved, factor, weight, levels, edges, points, super_block, sub_block, d, dmin, sc, m, code, cost):
    """Round the columns of a span one after another, each moved by the errors of those before it.

    Parameters
    ----------
    wanted, moved : np.ndarray [shape=(nrows * n,), dtype=float32]
        The weights, and the same moved by the errors of the columns before the span. `nrows` is a multiple of 16.
    factor : np.ndarray [shape=(n * n,), dtype=float32]
        Element ``n * column + earlier``: how far an error of the earlier column moves the later one.
    weight : np.ndarray [shape=(n,), dtype=float32]
        Price of a column's squared error once it has been moved.
    levels, edges, points, super_block, sub_block
        As in `Grid`.
    d, dmin, sc, m, code : np.ndarray
        The parts of `Blocks`, flat. `code` is rewritten.
    cost : np.ndarray [shape=(nrows,), dtype=float32]
        Receives the sum of the prices.
    """
    n = weight.size
    per, n_sub, n_super = super_block // sub_block, n // sub_block, n // super_block
    w, x = np.empty(16 * n, np.float32), np.empty(16 * n, np.float32)
    error, q = np.empty(16 * n, np.float32), np.empty(16 * n, np.float32)
    scale, low = np.empty(16 * n_sub, np.float32), np.empty(16 * n_sub, np.float32)
    block, n_single = new_block(points), n if points.weights == 1 else 0
    for row in range(0, cost.size, 16):
        _read(wanted, row * n, n, n, w)
        _read(moved, row * n, n, n, x)
        _read(code, row * n, n, n, q)
        for j in range(n_sub):
            at, s = row * n_sub + j, row * n_super + j // per
            store(scale, 16 * j, gather(d, s, n_super) * gather(sc, at, n_sub))
            store(low, 16 * j, gather(dmin, s, n_super) * gather(m, at, n_sub))
        total = lanes(ZERO)
        for c in range(n_single, n, BLOCK):
            step = load(scale, c // sub_block * 16)
            total = total + _feed_block(block, points, levels, w, x, error, q, step, factor, weight, n, c)
        for c in range(n_single):
            v = load(x, 16 * c) + _weighed_sum(error, 0, c, factor, n * c)
            step, shift = load(scale, c // sub_block * 16), load(low, c // sub_block * 16)
            l = select(step == ZERO, load(q, 16 * c), _nearest((v + shift) / step, levels, edges))
            value = step * _level(l, levels, edges) - shift
            store(q, 16 * c, l)
            store(error, 16 * c, load(w, 16 * c) - value)
            total = total + weight[c] * ((v - value) * (v - value))
        _write(code, row * n, n, n, q)
        store(cost, row, total)


@kernel
def _feed_block(block, points, levels, w, x, error, q, scale, factor, weight, n, first):
    """Choose the codes of 8 columns; return the price of their errors. A scale of 0 keeps them."""
    zero = scale == ZERO
    for i in range(BLOCK):
        c = first + i
        block.weight[i] = weight[c]
        for j in range(BLOCK):
            block.factor[8 * i + j] = factor[n * c + first + j] if j < i else ONE if j == i else ZERO
        e = (load(x, 16 * c) - load(w, 16 * c)) + _weighed_sum(error, 0, first, factor, n * c)
        for j in range(i):
            e = e - block.factor[8 * i + j] * load(block.target, 16 * j)
        store(block.target, 16 * i, e)
    for i in range(BLOCK):
        wanted = load(w, 16 * (first + i)) + load(block.target, 16 * i)
        store(block.z, 16 * i, select(zero, wanted, wanted / scale))
    choose(block, points, levels, True)
    for i in range(BLOCK):
        c = 16 * (first + i)
        store(q, c, select(zero, load(q, c), load(block.code, 16 * i)))
        store(error, c, load(w, c) - select(zero, ZERO, scale * load(block.q, 16 * i)))
        store(block.q, 16 * i, select(zero, ZERO, load(block.q, 16 * i)))
    return select(zero, ONE, scale * scale) * cost_of(block, block.q)


@inlined_kernel
def _weighed_sum(columns, first, n, factors, at):
    """Sum ``factors[at + i] * columns[first + i]`` for i below `n`, in four sums that do not wait for each other."""
    a, b, c, d = lanes(ZERO), lanes(ZERO), lanes(ZERO), lanes(ZERO)
    whole = n - n % 4
    for i in range(0, whole, 4):
        k = 16 * (first + i)
        a = a + factors[at + i] * load(columns, k)
        b = b + factors[at + i + 1] * load(columns, k + 16)
        c = c + factors[at + i + 2] * load(columns, k + 32)
        d = d + factors[at + i + 3] * load(columns, k + 48)
    for i in range(whole, n):
        a = a + factors[at + i] * load(columns, 16 * (first + i))
    return (a + b) + (c + d)


@span_kernel
def descend(
    n, moments, g, levels, edges, points, super_block, sub_block, sc_low, sc_high, m_high, d, dmin, sc, m, code, change
):
    """Minimize the error of a span over codes, then sub-blocks' scales, then super-blocks' scales.

    No step raises ``e H eᵀ`` of a row, e being its decoded - wanted weights.

    Parameters
    ----------
    n : int
        Columns of the span.
    moments : np.ndarray [shape=(n * n,), dtype=float32]
        H of the span's columns.
    g : np.ndarray [shape=(nrows * n,), dtype=float32]
        The span's columns of ``e H``. `nrows` is a multiple of 16.
    levels, edges, points, super_block, sub_block
        As in `Grid`.
    sc_low, sc_high, m_high : float32
        Ranges of `sc` (equal where the type stores none), in steps of 1, and of `m` (0: no minimum; else from 0 on).
    d, dmin, sc, m, code : np.ndarray
        The parts of `Blocks`, flat; rewritten.
    change : np.ndarray [shape=(nrows * n,), dtype=float32]
        Receives new minus old values of the weights.
    """
    ws, block = _workspace(n, super_block, sub_block), new_block(points)
    n_sub, n_super = n // sub_block, n // super_block
    for row in range(0, g.size // n, 16):
        _read(g, row * n, n, n, ws.g)
        _read(code, row * n, n, n, ws.code)
        _read(d, row * n_super, n_super, n_super, ws.d)
        _read(dmin, row * n_super, n_super, n_super, ws.dmin)
        _read(sc, row * n_sub, n_sub, n_sub, ws.sc)
        _read(m, row * n_sub, n_sub, n_sub, ws.m)
        ws.change[:] = ZERO
        for c in range(n):
            store(ws.level, 16 * c, _level(load(ws.code, 16 * c), levels, edges))
        if points.weights == 1:
            _move_codes(ws, moments, levels, edges, n, super_block, sub_block)
        for c in range(0, n if points.weights > 1 else 0, BLOCK):
            scale = load(ws.d, c // super_block * 16) * load(ws.sc, c // sub_block * 16)
            _move_block(ws, block, moments, levels, points, scale, n, c)
        if sc_low != sc_high:
            _move_sub_blocks(ws, moments, n, super_block, sub_block, sc_low, sc_high, m_high)
        _move_super_blocks(ws, moments, n, super_block, sub_block, m_high)
        _write(code, row * n, n, n, ws.code)
        _write(d, row * n_super, n_super, n_super, ws.d)
        _write(dmin, row * n_super, n_super, n_super, ws.dmin)
        _write(sc, row * n_sub, n_sub, n_sub, ws.sc)
        _write(m, row * n_sub, n_sub, n_sub, ws.m)
        _write(change, row * n, n, n, ws.change)


class _Workspace(NamedTuple):
    """Columns of 16 rows."""

    g: np.ndarray  # n: gradient of the error
    code: np.ndarray  # n
    level: np.ndarray  # n: the codes' levels
    change: np.ndarray  # n: of the values since the start
    step: np.ndarray  # n: change of the values in one move
    u: np.ndarray  # n: how the values move with a scale
    d: np.ndarray  # a number for each super-block
    dmin: np.ndarray
    sc: np.ndarray  # a number for each sub-block
    m: np.ndarray


@kernel
def _workspace(n, super_block, sub_block):
    n_sub, n_super = 16 * (n // sub_block), 16 * (n // super_block)
    return _Workspace(
        np.empty(16 * n, np.float32),
        np.empty(16 * n, np.float32),
        np.empty(16 * n, np.float32),
        np.empty(16 * n, np.float32),
        np.empty(16 * n, np.float32),
        np.empty(16 * n, np.float32),
        np.empty(n_super, np.float32),
        np.empty(n_super, np.float32),
        np.empty(n_sub, np.float32),
        np.empty(n_sub, np.float32),
    )


@kernel
def _move_codes(ws, moments, levels, edges, n, super_block, sub_block):
    """Move each code to the level with the lowest error, and keep all else."""
    for c in range(n):
        scale = load(ws.d, c // super_block * 16) * load(ws.sc, c // sub_block * 16)
        old = load(ws.level, 16 * c)
        code = _nearest(old - load(ws.g, 16 * c) / (moments[c * n + c] * scale), levels, edges)
        code = select(scale == ZERO, load(ws.code, 16 * c), code)
        level = _level(code, levels, edges)
        if any_lane(level != old):
            _move_column(ws, moments, n, c, code, level, scale * (level - old))


@kernel
def _move_block(ws, block, moments, levels, points, scale, n, first):
    """Move the codes of 8 columns to better points: with the best signs, then with those they have."""
    split(block, moments, n, first)
    solve(block, ws.g, first)
    for i in range(BLOCK):
        old = load(ws.level, 16 * (first + i))
        store(block.z, 16 * i, old - load(block.target, 16 * i) / scale)
        store(ws.u, 16 * i, old)
        store(ws.step, 16 * i, load(ws.code, 16 * (first + i)))
    best = cost_of(block, ws.u)
    for signs_too in (True, False):
        for i in range(BLOCK):
            store(block.sign, 16 * i, select(load(ws.level, 16 * (first + i)) < ZERO, -ONE, ONE))
        choose(block, points, levels, signs_too)
        cost = cost_of(block, block.q)
        better = (cost < best) & (scale != ZERO)
        best = select(better, cost, best)
        for i in range(BLOCK):
            store(ws.u, 16 * i, select(better, load(block.q, 16 * i), load(ws.u, 16 * i)))
            store(ws.step, 16 * i, select(better, load(block.code, 16 * i), load(ws.step, 16 * i)))
    for i in range(BLOCK):
        c, level = first + i, load(ws.u, 16 * i)
        old = load(ws.level, 16 * c)
        if any_lane(level != old):
            _move_column(ws, moments, n, c, load(ws.step, 16 * i), level, scale * (level - old))


@inlined_kernel
def _move_column(ws, moments, n, c, code, level, step):
    """Give column `c` other codes and levels, which add `step` to its values."""
    store(ws.code, 16 * c, code)
    store(ws.level, 16 * c, level)
    store(ws.change, 16 * c, load(ws.change, 16 * c) + step)
    for i in range(n):
        store(ws.g, 16 * i, load(ws.g, 16 * i) + moments[c * n + i] * step)


@inlined_kernel
def _apply(ws, moments, n, first, stop):
    """Apply a move of the columns first … stop to their values and to the gradient of all columns."""
    for c in range(first, stop):
        store(ws.change, 16 * c, load(ws.change, 16 * c) + load(ws.step, 16 * c))
    for i in range(n):
        moved = _weighed_sum(ws.step, first, stop - first, moments, i * n + first)
        store(ws.g, 16 * i, load(ws.g, 16 * i) + moved)


@inlined_kernel
def _change_of_error(x, y, gu, gv, uu, uv, vv):
    """Return the change of the error if the values move by ``x * u - y * v``."""
    return TWO * (x * gu - y * gv) + (x * x * uu - TWO * x * y * uv + y * y * vv)


@kernel
def _move_sub_blocks(ws, moments, n, super_block, sub_block, sc_low, sc_high, m_high):
    """Move the numbers of each sub-block: try scales near the best, each with its best minimum."""
    part = sc_low - np.float32(np.floor(sc_low))  # what all scales have beyond a whole number
    for j in range(n // sub_block):
        first, stop, at = j * sub_block, (j + 1) * sub_block, 16 * (j * sub_block // super_block)
        gu, gv, uu, uv, vv = lanes(ZERO), lanes(ZERO), lanes(ZERO), lanes(ZERO), ZERO
        for c in range(first, stop):
            u, g = load(ws.level, 16 * c), load(ws.g, 16 * c)
            hv = ZERO
            for i in range(first, stop):
                hv += moments[c * n + i]
            gu, gv, uv, vv = gu + g * u, gv + g, uv + u * hv, vv + hv
            uu = uu + u * _weighed_sum(ws.level, first, sub_block, moments, c * n + first)
        d, dmin, sc, m = load(ws.d, at), load(ws.dmin, at), load(ws.sc, 16 * j), load(ws.m, 16 * j)
        x = -gu / uu
        if m_high > ZERO:
            determinant = uu * vv - uv * uv
            x = select((determinant > ZERO) & (dmin != ZERO), (gv * uv - gu * vv) / determinant, x)
        best, best_sc, best_m = lanes(ZERO), sc, m
        wanted = nearest_int(maximum(-FAR, minimum(FAR, sc - part + x / d)))
        for beside in range(-1, 2):
            new_sc = minimum(sc_high, maximum(sc_low, to_float(wanted + beside) + part))
            x = d * (new_sc - sc)
            lower = m + (gv + x * uv) / (vv * dmin)  # the minimum that fits, between two whole numbers
            for up in range(2):
                new_m = m
                if m_high > ZERO:
                    new_m = to_float(nearest_int(maximum(-FAR, minimum(FAR, lower))) + up)
                    new_m = new_m - select(new_m > lower + np.float32(up), ONE, ZERO)
                    new_m = select(dmin == ZERO, m, minimum(m_high, maximum(ZERO, new_m)))
                change = _change_of_error(x, dmin * (new_m - m), gu, gv, uu, uv, vv)
                better = change < best
                best = select(better, change, best)
                best_sc, best_m = select(better, new_sc, best_sc), select(better, new_m, best_m)
        if any_lane(best < ZERO):
            x, y = d * (best_sc - sc), dmin * (best_m - m)
            store(ws.sc, 16 * j, best_sc)
            store(ws.m, 16 * j, best_m)
            for c in range(first, stop):
                store(ws.step, 16 * c, x * load(ws.level, 16 * c) - y)
            _apply(ws, moments, n, first, stop)


@kernel
def _move_super_blocks(ws, moments, n, super_block, sub_block, m_high):
    """Move the float16 scales of each super-block to the lowest error, and keep their signs."""
    for b in range(n // super_block):
        first, stop, at = b * super_block, (b + 1) * super_block, 16 * b
        gu, gv, uu, uv, vv = lanes(ZERO), lanes(ZERO), lanes(ZERO), lanes(ZERO), lanes(ZERO)
        for c in range(first, stop):
            j = 16 * (c // sub_block)
            store(ws.u, 16 * c, load(ws.sc, j) * load(ws.level, 16 * c))
            store(ws.step, 16 * c, load(ws.m, j))
        for c in range(first, stop):
            u, v, g = load(ws.u, 16 * c), load(ws.step, 16 * c), load(ws.g, 16 * c)
            gu, gv = gu + g * u, gv + g * v
            uu = uu + u * _weighed_sum(ws.u, first, super_block, moments, c * n + first)
            if m_high > ZERO:
                hv = _weighed_sum(ws.step, first, super_block, moments, c * n + first)
                uv, vv = uv + u * hv, vv + v * hv
        d, dmin = load(ws.d, at), load(ws.dmin, at)
        x = -gu / uu
        if m_high > ZERO:
            determinant = uu * vv - uv * uv
            x = select((determinant > ZERO) & (dmin != ZERO), (gv * uv - gu * vv) / determinant, x)
        new_d, new_dmin = from_half(to_half(d + x)), dmin
        if m_high > ZERO:
            y = (gv + (new_d - d) * uv) / vv
            new_dmin = select((vv > ZERO) & (dmin != ZERO), from_half(to_half(dmin + y)), dmin)
        change = _change_of_error(new_d - d, new_dmin - dmin, gu, gv, uu, uv, vv)
        better = (change < ZERO) & (new_d * d > ZERO) & (new_dmin * dmin >= ZERO)
        if any_lane(better):
            new_d, new_dmin = select(better, new_d, d), select(better, new_dmin, dmin)
            store(ws.d, at, new_d)
            store(ws.dmin, at, new_dmin)
            for c in range(first, stop):
                x, y = (new_d - d) * load(ws.u, 16 * c), (new_dmin - dmin) * load(ws.m, 16 * (c // sub_block))
                store(ws.step, 16 * c, x - y)
            _apply(ws, moments, n, first, stop)
