"""The scale searches of the k-quants, for 16 blocks side by side.

Each function does what the function of the same name in ggml-quants.c does, for 16 blocks at once: every number of the C
code is a lanes value here, with the same float32 operations in the same order, and what the C code does under a
condition is done everywhere and kept where the condition holds. The blocks lie column by column in flat arrays: value
`i` of the block in lane `k` is element ``at + 16 * i + k``.

`levels` arrays (uint8) receive what C calls L, from element `at`: the levels, which matter only for sub-blocks whose scale
becomes zero in the end.

Source: ggml-quants.c of llama.cpp, commit 0c1e57098.
"""

import numpy as np

from quantlab.quants.lanes import (
    absolute,
    any_lane,
    kernel,
    lanes,
    load,
    maximum,
    minimum,
    nearest_int,
    select,
    store,
    to_float,
)

GROUP_MAX_EPS = np.float32(1e-15)  # a block whose largest weight is smaller counts as all zero
ZERO, ONE, TENTH = np.float32(0), np.float32(1), np.float32(0.1)


@kernel
def level(v, low, high):
    """Round floats to the nearest whole number, clamp it to the ints `low` … `high`, give it as floats."""
    return to_float(maximum(low, minimum(high, nearest_int(v))))


@kernel
def make_qkx_quants(x, at, w, tried, levels, n, nmax, rmin, rdelta, nstep, use_mad):
    """Find scale and minimum of blocks quantized as ``x ≈ scale * l - minimum`` with l = 0 … `nmax`.

    The C code has it twice, as make_qkx2_quants and make_qkx3_quants.

    Parameters
    ----------
    x, w : np.ndarray [dtype=float32]
        Blocks of `n` values from element `at`, and the weights of their errors.
    tried : np.ndarray [shape=(16 * n,), dtype=float32]
        Room to work in.
    rmin, rdelta, nstep : float32, float32, int
        The scales tried are those of `nmax` + `rmin` + `rdelta` * (0 … `nstep`) levels.
    use_mad : bool
        Whether to sum absolute instead of squared errors.

    Returns
    -------
    scale, minimum : lanes
    """
    top = np.float32(nmax)
    low = load(x, at)
    high = low
    sum_w = load(w, at)
    sum_x = sum_w * low
    for i in range(16, 16 * n, 16):
        v, weight = load(x, at + i), load(w, at + i)
        low = select(v < low, v, low)
        high = select(v > high, v, high)
        sum_w = sum_w + weight
        sum_x = sum_x + weight * v
    low = select(low > ZERO, ZERO, low)
    flat = high == low
    flat_low = low

    iscale = top / (high - low)
    scale = ONE / iscale
    best_error = lanes(ZERO)
    for i in range(at, at + 16 * n, 16):
        v = load(x, i)
        diff = scale * level(iscale * (v - low), 0, nmax) + low - v
        best_error = best_error + load(w, i) * (absolute(diff) if use_mad else diff * diff)

    best_iscale, best_low = iscale, low
    for step in range(nstep + 1):
        iscale = (rmin + rdelta * np.float32(step) + top) / (high - low)
        sum_l = lanes(ZERO)
        sum_l2 = lanes(ZERO)
        sum_xl = lanes(ZERO)
        for i in range(0, 16 * n, 16):
            v = load(x, at + i)
            l = level(iscale * (v - low), 0, nmax)
            store(tried, i, l)
            wl = load(w, at + i) * l
            sum_l = sum_l + wl
            sum_l2 = sum_l2 + wl * l
            sum_xl = sum_xl + wl * v
        determinant = sum_w * sum_l2 - sum_l * sum_l
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
        this_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
        positive = this_low > ZERO
        this_scale = select(positive, sum_xl / sum_l2, this_scale)
        this_low = select(positive, ZERO, this_low)
        error = lanes(ZERO)
        for i in range(0, 16 * n, 16):
            diff = this_scale * load(tried, i) + this_low - load(x, at + i)
            error = error + load(w, at + i) * (absolute(diff) if use_mad else diff * diff)
        better = (determinant > ZERO) & (error < best_error)
        best_error = select(better, error, best_error)
        best_iscale = select(better, iscale, best_iscale)
        best_low = select(better, low, best_low)
        scale = select(better, this_scale, scale)
        low = select(better, this_low, low)

    for i in range(at, at + 16 * n, 16):
        l = maximum(0, minimum(nmax, nearest_int(best_iscale * (load(x, i) - best_low))))
        store(levels, i, select(flat, 0, l))
    return select(flat, ZERO, scale), -select(flat, flat_low, low)


@kernel
def largest(x, at, n):
    """Return the value of largest magnitude of each block, the first of equals, and its magnitude."""
    peak = lanes(ZERO)
    magnitude = lanes(ZERO)
    for i in range(at, at + 16 * n, 16):
        v = load(x, i)
        more = absolute(v) > magnitude
        magnitude = select(more, absolute(v), magnitude)
        peak = select(more, v, peak)
    return peak, magnitude


@kernel
def make_qx_quants(x, at, w, levels, n, nmax):
    """Find the scale of blocks quantized as ``x ≈ scale * l`` with l = -`nmax` … `nmax` - 1.

    Parameters
    ----------
    x, w : np.ndarray [dtype=float32]
        Blocks of `n` values from element `at`, and the weights of their errors.

    Returns
    -------
    scale : lanes
    """
    peak, magnitude = largest(x, at, n)
    zero = magnitude < GROUP_MAX_EPS
    best_iscale = -np.float32(nmax) / peak
    sum_lx, sum_l2 = _sums(x, at, w, n, nmax, best_iscale)
    scale = select(sum_l2 != ZERO, sum_lx / sum_l2, ZERO)
    best = scale * sum_lx
    for step in range(-9, 10):
        if step == 0:
            continue
        iscale = -(np.float32(nmax) + TENTH * np.float32(step)) / peak
        sum_lx, sum_l2 = _sums(x, at, w, n, nmax, iscale)
        better = (sum_l2 > ZERO) & (sum_lx * sum_lx > best * sum_l2)
        scale = select(better, sum_lx / sum_l2, scale)
        best = select(better, scale * sum_lx, best)
        best_iscale = select(better, iscale, best_iscale)
    for i in range(at, at + 16 * n, 16):
        l = maximum(-nmax, minimum(nmax - 1, nearest_int(best_iscale * load(x, i)))) + nmax
        store(levels, i, select(zero, 0, l))
    return select(zero, ZERO, scale)


@kernel
def _sums(x, at, w, n, nmax, iscale):
    """Return the weighted sums of x * l and of l * l."""
    sum_lx = lanes(ZERO)
    sum_l2 = lanes(ZERO)
    for i in range(at, at + 16 * n, 16):
        v, weight = load(x, i), load(w, i)
        l = level(iscale * v, -nmax, nmax - 1)
        sum_lx = sum_lx + weight * v * l
        sum_l2 = sum_l2 + weight * l * l
    return sum_lx, sum_l2


@kernel
def make_q3_quants(x, at, tried, levels, n, nmax):
    """Find the scale of blocks quantized as ``x ≈ scale * l``, changing one level at a time while that helps.

    Parameters
    ----------
    x : np.ndarray [dtype=float32]
        Blocks of `n` values from element `at`.
    tried : np.ndarray [shape=(16 * n,), dtype=float32]
        Room to work in.

    Returns
    -------
    scale : lanes
    """
    peak, magnitude = largest(x, at, n)
    zero = magnitude < GROUP_MAX_EPS
    iscale = -np.float32(nmax) / peak
    sum_lx = lanes(ZERO)
    sum_l2 = lanes(ZERO)
    for i in range(0, 16 * n, 16):
        v = load(x, at + i)
        l = level(iscale * v, -nmax, nmax - 1)
        store(tried, i, l)
        weight = v * v
        sum_lx = sum_lx + weight * v * l
        sum_l2 = sum_l2 + weight * l * l
    for _ in range(5):
        changed = lanes(False)
        for i in range(0, 16 * n, 16):
            v, l = load(x, at + i), load(tried, i)
            weight = v * v
            slx = sum_lx - weight * v * l
            sl2 = sum_l2 - weight * l * l
            new = level(v * sl2 / slx, -nmax, nmax - 1)
            new_slx = slx + weight * v * new
            new_sl2 = sl2 + weight * new * new
            better = (slx > ZERO) & (new != l) & (new_sl2 > ZERO)
            better = better & (new_slx * new_slx * sum_l2 > sum_lx * sum_lx * new_sl2)
            store(tried, i, select(better, new, l))
            sum_lx = select(better, new_slx, sum_lx)
            sum_l2 = select(better, new_sl2, sum_l2)
            changed = changed | better
        if not any_lane(changed & ~zero):
            break
    for i in range(0, 16 * n, 16):
        store(levels, at + i, select(zero, 0, nearest_int(load(tried, i)) + nmax))
    return select(zero | ~(sum_l2 > ZERO), ZERO, sum_lx / sum_l2)


@kernel
def make_qp_quants(x, w, levels, n, nmax):
    """Quantize the scales of 16 super-blocks as ``x ≈ scale * l`` with l = 0 … `nmax`.

    Parameters
    ----------
    x, w : np.ndarray [shape=(16 * n,), dtype=float32]
        The `n` scales of each super-block and the weights of their errors.
    levels : np.ndarray [shape=(16 * n,), dtype=uint8]
        Receives the levels. A negative one wraps, as in C.

    Returns
    -------
    scale : lanes
    """
    peak = lanes(ZERO)
    for i in range(0, 16 * n, 16):
        peak = maximum(peak, load(x, i))
    zero = peak < GROUP_MAX_EPS
    best_iscale = _best_positive_scale(x, w, n, nmax, peak)
    sum_lx = lanes(ZERO)
    sum_l2 = lanes(ZERO)
    for i in range(0, 16 * n, 16):
        v, weight = load(x, i), load(w, i)
        l = minimum(nmax, nearest_int(best_iscale * v))
        store(levels, i, select(zero, 0, l))
        sum_lx = sum_lx + weight * v * to_float(l)
        sum_l2 = sum_l2 + weight * to_float(l) * to_float(l)
    for _ in range(5):
        changed = lanes(False)
        for i in range(0, 16 * n, 16):
            v, weight, old = load(x, i), load(w, i), load(levels, i)
            l = to_float(old)
            slx = sum_lx - weight * v * l
            sl2 = sum_l2 - weight * l * l
            new = minimum(nmax, nearest_int(v * sl2 / slx))
            new_slx = slx + weight * v * to_float(new)
            new_sl2 = sl2 + weight * to_float(new) * to_float(new)
            better = ~zero & (slx > ZERO) & (sl2 > ZERO) & (new != old)
            better = better & (new_slx * new_slx * sum_l2 > sum_lx * sum_lx * new_sl2)
            store(levels, i, select(better, new, old))
            sum_lx = select(better, new_slx, sum_lx)
            sum_l2 = select(better, new_sl2, sum_l2)
            changed = changed | better
        if not any_lane(changed):
            break
    return select(zero | ~(sum_l2 > ZERO), ZERO, sum_lx / sum_l2)


@kernel
def _best_positive_scale(x, w, n, nmax, peak):
    """Return the inverse scale, of the nine that make_qp_quants tries, with the smallest squared error."""
    top = np.float32(nmax)
    best_iscale = top / peak
    scale = ONE / best_iscale
    best_error = lanes(ZERO)
    for i in range(0, 16 * n, 16):
        v = load(x, i)
        diff = v - scale * to_float(nearest_int(best_iscale * v) & 0xFF)
        best_error = best_error + load(w, i) * diff * diff
    for step in range(-4, 5):
        if step == 0:
            continue
        iscale = (TENTH * np.float32(step) + top) / peak
        scale = ONE / iscale
        error = lanes(ZERO)
        for i in range(0, 16 * n, 16):
            v = load(x, i)
            diff = v - scale * to_float(minimum(nmax, nearest_int(iscale * v)))
            error = error + load(w, i) * diff * diff
        better = error < best_error
        best_error = select(better, error, best_error)
        best_iscale = select(better, iscale, best_iscale)
    return best_iscale
