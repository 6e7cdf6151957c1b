"""SentencePiece models, the file tokenizer.model: a protocol buffer of pieces and settings.

    field 1  a piece         text (1), score (2), type (3)
    field 2  the trainer     model type (3), unknown token's id (40), byte fallback (35)
    field 3  the normalizer  name (1), dummy prefix (3)

The types of pieces have GGUF's numbers. `sentencepiece` checks a file; what its Python interface does not tell (which
pieces are user-defined, how the model was trained) is read here.

Source: sentencepiece_model.proto of sentencepiece.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.files.recognize import reason

__all__ = ["SentencePieces", "pack_sentencepiece", "read_sentencepiece"]

_MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}


@dataclass(frozen=True)
class SentencePieces:
    """A model's pieces by id."""

    tokens: list[str]
    scores: list[float]
    types: list[int]  # as `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte
    model_type: str  # `"bpe"`, `"unigram"`, `"word"` or `"char"`
    adds_space: bool  # whether a text starts as if a space stood before it


def read_sentencepiece(path: Path, raw: bytes) -> SentencePieces:
    """Read a model's bytes; `path` starts the error text.

    Raises
    ------
    ValueError
        If sentencepiece refuses the file, or a text is not UTF-8.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor().LoadFromSerializedProto(raw)
        tokens, scores, types, trainer, normalizer = [], [], [], {}, {}
        for number, value in _fields(raw):
            if number == 1:
                piece = dict(_fields(value))
                tokens.append(piece[1].decode("utf-8"))
                scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                types.append(piece.get(3, 1))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (RuntimeError, OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{path}: is not a SentencePiece model ({reason(error)}). Download it again.") from None
    model_type = _MODEL_TYPES.get(trainer.get(3, 1), "unknown")
    return SentencePieces(tokens, scores, types, model_type, bool(normalizer.get(3, 1)))


def pack_sentencepiece(pieces: Iterable[tuple[str, float, int]], *, unknown: int, byte_fallback: bool) -> bytes:
    """Encode a BPE model of pieces (text, score, type) whose normalizer changes only spaces.

    Parameters
    ----------
    pieces : iterable of (str, float, int)
        By id, types as in GGUF.
    unknown : int
        Id of the unknown token.
    byte_fallback : bool
        Whether characters without a piece become bytes.
    """
    parts = []
    for text, score, kind in pieces:
        raw = text.encode("utf-8", "surrogateescape")
        parts.append(_field(1, _field(1, raw) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])))
    parts.append(_field(2, b"\x18\x02\x98\x02" + bytes([byte_fallback]) + b"\xc0\x02" + _packed(unknown)))
    # no dummy prefix, keep and escape spaces
    parts.append(_field(3, _field(1, b"identity") + b"\x18\x00\x20\x00\x28\x01"))
    return b"".join(parts)


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the number and value of a message's fields, fixed-width numbers as bytes."""
    at = 0
    while at < len(raw):
        tag, at = _unpacked(raw, at)
        wire = tag & 7
        if wire == 0:
            value, at = _unpacked(raw, at)
        else:
            length, at = _unpacked(raw, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            value, at = raw[at : at + length], at + length
        yield tag >> 3, value


def _unpacked(raw: bytes, at: int) -> tuple[int, int]:
    """Read a number of seven bits per byte; return it and its end."""
    value = shift = 0
    while raw[at] > 0x7F:
        value |= (raw[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | raw[at] << shift, at + 1


def _packed(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, payload: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _packed(len(payload)) + payload
