"""The codes in the blocks: where each type keeps them, how often each is used, what values they stand for."""

from typing import NamedTuple

import numpy as np

from quantlab.quants.arrays import PIECE, block_bytes, block_size, dequantize


class _Bits(NamedTuple):
    """Where a type keeps `width` bits of every code: bytes start..stop of the block, in runs of `run` bytes; the
    lowest bits of a run's bytes belong to `run` neighbouring weights, the next bits to the next `run` weights."""

    start: int
    stop: int
    run: int
    width: int

    def take(self, blocks: np.ndarray) -> np.ndarray:
        """These bits of every weight, in the weights' order: uint8 (n_blocks, weights)."""
        runs = blocks[:, self.start : self.stop].reshape(len(blocks), -1, 1, self.run)
        shifts = np.arange(0, 8, self.width, dtype=np.uint8)[:, None]
        return (runs >> shifts & np.uint8((1 << self.width) - 1)).reshape(len(blocks), -1)

    def put(self, blocks: np.ndarray, codes: np.ndarray) -> None:
        """Write these bits of every weight; `codes` of the shape that `take` gives."""
        runs = codes.reshape(len(blocks), -1, 8 // self.width, self.run)
        shifts = np.arange(0, 8, self.width, dtype=np.uint8)[:, None]
        blocks[:, self.start : self.stop] = np.bitwise_or.reduce(runs << shifts, axis=2).reshape(len(blocks), -1)


# type -> the places of its codes' bits, lowest bits first
CODES = {
    "Q4_0": (_Bits(2, 18, 16, 4),),
    "Q4_1": (_Bits(4, 20, 16, 4),),
    "Q5_0": (_Bits(6, 22, 16, 4), _Bits(2, 6, 1, 1)),
    "Q5_1": (_Bits(8, 24, 16, 4), _Bits(4, 8, 1, 1)),
    "Q8_0": (_Bits(2, 34, 32, 8),),
    "Q2_K": (_Bits(16, 80, 32, 2),),
    "Q3_K": (_Bits(32, 96, 32, 2), _Bits(0, 32, 32, 1)),
    "Q4_K": (_Bits(16, 144, 32, 4),),
    "Q5_K": (_Bits(48, 176, 32, 4), _Bits(16, 48, 32, 1)),
    "Q6_K": (_Bits(0, 128, 64, 4), _Bits(128, 192, 32, 2)),
}


def code_histogram(data, qtype: str) -> np.ndarray:
    """Count how often each code is used: a type that leaves levels empty wastes bits.

    Parameters
    ----------
    data : np.ndarray [dtype=uint8]
        Encoded blocks, in any shape with whole blocks.
    qtype : str
        Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K or Q6_K.

    Returns
    -------
    np.ndarray [shape=(2**bits,), dtype=int64]
        Counts in the order of the codes' values (Q8_0: from -128 to 127).

    Raises
    ------
    ValueError
        If `qtype` has no codes of one width, or `data` is not whole blocks of uint8.

    Examples
    --------
    >>> from quantlab.quants import quantize
    >>> code_histogram(quantize(np.full(256, -1, np.float32), "Q2_K"), "Q2_K").sum()
    np.int64(256)
    """
    blocks = _blocks(data, qtype)
    counts = np.zeros(1 << sum(place.width for place in CODES[qtype]), np.int64)
    step = PIECE // block_size(qtype)
    for start in range(0, len(blocks), step):
        counts += np.bincount(codes(blocks[start : start + step], qtype).ravel(), minlength=len(counts))
    return np.roll(counts, 128) if qtype == "Q8_0" else counts


def codes(data, qtype: str) -> np.ndarray:
    """Read the code of every weight.

    Parameters
    ----------
    data : np.ndarray [dtype=uint8]
        Encoded blocks, in any shape with whole blocks.
    qtype : str
        Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K or Q6_K.

    Returns
    -------
    np.ndarray [shape=(n_blocks, block_size), dtype=uint8]
        0 … 2**bits - 1, as stored; Q8_0's are the bytes of int8.

    Raises
    ------
    ValueError
        If `qtype` has no codes of one width, or `data` is not whole blocks of uint8.

    Examples
    --------
    >>> from quantlab.quants import quantize
    >>> codes(quantize(np.arange(32, dtype=np.float32), "Q4_1"), "Q4_1")[0, ::8]
    array([ 0,  4,  8, 12], dtype=uint8)
    """
    result, shift = np.uint8(0), 0
    blocks = _blocks(data, qtype)
    for place in CODES[qtype]:
        result = result | place.take(blocks) << shift
        shift += place.width
    return result


def grid(data, qtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Find the values that every weight can take: `first + step * code`.

    Parameters
    ----------
    data, qtype
        As for `codes`.

    Returns
    -------
    first, step : np.ndarray [shape=(n_blocks, block_size), dtype=float32]
        What the decoder makes of code 0, and how much more of code 1, in the weights' unit; a step may be negative,
        or NaN where a block's scale is not finite.

    Raises
    ------
    ValueError
        As `codes`.

    Examples
    --------
    >>> from quantlab.quants import quantize
    >>> first, step = grid(quantize(np.linspace(-8, 7, 32, dtype=np.float32), "Q4_0"), "Q4_0")
    >>> first[0, 0], step[0, 0]
    (np.float32(-8.0), np.float32(1.0))
    """
    blocks = _blocks(data, qtype)
    shape = (len(blocks), block_size(qtype))
    first, second = (dequantize(_with_codes(blocks, qtype, code), qtype, shape) for code in (0, 1))
    with np.errstate(invalid="ignore", over="ignore"):
        return first, second - first


def _blocks(data, qtype: str) -> np.ndarray:
    """`data` as (n_blocks, bytes of a block), checked."""
    if qtype not in CODES:
        raise ValueError(f"qtype={qtype!r}, has no table of codes. Choose one of {', '.join(CODES)}.")
    data = np.ascontiguousarray(data)
    if data.dtype != np.uint8 or data.size % block_bytes(qtype):
        raise ValueError(
            f"data: {data.size} of {data.dtype}, must be whole {qtype} blocks of {block_bytes(qtype)} uint8. "
            "Check the type of the tensor."
        )
    return data.reshape(-1, block_bytes(qtype))


def _with_codes(blocks: np.ndarray, qtype: str, code: int) -> np.ndarray:
    """The blocks with every code replaced by `code`."""
    blocks = blocks.copy()
    for place in CODES[qtype]:
        blocks[:, place.start : place.stop] = 0
    lowest = CODES[qtype][0]
    lowest.put(blocks, np.full((len(blocks), block_size(qtype)), code, np.uint8))
    return blocks
