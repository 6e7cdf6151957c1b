"""The oracle of the newer types whose encoders are short, one float32 at a time; see naive.py for the habits of C.

Source: llama.cpp, ggml/src/ggml-quants.c and ggml-impl.h.
"""

# ruff: noqa: E741 - a level is called l here, as in C

import numpy as np
from naive import TINY, F, absmax, bytes_of, clamp, groups, half, importance, nearest_int, nibbles, sum_of

NONLINEAR = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
E2M1 = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]


def inverse(v):
    return F(1) / v if v else F(0)


def best_index(v):
    """The level of the nearest value, by bisection."""
    if v <= NONLINEAR[0]:
        return 0
    if v >= NONLINEAR[15]:
        return 15
    low, high = 0, 15
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if v < NONLINEAR[middle] else (middle, high)
    return low if v - F(NONLINEAR[low]) < F(NONLINEAR[high]) - v else high


def nonlinear_scale(x, weights):
    """The best of 16 scales that give the weight of largest magnitude a value near -127."""
    amax, top = absmax(x)
    if amax < TINY:
        return F(0)
    d = best = F(0)
    for step in (None, *range(-7, 8)):
        iscale = F(1) / (-top / F(-127)) if step is None else F(step - 127) / top
        sumqx, sumq2 = F(0), F(0)
        for v, w in zip(x, weights, strict=True):
            q = F(NONLINEAR[best_index(iscale * v)])
            sumqx += w * q * v
            sumq2 += w * q * q
        if sumq2 > 0 and (step is None or sumqx * sumqx > best * sumq2):
            d = sumqx / sumq2
            best = d * sumqx
    return d


def nonlinear_scales(x, qw):
    sigma2 = sum_of([v * v for v in x]) * (F(2) / F(len(x)))
    weights = [v * v for v in x] if qw is None else importance(x, qw, sigma2)
    return [nonlinear_scale(s, w) for s, w in zip(groups(x, 32), groups(weights, 32), strict=True)]


def iq4_nl(x, qw=None):
    (d,) = nonlinear_scales(x, qw)
    return bytes_of(half(d), nibbles([best_index(inverse(d) * v) for v in x]))


def iq4_xs(x, qw=None):
    scales = nonlinear_scales(x, qw)
    d = -absmax(scales)[1] / F(32)
    ls = [clamp(-32, nearest_int(inverse(d) * s), 31) for s in scales]
    codes = [nibbles([best_index(inverse(d * F(l)) * v) for v in s]) for s, l in zip(groups(x, 32), ls, strict=True)]
    ls = np.array(ls) + 32
    high = sum(int(l >> 4) << 2 * j for j, l in enumerate(ls))
    return bytes_of(half(d), [high & 255, high >> 8], ls[::2] & 15 | (ls[1::2] & 15) << 4, *codes)


def ternary(x, lowest):
    """The largest magnitude, and 0, 1, 2 for -1, 0, 1; `lowest` stands for what does not fit an int."""
    d = absmax(x)[0]
    scaled = [inverse(d) * v for v in x]
    return d, [lowest if not abs(v) < 2 else int(v >= F(0.5)) - int(v <= F(-0.5)) + 1 for v in scaled]


def tq1_0(x):
    d, levels = ternary(x, 1)
    q, last = np.array(levels[:160]).reshape(5, 32), np.array(levels[160:240]).reshape(5, 16)
    digits = [*q.T, *last.T, *np.vstack([np.array(levels[240:]).reshape(4, 4), np.zeros((1, 4), int)]).T]
    return bytes_of([(int(n @ [81, 27, 9, 3, 1]) * 256 + 242) // 243 for n in digits], half(d))


def tq2_0(x):
    d, levels = ternary(x, 1)
    q = np.array(levels).reshape(2, 4, 32)
    return bytes_of(q[:, 0] | q[:, 1] << 2 | q[:, 2] << 4 | q[:, 3] << 6, half(d))


def q1_0(x):
    return bytes_of(half(sum_of([abs(v) for v in x]) / F(128)), np.packbits([v >= 0 for v in x], bitorder="little"))


def q2_0(x):
    d, levels = ternary(x, 0)
    return bytes_of(half(d), np.array(levels).reshape(-1, 4) @ [1, 4, 16, 64])


def nearest_e2m1(x, d):
    return [int(np.argmin([abs(F(value) * d - v) for value in E2M1])) for v in x]


def mxfp4(x):
    amax = absmax(x)[0]
    e = (int(np.floor(np.log2(amax))) - 2 + 127) & 255 if amax > 0 else 0
    d = np.int32(0x200000 << e if e < 2 else (e - 1) << 23).view(np.float32)
    return bytes_of([e], nibbles(nearest_e2m1(x, d)))


def nvfp4(x):
    scales, codes = [], []
    for sub in groups(x, 16):
        wanted = float(absmax(sub)[0] / F(6))
        exponent = max(-6, int(np.floor(np.log2(wanted)))) if wanted else -6  # below 2**-6 floats are denormal
        steps = min(int(np.floor(wanted * 2.0 ** (3 - exponent) + 0.5)) + 8 * (exponent + 6), 0x7E)
        steps = steps - 1 if exponent == -6 and wanted < 2.0**-6 and steps == 8 else steps  # C keeps 7 there
        scales.append(steps)
        d = F(steps * 2.0**-9 if steps < 8 else (8 + steps % 8) * 2.0 ** (steps // 8 - 10)) / F(2)
        q = nearest_e2m1(sub, d)
        codes += [low | high << 4 for low, high in zip(q[:8], q[8:], strict=True)]
    return bytes_of(scales, codes)


# type -> weights of a block and its encoder; the first two also take importance
ENCODERS = {
    "IQ4_NL": (32, iq4_nl),
    "IQ4_XS": (256, iq4_xs),
    "TQ1_0": (256, tq1_0),
    "TQ2_0": (256, tq2_0),
    "MXFP4": (32, mxfp4),
    "NVFP4": (64, nvfp4),
    "Q1_0": (128, q1_0),
    "Q2_0": (64, q2_0),
}


def quantize(x, qtype, imatrix=None):
    """Encode float32 rows (nrows, n_per_row), block by block."""
    size, encoder = ENCODERS[qtype]
    encoded = []
    with np.errstate(all="ignore"):
        for row in x:
            for at in range(0, len(row), size):
                part = slice(at, at + size)
                weights = () if imatrix is None else (list(imatrix[part]),)
                encoded.append(encoder(list(row[part]), *weights))
    return np.concatenate(encoded).reshape(len(x), -1)


def best_neighbour(neighbours, values, x, weights, scale):
    """The position in `neighbours` of the smallest weighted error, the first of equals; `values` by position."""
    best, found = F(np.finfo(F).max), None
    for k, position in enumerate(neighbours):
        total = F(0)
        for q, v, w in zip(values[position], x, weights, strict=True):
            diff = scale * F(q) - v
            total += w * diff * diff
        if total < best:
            best, found = total, k
    return found
