"""Ways to spoil a good file of each kind: everything that changes something random takes a `random.Random`."""

import contextlib
import io
import json
import pickletools
import struct
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

HOSTILE_NUMBERS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 31, 33, 48, 127, 128, 255, 256, 65535, 65536, 1 << 20]
HOSTILE_NUMBERS += [n + d for n in (1 << 31, 1 << 32, 1 << 53, 1 << 61, 1 << 62, 1 << 63, 1 << 64) for d in (-1, 0)]
HOSTILE_BYTES = [b"", b"\0", b"\n", b"\x1b[2J", b"\xff", b"\xed\xa0\x80", b"../x", b"%s", b"x" * 300, "ｘ▁é".encode()]
HOSTILE_JSON = [None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), 1 << 31, 1 << 64]
HOSTILE_JSON += [
    10**400,
    "",
    "\0",
    "\n",
    "\x1b[2J",
    "\ud800",
    "../x",
    "/etc/passwd",
    "x" * 3000,
    "é",
    "▁",
    "<0x0A>",
    "7",
]
HOSTILE_JSON += [[], {}, [[]], [0], [None], {"": 0}, {"content": 7}, {"content": "a", "id": 3}, ["a", "b"], [1] * 40]


def spoil_bytes(raw: bytes, rng: Random) -> bytes:
    """Change, cut, lengthen or repeat a stretch of bytes."""
    at = rng.randrange(len(raw) + 1)
    size = rng.choice((1, 1, 2, 4, 8, 16, 64))
    end = min(at + size, len(raw))
    return rng.choice(
        [
            lambda: raw[:at],
            lambda: raw[:at] + raw[end:],
            lambda: raw[:at] + rng.randbytes(end - at) + raw[end:],
            lambda: raw[:at] + rng.choice(HOSTILE_BYTES) + raw[at:],
            lambda: raw[:at] + rng.choice((b"\0", b"\xff")) * (end - at) + raw[end:],
            lambda: raw[:end] + raw[at:],
            lambda: raw[:at] + rng.choice(HOSTILE_NUMBERS).to_bytes(9, "little")[: rng.choice((4, 8))] + raw[end:],
        ]
    )()


def _spoil_number(raw: bytes, start: int, nbytes: int, rng: Random) -> bytes:
    """Replace the little-endian number at `start`."""
    old = int.from_bytes(raw[start : start + nbytes], "little")
    near = [old - 1, old + 1, old * 2, old ^ (1 << rng.randrange(8 * nbytes)), len(raw), len(raw) - start, -1, -32]
    new = rng.choice(HOSTILE_NUMBERS + near) % (1 << 8 * nbytes)
    return raw[:start] + new.to_bytes(nbytes, "little") + raw[start + nbytes :]


# ── GGUF and importance matrices ──────────────────────────────────────────────────────────────────────────────────────

_NBYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # of a number, by GGUF value type
HOSTILE_VALUES = [struct.pack("<If", 6, x) for x in (0.0, -1.0, float("nan"), float("inf"), 1e-45)]
HOSTILE_VALUES += [struct.pack("<II", 4, x % (1 << 32)) for x in HOSTILE_NUMBERS]
HOSTILE_VALUES += [struct.pack("<IQ", 10, x % (1 << 64)) for x in HOSTILE_NUMBERS]
HOSTILE_VALUES += [struct.pack("<Ii", 5, -1), struct.pack("<IB", 7, 2), struct.pack("<Id", 12, float("nan"))]
HOSTILE_VALUES += [struct.pack("<IQ", 8, len(text)) + text for text in HOSTILE_BYTES]
HOSTILE_VALUES += [struct.pack("<IIQ", 9, kind, count) for kind, count in ((4, 0), (8, 0), (9, 0), (4, 1 << 62))]
HOSTILE_VALUES += [struct.pack("<IIQIQ", 9, 9, 1, 8, 0), struct.pack("<IIQf", 9, 6, 1, float("nan"))]
HOSTILE_VALUES += [struct.pack("<IIQQ", 9, 8, 1, 2) + b"\xff\n", struct.pack("<IIQQQ", 9, 8, 2, 0, 0)]


class _Fields:
    """Where the fields of a GGUF file lie, as far as it can be followed."""

    def __init__(self, raw: bytes):
        self.raw, self.pos = raw, 4
        self.numbers: list[tuple[int, int]] = []  # start, bytes
        self.keys: list[tuple[int, int, int]] = []  # start, start of the value type, end
        self.tensors: list[tuple[int, int]] = []  # start, end
        with contextlib.suppress(struct.error):
            self._walk()

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from("<" + form, self.raw, self.pos)
        nbytes = struct.calcsize(form)
        self.numbers.append((self.pos, nbytes))
        self.pos += nbytes
        return value

    def _skip(self, nbytes: int) -> None:
        if self.pos + nbytes > len(self.raw):
            raise struct.error
        self.pos += nbytes

    def _value(self, kind: int) -> None:
        if kind == 8:
            self._skip(self._number("Q"))
        elif kind == 9:
            kind, count = self._number("I"), self._number("Q")
            for _ in range(count if kind in (8, 9) else 0):
                self._value(kind)
            self._skip(0 if kind in (8, 9) else count * _NBYTES.get(kind, 1))
        else:
            self.numbers.append((self.pos, _NBYTES.get(kind, 1)))
            self._skip(_NBYTES.get(kind, 1))

    def _walk(self) -> None:
        _, n_tensors, n_keys = self._number("I"), self._number("Q"), self._number("Q")
        for _ in range(n_keys):
            start = self.pos
            self._skip(self._number("Q"))
            value = self.pos
            self._value(self._number("I"))
            self.keys.append((start, value, self.pos))
        for _ in range(n_tensors):
            start = self.pos
            self._skip(self._number("Q"))
            for _ in range(self._number("I")):
                self._number("Q")
            self._number("I"), self._number("Q")
            self.tensors.append((start, self.pos))


def spoil_gguf(raw: bytes, rng: Random) -> bytes:
    """Change a number, a name, a value or an entry of a GGUF file."""
    fields = _Fields(raw)
    if not fields.numbers or not fields.keys or rng.random() < 0.1:
        return spoil_bytes(raw, rng)
    start, value, end = rng.choice(fields.keys)
    entries = [key[::2] for key in fields.keys] + fields.tensors
    first, last = rng.choice(entries)
    choice = rng.randrange(7)
    if choice < 2:  # the numbers of few long arrays would drown the others
        return _spoil_number(raw, *rng.choice(fields.numbers[:8] + fields.numbers[-99:] + fields.numbers), rng)
    if choice < 4:
        return raw[:value] + rng.choice(HOSTILE_VALUES) + raw[end:]
    if choice == 4:  # another name, with its right length
        length = int.from_bytes(raw[first : first + 8], "little")
        name = rng.choice([*HOSTILE_BYTES, spoil_bytes(raw[first + 8 : first + 8 + length], rng)])
        return raw[:first] + struct.pack("<Q", len(name)) + name + raw[first + 8 + length :]
    count_at = 8 if (first, last) in fields.tensors else 16
    count = int.from_bytes(raw[count_at : count_at + 8], "little") + (1 if choice == 5 else -1)
    raw = raw[:count_at] + struct.pack("<Q", count % (1 << 64)) + raw[count_at + 8 :]
    return raw[:last] + raw[first:] if choice == 5 else raw[:first] + raw[last:]


def spoil_shards(raw: bytes, rng: Random) -> bytes:
    """Spoil one of two GGUF files that follow each other, the length of the first in eight bytes before it."""
    at = int.from_bytes(raw[:8], "little")
    first, second = raw[8 : 8 + at], raw[8 + at :]
    first, second = (spoil_gguf(first, rng), second) if rng.random() < 0.5 else (first, spoil_gguf(second, rng))
    return struct.pack("<Q", len(first)) + first + second


def spoil_imatrix(raw: bytes, rng: Random) -> bytes:
    """Change a field of either format."""
    if raw[:4] == b"GGUF":
        return spoil_gguf(raw, rng)
    starts, pos = [0], 4
    while pos + 12 < len(raw):  # the fields of an entry, as far as they can be followed
        name_end = pos + 4 + int.from_bytes(raw[pos : pos + 4], "little")
        starts += [start for start in (pos, name_end, name_end + 4) if start + 4 <= len(raw)]
        pos = name_end + 8 + 4 * int.from_bytes(raw[name_end + 4 : name_end + 8], "little")
    return spoil_bytes(raw, rng) if rng.random() < 0.3 else _spoil_number(raw, rng.choice(starts), 4, rng)


# ── JSON and safetensors ──────────────────────────────────────────────────────────────────────────────────────────────


def spoil_json(value: Any, rng: Random) -> Any:
    """Return a copy of a JSON value, changed at one place; a walk from the top finds it, so that few drown in many."""
    if isinstance(value, dict | list) and value and rng.random() < 0.8:
        return _spoil_item(value, rng)
    choice = rng.randrange(5)
    if choice == 0 and isinstance(value, str):
        text = spoil_bytes(value.encode("latin-1", "replace"), rng).decode("latin-1")
        return text
    if choice == 1 and type(value) is int:
        return rng.choice((value - 1, value + 1, -value, value * 2, [value, value], str(value), [value]))
    if choice == 2:
        for _ in range(rng.choice((1, 3, 40, 300))):
            value = rng.choice(([value], {"a": value}, {"content": value}, [value, value][:1]))
        return value
    return rng.choice(HOSTILE_JSON)


def _spoil_item(value: dict | list, rng: Random) -> dict | list:
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    at = rng.randrange(min(len(items), rng.choice((8, len(items)))))
    key, item = items[at]
    choice = rng.randrange(9)
    if choice < 6:
        items[at] = (key, spoil_json(item, rng))
    elif choice == 6:
        del items[at]
    elif choice == 7:
        items[at] = (key, rng.choice(items)[1])
    else:
        items.insert(at, (rng.choice(("", "a", "\0", "x" * 300, key)), item))
    return dict(items) if isinstance(value, dict) else [item for _, item in items]


def spoil_safetensors(raw: bytes, rng: Random) -> bytes:
    """Change the header as JSON, and seldom its length or any bytes."""
    if rng.random() < 0.2:
        return spoil_bytes(raw, rng)
    end = 8 + int.from_bytes(raw[:8], "little")
    try:
        header = json.dumps(spoil_json(json.loads(raw[8:end]), rng)).encode()
    except (ValueError, RecursionError):
        return _spoil_number(raw + bytes(8), 0, 8, rng)
    if rng.random() < 0.1:  # a name that is there twice
        header = header.replace(b'"b"', b'"a"')
    return struct.pack("<Q", len(header)) + header + raw[end:]


# ── torch ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

HOSTILE_CODE = [b"cos\nsystem\n", b"(S'exit 1'\ntR", b"cbuiltins\neval\n", b"ctorch\nload\n", b"c__builtin__\nexec\n"]
HOSTILE_CODE += [
    b"0",
    b"2",
    b"1",
    b"(",
    b"t",
    b"R",
    b"b",
    b"Q",
    b"}",
    b"]",
    b")",
    b"N",
    b"J\xff\xff\xff\xff",
    b"K\0",
    b"h\xff",
]
HOSTILE_CODE += [
    b"\x8a\x09" + b"\xff" * 8 + b"\0",
    b"q\0",
    b"q\1",
    b"\x94",
    b"a",
    b"e",
    b"s",
    b"u",
    b"\x85",
    b"\x86",
    b"\x93",
    b"\x81",
]
HOSTILE_CODE += [
    b"X\x02\0\0\0os",
    b"X\x06\0\0\0system",
    b"G\x7f\xf8" + bytes(6),
    b"I00\n",
    b"L9999999999999999999L\n",
    b".",
]
HOSTILE_CODE += [b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"]


def spoil_torch(raw: bytes, rng: Random) -> bytes:
    """Change opcodes of the pickle, or what lies around it."""
    if rng.random() < 0.2:
        return spoil_bytes(raw, rng)
    if raw[:2] == b"PK":
        with contextlib.suppress(Exception):  # a zip that is spoiled already
            return _spoil_zip(raw, rng)
        return spoil_bytes(raw, rng)
    return _spoil_pickle(raw, rng)


def _spoil_pickle(raw: bytes, rng: Random) -> bytes:
    """Insert, repeat, remove or replace one opcode of the pickles that follow each other."""
    starts, stream = [0], io.BytesIO(raw)
    with contextlib.suppress(Exception):  # as far as it can be followed
        while stream.tell() < len(raw):
            starts += [pos for _, _, pos in pickletools.genops(stream)][1:] + [stream.tell()]
    index = rng.randrange(len(starts))
    start, end = starts[index], starts[index + 1] if index + 1 < len(starts) else starts[index]
    choice = rng.randrange(5)
    if choice == 0:
        return raw[:start] + rng.choice(HOSTILE_CODE) + raw[start:]
    if choice == 1:
        return raw[:start] + rng.choice(HOSTILE_CODE) + raw[end:]
    if choice == 2:
        return raw[:start] + raw[end:]
    if choice == 3:
        return raw[:end] + raw[start:end] * rng.choice((1, 2, 50)) + raw[end:]
    return raw[: start + 1] + spoil_bytes(raw[start + 1 : end], rng) + raw[end:]


def _spoil_zip(raw: bytes, rng: Random) -> bytes:
    """Change one entry of a zip: its bytes, its name, its compression, its being there."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = [(info.filename, archive.read(info)[: 1 << 16], zipfile.ZIP_STORED) for info in archive.infolist()]
    at = 0 if rng.random() < 0.6 else rng.randrange(len(entries))
    name, content, method = entries[at]
    choice = rng.randrange(10)
    if choice < 6:
        content = _spoil_pickle(content, rng) if name.endswith(".pkl") else spoil_bytes(content, rng)
        entries[at] = (name, content, method)
    elif choice == 6:
        entries[at] = (
            rng.choice(("/etc/passwd", "../x", "", "a/data.pkl", "archive/data/0", "archive/data/../0")),
            content,
            0,
        )
    elif choice == 7:
        entries[at] = (name, content * rng.choice((1, 100)), rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)))
    else:
        entries[at : at + 1] = [entries[at]] * (2 if choice == 8 else 0)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content, method in entries:
            archive.writestr(name, content, method)
    return out.getvalue()


# ── folders, packed as hostile.py packs them ──────────────────────────────────────────────────────────────────────────

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "added_tokens.json")
TOKENIZER_FILES += ("chat_template.jinja", "config.json")


def _spoil_files(raw: bytes, rng: Random, wanted: Callable[[str], bool]) -> bytes:
    try:
        files = json.loads(raw)
        names = [name for name in files if wanted(name)]
        name = rng.choice(names)
    except (ValueError, RecursionError, TypeError, IndexError):
        return raw[:-1]
    content = files[name]
    if rng.random() < 0.04:
        del files[name]
    elif isinstance(content, str):
        files[name] = spoil_bytes(content.encode("latin-1", "replace"), rng).decode("latin-1")
    else:
        files[name] = spoil_json(content, rng)
    return json.dumps(files).encode()


def spoil_checkpoint(raw: bytes, rng: Random) -> bytes:
    """Change a file that is none of the tokenizer's."""
    return _spoil_files(raw, rng, lambda name: name not in TOKENIZER_FILES[:-1])


def spoil_tokenizer(raw: bytes, rng: Random) -> bytes:
    """Change a file of the tokenizer."""
    return _spoil_files(raw, rng, lambda name: name in TOKENIZER_FILES)
