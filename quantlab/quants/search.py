"""The scale searches of the k-quants, for 16 blocks side by side.

Each function does what the function of the same name in ggml-quants.c does, for 16 blocks at once: every number of the
C code is a lanes value here, with the same float32 operations in the same order, and what the C code does under a
condition is done everywhere and kept where the condition holds. The blocks lie column by column in flat arrays: value
`i` of the block in lane `k` is element ``at + 16 * i + k``.

`levels` arrays (uint8) receive what C calls L: the levels, which matter only for sub-blocks whose scale becomes zero in
the end.

Source: ggml-quants.c of llama.cpp, commit 0c1e57098.
"""

import numpy as np

from quantlab.quants.lanes import (
    ROUNDER,
    absolute,
    any_lane,
    bits,
    from_bits,
    inlined_kernel,
    kernel,
    lanes,
    load,
    maximum,
    minimum,
    nearest_int,
    select,
    store,
    to_float,
    to_int,
)

GROUP_MAX_EPS = np.float32(1e-15)  # a block whose largest weight is smaller counts as all zero
IN_RANGE = np.float32(4e6)  # below it nearest_int does not wrap
ZERO, ONE, TENTH = np.float32(0), np.float32(1), np.float32(0.1)
# ROUNDER plus a whole number has these bits plus that number. Clamped as ints, levels leave the adders to the sums.
ROUNDER_BITS = np.int32(0x4B400000)


@kernel
def level(v, low, high):
    """Round floats to the nearest whole number, clamp it to the ints `low` … `high`, give it as floats."""
    return to_float(maximum(low, minimum(high, nearest_int(v))))


# What a search for scale and minimum knows of each block lies in one array, `found`, field after field: a column of 16
# lanes for each of up to 16 blocks.
LOW = 0  # the minimum of the best try
HIGH = 256  # the largest value
SMALLEST = 512  # the smallest value
SCALE = 768  # the scale of the best try
ERROR = 1024  # its error
ISCALE = 1280  # its levels are those of iscale * (x - base)
BASE = 1536
SUM_W = 1792  # sum of the weights
SUM_X = 2048  # weighted sum of the values
FIT_SCALE = 2304  # scale and minimum of the current try
FIT_LOW = 2560
FIT_ISCALE = 2816  # its levels are spread with this
TRIED = 3072  # its levels, one column for each of TOGETHER values
TOGETHER = 64  # values of the blocks that a search works on alternately
FOUND = TRIED + 16 * TOGETHER  # size of the array

# For the other searches:
SUM_LX, SUM_L2 = SUM_X, SUM_W  # weighted sums of x * l and of l * l
WX = TRIED  # weights times values of one block


@kernel
def make_qkx_quants(x, w, levels, found, n, nmax, rmin, rdelta, nstep, use_mad):
    """Find scale and minimum of 256 / `n` blocks quantized as ``x ≈ scale * l + low`` with l = 0 … `nmax`.

    The C code has it twice, as make_qkx2_quants and make_qkx3_quants. Here some blocks take each step together: one of
    them would have to wait for its divisions, during which the processor works on the others. Short loops, one after
    the other, are quicker than a long one: the processor sees more turns ahead.

    Parameters
    ----------
    x, w : np.ndarray [shape=(256 * 16,), dtype=float32]
        Blocks of `n` values, and the weights of their errors.
    found : np.ndarray [shape=(FOUND,), dtype=float32]
        Receives SCALE and LOW.
    rmin, rdelta, nstep : float32, float32, int
        The scales tried are those of `nmax` + `rmin` + `rdelta` * (0 … `nstep`) levels.
    use_mad : bool
        Whether to sum absolute instead of squared errors.
    """
    together = TOGETHER // n
    for first in range(0, 256 // n, together):
        for block in range(first, first + together):
            _start(x, w, found, n, block, nmax, rmin + np.float32(nmax), use_mad)
        for step in range(nstep + 1):
            next_steps = rmin + rdelta * np.float32(step + 1) + np.float32(nmax)
            for block in range(first, first + together):
                _spread(x, found, n, block, TRIED + (block - first) * n * 16, nmax)
            for block in range(first, first + together):
                _fit(x, w, found, n, block, TRIED + (block - first) * n * 16)
            for block in range(first, first + together):
                _judge(x, w, found, n, block, TRIED + (block - first) * n * 16, next_steps, use_mad)
    for i in range(0, 256 * 16, 16):
        at = i // (16 * n) * 16
        iscale = load(found, ISCALE + at)
        l = maximum(0, minimum(nmax, nearest_int(iscale * (load(x, i) - load(found, BASE + at)))))
        store(levels, i, select(iscale == ZERO, 0, l))


@inlined_kernel
def _start(x, w, found, n, block, nmax, steps, use_mad):
    """Spread the levels evenly from the smallest value, or from 0 if that is smaller, to the largest.

    The first try will have `steps` levels.
    """
    first, end, at = 16 * n * block, 16 * n * (block + 1), 16 * block
    smallest = load(x, first)
    high = smallest
    sum_w = load(w, first)
    sum_x = sum_w * smallest
    for i in range(first + 16, end, 16):
        v, weight = load(x, i), load(w, i)
        smallest = select(v < smallest, v, smallest)
        high = select(v > high, v, high)
        sum_w = sum_w + weight
        sum_x = sum_x + weight * v
    low = select(smallest > ZERO, ZERO, smallest)
    flat = high == low
    iscale = np.float32(nmax) / (high - low)
    scale = ONE / iscale
    error = lanes(ZERO)
    for i in range(first, end, 16):
        v = load(x, i)
        diff = scale * level(iscale * (v - low), 0, nmax) + low - v
        error = error + load(w, i) * (absolute(diff) if use_mad else diff * diff)
    store(found, LOW + at, low)
    store(found, SMALLEST + at, smallest)
    store(found, SUM_W + at, sum_w)
    store(found, SUM_X + at, sum_x)
    store(found, BASE + at, low)
    # A flat block keeps scale 0, as no error is below 0; any other value serves as its largest, so that steps exist.
    high = select(flat, select(low < ZERO, lanes(ZERO), ONE), high)
    store(found, HIGH + at, high)
    store(found, FIT_ISCALE + at, steps / (high - low))
    store(found, ERROR + at, select(flat, ZERO, error))
    store(found, SCALE + at, select(flat, ZERO, scale))
    store(found, ISCALE + at, select(flat, ZERO, iscale))


@inlined_kernel
def _spread(x, found, n, block, tried, nmax):
    """Round the values to the levels of a try."""
    first, at = 16 * n * block, 16 * block
    low, iscale = load(found, LOW + at), load(found, FIT_ISCALE + at)
    reach = maximum(absolute(load(found, HIGH + at) - low), absolute(load(found, SMALLEST + at) - low))
    # Rounding in floats is quicker than nearest_int, and the same as long as nothing can wrap.
    wraps = any_lane(~(absolute(iscale) * reach < IN_RANGE))
    top = ROUNDER_BITS + np.int32(nmax)
    for i in range(first, first + 16 * n, 16):
        v = iscale * (load(x, i) - low)
        if wraps:
            l = level(v, 0, nmax)
        else:
            l = from_bits(maximum(minimum(bits(v + ROUNDER), top), ROUNDER_BITS)) - ROUNDER
        store(found, tried + i - first, l)


@inlined_kernel
def _fit(x, w, found, n, block, tried):
    """Fit scale and minimum to the levels of a try by least squares."""
    first, at = 16 * n * block, 16 * block
    sum_l = lanes(ZERO)
    sum_l2 = lanes(ZERO)
    sum_xl = lanes(ZERO)
    for i in range(0, 16 * n, 16):
        l = load(found, tried + i)
        wl = load(w, first + i) * l
        sum_l = sum_l + wl
        sum_l2 = sum_l2 + wl * l
        sum_xl = sum_xl + wl * load(x, first + i)
    sum_w, sum_x = load(found, SUM_W + at), load(found, SUM_X + at)
    determinant = sum_w * sum_l2 - sum_l * sum_l
    scale = (sum_w * sum_xl - sum_x * sum_l) / determinant
    new_low = (sum_l2 * sum_x - sum_l * sum_xl) / determinant
    positive = new_low > ZERO
    if any_lane(positive):  # seldom; a division takes as long as five turns of the loop
        scale = select(positive, sum_xl / sum_l2, scale)
        new_low = select(positive, ZERO, new_low)
    # With NaN as scale the error will be NaN, which is not smaller than anything.
    store(found, FIT_SCALE + at, select(determinant > ZERO, scale, np.float32(np.nan)))
    store(found, FIT_LOW + at, new_low)


@inlined_kernel
def _judge(x, w, found, n, block, tried, steps, use_mad):
    """Keep scale and minimum of a try if its error is smaller than the best before; the next one has `steps` levels."""
    first, at = 16 * n * block, 16 * block
    scale, new_low = load(found, FIT_SCALE + at), load(found, FIT_LOW + at)
    error = lanes(ZERO)
    for i in range(0, 16 * n, 16):
        diff = scale * load(found, tried + i) + new_low - load(x, first + i)
        error = error + load(w, first + i) * (absolute(diff) if use_mad else diff * diff)
    low, iscale = load(found, LOW + at), load(found, FIT_ISCALE + at)
    better = error < load(found, ERROR + at)
    store(found, ERROR + at, select(better, error, load(found, ERROR + at)))
    store(found, ISCALE + at, select(better, iscale, load(found, ISCALE + at)))
    store(found, BASE + at, select(better, low, load(found, BASE + at)))
    store(found, SCALE + at, select(better, scale, load(found, SCALE + at)))
    low = select(better, new_low, low)
    store(found, LOW + at, low)
    store(found, FIT_ISCALE + at, steps / (load(found, HIGH + at) - low))


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
def make_qx_quants(x, at, w, found, levels, n, nmax):
    """Find the scale of blocks quantized as ``x ≈ scale * l`` with l = -`nmax` … `nmax` - 1.

    Parameters
    ----------
    x, w : np.ndarray [dtype=float32]
        Blocks of `n` values from element `at`, and the weights of their errors.
    found : np.ndarray [shape=(FOUND,), dtype=float32]
        Room to work in.

    Returns
    -------
    scale : lanes
    """
    peak, magnitude = largest(x, at, n)
    zero = magnitude < GROUP_MAX_EPS
    peak = select(zero, ONE, peak)
    for i in range(0, 16 * n, 16):
        store(found, WX + i, load(w, at + i) * load(x, at + i))
    wraps = any_lane(magnitude == np.float32(np.inf))  # else |iscale * x| stays below nmax + 1
    best_iscale = -np.float32(nmax) / peak
    sum_lx, sum_l2 = _sums(x, at, w, found, n, nmax, best_iscale, False, wraps)
    scale = select(sum_l2 != ZERO, sum_lx / sum_l2, ZERO)
    best = scale * sum_lx
    for step in range(-9, 10):
        if step == 0:
            continue
        iscale = -(np.float32(nmax) + TENTH * np.float32(step)) / peak
        sum_lx, sum_l2 = _sums(x, at, w, found, n, nmax, iscale, step >= 5, wraps)
        better = (sum_l2 > ZERO) & (sum_lx * sum_lx > best * sum_l2)
        if not any_lane(better):
            continue
        scale = select(better, sum_lx / sum_l2, scale)
        best = select(better, scale * sum_lx, best)
        best_iscale = select(better, iscale, best_iscale)
    for i in range(at, at + 16 * n, 16):
        l = maximum(-nmax, minimum(nmax - 1, nearest_int(best_iscale * load(x, i)))) + nmax
        store(levels, i, select(zero, 0, l))
    return select(zero, ZERO, scale)


@inlined_kernel
def _sums(x, at, w, found, n, nmax, iscale, beyond, wraps):
    """Return the weighted sums of x * l and of l * l over blocks of `n`; `beyond`: levels below -`nmax` may come up."""
    low, high = ROUNDER_BITS - np.int32(nmax), ROUNDER_BITS + np.int32(nmax - 1)
    sum_lx = lanes(ZERO)
    sum_l2 = lanes(ZERO)
    for i in range(0, 16 * n, 16):
        v = iscale * load(x, at + i)
        if wraps:
            l = level(v, -nmax, nmax - 1)
        else:
            rounded = minimum(bits(v + ROUNDER), high)
            if beyond:
                rounded = maximum(rounded, low)
            l = from_bits(rounded) - ROUNDER
        sum_lx = sum_lx + load(found, WX + i) * l
        sum_l2 = sum_l2 + load(w, at + i) * l * l
    return sum_lx, sum_l2


@kernel
def make_q3_quants(x, w, found, levels, nmax):
    """Find the scale of 16 blocks of 16 quantized as ``x ≈ scale * l``, changing single levels as long as that helps.

    A change has to wait for the one before it in its block, so some blocks are changed in turn. A round that leaves a
    block as it was is not its last one here, but all further ones leave it so, too.

    Parameters
    ----------
    x, w : np.ndarray [shape=(256 * 16,), dtype=float32]
        The values and their squares.
    found : np.ndarray [shape=(FOUND,), dtype=float32]
        Receives SCALE.
    """
    together = TOGETHER // 16
    for first in range(0, 16, together):
        for block in range(first, first + together):
            _start_q3(x, w, found, block, TRIED + 256 * (block - first), nmax)
        for _ in range(5):
            changed = lanes(False)
            for i in range(0, 256, 16):
                for block in range(first, first + together):
                    changed = changed | _change_level(x, w, found, block, i, TRIED + 256 * (block - first) + i, nmax)
            if not any_lane(changed):
                break
        for block in range(first, first + together):
            sum_l2 = load(found, SUM_L2 + 16 * block)
            scale = load(found, SUM_LX + 16 * block) / sum_l2
            store(found, SCALE + 16 * block, select(sum_l2 > ZERO, scale, ZERO))
            for i in range(0, 256, 16):
                l = to_int(load(found, TRIED + 256 * (block - first) + i)) + nmax
                store(levels, 256 * block + i, select(sum_l2 == ZERO, 0, l))


@inlined_kernel
def _start_q3(x, w, found, block, tried, nmax):
    """Give the value of largest magnitude the level -`nmax`. The sums of blocks that count as zero are made zero."""
    peak, magnitude = largest(x, 256 * block, 16)
    iscale = -np.float32(nmax) / peak
    sum_lx = lanes(ZERO)
    sum_l2 = lanes(ZERO)
    for i in range(0, 256, 16):
        v, weight = load(x, 256 * block + i), load(w, 256 * block + i)
        l = level(iscale * v, -nmax, nmax - 1)
        store(found, tried + i, l)
        sum_lx = sum_lx + weight * v * l
        sum_l2 = sum_l2 + weight * l * l
    zero = magnitude < GROUP_MAX_EPS
    store(found, SUM_LX + 16 * block, select(zero, ZERO, sum_lx))
    store(found, SUM_L2 + 16 * block, select(zero, ZERO, sum_l2))


@inlined_kernel
def _change_level(x, w, found, block, i, tried, nmax):
    """Give one value of a block another level where this makes the error smaller; return where."""
    v, weight = load(x, 256 * block + i), load(w, 256 * block + i)
    l = load(found, tried)
    sum_lx, sum_l2 = load(found, SUM_LX + 16 * block), load(found, SUM_L2 + 16 * block)
    slx = sum_lx - weight * v * l
    sl2 = sum_l2 - weight * l * l
    new = level(v * sl2 / slx, -nmax, nmax - 1)
    new_slx = slx + weight * v * new
    new_sl2 = sl2 + weight * new * new
    better = (slx > ZERO) & (new != l) & (new_sl2 > ZERO)
    better = better & (new_slx * new_slx * sum_l2 > sum_lx * sum_lx * new_sl2)
    store(found, tried, select(better, new, l))
    store(found, SUM_LX + 16 * block, select(better, new_slx, sum_lx))
    store(found, SUM_L2 + 16 * block, select(better, new_sl2, sum_l2))
    return better


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
