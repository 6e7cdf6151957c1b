"""Safetensors files: the positions of each tensor's bytes, which the library's reader hides.

    0   8   length n of the header, uint64
    8   n   JSON: {"name": {"dtype": "BF16", "shape": [..], "data_offsets": [begin, end]}, .., "__metadata__": {..}}
    8+n ..  data; offsets count from here

Source: the safetensors format description.
"""

import json
import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.files.byte_range import STORED_DTYPES, ByteRange, StoredTensor
from quantlab.files.checkpoint_kinds import check_not_packed, empty_tensors
from quantlab.files.recognize import looks_like, reason, short

__all__ = ["read_safetensors"]

MAX_HEADER = 8 << 20  # bytes; 50 k tensors take 6 MB
MAX_TENSORS = 1 << 16
MAX_NAME = 256  # characters
_DAMAGED = "The file is damaged or hostile; download it again."


def read_safetensors(path: str | Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file, but not the tensor data.

    Returns
    -------
    dict[str, StoredTensor]
        By name, sorted by name.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the header is not a safetensors header, or contradicts itself or the file's size.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Download the whole checkpoint.")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if len(start) < 10 or start[8:9] != b"{":
            raise ValueError(f"{path}: first bytes are {start[:9]!r}, need a safetensors header. {looks_like(start)}")
        if length > min(size - 8, MAX_HEADER):
            most = min(size - 8, MAX_HEADER)
            raise ValueError(f"{path}: header length {length}, need at most {most} in a file of {size}. {_DAMAGED}")
        file.seek(8)
        raw = file.read(length)
    header = _parse(path, raw)
    check_not_packed(path, header)
    _check_not_empty(path, header)
    data_offset = 8 + length
    tensors = [_tensor(path, name, entry, data_offset, size) for name, entry in sorted(header.items())]
    _check_overlaps(path, tensors)
    return {tensor.name: tensor for tensor in tensors}


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a name occurs twice")
        return table

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not valid JSON ({reason(error)}). {_DAMAGED}") from None
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise ValueError(f"{path}: the header must be a table of at most {MAX_TENSORS} tensors. {_DAMAGED}")
    header.pop("__metadata__", None)
    return header


def _check_not_empty(path: Path, header: dict[str, Any]) -> None:
    """Refuse tensors without values, which a partitioned training leaves in each process's file."""
    empty = [name for name, entry in header.items() if isinstance(entry, dict) and _is_empty(entry.get("shape"))]
    if empty:
        names = ", ".join(map(short, sorted(empty)[:3])) + f" and {len(empty) - 3} more" * (len(empty) > 3)
        raise ValueError(f"{path}: {empty_tensors(names)}")


def _is_empty(shape: Any) -> bool:
    return isinstance(shape, list) and any(type(size) is int and size == 0 for size in shape)


def _tensor(path: Path, name: str, entry: Any, data_offset: int, size: int) -> StoredTensor:
    """Check one entry of the header against the file."""
    if not name.isprintable() or len(name) > MAX_NAME:
        raise ValueError(f"{path}: tensor name {name[:80]!r}, need at most {MAX_NAME} printable characters. {_DAMAGED}")
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"{path}: {name}: must have dtype, shape and data_offsets. {_DAMAGED}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORED_DTYPES:
        raise ValueError(
            f"{path}: {name}: dtype={short(dtype)}, need one of {' '.join(STORED_DTYPES)}. "
            f"Use an unquantized checkpoint."
        )
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2 or len(shape) > 8:
        what = f"shape={short(shape)}, data_offsets={short(offsets)}"
        raise ValueError(f"{path}: {name}: {what}, need whole numbers. {_DAMAGED}")
    begin, end = offsets
    nbytes = prod(shape) * np.dtype(STORED_DTYPES[dtype]).itemsize
    if end - begin != nbytes:
        raise ValueError(f"{path}: {name}: data_offsets={offsets} span {end - begin} bytes, need {nbytes}. {_DAMAGED}")
    if data_offset + end > size:
        raise ValueError(f"{path}: {name}: ends at byte {data_offset + end}, the file has {size}. Download it again.")
    return StoredTensor(name, dtype, tuple(shape) or (1,), ByteRange(path, data_offset + begin, nbytes))


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _check_overlaps(path: Path, tensors: list[StoredTensor]) -> None:
    by_offset = sorted(tensors, key=lambda tensor: tensor.data.offset)
    for before, after in zip(by_offset, by_offset[1:], strict=False):
        if before.data.offset + before.data.nbytes > after.data.offset:
            raise ValueError(f"{path}: {after.name}: overlaps {before.name}. {_DAMAGED}")
