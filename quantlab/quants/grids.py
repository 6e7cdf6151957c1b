"""The grids of the I-quants, and the neighbours of every point that is not on a grid.

A *point* is the levels of 8 weights (4 for IQ3), packed into an int: two bits a level (three for IQ3), the first weight
lowest. A grid is a list of points; what a block stores of 8 weights is a position in that list. An encoder rounds the
weights to a point. If the grid lacks it, the encoder tries its *neighbours*: the grid's points at the smallest few
distances, sorted by distance, then by position. That order is total, so every machine makes the same lists.

The gguf package has the grids; the lists are made here, in a few hundredths of a second.

Source: `iq2xs_init_impl` and `iq3xs_init_impl` of llama.cpp's ggml-quants.c.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

DISTANCES = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ3_XXS": 2, "IQ3_S": 3, "IQ1_S": 3}  # how many are tried

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
ALL_SIGNS = (255 * _BITS).view(np.int64).reshape(-1)  # by the signs of 8 weights: 255 in the byte of each minus
EVEN = np.array([s | s.bit_count() % 2 << 7 for s in range(128)], np.uint8)  # by 7 signs: 8, an even number of minuses
EVEN_SIGNS = ALL_SIGNS[EVEN]


class Grid(NamedTuple):
    """A grid and the neighbours of all points. `start` and `codes` have one run for each point, `index` one element."""

    points: np.ndarray  # uint16: the points of the grid
    index: np.ndarray  # int32: the position of a point in the grid, -1 if the grid lacks it
    start: np.ndarray  # int32: codes[start[p] : start[p + 1]] are the neighbours of point p
    codes: np.ndarray  # uint16: points; each run is filled up to a multiple of 16 with its first one


class Points(NamedTuple):
    """The points of a grid, sorted by the levels of their first halves.

    Attributes
    ----------
    weights : int
        Weights of a point; 1 for a type without a grid, whose arrays are empty.
    even : bool
        Whether the number of minus signs of 8 weights must be even.
    halves : np.ndarray [shape=(n_halves * weights / 2,), dtype=float32]
        Values of all halves that a point may have.
    start : np.ndarray [shape=(n_halves + 1,), dtype=int32]
        The points ``start[h] : start[h + 1]`` begin with half h.
    second, code : np.ndarray [shape=(n_points,), dtype=int32]
        Each point's second half, and its levels as in `Grid.points`.
    """

    weights: int
    even: bool
    halves: np.ndarray
    start: np.ndarray
    second: np.ndarray
    code: np.ndarray


_NONE = np.zeros(0, np.int32)
NO_POINTS = Points(1, False, np.zeros(0, np.float32), _NONE, _NONE, _NONE)


@cache
def sorted_points(qtype: str, factor: float) -> Points:
    """Return the points of IQ2 and IQ3; values are `factor` times those of the grid."""
    levels, shifts, values = _levels(qtype)
    weights, n_levels = levels.shape[1], len(values)
    places = n_levels ** np.arange(weights // 2)
    first, second = levels[:, : weights // 2] @ places, levels[:, weights // 2 :] @ places
    order = np.lexsort((second, first))
    n_halves = n_levels ** (weights // 2)
    halves = values[np.arange(n_halves)[:, None] // places % n_levels] * np.float32(factor)
    start = np.searchsorted(first[order], np.arange(n_halves + 1))
    parts = (start, second[order], (levels << shifts).sum(1)[order])
    even = qtype in ("IQ2_XXS", "IQ2_XS", "IQ3_XXS")
    return Points(weights, even, halves.reshape(-1), *(part.astype(np.int32) for part in parts))


def signed_values(qtype: str, factor: float) -> np.ndarray:
    """Return the values of all levels with both signs, ascending, times `factor` [dtype=float32]."""
    values = _levels(qtype)[2] * np.float32(factor)
    return np.concatenate([-values[::-1], values])


def point_levels(qtype: str) -> np.ndarray:
    """Return the levels of a grid's points [shape=(n_points, weights), dtype=uint8]."""
    return _levels(qtype)[0].astype(np.uint8)


def level_bits(weights: int) -> int:
    """Return the bits of a level in a point's code: 2 of 8 weights, 3 of 4."""
    return 16 // weights - weights // 4 % 2


@cache
def _levels(qtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the levels of all points, the place of each in a point's code, and the levels' values."""
    values = _values(qtype)
    known = np.unique(values)
    weights = values.shape[1]
    return np.searchsorted(known, values), level_bits(weights) * np.arange(weights), known.astype(np.float32)


@cache
def grid(qtype: str) -> Grid:
    """Return grid and neighbours of IQ1_S (IQ1_M has the same), IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS or IQ3_S."""
    levels, shifts, values = _levels(qtype)
    weights, n_levels = levels.shape[1], len(values)
    points = (levels << shifts).sum(1)
    index = np.full(1 << level_bits(weights) * weights, -1, np.int32)
    index[points] = np.arange(len(points))
    missing = _all_points(n_levels, weights)
    missing = missing[index[(missing << shifts).sum(1)] < 0]
    counts, neighbours = _neighbours(missing, levels, DISTANCES[qtype])
    start, codes = _runs((missing << shifts).sum(1), counts, points[neighbours], len(index))
    return Grid(points.astype(np.uint16), index, start, codes)


@cache
def words(qtype: str) -> np.ndarray:
    """Return the values of each point of a grid in an int64: 8 bytes, or 4 in the low half."""
    values = _values(qtype)
    return np.hstack([values, np.zeros((len(values), 8 - values.shape[1]), np.int8)]).view(np.int64).reshape(-1)


@cache
def _values(qtype: str) -> np.ndarray:
    """Read a grid of the gguf package: int8 (n, weights)."""
    from gguf import quants

    package = getattr(quants, qtype)
    package.init_grid()
    return np.ascontiguousarray(package.grid.reshape(package.grid_shape).astype(np.int8))


def _all_points(n_levels: int, weights: int) -> np.ndarray:
    """Return the levels of all points: int64 (n_levels**weights, weights)."""
    return np.stack(np.meshgrid(*[np.arange(n_levels)] * weights, indexing="ij"), -1).reshape(-1, weights)


def _neighbours(points: np.ndarray, levels: np.ndarray, n_distances: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of neighbours of each point, and the positions of all neighbours in order."""
    left = np.hstack([points, (points * points).sum(1)[:, None], np.ones((len(points), 1))]).astype(np.float32)
    right = np.hstack([-2 * levels, np.ones((len(levels), 1)), (levels * levels).sum(1)[:, None]]).astype(np.float32)
    distance = (left @ right.T).astype(np.uint8)  # of levels, squared: whole numbers, exact
    shells, this = [], distance.min(1, keepdims=True)
    for shell in range(n_distances):
        if shell:  # bytes below 0 wrap, so what lies within the last shell is far from the smallest
            this = this + np.uint8(1) + (distance - (this + np.uint8(1))).min(1, keepdims=True)
        shells.append(np.divmod(np.flatnonzero(distance == this).astype(np.int32), np.int32(len(levels))))
    counts = np.array([np.bincount(point, minlength=len(points)) for point, _ in shells])
    total = counts.sum(0)
    first = np.cumsum(total) - total + np.cumsum(counts, axis=0) - counts  # of each shell of each point
    order = np.empty(total.sum(), np.int32)
    for (point, position), n, start in zip(shells, counts, first, strict=True):
        order[np.arange(len(point)) + (start - (np.cumsum(n) - n))[point]] = position
    return total, order


def _runs(points: np.ndarray, counts: np.ndarray, neighbours: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay out the neighbours of `points` in runs of a multiple of 16, in the order of the points."""
    order = np.argsort(points)
    first = np.cumsum(counts) - counts
    lengths = np.zeros(n + 1, np.int32)
    lengths[points + 1] = -(-counts // 16) * 16
    start = np.cumsum(lengths, dtype=np.int32)
    points, counts, first = points[order], counts[order], first[order]
    codes = np.repeat(neighbours[first], lengths[points + 1]).astype(np.uint16)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    codes[np.repeat(start[points], counts) + within] = neighbours[np.repeat(first, counts) + within]
    return start, codes
