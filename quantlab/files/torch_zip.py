"""Torch checkpoints (.pth .pt .bin), read without torch: the positions of each tensor's bytes.

A torch file holds a pickle, a program for a stack machine that may call any function it names. Here an own machine runs
it that knows nothing but tables, lists, tuples, plain values and tensors: any other name is refused, and nothing is
called. Both forms are read:

    zip     NAME/data.pkl (the pickle), NAME/data/KEY (one file per storage, not compressed), NAME/byteorder
    legacy  five pickles in a row (magic number, protocol, system, the table of tensors, list of storage keys), then per
            storage its number of elements as int64 and the elements

Source: torch/serialization.py for both layouts; pickletools of the standard library for the opcodes.
"""

import io
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.files.byte_range import PLAIN_DTYPES, ByteRange, StoredTensor, StridedTensor
from quantlab.files.checkpoint_kinds import empty_tensors
from quantlab.files.recognize import looks_like, reason, short

__all__ = ["read_torch"]

MAX_PICKLE = 32 << 20  # bytes
MAX_DIRECTORY = 8 << 20  # bytes of the zip's table of contents
MAX_NAME = 256  # characters
MAX_STEPS = 2_000_000  # of the machine; a tensor takes about 45
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_DAMAGED = "The file is damaged or hostile; download it again."
_STORAGES = {
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "I8",
    "BoolStorage": "I8",
}


@dataclass(frozen=True)
class _Storage:
    """A pickle's description of a storage: element type, key, number of elements."""

    dtype: str
    key: str
    numel: int


@dataclass(frozen=True)
class _View:
    """A pickle's description of a tensor: a view of a storage; `offset` and `strides` count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def is_dense(self) -> bool:
        """True if the elements are adjacent, in C order."""
        dense = [prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        return all(s == d for s, d, n in zip(self.strides, dense, self.shape, strict=True) if n > 1)


@dataclass(frozen=True)
class _Name:
    """A global name that a pickle may use; `build` makes the result of a call."""

    text: str
    build: Callable[..., Any] | None = None


def read_torch(path: str | Path) -> dict[str, StoredTensor]:
    """Index the tensors of a torch file, without running its code or reading tensor data.

    Parameters
    ----------
    path : str or Path
        A state dict as torch.save writes it, alone or under the name `model` or `state_dict`.

    Returns
    -------
    dict[str, StoredTensor]
        In the order of the file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is not a torch file, names anything but tensors, or is inconsistent.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. Download the whole checkpoint.")
    with open(path, "rb") as file:
        start = file.read(64)
    try:
        if start.startswith(b"PK\x03\x04"):
            return _read_zip(path)
        if start.startswith(b"\x80"):
            return _read_legacy(path)
    except (zipfile.BadZipFile, struct.error, EOFError, RuntimeError, LookupError, OSError, ValueError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: broken torch file ({reason(error)}). {_DAMAGED}") from None
    raise ValueError(f"{path}: first bytes are {start[:4]!r}, need a torch file. {looks_like(start)}")


def _read_zip(path: Path) -> dict[str, StoredTensor]:
    _check_directory(path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        for info in entries.values():
            if info.compress_type != zipfile.ZIP_STORED:  # no bombs then, and every tensor lies in the file as it is
                raise ValueError(
                    f"{path}: {short(info.filename)} is compressed, must be stored as torch stores it. "
                    f"Save it with torch again."
                )
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{path}: {len(pickles)} entries called data.pkl, need one. Give a file that torch saved.")
        root = pickles[0].removesuffix("data.pkl")
        if entries[pickles[0]].file_size > MAX_PICKLE:
            raise ValueError(
                f"{path}: data.pkl has {entries[pickles[0]].file_size} bytes, need at most {MAX_PICKLE}. "
                f"Give a checkpoint's weights."
            )
        order = entries.get(root + "byteorder")
        if order is not None and (order.file_size != 6 or archive.read(order) != b"little"):
            raise ValueError(f"{path}: byte order is not little-endian. Save it again on a little-endian machine.")
        table = _run(path, io.BytesIO(archive.read(pickles[0])))
    size = path.stat().st_size

    def locate(storage: _Storage) -> int:
        info = entries.get(f"{root}data/{storage.key}")
        nbytes = storage.numel * np.dtype(PLAIN_DTYPES[storage.dtype]).itemsize
        if info is None or info.file_size != nbytes:
            found = "nothing" if info is None else f"{info.file_size} bytes"
            entry = short(f"data/{storage.key}")
            raise ValueError(f"{path}: {entry}: found {found}, need {nbytes} bytes. {_DAMAGED}")
        with open(path, "rb") as file:
            file.seek(info.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
        offset = info.header_offset + 30 + name_length + extra_length
        if offset + nbytes > size:
            entry = short(f"data/{storage.key}")
            raise ValueError(f"{path}: {entry}: ends at byte {offset + nbytes}, the file has {size}. {_DAMAGED}")
        return offset

    return _stored(path, table, locate)


def _check_directory(path: Path) -> None:
    """Refuse a zip whose table of contents is too large to be read into memory."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 66_000))
        tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    length = struct.unpack_from("<I", tail, end + 12)[0] if 0 <= end <= len(tail) - 22 else 0
    wide = tail.rfind(b"PK\x06\x06")
    if length == 0xFFFFFFFF and 0 <= wide <= len(tail) - 56:
        length = struct.unpack_from("<Q", tail, wide + 40)[0]
    if length > MAX_DIRECTORY:
        raise ValueError(f"{path}: table of contents has {length} bytes, need at most {MAX_DIRECTORY}. {_DAMAGED}")


def _read_legacy(path: Path) -> dict[str, StoredTensor]:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        stream = io.BytesIO(file.read(MAX_PICKLE))
        if _run(path, stream) != _LEGACY_MAGIC:
            raise ValueError(f"{path}: is a pickle that torch did not write. Give a checkpoint's weights.")
        _run(path, stream)  # protocol
        _run(path, stream)  # system
        table, keys = _run(path, stream), _run(path, stream)
        offset, offsets = stream.tell(), {}
        numbers = {view.storage.key: view.storage for view in _views(path, table).values()}
        for key in keys if isinstance(keys, list) else []:
            if not isinstance(key, str) or key not in numbers:
                raise ValueError(f"{path}: storage {short(key)} belongs to no tensor. {_DAMAGED}")
            file.seek(offset)
            numel = int.from_bytes(file.read(8), "little")
            offsets[key] = offset + 8
            offset += 8 + numel * np.dtype(PLAIN_DTYPES[numbers[key].dtype]).itemsize
            if numel != numbers[key].numel or offset > size:
                wanted = numbers[key].numel
                raise ValueError(
                    f"{path}: storage {short(key)}: {numel} elements, need {wanted} in {size} bytes. {_DAMAGED}"
                )
    return _stored(path, table, lambda storage: offsets[storage.key])


def _views(path: Path, table: Any) -> dict[str, _View]:
    """Return the tensors of the outermost table, or of the one under `model` or `state_dict`."""
    for name in ("model", "state_dict"):
        if isinstance(table, dict) and isinstance(table.get(name), dict):
            table = table[name]
    if not isinstance(table, dict):
        raise ValueError(
            f"{path}: holds a {type(table).__name__}, need a table of tensors. Give a checkpoint's weights."
        )
    views = {name: value for name, value in table.items() if isinstance(value, _View) and isinstance(name, str)}
    for name in views:
        if not name.isprintable() or len(name) > MAX_NAME:
            raise ValueError(
                f"{path}: tensor name {short(name)}, need at most {MAX_NAME} printable characters. {_DAMAGED}"
            )
    if not views:
        raise ValueError(f"{path}: holds no tensors. Give a checkpoint's weights.")
    return views


def _stored(path: Path, table: Any, locate: Callable[[_Storage], int]) -> dict[str, StoredTensor]:
    offsets: dict[_Storage, int] = {}
    tensors = {}
    for name, view in _views(path, table).items():
        if view.storage not in offsets:
            offsets[view.storage] = locate(view.storage)
        dtype, shape = view.storage.dtype, view.shape or (1,)
        itemsize = np.dtype(PLAIN_DTYPES[dtype]).itemsize
        data = ByteRange(path, offsets[view.storage] + view.offset * itemsize, _reach(view) * itemsize)
        if view.is_dense:
            tensors[name] = StoredTensor(name, dtype, shape, data)
        elif len(shape) <= 2:
            tensors[name] = StridedTensor(name, dtype, shape, data, (0, *view.strides)[-2:])  # pyright: ignore[reportArgumentType]
        else:
            raise ValueError(f"{path}: {name}: shape {shape} has strides {view.strides}. Save it as contiguous.")
    return tensors


def _reach(view: _View) -> int:
    """Return the distance in elements from a tensor's first element to its last."""
    return 1 + sum(stride * (n - 1) for stride, n in zip(view.strides, view.shape, strict=True))


def _run(path: Path, stream: io.BytesIO) -> Any:
    """Run one pickle on the machine and return its result."""
    machine = _Machine(path)
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if step > MAX_STEPS:
                raise ValueError(f"{path}: pickle takes more than {MAX_STEPS} steps. {_DAMAGED}")
            machine.step(opcode.name, argument)
    except (IndexError, TypeError, AttributeError, OverflowError, UnicodeError) as error:
        raise ValueError(f"{path}: pickle is truncated or inconsistent ({type(error).__name__}). {_DAMAGED}") from None
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: broken pickle ({reason(error)}). {_DAMAGED}") from None
    if len(machine.stack) != 1:
        raise ValueError(f"{path}: pickle leaves {len(machine.stack)} values, need one. {_DAMAGED}")
    return machine.stack[0]


class _Machine:
    """A pickle machine that builds plain values and tensors and calls nothing."""

    def __init__(self, path: Path):
        self.path, self.stack, self.memo, self.marks = path, [], {}, []

    def step(self, name: str, argument: Any) -> None:
        """Carry out one opcode."""
        stack = self.stack
        if name in ("PROTO", "FRAME", "STOP"):
            return
        if name == "MARK":
            self.marks.append(len(stack))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _WITH_ARGUMENT:
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else int(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            if int(argument) not in self.memo:
                raise ValueError(f"{self.path}: pickle reads memo {argument}, which does not exist. {_DAMAGED}")
            stack.append(self.memo[int(argument)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, attribute = argument.split(" ") if argument else (stack.pop(-2), stack.pop())
            stack.append(self._name(f"{module}.{attribute}"))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            if len(stack) < count:
                raise IndexError(name)
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("TUPLE", "APPENDS", "SETITEMS", "LIST", "DICT"):
            self._group(name)
        elif name == "APPEND":
            value = stack.pop()
            self._top(list).append(value)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self._set(self._top(dict), key, value)
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif name == "BUILD":
            stack.pop()  # attributes, such as the versions that torch hangs on its tables
            self._top(dict)
        else:
            raise ValueError(f"{self.path}: pickle uses {name}, which no checkpoint needs. The file is hostile.")

    def _group(self, name: str) -> None:
        """Pop the items down to the last mark and store them as the opcode says."""
        stack = self.stack
        if not self.marks:
            raise ValueError(f"{self.path}: pickle closes a group that it did not open. {_DAMAGED}")
        at = self.marks.pop()
        items = stack[at:]
        del stack[at:]
        if name == "TUPLE":
            stack.append(tuple(items))
        elif name == "LIST":
            stack.append(items)
        elif name == "APPENDS":
            self._top(list).extend(items)
        else:
            if name == "DICT":
                stack.append({})
            table = self._top(dict)
            for key, value in zip(items[::2], items[1::2], strict=True):
                self._set(table, key, value)

    def _top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise TypeError(kind)
        return self.stack[-1]

    def _set(self, table: dict, key: Any, value: Any) -> None:
        if not isinstance(key, str | int):
            raise TypeError(key)
        table[key] = value

    def _name(self, text: str) -> _Name:
        module, _, attribute = text.rpartition(".")
        if module in ("torch", "torch.storage") and attribute in _STORAGES:
            return _Name(attribute)
        if text not in _BUILDERS:
            raise ValueError(
                f"{self.path}: pickle names {short(text)}, only tensors are read. Do not load this file with torch."
            )
        return _Name(text, _BUILDERS[text])

    def _storage(self, identity: Any) -> _Storage:
        tag, name, key, _, numel, *_ = identity
        if tag != "storage" or not isinstance(name, _Name) or not isinstance(key, str) or not _is_count(numel):
            raise TypeError(identity)
        return _Storage(_STORAGES[name.text], key, numel)

    def _call(self, function: Any, arguments: Any) -> Any:
        if not isinstance(function, _Name) or function.build is None or not isinstance(arguments, tuple):
            raise ValueError(
                f"{self.path}: pickle calls a function that does not build tensors. Do not load this file with torch."
            )
        try:
            return function.build(*arguments)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _tensor(storage: _Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> _View:
    """Check a tensor against its storage (the other arguments concern gradients)."""
    counts = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or not all(map(_is_count, counts)):
        raise TypeError(storage)
    view = _View(storage, offset, tuple(shape), tuple(stride))
    if 0 in shape and len(shape) <= 8:
        raise ValueError(empty_tensors("a tensor"))
    # a tensor that shows an element many times is refused as well: it would be larger than the file
    if len(shape) > 8 or offset + max(prod(shape), _reach(view)) > storage.numel:
        raise ValueError(
            f"tensor of shape {short(shape)}, strides {short(stride)}, from element {offset} "
            f"in a storage of {storage.numel}. {_DAMAGED}"
        )
    return view


_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "collections.OrderedDict": lambda *_: {},
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_WITH_ARGUMENT = frozenset(
    "BININT BININT1 BININT2 INT LONG LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES".split()
)
