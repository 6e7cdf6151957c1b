"""The numbers in the blocks: everything that a type's decoder can express, unpacked and packed again.

    value = d * sc * level[code] - dmin * m

with a code per weight, numbers `sc` and `m` per sub-block, and float16 `d` and `dmin` per super-block. In IQ2 and IQ3
`sc` is l + 1/2 with the block's l = 0 … 15, and the codes of 4 or 8 weights, their signs aside, are a point of a grid.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from quantlab.quants.codebook import put, take
from quantlab.quants.ggml_types import GGML_TYPES, Bits, block_bytes, block_size
from quantlab.quants.grids import (
    EVEN,
    NO_POINTS,
    Points,
    level_bits,
    point_levels,
    signed_values,
    sorted_points,
)
from quantlab.quants.grids import grid as grid_of


@dataclass(frozen=True)
class Grid:
    """The values that a type's decoder can express.

    Attributes
    ----------
    qtype : str
        ggml type.
    super_block, sub_block : int
        Weights that share `d` and `dmin`; weights that share `sc` and `m`.
    sc_range, m_range : (float, float)
        Smallest and largest number of a sub-block's scale and minimum, in steps of 1: (1, 1) where the type stores
        none, (0, 0) for the minimum of a type without one.
    """

    qtype: str
    super_block: int
    sub_block: int
    sc_range: tuple[float, float]
    m_range: tuple[float, float]

    @cached_property
    def levels(self) -> np.ndarray:
        """The level of each code [dtype=float32], ascending."""
        if self.qtype in _FACTORS:
            return signed_values(self.qtype, _FACTORS[self.qtype])
        return np.array(GGML_TYPES[self.qtype].levels, np.float32)

    @cached_property
    def points(self) -> Points:
        """The points that the codes of several weights must be."""
        return sorted_points(self.qtype, _FACTORS[self.qtype]) if self.qtype in _FACTORS else NO_POINTS

    @cached_property
    def edges(self) -> np.ndarray:
        """Midpoints between neighbouring levels [dtype=float32]; empty where the levels are one step apart."""
        even = (np.diff(self.levels) == 1).all()
        return np.zeros(0, np.float32) if even else (self.levels[:-1] + self.levels[1:]) / 2


@dataclass
class Blocks:
    """The numbers in the blocks of some rows: ``value = d * sc * levels[code] - dmin * m``.

    Attributes
    ----------
    grid : Grid
    d, dmin : np.ndarray [shape=(nrows, n / super_block), dtype=float32]
        Each is exactly a float16.
    sc, m : np.ndarray [shape=(nrows, n / sub_block), dtype=float32]
        Whole numbers; `sc` of IQ2 and IQ3 half of an odd one.
    code : np.ndarray [shape=(nrows, n), dtype=float32]
        Whole numbers.
    """

    grid: Grid
    d: np.ndarray
    dmin: np.ndarray
    sc: np.ndarray
    m: np.ndarray
    code: np.ndarray

    @property
    def parts(self) -> tuple[np.ndarray, ...]:
        """The arrays, in the order of the kernels' arguments."""
        return self.d, self.dmin, self.sc, self.m, self.code

    def values(self) -> np.ndarray:
        """Decode the numbers [shape=(nrows, n), dtype=float32]."""
        per = self.grid.super_block // self.grid.sub_block
        scale = np.repeat(np.repeat(self.d, per, 1) * self.sc, self.grid.sub_block, 1)
        low = np.repeat(np.repeat(self.dmin, per, 1) * self.m, self.grid.sub_block, 1)
        return scale * self.grid.levels[self.code.astype(np.intp)] - low


# ---- where a type keeps its scales: block bytes [shape=(n_blocks, bytes), dtype=uint8] to (d, dmin, sc, m) and back


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _put_half(blocks: np.ndarray, at: int, numbers: np.ndarray) -> None:
    blocks[:, at : at + 2] = np.ascontiguousarray(numbers, "<f2").reshape(-1, 1).view(np.uint8)


def _read_q2_k(blocks):
    return _half(blocks, 80), _half(blocks, 82), blocks[:, :16] & 15, blocks[:, :16] >> 4


def _write_q2_k(blocks, d, dmin, sc, m):
    blocks[:, :16] = sc | m << 4
    _put_half(blocks, 80, d)
    _put_half(blocks, 82, dmin)


def _read_q3_k(blocks):
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    low = np.concatenate([low & 15, low >> 4], axis=1)
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    return _half(blocks, 108), None, (low | high << 4).astype(np.int8) - 32, None


def _write_q3_k(blocks, d, dmin, sc, m):
    sc = (sc.astype(np.int8) + 32).astype(np.uint8)
    high = (sc >> 4).reshape(-1, 4, 4)
    blocks[:, 96:104] = sc[:, :8] & 15 | sc[:, 8:] << 4
    blocks[:, 104:108] = high[:, 0] | high[:, 1] << 2 | high[:, 2] << 4 | high[:, 3] << 6
    _put_half(blocks, 108, d)


def _read_six_bits(blocks):
    """Q4_K and Q5_K."""
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    sc = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
    m = np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)
    return _half(blocks, 0), _half(blocks, 2), sc, m


def _write_six_bits(blocks, d, dmin, sc, m):
    _put_half(blocks, 0, d)
    _put_half(blocks, 2, dmin)
    blocks[:, 4:8] = sc[:, :4] | sc[:, 4:] >> 4 << 6
    blocks[:, 8:12] = m[:, :4] | m[:, 4:] >> 4 << 6
    blocks[:, 12:16] = sc[:, 4:] & 15 | m[:, 4:] << 4


def _read_q6_k(blocks):
    return _half(blocks, 208), None, blocks[:, 192:208].view(np.int8), None


def _write_q6_k(blocks, d, dmin, sc, m):
    blocks[:, 192:208] = sc.astype(np.int8).view(np.uint8)
    _put_half(blocks, 208, d)


def _read_iq4_xs(blocks):
    high = np.ascontiguousarray(blocks[:, 2:4]).view("<u2")
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    high = (high >> 2 * np.arange(8, dtype=np.uint16) & 3).astype(np.uint8)
    return _half(blocks, 0), None, (low | high << 4).astype(np.int8) - 32, None


def _write_iq4_xs(blocks, d, dmin, sc, m):
    sc = (sc.astype(np.int8) + 32).astype(np.uint8)
    high = np.bitwise_or.reduce((sc >> 4).astype("<u2") << 2 * np.arange(8, dtype="<u2"), axis=1)
    _put_half(blocks, 0, d)
    blocks[:, 2:4] = high.reshape(-1, 1).view(np.uint8)
    blocks[:, 4:8] = sc[:, ::2] & 15 | sc[:, 1::2] << 4


def _read_scale(blocks):
    """The types whose blocks begin with their scale, and store no more of it or with the points."""
    return _half(blocks, 0), None, None, None


def _write_scale(blocks, d, dmin, sc, m):
    _put_half(blocks, 0, d)


def _read_scale_and_low(blocks):
    """Q4_1 and Q5_1, whose stored minimum is added, not subtracted."""
    return _half(blocks, 0), -_half(blocks, 2), None, None


def _write_scale_and_low(blocks, d, dmin, sc, m):
    _put_half(blocks, 0, d)
    _put_half(blocks, 2, -dmin)


# ---- IQ2 and IQ3: positions in the grid, the 8 signs of 8 weights, and l

# the values of 8 or 4 weights are factor * d * (l + 1/2) * those of the grid
_FACTORS = {"IQ2_XXS": 0.25, "IQ2_XS": 0.25, "IQ2_S": 0.25, "IQ3_XXS": 0.5, "IQ3_S": 2.0}
# type -> places of the positions' low bits and high bits, of the signs, of l
_PLACES = {
    "IQ2_S": (Bits(2, 34, 1, 8), Bits(66, 74, 1, 2), Bits(34, 66, 1, 8), Bits(74, 82, 1, 4)),
    "IQ3_S": (Bits(2, 66, 1, 8), Bits(66, 74, 1, 1), Bits(74, 106, 1, 8), Bits(106, 110, 1, 4)),
}
_IQ2_XS_L = Bits(66, 74, 1, 4)
_SEVENS = 7 * np.arange(4, dtype="<u4")  # places of four times 7 signs in 32 bits


def _words(blocks: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(blocks).view(dtype)


def _read_points(qtype: str, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return positions [shape=(n_blocks, 256 / weights)], signs [shape=(n_blocks, 32)] and l of each sub-block."""
    if qtype in _PLACES:
        low, high, signs, l = (take(place, blocks) for place in _PLACES[qtype])
        return low | high.astype(np.uint16) << 8, signs, l
    if qtype == "IQ2_XS":
        q = _words(blocks[:, 2:66], "<u2")
        return q & 511, EVEN[q >> 9], take(_IQ2_XS_L, blocks)
    if qtype == "IQ2_XXS":
        pairs = _words(blocks[:, 2:66], "<u4")
        position, tail = _words(pairs[:, ::2], "u1"), pairs[:, 1::2]
    else:
        position, tail = blocks[:, 2:66], _words(blocks[:, 66:98], "<u4")
    return position, EVEN[tail[:, :, None] >> _SEVENS & 127].reshape(len(blocks), 32), tail >> 28


def _write_points(qtype: str, blocks: np.ndarray, position: np.ndarray, signs: np.ndarray, l: np.ndarray) -> None:
    """Write what `_read_points` returns."""
    if qtype in _PLACES:
        for place, part in zip(_PLACES[qtype], (position, position >> 8, signs, l), strict=True):
            put(place, blocks, part.astype(np.uint8))
    elif qtype == "IQ2_XS":
        blocks[:, 2:66] = _words((position | (signs & 127).astype(np.uint16) << 9).astype("<u2"), "u1")
        put(_IQ2_XS_L, blocks, l.astype(np.uint8))
    else:
        sevens = (signs & 127).astype("<u4").reshape(-1, 8, 4) << _SEVENS
        tail = l.astype("<u4") << 28 | np.bitwise_or.reduce(sevens, axis=2)
        position = position.astype(np.uint8)
        if qtype == "IQ2_XXS":
            pairs = np.stack([_words(position, "<u4"), tail], axis=2)
            blocks[:, 2:66] = _words(pairs.reshape(len(blocks), -1), "u1")
        else:
            blocks[:, 2:66], blocks[:, 66:98] = position, _words(tail, "u1")


def _codes_of_points(qtype: str, position: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Return the codes, places in `Grid.levels` [shape=(n_blocks, 256), dtype=uint8]."""
    level, n_levels = point_levels(qtype)[position].reshape(len(signs), 256), len(GRIDS[qtype].levels) // 2
    return np.where(np.unpackbits(signs, axis=1, bitorder="little"), n_levels - 1 - level, n_levels + level)


def _points_of_codes(qtype: str, code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and signs of codes [shape=(n_blocks, 256), dtype=uint8]."""
    n_levels, weights = len(GRIDS[qtype].levels) // 2, GRIDS[qtype].points.weights
    minus = code < n_levels
    level = np.where(minus, n_levels - 1 - code, code - n_levels).astype(np.int32)
    points = (level.reshape(len(code), -1, weights) << level_bits(weights) * np.arange(weights)).sum(axis=2)
    return grid_of(qtype).index[points], np.packbits(minus, axis=1, bitorder="little")


# type -> how its scales are read and written, and the ranges of `sc` and `m`
_SCALES = {
    "Q2_K": (_read_q2_k, _write_q2_k, (0, 15), (0, 15)),
    "Q3_K": (_read_q3_k, _write_q3_k, (-32, 31), (0, 0)),
    "Q4_K": (_read_six_bits, _write_six_bits, (0, 63), (0, 63)),
    "Q5_K": (_read_six_bits, _write_six_bits, (0, 63), (0, 63)),
    "Q6_K": (_read_q6_k, _write_q6_k, (-128, 127), (0, 0)),
    "IQ4_XS": (_read_iq4_xs, _write_iq4_xs, (-32, 31), (0, 0)),
    "IQ4_NL": (_read_scale, _write_scale, (1, 1), (0, 0)),
    "Q4_0": (_read_scale, _write_scale, (1, 1), (0, 0)),
    "Q5_0": (_read_scale, _write_scale, (1, 1), (0, 0)),
    "Q4_1": (_read_scale_and_low, _write_scale_and_low, (1, 1), (1, 1)),
    "Q5_1": (_read_scale_and_low, _write_scale_and_low, (1, 1), (1, 1)),
    **{qtype: (_read_scale, _write_scale, (0.5, 15.5), (0, 0)) for qtype in _FACTORS},
}
GRIDS = {
    qtype: Grid(qtype, GGML_TYPES[qtype].block, GGML_TYPES[qtype].sub_block or GGML_TYPES[qtype].block, sc, m)
    for qtype, (_, _, sc, m) in _SCALES.items()
}


def unpack(data: np.ndarray, qtype: str) -> Blocks:
    """Unpack the numbers of encoded rows.

    Parameters
    ----------
    data : np.ndarray [shape=(nrows, row_bytes), dtype=uint8]
    qtype : str
        One of `GRIDS`.

    Returns
    -------
    Blocks
        `pack` of it gives `data` again.
    """
    grid, nrows = GRIDS[qtype], len(data)
    blocks = np.ascontiguousarray(data).reshape(-1, block_bytes(qtype))
    d, dmin, sc, m = _SCALES[qtype][0](blocks)
    code, shift = np.uint8(0), 0
    for place in GGML_TYPES[qtype].codes:
        code, shift = code | take(place, blocks) << shift, shift + place.width
    if qtype in _FACTORS:
        position, signs, l = _read_points(qtype, blocks)
        code, sc = _codes_of_points(qtype, position, signs), l + np.float32(0.5)
    per = grid.super_block // grid.sub_block
    sc = np.full((len(blocks), per), grid.sc_range[0]) if sc is None else sc
    m = np.full((len(blocks), per), grid.m_range[0]) if m is None else m
    dmin = np.zeros_like(d) if dmin is None else dmin
    return Blocks(grid, *(np.ascontiguousarray(part, np.float32).reshape(nrows, -1) for part in (d, dmin, sc, m, code)))


def pack(blocks: Blocks) -> np.ndarray:
    """Pack the numbers of rows into blocks [shape=(nrows, row_bytes), dtype=uint8]."""
    grid, nrows = blocks.grid, len(blocks.code)
    per, size = grid.super_block // grid.sub_block, block_size(grid.qtype)
    data = np.zeros((blocks.code.size // size, block_bytes(grid.qtype)), np.uint8)
    sc, m = (part.reshape(-1, per) for part in (blocks.sc, blocks.m))
    sc = sc.astype(np.int16) if grid.sc_range[0] < 0 else sc.astype(np.uint8)
    code, shift = blocks.code.astype(np.uint8).reshape(-1, size), 0
    for place in GGML_TYPES[grid.qtype].codes:
        put(place, data, code >> shift & np.uint8((1 << place.width) - 1))
        shift += place.width
    if grid.qtype in _FACTORS:
        _write_points(grid.qtype, data, *_points_of_codes(grid.qtype, code), sc)
    _SCALES[grid.qtype][1](data, blocks.d, blocks.dmin, sc, m.astype(np.uint8))
    return data.reshape(nrows, -1)
