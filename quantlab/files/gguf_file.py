"""GGUF files: a header reader that trusts no size, and a streaming writer.

A GGUF file (version 3, little-endian; version 2 is laid out alike):

    offset  bytes
    0       4      "GGUF"
    4       4      version                          uint32
    8       8      number of tensors                uint64
    16      8      number of metadata keys          uint64
    24      ...    per key: string key, uint32 value type, value
            ...    per tensor: string name, uint32 n_dims, uint64 ne[n_dims] (fastest first), uint32 type, uint64 offset
            ...    zeros up to a multiple of the alignment; offsets count from here
            ...    tensors, each at a multiple of the alignment

A string is a uint64 length and that many bytes; an array is a uint32 value type, a uint64 length and the values.
Nothing that a file says about its own sizes is believed before it is compared with the bytes that are there.

Source: the GGUF specification in ggml's documentation; `gguf.cpp` of llama.cpp for what its loader refuses.
"""

import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quantlab.files.recognize import looks_like, short
from quantlab.quants.ggml_types import GGML_TYPES, row_bytes

__all__ = ["Header", "Strings", "TensorInfo", "TensorSpec", "pack_header", "read_header", "write_gguf"]

ALIGNMENT = 32
MAX_HEADER = 32 << 20  # bytes; a vocabulary of 262 k tokens with its merges takes 12 MB
MAX_TEXT = 8 << 20  # bytes of one string
MAX_STRINGS = 1_500_000  # in one file; bounds the memory that a header of tiny strings can cost
MAX_KEYS = MAX_TENSORS = 1 << 16
MAX_NAME, MAX_KEY = 127, 65535  # bytes
MAX_DEPTH, MAX_NESTED = 4, 4096  # how deep, and how many in a file, arrays may lie in arrays
WINDOW, FEW_STRINGS = 1 << 17, 512  # bytes of strings that are looked at together, strings taken singly in between

# GGUF value type -> NumPy scalar; bool, string and array have no entry
_NUMBERS = {0: np.uint8, 1: np.int8, 2: np.uint16, 3: np.int16, 4: np.uint32, 5: np.int32, 6: np.float32}
_NUMBERS |= {10: np.uint64, 11: np.int64, 12: np.float64}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_QTYPES = {record.number: record.name for record in GGML_TYPES.values()}
_TYPE_OF_NUMBER = {np.dtype(number): value_type for value_type, number in _NUMBERS.items()} | {np.dtype(bool): _BOOL}

_REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"}
_REMOVED |= {36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}
_FORKS = range(97, 400)


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape (NumPy order) and ggml type of a tensor to be written."""

    name: str
    shape: tuple[int, ...]
    qtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return prod(self.shape[:-1]) * row_bytes(self.qtype, self.shape[-1], name=self.name)


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor of a file; `offset` counts from the start of the file."""

    offset: int


class Strings(Sequence):
    """An array of strings in a file: bytes that can be copied, and a sequence of str for readers.

    A vocabulary has hundreds of thousands; to unpack and pack them takes longer than to quantize a small model. `raw`
    holds each string's length, 8 bytes, and the string.
    """

    def __init__(self, raw: bytes, count: int):
        self.raw, self._count = raw, count

    @cached_property
    def _texts(self) -> list[str]:
        unpack, texts, end, raw = struct.Struct("<Q").unpack_from, [], 0, self.raw
        for _ in range(self._count):
            start = end + 8
            end = start + unpack(raw, end)[0]
            texts.append(raw[start:end].decode("utf-8", "surrogateescape"))
        return texts

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place):
        return self._texts[place]

    def __iter__(self):
        return iter(self._texts)

    def __eq__(self, other) -> bool:
        return self.raw == other.raw if isinstance(other, Strings) else self._texts == other

    def __repr__(self) -> str:
        return repr(self._texts)


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file: everything before the tensor data."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset: int
    file_size: int


def read_header(path: str | Path) -> Header:
    """Read the metadata and the tensor table of one GGUF file, but not the tensor data.

    Parameters
    ----------
    path : str or Path
        A GGUF file of version 2 or 3, little-endian.

    Returns
    -------
    Header
        Metadata in file order, where each value carries its GGUF type: NumPy scalars for numbers, bool, str,
        NumPy arrays for arrays of numbers, `Strings` for arrays of strings, lists of these for nested arrays.
        Bytes that are not UTF-8 come back as surrogate escapes, so that writing restores them.

    Raises
    ------
    FileNotFoundError, IsADirectoryError, OSError
        If `path` does not exist, or is a folder, a pipe or a device.
    ValueError
        If the file is no GGUF file or breaks a rule of the format.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.gguf"
    >>> _ = write_gguf(path, {"general.architecture": "llama"}, [], [])
    >>> read_header(path).metadata
    {'general.architecture': 'llama'}
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, must be a GGUF file. Run quantlab convert first.")
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: is a pipe or device, must be a file on disk. Save the model in a file first.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Check the name, or run quantlab convert or fetch first.")
    with open(path, "rb") as file:
        cursor = _Cursor(path, file, os.fstat(file.fileno()).st_size)
        version, n_tensors, n_keys = _read_start(cursor)
        metadata = _read_metadata(cursor, n_keys)
        alignment = _alignment_of(cursor, metadata)
        infos = [_read_info(cursor) for _ in range(n_tensors)]
    data_offset = -(-cursor.pos // alignment) * alignment
    tensors = _place(cursor, infos, data_offset, alignment)
    return Header(path, version, metadata, tensors, alignment, data_offset, cursor.size)


class _Cursor:
    """A reader for the start of a file that refuses to go past its end or past MAX_HEADER."""

    def __init__(self, path: Path, file: BinaryIO, size: int):
        self.path, self.file, self.size = path, file, size
        self.buffer, self.pos, self.n_strings, self.n_nested = b"", 0, 0, 0

    def bad(
        self, what: str, remedy: str = "The file is damaged or hostile; get it again from its source."
    ) -> ValueError:
        what = what if len(what) <= 400 else f"{what[:200]}…{what[-200:]}"  # a key may have 65535 characters
        return ValueError(f"{self.path}: {what}. {remedy}")

    def have(self, end: int, what: str) -> bytes:
        """Read on until the buffer reaches byte `end`, and return it."""
        if end > len(self.buffer):
            if end > self.size:
                raise self.bad(f"{what} ends at byte {end}, the file has {self.size}")
            if end > MAX_HEADER:
                raise self.bad(f"{what} ends at byte {end}, need a header of at most {MAX_HEADER} bytes")
            target = min(max(end, 2 * len(self.buffer), 1 << 20), MAX_HEADER)
            self.buffer += self.file.read(target - len(self.buffer))
            if end > len(self.buffer):
                raise self.bad(f"{what} ends at byte {end}, the file shrank to {len(self.buffer)} bytes")
        return self.buffer

    def number(self, form: str, what: str) -> int:
        """Read one little-endian number of struct form `form`."""
        end = self.pos + struct.calcsize(form)
        (value,) = struct.unpack_from("<" + form, self.have(end, what), self.pos)
        self.pos = end
        return value

    def string(self, what: str, most: int) -> str:
        length = self.number("Q", what)
        if length > most:
            raise self.bad(f"{what} has length {length}, need at most {most}")
        end = self.pos + length
        text = self.have(end, what)[self.pos : end].decode("utf-8", "surrogateescape")
        self.pos = end
        return text

    def strings(self, count: int, what: str) -> Strings:
        """Read `count` strings: few one by one, many at once (a vocabulary has hundreds of thousands)."""
        self.n_strings += count
        if self.n_strings > MAX_STRINGS:
            raise self.bad(f"{what} brings the file to {self.n_strings} strings, need at most {MAX_STRINGS}")
        unpack, pos, buffer, left = struct.Struct("<Q").unpack_from, self.pos, self.buffer, count
        while left:
            few = min(left, FEW_STRINGS)
            for _ in range(few):
                try:
                    pos += 8 + unpack(buffer, pos)[0]
                except (struct.error, OverflowError):  # the length lies behind what has been read
                    self.have(pos, what)
                    buffer = self.have(pos + 8, what)
                    pos += 8 + unpack(buffer, pos)[0]
            left -= few
            if left:
                many, pos = _short_strings(buffer, pos, left)
                left -= many
        buffer = self.have(pos, what)
        start, self.pos = self.pos, pos
        return Strings(buffer[start:pos], count)


def _short_strings(buffer: bytes, pos: int, most: int) -> tuple[int, int]:
    """Return the number of adjacent strings from `pos` on (at most `most`), and where the next one begins.

    It finds those of fewer than 256 bytes in the next WINDOW bytes: a length that is followed by seven zeros can only
    be a string's start where the string before it ends there.
    """
    window = np.frombuffer(buffer[pos : pos + WINDOW], np.uint8)
    is_zero = window[1:] == 0
    for step in (1, 2, 3):
        is_zero = is_zero[:-step] & is_zero[step:]  # 2, 4, then 7 zeros from here on
    starts = np.flatnonzero(is_zero)[: most + 1]
    if starts.size == 0 or starts[0] != 0:
        return 0, pos
    follows = starts[:-1] + 8 + window[starts[:-1]] == starts[1:]
    n = follows.size if follows.all() else int(follows.argmin())
    return n, pos + int(starts[n])


_TRUNCATED = "It is truncated or damaged; get it again from its source."


def _read_start(cursor: _Cursor) -> tuple[int, int, int]:
    """Read magic, version and the two counts."""
    magic = cursor.file.read(64)
    if magic[:4] != b"GGUF":
        raise ValueError(f"{cursor.path}: first 4 bytes are {magic[:4]!r}, need b'GGUF'. {looks_like(magic)}")
    cursor.buffer, cursor.pos = magic, 4
    version = cursor.number("I", "version")
    if version & 0xFFFF == 0:
        raise cursor.bad(f"version={version:#x}, need little-endian, this file is big-endian", "Convert it again.")
    if version not in (2, 3):
        raise cursor.bad(f"version={version}, need 2 or 3", "Convert the checkpoint again with a current tool.")
    n_tensors, n_keys = cursor.number("Q", "number of tensors"), cursor.number("Q", "number of keys")
    if n_tensors > min(MAX_TENSORS, cursor.size // 25):  # the shortest tensor entry has 25 bytes
        raise cursor.bad(f"n_tensors={n_tensors}, a file of {cursor.size} bytes has fewer", _TRUNCATED)
    if n_keys > min(MAX_KEYS, cursor.size // 14):  # the shortest key entry has 14 bytes
        raise cursor.bad(f"n_kv={n_keys}, a file of {cursor.size} bytes has fewer", _TRUNCATED)
    return version, n_tensors, n_keys


def _read_metadata(cursor: _Cursor, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(n_keys):
        key = cursor.string(f"key {i}", MAX_KEY)
        if not key or key in metadata or not key.isprintable():
            raise cursor.bad(f"key {i} is {short(key)}, must be a printable name that occurs once")
        value_type = cursor.number("I", key)
        metadata[key] = _read_value(cursor, value_type, key, 0)
    return metadata


def _read_value(cursor: _Cursor, value_type: int, key: str, depth: int) -> Any:
    """Read one value; `depth` is the number of arrays around it."""
    if value_type in _NUMBERS:
        return _read_numbers(cursor, _NUMBERS[value_type], 1, key)[0]
    if value_type == _BOOL:
        return bool(cursor.number("B", key))
    if value_type == _STRING:
        return cursor.string(key, MAX_TEXT)
    if value_type != _ARRAY:
        raise cursor.bad(f"{key}: value type {value_type}, need 0 to 12")
    if depth == MAX_DEPTH:
        raise cursor.bad(f"{key}: arrays nested deeper than {MAX_DEPTH}")
    item_type, count = cursor.number("I", key), cursor.number("Q", key)
    item_bytes = 8 if item_type == _STRING else 12 if item_type == _ARRAY else 1  # at least
    if count * item_bytes > cursor.size - cursor.pos:
        raise cursor.bad(f"{key}: array of {count} values, only {cursor.size - cursor.pos} bytes are left")
    if item_type == _STRING:
        return cursor.strings(count, key)
    if item_type == _ARRAY:
        cursor.n_nested += count
        if cursor.n_nested > MAX_NESTED:
            raise cursor.bad(f"{key} brings the file to {cursor.n_nested} arrays in arrays, need at most {MAX_NESTED}")
        return [_read_value(cursor, _ARRAY, key, depth + 1) for _ in range(count)]
    if item_type == _BOOL:
        return _read_numbers(cursor, np.uint8, count, key) != 0
    if item_type not in _NUMBERS:
        raise cursor.bad(f"{key}: array of value type {item_type}, need 0 to 12")
    return _read_numbers(cursor, _NUMBERS[item_type], count, key)


def _read_numbers(cursor: _Cursor, number: type, count: int, key: str) -> np.ndarray:
    dtype = np.dtype(number).newbyteorder("<")
    end = cursor.pos + count * dtype.itemsize
    values = np.frombuffer(cursor.have(end, key), dtype, count, cursor.pos).astype(number)
    cursor.pos = end
    return values


def _alignment_of(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    alignment = metadata.get("general.alignment", np.uint32(ALIGNMENT))
    if not isinstance(alignment, np.uint32) or alignment == 0 or alignment & (alignment - 1):  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
        raise cursor.bad(f"general.alignment={short(alignment)}, need a power of two as uint32")
    return int(alignment)


def _read_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
    """Read one entry of the tensor table: name, shape, type, offset in the data part."""
    name = cursor.string("tensor name", MAX_NAME)
    if not name.isprintable():
        raise cursor.bad(f"tensor name {short(name)}, need printable characters")
    n_dims = cursor.number("I", name)
    if not 0 <= n_dims <= 4:
        raise cursor.bad(f"{name}: n_dims={n_dims}, GGUF tensors have at most 4", "llama.cpp cannot read it either.")
    shape = tuple(cursor.number("Q", name) for _ in range(n_dims))[::-1] or (1,)  # a scalar, to ggml one value
    if min(shape) < 1:
        raise cursor.bad(f"{name}: shape={shape}, every dimension must be at least 1")
    number = cursor.number("I", name)
    if number not in _QTYPES:
        raise _unknown_type(cursor, name, number)
    return name, shape, _QTYPES[number], cursor.number("Q", name)


def _unknown_type(cursor: _Cursor, name: str, number: int) -> ValueError:
    """Explain a type number that llama.cpp does not know."""
    if number in _REMOVED:
        what = f"{name}: ggml type {number} ({_REMOVED[number]}) was removed from llama.cpp"
        return cursor.bad(what, "Quantize the model again from its source.")
    if number in _FORKS:
        what = f"{name}: ggml type {number} is unknown to llama.cpp; numbers 97 to 399 are ik_llama.cpp's own types"
        return cursor.bad(what, "Use the program that wrote it.")
    return cursor.bad(f"{name}: ggml type {number} is not known", "A newer llama.cpp may read it.")


def _place(cursor: _Cursor, infos: list, data_offset: int, alignment: int) -> tuple[TensorInfo, ...]:
    """Check that every tensor is inside the file, aligned and separate; turn offsets into file positions."""
    tensors: list[TensorInfo] = []
    seen: set[str] = set()
    for name, shape, qtype, offset in infos:
        try:
            tensor = TensorInfo(name, shape, qtype, data_offset + offset)
            end = tensor.offset + tensor.nbytes
        except ValueError as error:
            raise ValueError(f"{cursor.path}: {error}") from None
        if name in seen:
            raise cursor.bad(f"{name}: two tensors have this name")
        if offset % alignment:
            raise cursor.bad(f"{name}: offset={offset} is not a multiple of the alignment {alignment}")
        if end > cursor.size:
            raise cursor.bad(f"{name}: shape={shape} {qtype} ends at byte {end}, the file has {cursor.size}")
        seen.add(name)
        tensors.append(tensor)
    by_offset = sorted(tensors, key=lambda tensor: tensor.offset)
    for before, after in zip(by_offset, by_offset[1:], strict=False):
        if before.offset + before.nbytes > after.offset:
            raise cursor.bad(f"{after.name}: overlaps {before.name}")
    return tuple(tensors)


def write_gguf(
    path_or_file: str | Path | BinaryIO,
    metadata: dict[str, Any],
    specs: Sequence[TensorSpec],
    data: Iterable[np.ndarray | Iterable[np.ndarray]],
    *,
    progress: Callable[[int], Any] | None = None,
) -> int:
    """Write a GGUF file of version 3: the header first, then each tensor's bytes as they come.

    Parameters
    ----------
    path_or_file : str, Path or object with `.write(bytes)`
        Where to write; a path is written as it is (see `quantlab.files.output.replacing`).
    metadata : dict
        Values typed as `read_header` returns them; a `list[str]` does as well as `Strings`.
    specs : sequence of TensorSpec
        The tensors in file order.
    data : iterable
        For each tensor one array, or an iterator of arrays (blocks of rows) that follow each other.
    progress : callable, optional
        Called with the number of data bytes after each array.

    Returns
    -------
    int
        Bytes written.

    Raises
    ------
    TypeError
        If a metadata value has no GGUF type.
    ValueError
        If the data of a tensor is longer or shorter than its spec says, or tensors are missing.
    """
    if isinstance(path_or_file, str | Path):
        with open(path_or_file, "wb", buffering=1 << 20) as file:
            return write_gguf(file, metadata, specs, data, progress=progress)
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    header = pack_header(metadata, specs)
    path_or_file.write(header)
    written, items = len(header), iter(data)
    for spec in specs:
        item = next(items, None)
        if item is None:
            raise ValueError(f"{spec.name}: has no data, must have one item of `parts`. Give one item per spec.")
        blocks = [item] if isinstance(item, np.ndarray) else item
        nbytes = sum(_write_block(path_or_file, block, progress) for block in blocks)
        if nbytes != spec.nbytes:
            raise ValueError(
                f"{spec.name}: {nbytes} bytes of data, {spec.shape} {spec.qtype} needs {spec.nbytes}. "
                f"Give whole tensors."
            )
        padding = bytes(-nbytes % alignment)
        path_or_file.write(padding)
        written += nbytes + len(padding)
    return written


def _write_block(file: BinaryIO, block: np.ndarray, progress: Callable[[int], Any] | None) -> int:
    raw = np.ascontiguousarray(block).reshape(-1).view(np.uint8)
    file.write(memoryview(raw))
    if progress is not None:
        progress(raw.nbytes)
    return raw.nbytes


def pack_header(metadata: dict[str, Any], specs: Sequence[TensorSpec]) -> bytes:
    """Return everything that stands before the tensor data: metadata, tensor table, zeros up to the alignment."""
    alignment = int(metadata.get("general.alignment", ALIGNMENT))
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(specs), len(metadata))]
    for key, value in metadata.items():
        parts += [_pack_string(key), _pack_value(value, key)]
    offset = 0
    for spec in specs:
        number = GGML_TYPES[spec.qtype].number
        form = f"<I{len(spec.shape)}QIQ"
        parts += [_pack_string(spec.name), struct.pack(form, len(spec.shape), *spec.shape[::-1], number, offset)]
        offset += -(-spec.nbytes // alignment) * alignment
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _pack_string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _pack_value(value: Any, key: str) -> bytes:
    """Pack the value type (four bytes) and the value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _pack_string(value)
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, np.ndarray):
        head = struct.pack("<IIQ", _ARRAY, _TYPE_OF_NUMBER[value.dtype], len(value))
        return head + value.astype(value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, Strings):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + value.raw
    if isinstance(value, list):
        items = [_pack_string(item) if isinstance(item, str) else _pack_value(item, key)[4:] for item in value]
        item_type = _ARRAY if value and not isinstance(value[0], str) else _STRING
        return struct.pack("<IIQ", _ARRAY, item_type, len(value)) + b"".join(items)
    if isinstance(value, np.generic) and value.dtype in _TYPE_OF_NUMBER:
        return struct.pack("<I", _TYPE_OF_NUMBER[value.dtype]) + value.astype(value.dtype.newbyteorder("<")).tobytes()
    raise TypeError(f"{key}: {type(value).__name__} has no GGUF type. Wrap numbers, as in np.uint32(7).")
