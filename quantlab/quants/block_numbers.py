"""The numbers in the blocks: everything that a type's decoder can express, unpacked and packed again.

    value = d * sc * level[code] - dmin * m

with a code per weight, whole numbers `sc` and `m` per sub-block, and float16 `d` and `dmin` per super-block.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from quantlab.quants.codebook import put, take
from quantlab.quants.ggml_types import GGML_TYPES, block_bytes, block_size


@dataclass(frozen=True)
class Grid:
    """The values that a type's decoder can express.

    Attributes
    ----------
    qtype : str
        ggml type.
    super_block, sub_block : int
        Weights that share `d` and `dmin`; weights that share `sc` and `m`.
    sc_range, m_range : (int, int)
        Smallest and largest whole number of a sub-block's scale and minimum: (1, 1) where the type stores none, (0, 0)
        for the minimum of a type without one.
    """

    qtype: str
    super_block: int
    sub_block: int
    sc_range: tuple[int, int]
    m_range: tuple[int, int]

    @cached_property
    def levels(self) -> np.ndarray:
        """The level of each code [dtype=float32], ascending."""
        return np.array(GGML_TYPES[self.qtype].levels, np.float32)

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
        Whole numbers.
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
    """The types of 32 weights with a scale alone."""
    return _half(blocks, 0), None, None, None


def _write_scale(blocks, d, dmin, sc, m):
    _put_half(blocks, 0, d)


def _read_scale_and_low(blocks):
    """Q4_1 and Q5_1, whose stored minimum is added, not subtracted."""
    return _half(blocks, 0), -_half(blocks, 2), None, None


def _write_scale_and_low(blocks, d, dmin, sc, m):
    _put_half(blocks, 0, d)
    _put_half(blocks, 2, -dmin)


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
    _SCALES[grid.qtype][1](data, blocks.d, blocks.dmin, sc, m.astype(np.uint8))
    return data.reshape(nrows, -1)
