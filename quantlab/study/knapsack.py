"""An exact solver: one option from each group, with the least total damage under a size limit.

Groups are taken one after the other. A state is what has been picked so far, and only its bytes and damage matter:

    {nothing}  ─ group 0 ─►  states  ─ group 1 ─►  states  …  ─►  the best of the last states

Of the states that each step makes, those fall away that cannot lead to the best: they are as large as another and no
better, or the rest cannot fit, or a lower bound of where they lead is above what is known to be possible. The bound
prices bytes at `price` and lets every group still to come take what is cheapest then (a Lagrangian bound). Few states
are left, so that sizes need not be rounded to larger units.

Damages are rounded to 2^-50 and added up as integers, so that sums are exact, ties are ties, and the result depends on
no order of additions.

Source: Nemhauser and Ullmann 1969, "Discrete dynamic programming and capital allocation", with Lagrangian bounds as in
Kellerer, Pferschy and Pisinger 2004, "Knapsack Problems", chapter 11.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNIT = 2.0**-50  # nats
_LARGEST = 4096.0  # nats; sums of integers stay far below 2^63


@dataclass(frozen=True)
class Options:
    """The options of one group, from the smallest on."""

    sizes: np.ndarray  # int64 (n,): bytes
    damages: np.ndarray  # int64 (n,): multiples of `UNIT`
    places: np.ndarray  # int64 (n,): where each stood in what was given


def solve(groups: Sequence[Sequence[tuple[int, float]]], limit: int) -> list[int]:
    """Pick one option of each group.

    Parameters
    ----------
    groups : sequence of sequence of (int, float)
        Bytes and damage (nats, may be negative) of each option of each group.
    limit : int
        Bytes that all picked options together may take.

    Returns
    -------
    list of int
        Index of the picked option, by group. Of picks that do equally little damage the smallest is taken; of those
        that are equally large too, the one whose option in the last group is smallest, then in the last but one, ….

    Raises
    ------
    ValueError
        If not even the smallest options fit, a group is empty, or a damage is no number or out of range.

    Examples
    --------
    >>> solve([[(1, 0.5), (2, 0.1)], [(1, 0.3), (3, 0.0)]], 4)
    [1, 0]
    """
    options = [_sorted(group) for group in groups]
    least = sum(int(group.sizes[0]) for group in options)
    if least > limit:
        raise ValueError(
            f"limit={limit} bytes, must be at least {least}: the sum of the smallest options. Raise the limit."
        )
    price, known = _price(options, limit)
    # what is still to come takes at least so many bytes, and costs at least so much at that price
    bytes_left = np.cumsum([0] + [int(group.sizes[0]) for group in reversed(options)])[::-1]
    cost_left = np.cumsum([0.0] + [(group.damages + price * group.sizes).min() for group in reversed(options)])[::-1]
    slack = 1e-9 * (abs(known) + price * limit) + 1  # of the bound, for its floating-point numbers
    sizes, damages, steps = np.zeros(1, np.int64), np.zeros(1, np.int64), []
    for i, group in enumerate(options):
        states = len(sizes)
        option = np.repeat(np.arange(len(group.sizes)), states)
        parent = np.tile(np.arange(states), len(group.sizes))
        sizes, damages = sizes[parent] + group.sizes[option], damages[parent] + group.damages[option]
        bound = damages + price * (sizes - float(limit)) + cost_left[i + 1]
        kept = np.flatnonzero((sizes + bytes_left[i + 1] <= limit) & (bound <= known + slack))
        kept = kept[_undominated(sizes[kept], damages[kept], option[kept])]
        sizes, damages = sizes[kept], damages[kept]
        steps.append((parent[kept], group.places[option[kept]]))
    return _trace(steps, len(sizes) - 1)  # the last state is the largest, and the one with the least damage


def _sorted(group: Sequence[tuple[int, float]]) -> Options:
    """Return one group's options as integers, by size."""
    damages = np.array([damage for _, damage in group])
    if not len(group) or not (np.abs(damages) <= _LARGEST).all():
        raise ValueError(f"damages={damages.tolist()}, must be numbers up to {_LARGEST}, at least one. Measure again.")
    sizes, damages = np.array([size for size, _ in group], np.int64), np.rint(damages / UNIT).astype(np.int64)
    order = np.lexsort((damages, sizes))
    return Options(sizes[order], damages[order], order)


def _price(options: Sequence[Options], limit: int) -> tuple[float, int]:
    """Return the lowest price of a byte at which the cheapest options fit, and their damage."""

    def cheapest(price: float) -> tuple[int, int]:
        picks = [(group, int((group.damages + price * group.sizes).argmin())) for group in options]
        return sum(int(g.sizes[i]) for g, i in picks), sum(int(g.damages[i]) for g, i in picks)

    low, high = 0.0, 1.0 + 2.0 * max(float(np.ptp(group.damages)) for group in options)  # at `high` the smallest win
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if cheapest(middle)[0] <= limit else (middle, high)
    return high, cheapest(high)[1]


def _undominated(sizes: np.ndarray, damages: np.ndarray, options: np.ndarray) -> np.ndarray:
    """Return the indices of undominated states by size (equal ones: the first option)."""
    order = np.lexsort((options, damages, sizes))
    ordered = damages[order]
    better = np.ones(len(order), np.bool_)
    better[1:] = ordered[1:] < np.minimum.accumulate(ordered)[:-1]
    return order[better]


def _trace(steps: Sequence[tuple[np.ndarray, np.ndarray]], state: int) -> list[int]:
    """Follow a state back to the beginning."""
    picked = []
    for parents, places in reversed(steps):
        picked.append(int(places[state]))
        state = parents[state]
    return picked[::-1]
