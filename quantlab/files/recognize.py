"""Short descriptions of untrusted files, and of values and errors found in them."""

import struct
from typing import Any

__all__ = ["looks_like", "reason", "short"]

_STARTS = [
    (b"PK\x03\x04", "This looks like a torch file; run quantlab convert first."),
    (b"\x80\x02", "This looks like an old torch file; run quantlab convert first."),
    (b"version https://git-lfs", "This is a Git LFS pointer, not the file itself; run git lfs pull."),
    (b"\x1f\x8b", "This is a gzip archive; unpack it first."),
    (b"tjgg", "This is a GGJT file of 2023; convert the checkpoint again."),
    (b"lmgg", "This is a GGML file of 2023; convert the checkpoint again."),
    (b"fmgg", "This is a GGMF file of 2023; convert the checkpoint again."),
    (b"FUGG", "This is a GGUF file with its bytes swapped; download it again."),
]


def looks_like(start: bytes) -> str:
    """Return one sentence, with a remedy, about the likely kind of a file that begins with `start`.

    Examples
    --------
    >>> looks_like(b"PK\\x03\\x04....")
    'This looks like a torch file; run quantlab convert first.'
    """
    for prefix, sentence in _STARTS:
        if start.startswith(prefix):
            return sentence
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "This is a web page, not a model; download the file itself."
    if start[:1] == b"{":
        return "This looks like JSON; name the model's folder or its weights."
    if len(start) >= 9 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < 1 << 30:
        return "This looks like a safetensors file; run quantlab convert first."
    if not start:
        return "The file is empty; download it again."
    return "It is not a model file that quantlab knows."


def short(value: Any, most: int = 80) -> str:
    """Return a value from a file as printable text of `most` characters at most.

    Examples
    --------
    >>> short([1, "a"]), short(10**4000)
    ("[1, 'a']", 'a number of 13288 bits')
    """
    if type(value) is int and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    try:
        text = " ".join(repr(value).split())  # the text of an array has several lines
    except (RecursionError, ValueError):  # nested too deeply, or with too long a number in it
        return f"a {type(value).__name__}"
    return text if len(text) <= most else text[: most - 1] + "…"


def reason(error: BaseException) -> str:
    """Return the first line of a library's error about an untrusted file, short enough for an error text.

    Examples
    --------
    >>> reason(ValueError("bad name '\\x1b[2J'\\nin line 1")), reason(RecursionError())
    ("bad name '?[2J'", 'RecursionError')
    """
    lines = str(error).splitlines() or [type(error).__name__]
    return "".join(char if char.isprintable() else "?" for char in lines[0])[:200]
