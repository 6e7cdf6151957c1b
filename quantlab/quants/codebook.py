"""The codes in the blocks: their places, their frequencies, and the values they stand for."""

import numpy as np
from numpy.typing import ArrayLike

from quantlab.quants.arrays import PIECE, dequantize
from quantlab.quants.ggml_types import GGML_TYPES, Bits, block_bytes, block_size, type_name

# type -> the places of its codes' bits, lowest bits first
CODES = {record.name: record.codes for record in GGML_TYPES.values() if record.codes}


def take(place: Bits, blocks: np.ndarray) -> np.ndarray:
    """Read some bits of every weight's code, in the weights' order: uint8 (n_blocks, weights)."""
    runs = blocks[:, place.start : place.stop].reshape(len(blocks), -1, 1, place.run)
    return (runs >> _shifts(place) & np.uint8((1 << place.width) - 1)).reshape(len(blocks), -1)


def put(place: Bits, blocks: np.ndarray, codes: np.ndarray) -> None:
    """Write some bits of every weight's code; `codes` of the shape that `take` gives."""
    runs = codes.reshape(len(blocks), -1, 8 // place.width, place.run)
    blocks[:, place.start : place.stop] = np.bitwise_or.reduce(runs << _shifts(place), axis=2).reshape(len(blocks), -1)


def _shifts(place: Bits) -> np.ndarray:
    return np.arange(0, 8, place.width, dtype=np.uint8)[:, None]


def code_values(qtype: str) -> np.ndarray:
    """Return the step numbers of `grid`: the codes themselves, or the type's table entry for each.

    Returns
    -------
    np.ndarray [shape=(2**bits,), dtype=int64]
    """
    levels = GGML_TYPES[type_name(qtype)].levels
    return np.arange(len(levels)) if isinstance(levels, range) else np.array(levels)


def code_histogram(data: ArrayLike, qtype: str) -> np.ndarray:
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
        Counts in the order of the codes' values (Q8_0: from -128 to 127; of a table: from its lowest value).

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
    order = np.argsort(code_values(qtype), kind="stable")
    counts = np.zeros(len(order), np.int64)
    step = PIECE // block_size(qtype)
    for start in range(0, len(blocks), step):
        counts += np.bincount(codes(blocks[start : start + step], qtype).ravel(), minlength=len(counts))
    return counts[order]


def codes(data: ArrayLike, qtype: str) -> np.ndarray:
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
    blocks, shift, qtype = _blocks(data, qtype), 0, type_name(qtype)
    result = np.zeros((len(blocks), 1), np.uint8)
    for place in CODES[qtype]:
        result = result | take(place, blocks) << shift
        shift += place.width
    return result


def grid(data: ArrayLike, qtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Find the values that every weight can take: `first + step * code_values(qtype)[code]`.

    Parameters
    ----------
    data, qtype
        As for `codes`.

    Returns
    -------
    first, step : np.ndarray [shape=(n_blocks, block_size), dtype=float32]
        What the decoder makes of value 0, and how much more of value 1, in the weights' unit; a step may be negative,
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
    blocks, qtype = _blocks(data, qtype), type_name(qtype)
    shape, values = (len(blocks), block_size(qtype)), code_values(qtype).tolist()
    second = dequantize(_with_codes(blocks, qtype, values.index(1)), qtype, shape)
    if 0 not in values:
        return np.zeros_like(second), second
    first = dequantize(_with_codes(blocks, qtype, values.index(0)), qtype, shape)
    with np.errstate(invalid="ignore", over="ignore"):
        return first, second - first


def _blocks(data: ArrayLike, qtype: str) -> np.ndarray:
    """`data` as (n_blocks, bytes of a block), checked."""
    qtype = type_name(qtype)
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
    blocks, shape = blocks.copy(), (len(blocks), block_size(qtype))
    for place in CODES[qtype]:
        put(place, blocks, np.full(shape, code & ((1 << place.width) - 1), np.uint8))
        code >>= place.width
    return blocks
