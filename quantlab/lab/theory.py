"""Theory of rounding numbers to few bits: bounds and plain quantizers to compare the types with."""

from math import log2, log10
from statistics import NormalDist

import numpy as np

_NORMAL = NormalDist()
DB_PER_BIT = 20 * log10(2)  # of the signal to noise ratio


def gaussian_bound(bits: float) -> float:
    """Return the best signal to noise ratio, in dB, of normal numbers at `bits` per number.

    No code does better: the distortion at a rate of R bits is at least σ² 2**(-2 R).

    Source: C. E. Shannon, Coding theorems for a discrete source with a fidelity criterion, 1959; T. M. Cover and
    J. A. Thomas, Elements of Information Theory, theorem 10.3.2.

    Examples
    --------
    >>> round(gaussian_bound(4), 2)
    24.08
    """
    return bits * DB_PER_BIT


def uniform(bits: int) -> float:
    """Return the signal to noise ratio, in dB, of the best uniform quantizer of normal numbers with 2**bits levels.

    One step for all numbers, codes of one length: no scales, no blocks. The best step is searched for.

    Source: J. Max, Quantizing for minimum distortion, 1960, table II (its 4 bits have a squared error of 0.01154).

    Examples
    --------
    >>> round(10 ** (-uniform(4) / 10), 5)
    0.01154
    """
    low, high = 0.0, 4.0  # of the step, in standard deviations; the error has one minimum
    for _ in range(60):
        third = (high - low) / 3
        if _squared_error(low + third, 2**bits) < _squared_error(high - third, 2**bits):
            high -= third
        else:
            low += third
    return -10 * log10(_squared_error((low + high) / 2, 2**bits))


def uniform_with_entropy_code(step: float) -> tuple[float, float]:
    """Return bits per number and signal to noise ratio in dB of rounding normal numbers to multiples of `step`.

    The codes have as many bits as their frequency asks for, as a perfect entropy coder would give them.

    Examples
    --------
    >>> bits, snr = uniform_with_entropy_code(0.01)
    >>> round(gaussian_bound(bits) - snr, 2)  # in the limit 10 log10(π e / 6)
    1.53
    """
    edges = (np.arange(-_levels_each_side(step), _levels_each_side(step) + 2) - 0.5) * step
    error, bits = 0.0, 0.0
    for left, right in zip(edges[:-1], edges[1:], strict=True):
        error += _squared_error_between(left, right, (left + right) / 2)
        p = _NORMAL.cdf(right) - _NORMAL.cdf(left)
        bits -= p * log2(p) if p > 0 else 0.0
    return bits, -10 * log10(error)


def round_in_groups(x: np.ndarray, bits: int, group: int, *, minimum: bool = False) -> np.ndarray:
    """Round numbers to 2**bits evenly spread levels, with a float16 scale for every `group` of neighbours.

    The plainest way there is: the group's largest magnitude sets the scale, or its range does if there is a
    `minimum`, a float16 too. Nothing is searched for.

    Parameters
    ----------
    x : np.ndarray [shape=(n,), dtype=float32]
        Numbers; `n` a multiple of `group`.
    bits : int
        Bits of a code.
    group : int
        Numbers that share a scale.
    minimum : bool
        Whether each group also has a minimum, so that the levels need not lie around zero.
    """
    rows = x.reshape(-1, group)
    if minimum:
        low = np.minimum(rows.min(axis=1, keepdims=True), 0).astype(np.float16).astype(np.float32)
        top = 2**bits - 1
        scale = ((rows.max(axis=1, keepdims=True) - low) / top).astype(np.float16).astype(np.float32)
        codes = np.clip(np.rint(np.divide(rows - low, scale, where=scale != 0, out=np.zeros_like(rows))), 0, top)
        return (low + scale * codes).ravel()
    peak = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    half = 2 ** (bits - 1)
    scale = (-peak / half).astype(np.float16).astype(np.float32)  # the largest gets the level that has no twin
    codes = np.clip(np.rint(np.divide(rows, scale, where=scale != 0, out=np.zeros_like(rows))), -half, half - 1)
    return (scale * codes).ravel()


def snr(x: np.ndarray, rounded: np.ndarray) -> float:
    """Return the signal to noise ratio of rounded numbers in dB; infinite if nothing was lost."""
    noise = np.square(rounded - x, dtype=np.float64).sum()
    return 10 * log10(np.square(x, dtype=np.float64).sum() / noise) if noise else float("inf")


def _levels_each_side(step: float) -> int:
    """Return the number of levels on each side that reach eight standard deviations."""
    return int(np.ceil(8 / step))


def _squared_error_between(left: float, right: float, level: float) -> float:
    """∫ (t - level)² density(t) dt from `left` to `right`."""
    p = _NORMAL.cdf(right) - _NORMAL.cdf(left)
    first = _NORMAL.pdf(left) - _NORMAL.pdf(right)
    edges = [t * _NORMAL.pdf(t) if abs(t) < 40 else 0.0 for t in (left, right)]
    return (1 + level * level) * p + edges[0] - edges[1] - 2 * level * first


def _squared_error(step: float, levels: int) -> float:
    """Return the mean squared error of normal numbers rounded to `levels` levels, `step` apart, around zero."""
    error = 0.0
    for i in range(levels // 2):  # the other half is its mirror image
        left, right = i * step, (i + 1) * step if i < levels // 2 - 1 else float("inf")
        error += 2 * _squared_error_between(left, right, (i + 0.5) * step)
    return error
