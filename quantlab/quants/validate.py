"""Validate encoded rows as llama-quantize does: the scales of blocks, and floats without blocks, must be finite.

Finite weights can overflow: a scale is a half-precision float, so one weight of 1e6 makes its Q4_0 block infinite.

Source: `ggml_validate_row_data` of llama.cpp's ggml-quants.c.
"""

import numpy as np
from numba import prange

from quantlab.quants.floats import all_finite
from quantlab.quants.ggml_types import block_size, ggml_type, load
from quantlab.quants.lanes import parallel_kernel

_CEILINGS = {"float16": 0x7C00, "bfloat16": 0x7F80}  # bits of infinity


def is_valid(data: np.ndarray, qtype: str) -> bool:
    """Tell whether llama.cpp accepts encoded rows.

    Parameters
    ----------
    data : np.ndarray [shape=(nrows, row_bytes), dtype=uint8, rows contiguous]
    qtype : str
        ggml type. Any bytes are accepted of a type without a rule, such as NVFP4 or integers.

    Examples
    --------
    >>> is_valid(np.array([[0, 0x7C] + 16 * [0]], np.uint8), "Q4_0")  # an infinite scale
    False
    """
    record = ggml_type(qtype)
    if record.dtype == "float32":
        return all_finite(data.view(np.uint32))
    if record.dtype in _CEILINGS:
        return _all_below(data.view(np.uint16), 0, 1, _CEILINGS[record.dtype])
    if record.validator or not record.halves or record.for_activations:
        return not invalid_blocks(data, qtype).any()
    words, step = data.view(np.uint16), record.nbytes // 2
    return all(_all_below(words, offset // 2, step, _CEILINGS["float16"]) for offset in record.halves)


@parallel_kernel
def _all_below(words, first, step, ceiling):
    """Tell whether every `step`-th 16-bit float from `first` on is below these bits, without its sign."""
    bad = 0
    for row in prange(words.shape[0]):
        largest = np.uint16(0)
        for i in range(first, words.shape[1], step):
            largest = max(largest, words[row, i] & np.uint16(0x7FFF))
        bad += largest >= ceiling
    return bad == 0


def invalid_blocks(data: np.ndarray, qtype: str) -> np.ndarray:
    """Find the blocks that llama.cpp refuses.

    Parameters
    ----------
    data : np.ndarray [shape=(nrows, row_bytes), dtype=uint8, rows contiguous]
    qtype : str
        ggml type.

    Returns
    -------
    np.ndarray [shape=(nrows, blocks per row), dtype=bool]
    """
    record = ggml_type(qtype)
    blocks = data.reshape(len(data), -1, record.nbytes)
    if record.validator:
        return load(record.validator)(blocks)
    invalid = np.zeros(blocks.shape[:2], bool)
    for offset in () if record.for_activations else record.halves:
        invalid |= half_not_finite(blocks[..., offset : offset + 2])
    return invalid


# ---- validators: blocks [shape=(nrows, blocks per row, nbytes), dtype=uint8] → which are invalid


def half_not_finite(blocks: np.ndarray) -> np.ndarray:
    """F16."""
    return blocks.view(np.uint16)[..., 0] & 0x7C00 == 0x7C00


def brain_not_finite(blocks: np.ndarray) -> np.ndarray:
    """BF16."""
    return blocks.view(np.uint16)[..., 0] & 0x7F80 == 0x7F80


def float_not_finite(blocks: np.ndarray) -> np.ndarray:
    """F32, and Q8_K, whose block begins with one."""
    return ~np.isfinite(blocks[..., :4].view(np.float32)[..., 0])


def double_not_finite(blocks: np.ndarray) -> np.ndarray:
    """F64."""
    return ~np.isfinite(blocks.view(np.float64)[..., 0])


def spread_half_not_finite(blocks: np.ndarray) -> np.ndarray:
    """IQ1_M: the block ends with four words, each of which has four bits of the scale on top."""
    words = blocks[..., 48:56].view(np.uint16)
    scale = words[..., 0] >> 12 | words[..., 1] >> 8 & 0x00F0 | words[..., 2] >> 4 & 0x0F00 | words[..., 3] & 0xF000
    return scale & 0x7C00 == 0x7C00


def power_is_nan(blocks: np.ndarray) -> np.ndarray:
    """MXFP4: a power of two, whose byte 0xFF means NaN."""
    return blocks[..., 0] == 0xFF


# ---- what users see


def check_encoded(
    data: np.ndarray, x: np.ndarray, qtype: str, *, name: str = "x", first_row: int = 0, first_column: int = 0
) -> None:
    """Refuse encoded rows whose weights overflowed, and name the weight.

    Parameters
    ----------
    data : np.ndarray [shape=(nrows, row_bytes), dtype=uint8]
    x : np.ndarray [shape=(nrows, n_per_row), floats]
        The weights that were encoded.
    qtype : str
        ggml type.
    name : str
        The tensor's name.
    first_row, first_column : int
        Place of ``x[0, 0]`` in the tensor.

    Raises
    ------
    ValueError
        If a block is invalid. Its largest weight is named.
    """
    if is_valid(data, qtype):
        return
    row, block = np.argwhere(invalid_blocks(data, qtype))[0]
    start = block * block_size(qtype)
    weights = np.abs(x[row, start : start + block_size(qtype)].astype(np.float32))
    column = start + int(weights.argmax())
    what = f"exceeds the range of {qtype}" if len(weights) == 1 else f"makes the scale of its {qtype} block infinite"
    raise ValueError(
        f"{name}: value={x[row, column]:g} in row {first_row + row}, column {first_column + column}, {what}. "
        "Choose BF16 or F32 for this tensor, or check the checkpoint that it came from."
    )


def check_stored(data: np.ndarray, qtype: str, *, name: str, first_row: int = 0) -> None:
    """Refuse rows of a file that llama.cpp refuses.

    Parameters
    ----------
    data : np.ndarray [shape=(nrows, row_bytes), dtype=uint8]
    qtype : str
        ggml type.
    name : str
        The tensor's name.
    first_row : int
        Number of the first row in the tensor.

    Raises
    ------
    ValueError
        If a float or a scale is not finite.
    """
    if not is_valid(data, qtype):
        raise ValueError(f"{name}: {first_invalid(data, qtype, first_row)}. Download the file again.")


def first_invalid(data: np.ndarray, qtype: str, first_row: int = 0) -> str:
    """Describe the place and the fault of the first invalid block of rows."""
    row, block = np.argwhere(invalid_blocks(data, qtype))[0]
    size = block_size(qtype)
    if size == 1:
        return f"the value in row {first_row + row}, column {block}, must be finite"
    place = f"row {first_row + row}, columns {block * size}:{(block + 1) * size}"
    return f"the scale of the {qtype} block in {place}, must be finite"
