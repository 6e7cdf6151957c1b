"""The oracle: every encoder of llama.cpp once more, one float32 at a time, slow and plain.

Each function does the float operations of its namesake in ggml-quants.c in the same order, rounding to float32 after
every one, on NumPy scalars; the kernels of `quantlab.quants` must give the same bytes a thousand times faster.
Reading this file is the shortest way to learn how ggml's types are made.

Three habits of C matter for the last bit:

* `w*x*l` is `(w*x)*l`, and an int in a product becomes a float32 first;
* `nearest_int` adds and drops 1.5 * 2**23, which rounds to nearest, ties to even, and has its own idea of what
  becomes of infinities;
* a float cast to an integer loses its fraction, and one that does not fit gives the smallest int32, whose low byte
  is 0.

Source: llama.cpp, ggml/src/ggml-quants.c and ggml-impl.h.
"""

# ruff: noqa: E741 - a level is called l here, as in C

from functools import partial

import numpy as np

F = np.float32
TINY = F(1e-15)  # GROUP_MAX_EPS: below it a group counts as all zero


# ---- numbers


def nearest_int(v):
    """Round to an int, ties to even; out of range, whatever the low 23 bits of v + 1.5*2**23 say."""
    return int((F(v) + F(12582912.0)).view(np.int32) & 0x7FFFFF) - 0x400000


def c_int(v):
    """`(int) v` as x86-64 does it: towards zero; NaN and what does not fit become -2**31."""
    return int(v) if abs(v) < 2.0**31 else -(2**31)


def c_int8(i):
    """`(int8_t) i`: the low byte, read as signed."""
    return (int(i) & 255) - ((int(i) & 128) << 1)


def roundf(v):
    """C's roundf: to the nearest integer, halves away from zero."""
    whole = np.trunc(v)
    return F(whole + np.copysign(F(1), v)) if abs(F(v - whole)) >= F(0.5) else F(whole)


def clamp(low, i, high):
    return max(low, min(high, i))


def half(v):
    """Round to float16; returns its two bytes."""
    return np.frombuffer(np.float16(v).tobytes(), np.uint8)


def from_half(two_bytes):
    return F(two_bytes.view(np.float16)[0])


def absmax(x):
    """The value with the largest magnitude (the first of equals) and that magnitude."""
    amax, top = F(0), F(0)
    for v in x:
        if abs(v) > amax:
            amax, top = abs(v), v
    return amax, top


def sum_of(values):
    """Sum from left to right in float32."""
    total = F(0)
    for v in values:
        total = total + v
    return total


# ---- searches: the best scale for a group of weights


def make_qx_quants(nmax, x, weights):
    """Levels -nmax..nmax-1 around zero: try 19 scales, keep the one with the best least-squares fit.

    Returns the scale and the levels, shifted to 0..2*nmax-1. Source: make_qx_quants with rmse_type 1.
    """
    amax, top = absmax(x)
    if amax < TINY:
        return F(0), [0] * len(x)
    scale = best = levels = None
    for step in (0, *range(-9, 0), *range(1, 10)):
        iscale = F(-nmax) / top if step == 0 else -(F(nmax) + F(0.1) * F(step)) / top
        tried = [clamp(-nmax, nearest_int(iscale * v), nmax - 1) for v in x]
        sumlx, suml2 = F(0), F(0)
        for v, w, l in zip(x, weights, tried, strict=True):
            sumlx += w * v * F(l)
            suml2 += w * F(l) * F(l)
        if step == 0:
            scale = sumlx / suml2 if suml2 else F(0)
            best, levels = scale * sumlx, tried
        elif suml2 > 0 and sumlx * sumlx > best * suml2:
            scale = sumlx / suml2
            best, levels = scale * sumlx, tried
    return scale, [l + nmax for l in levels]


def make_q3_quants(nmax, x):
    """Levels -nmax..nmax-1: start from the largest weight's scale, then move single levels while the fit improves.

    Source: make_q3_quants with do_rmse.
    """
    amax, top = absmax(x)
    if amax < TINY:
        return F(0), [0] * len(x)
    iscale = F(-nmax) / top
    levels = [clamp(-nmax, nearest_int(iscale * v), nmax - 1) for v in x]
    sumlx, suml2 = F(0), F(0)
    for v, l in zip(x, levels, strict=True):
        w = v * v
        sumlx += w * v * F(l)
        suml2 += w * F(l) * F(l)
    for _ in range(5):
        changed = False
        for i, v in enumerate(x):
            w, l = v * v, F(levels[i])
            slx = sumlx - w * v * l
            if not slx > 0:
                continue
            sl2 = suml2 - w * l * l
            new = clamp(-nmax, nearest_int(v * sl2 / slx), nmax - 1)
            if new == levels[i]:
                continue
            slx += w * v * F(new)
            sl2 += w * F(new) * F(new)
            if sl2 > 0 and slx * slx * suml2 > sumlx * sumlx * sl2:
                levels[i], sumlx, suml2, changed = new, slx, sl2, True
        if not changed:
            break
    return sumlx / suml2 if suml2 > 0 else F(0), [l + nmax for l in levels]


def make_qkx_quants(nmax, x, weights, rmin, rdelta, nstep, use_mad=False):
    """Levels 0..nmax above a minimum: try nstep+1 scales, solve for scale and minimum, keep the smallest error.

    Returns scale, levels and minus the minimum (>= 0). Source: make_qkx2_quants, and make_qkx3_quants with weights,
    which is the same search.
    """
    low, high = x[0], x[0]
    sum_w = weights[0]
    sum_x = sum_w * x[0]
    for v, w in zip(x[1:], weights[1:], strict=True):
        low, high = min(low, v), max(high, v)
        sum_w += w
        sum_x += w * v
    low = min(low, F(0))
    if high == low:
        return F(0), [0] * len(x), -low

    def levels_for(iscale):
        return [clamp(0, nearest_int(iscale * (v - low)), nmax) for v in x]  # from the best minimum so far

    def error_of(levels, scale, minimum):
        total = F(0)
        for v, w, l in zip(x, weights, levels, strict=True):
            diff = scale * F(l) + minimum - v
            total += w * (abs(diff) if use_mad else diff * diff)
        return total

    iscale = F(nmax) / (high - low)
    scale = F(1) / iscale
    levels = levels_for(iscale)
    best = error_of(levels, scale, low)
    for step in range(nstep + 1):
        iscale = (F(rmin) + F(rdelta) * F(step) + F(nmax)) / (high - low)
        tried = levels_for(iscale)
        sum_l, sum_l2, sum_xl = F(0), F(0), F(0)
        for v, w, l in zip(x, weights, tried, strict=True):
            sum_l += w * F(l)
            sum_l2 += w * F(l) * F(l)
            sum_xl += w * F(l) * v
        det = sum_w * sum_l2 - sum_l * sum_l
        if not det > 0:
            continue
        this_scale = (sum_w * sum_xl - sum_x * sum_l) / det
        this_min = (sum_l2 * sum_x - sum_l * sum_xl) / det
        if this_min > 0:
            this_min, this_scale = F(0), sum_xl / sum_l2
        error = error_of(tried, this_scale, this_min)
        if error < best:
            best, scale, low, levels = error, this_scale, this_min, tried
    return scale, levels, -low


def make_qp_quants(nmax, x, weights):
    """Levels 0..nmax for values >= 0 (the scales and minima of a super-block): 9 scales, then single moves.

    Source: make_qp_quants.
    """
    top = F(0)
    for v in x:
        top = max(top, v)
    if top < TINY:
        return F(0), [0] * len(x)

    def error_of(levels, scale):
        total = F(0)
        for v, w, l in zip(x, weights, levels, strict=True):
            diff = v - scale * F(l)
            total += w * diff * diff
        return total

    iscale = F(nmax) / top
    best = error_of([nearest_int(iscale * v) & 255 for v in x], F(1) / iscale)
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        tried = (F(0.1) * F(step) + F(nmax)) / top
        error = error_of([min(nmax, nearest_int(tried * v)) for v in x], F(1) / tried)
        if error < best:
            best, iscale = error, tried
    levels = [min(nmax, nearest_int(iscale * v)) & 255 for v in x]
    sumlx, suml2 = F(0), F(0)
    for v, w in zip(x, weights, strict=True):
        l = min(nmax, nearest_int(iscale * v))
        sumlx += w * v * F(l)
        suml2 += w * F(l) * F(l)
    for _ in range(5):
        changed = False
        for i, (v, w) in enumerate(zip(x, weights, strict=True)):
            l = F(levels[i])
            slx, sl2 = sumlx - w * v * l, suml2 - w * l * l
            if not (slx > 0 and sl2 > 0):
                continue
            new = min(nmax, nearest_int(v * sl2 / slx))
            if new == levels[i]:
                continue
            slx += w * v * F(new)
            sl2 += w * F(new) * F(new)
            if slx * slx * suml2 > sumlx * sumlx * sl2:
                levels[i], sumlx, suml2, changed = new & 255, slx, sl2, True
        if not changed:
            break
    return sumlx / suml2 if suml2 > 0 else F(0), levels


# ---- bytes


def nibbles(levels):
    """32 levels of 4 bits: weight j in the low half of byte j, weight j+16 in the high half."""
    levels = np.array(levels, np.uint8)
    return levels[:16] & 15 | levels[16:] << 4


def fifth_bits(levels):
    """The fifth bit of 32 levels: bit j of a little-endian uint32."""
    return np.packbits(np.array(levels) >> 4 & 1, bitorder="little")


def scales_and_mins_of_6_bits(ls, lm):
    """Eight scales and eight minima in 12 bytes, as Q4_K and Q5_K keep them."""
    ls, lm = np.array(ls, np.uint8), np.array(lm, np.uint8)
    return np.concatenate([ls[:4] | ls[4:] >> 4 << 6, lm[:4] | lm[4:] >> 4 << 6, ls[4:] & 15 | (lm[4:] & 15) << 4])


def unpack_6_bits(packed):
    """What a decoder reads back: eight scales, eight minima."""
    low, mid, high = packed[:4], packed[4:8], packed[8:]
    return [*(low & 63), *(high & 15 | low >> 6 << 4)], [*(mid & 63), *(high >> 4 | mid >> 6 << 4)]


def two_bits(levels):
    """256 levels of 2 bits: byte l of half h has weights 128h+l, +32, +64, +96 from its low bits to its high bits."""
    q = np.array(levels, np.uint8).reshape(2, 4, 32)
    return (q[:, 0] | q[:, 1] << 2 | q[:, 2] << 4 | q[:, 3] << 6).ravel()


def bit_planes(bits):
    """256 single bits: bit g of byte l belongs to weight 32g+l."""
    return np.packbits(np.array(bits, np.uint8).reshape(8, 32), axis=0, bitorder="little").ravel()


def bytes_of(*parts):
    return np.concatenate([np.asarray(part).astype(np.int64).astype(np.uint8).ravel() for part in parts])


# ---- blocks of 32


def sigma2_of(x, factor=1):
    """Mean square of a row or super-block, times `factor`; the floor of every weight's importance."""
    return F(factor) * sum_of([v * v for v in x]) / F(len(x))


def importance(x, qw, sigma2):
    return [q * np.sqrt(sigma2 + v * v) for v, q in zip(x, qw, strict=True)]


def legacy_block(head, levels, nmax):
    """Scale (and minimum), fifth bits where levels go beyond 15, nibbles."""
    return bytes_of(*map(half, head), fifth_bits(levels) if nmax > 15 else [], nibbles(levels))


def q4_0(x, w=None, nmax=8):
    if w is not None:
        d, levels = make_qx_quants(nmax, x, w)
        return legacy_block([d], levels, 2 * nmax - 1)
    d = absmax(x)[1] / F(-nmax)
    inverse = F(1) / d if d else F(0)
    levels = [min(2 * nmax - 1, c_int8(c_int(v * inverse + F(nmax + 0.5)))) & 255 for v in x]
    return legacy_block([d], levels, 2 * nmax - 1)


def q4_1(x, w=None, nmax=15):
    if w is not None:
        d, levels, minus_min = make_qkx_quants(nmax, x, w, -0.9, 0.05, 36)
        return legacy_block([d, -minus_min], levels, nmax)
    low = min(x)
    d = (max(x) - low) / F(nmax)
    inverse = F(1) / d if d else F(0)
    levels = [min(nmax, c_int8(c_int((v - low) * inverse + F(0.5)))) & 255 for v in x]
    return legacy_block([d, low], levels, nmax)


def q8_levels(x):
    d = absmax(x)[0] / F(127)
    inverse = F(1) / d if d else F(0)
    return d, [c_int8(c_int(roundf(v * inverse))) for v in x]


def q8_0(x):
    d, levels = q8_levels(x)
    return bytes_of(half(d), levels)


def q8_1(x):
    """For activations: also the sum of the block, which a dot product with a type with minima needs."""
    d, levels = q8_levels(x)
    return bytes_of(half(d), half(F(sum(levels)) * d), levels)


# ---- super-blocks of 256: sub-blocks with their own scales, which are integers times the super-block's


def groups(x, n):
    return [x[i : i + n] for i in range(0, len(x), n)]


def relevel(x, levels, d, m, low, high):
    """Levels for the scale as it was rounded; a scale of 0 keeps the levels that the search left."""
    if not d:
        return levels
    return [clamp(low, nearest_int((v + m) / d), high) - low for v in x]


def weighted_search(sub, qw, sigma2, nmax, top):
    """Search by importance; then levels 0..top for the scales and for the minima: found, d, ls, dmin, lm."""
    weights = [importance(s, q, sigma2) for s, q in zip(sub, groups(qw, len(sub[0])), strict=True)]
    found = [make_qkx_quants(nmax, s, w, -0.9, 0.05, 36) for s, w in zip(sub, weights, strict=True)]
    sums = [sum_of(w) for w in weights]
    return found, *make_qp_quants(top, [f[0] for f in found], sums), *make_qp_quants(top, [f[2] for f in found], sums)


def q2_k(x, qw=None):
    sub = groups(x, 16)
    if qw is None:
        found = [make_qkx_quants(3, s, [abs(v) for v in s], -0.5, 0.1, 15, use_mad=True) for s in sub]
        scales, mins = [f[0] for f in found], [f[2] for f in found]
        d, ls = plain_levels(scales, 15)
        dmin, lm = plain_levels(mins, 15)
    else:
        found, d, ls, dmin, lm = weighted_search(sub, qw, sigma2_of(x), 3, 15)
    packed = [(int(s) | int(m) << 4) & 255 for s, m in zip(ls, lm, strict=True)]
    d, dmin = half(d), half(dmin)
    levels = []
    for s, (_, first, _), sc in zip(sub, found, packed, strict=True):
        levels += relevel(s, first, from_half(d) * F(sc & 15), from_half(dmin) * F(sc >> 4), 0, 3)
    return bytes_of(packed, two_bits(levels), d, dmin)


def plain_levels(values, nmax):
    """Values >= 0 as integers 0..nmax times one scale, set by the largest; returns the scale and the integers."""
    top = max([F(0), *values])
    inverse = F(nmax) / top if top > 0 else F(0)
    return top / F(nmax), [nearest_int(inverse * v) & 255 for v in values]


def q3_k(x, qw=None):
    sub = groups(x, 16)
    if qw is None:
        found = [make_q3_quants(4, s) for s in sub]
        top = absmax([f[0] for f in found])[1]
        d, ls = F(0), [0] * 16
        if top:
            inverse = F(-32) / top
            d, ls = F(1) / inverse, [clamp(-32, c_int8(nearest_int(inverse * f[0])), 31) + 32 for f in found]
    else:
        sigma2 = sigma2_of(x, 2)
        weights = [importance(s, q, sigma2) for s, q in zip(sub, groups(qw, 16), strict=True)]
        found = [make_qx_quants(4, s, w) for s, w in zip(sub, weights, strict=True)]
        d, ls = make_qx_quants(32, [f[0] for f in found], [sum_of(w) for w in weights])
    d = half(d)
    levels = []
    for s, (_, first), l in zip(sub, found, ls, strict=True):
        levels += relevel(s, first, from_half(d) * F(l - 32), F(0), -4, 3)
    ls, q = np.array(ls), np.array(levels)
    scales = [ls[:8] & 15 | (ls[8:] & 15) << 4, *((ls[j::4] >> 4) @ [1, 4, 16, 64] for j in range(4))]
    return bytes_of(bit_planes(q > 3), two_bits(np.where(q > 3, q - 4, q)), np.hstack(scales), d)


def q45_k(x, qw, nmax, rmin, nstep):
    """What Q4_K and Q5_K share: 8 sub-blocks of 32 with a scale and a minimum of 6 bits. Returns head and levels."""
    sub = groups(x, 32)
    if qw is None:
        means = [np.sqrt(sigma2_of(s)) for s in sub]
        weights = [[mean + abs(v) for v in s] for s, mean in zip(sub, means, strict=True)]
        found = [make_qkx_quants(nmax, s, w, rmin, 0.1, nstep) for s, w in zip(sub, weights, strict=True)]
        d, ls = plain_levels([f[0] for f in found], 63)
        dmin, lm = plain_levels([f[2] for f in found], 63)
    else:
        found, d, ls, dmin, lm = weighted_search(sub, qw, sigma2_of(x, 2), nmax, 63)
    if qw is None or nmax == 31:  # weighted Q4_K alone does not limit them
        ls, lm = np.minimum(ls, 63), np.minimum(lm, 63)
    d, dmin, packed = half(d), half(dmin), scales_and_mins_of_6_bits(ls, lm)
    levels = []
    for s, (_, first, _), sc, m in zip(sub, found, *unpack_6_bits(packed), strict=True):
        levels += relevel(s, first, from_half(d) * F(sc), from_half(dmin) * F(m), 0, nmax)
    return bytes_of(d, dmin, packed), np.array(levels, np.uint8)


def q4_k(x, qw=None):
    head, levels = q45_k(x, qw, 15, -1, 20)
    pairs = levels.reshape(4, 2, 32)
    return bytes_of(head, pairs[:, 0] | pairs[:, 1] << 4)


def q5_k(x, qw=None):
    head, levels = q45_k(x, qw, 31, -0.5, 15)
    pairs = levels.reshape(4, 2, 32) & 15
    return bytes_of(head, bit_planes(levels > 15), pairs[:, 0] | pairs[:, 1] << 4)


def q6_k(x, qw=None):
    weights = [v * v for v in x] if qw is None else qw
    sub = groups(x, 16)
    found = [make_qx_quants(32, s, w) for s, w in zip(sub, groups(weights, 16), strict=True)]
    amax, top = absmax([f[0] for f in found])
    if amax < TINY:
        return np.zeros(210, np.uint8)
    inverse = F(-128) / top
    d = half(F(1) / inverse)
    scales = [c_int8(min(127, nearest_int(inverse * f[0]))) for f in found]
    levels = []
    for s, (_, first), sc in zip(sub, found, scales, strict=True):
        levels += relevel(s, first, from_half(d) * F(sc), F(0), -32, 31)
    q = np.array(levels, np.uint8)
    low = q.reshape(2, 2, 64) & 15
    return bytes_of(low[:, 0] | low[:, 1] << 4, two_bits(q >> 4), scales, d)


def q8_k(x):
    """For activations: float32 scale, and the sums of 16 levels that a dot product with minima needs."""
    amax, top = absmax(x)
    if not amax:
        return np.zeros(4 + 256 + 32, np.uint8)
    iscale = F(-127) / top
    levels = [c_int8(min(127, nearest_int(iscale * v))) for v in x]
    sums = np.array([sum(g) for g in groups(levels, 16)], np.int16)
    return bytes_of((F(1) / iscale).reshape(1).view(np.uint8), levels, sums.view(np.uint8))


# ---- rows

ENCODERS = {
    **{"Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": partial(q4_0, nmax=16), "Q5_1": partial(q4_1, nmax=31), "Q8_0": q8_0},
    **{"Q8_1": q8_1, "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k, "Q8_K": q8_k},
}
WEIGHTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def quantize(x, qtype, imatrix=None):
    """Encode float32 rows (nrows, n_per_row), with an importance matrix (n_per_row,) or without."""
    n = 256 if qtype.endswith("_K") else 32
    with np.errstate(all="ignore"):
        return np.stack([np.concatenate(list(_blocks(list(row), qtype, imatrix, n))) for row in x])


def _blocks(row, qtype, imatrix, n):
    if imatrix is None:
        yield from (ENCODERS[qtype](block) for block in groups(row, n))
        return
    weights = list(imatrix)
    if n == 32:  # blocks of 32 take the mean square of the whole row; super-blocks their own
        weights = importance(row, weights, sigma2_of(row))
    for block, w in zip(groups(row, n), groups(weights, n), strict=True):
        yield ENCODERS[qtype](block, w)
