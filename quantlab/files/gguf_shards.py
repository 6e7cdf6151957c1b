"""GGUF files in several shards: `NAME-00001-of-00003.gguf` with the keys `split.no`, `split.count` and so on."""

import re
from pathlib import Path

import numpy as np

from quantlab.files.gguf_file import Header, read_header
from quantlab.files.recognize import short

__all__ = ["shard_count", "shard_headers", "shard_path", "shard_paths"]

MAX_SHARDS = 1000


def shard_path(path: Path, number: int, count: int) -> Path:
    """Return the name of shard `number` (from 1) of `count`, given any shard's name.

    Raises
    ------
    ValueError
        If `path` does not end in `-NNNNN-of-NNNNN.gguf`.

    Examples
    --------
    >>> shard_path(Path("m-00001-of-00003.gguf"), 2, 3).name
    'm-00002-of-00003.gguf'
    """
    match = re.fullmatch(r"(.+)-\d{5}-of-\d{5}\.gguf", path.name)
    if match is None:
        raise ValueError(
            f"{path}: split.count={count}, so the name must end in -00001-of-{count:05d}.gguf. "
            f"Rename the shards to their published names."
        )
    return path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf")


def shard_paths(path: Path, count: int) -> list[Path]:
    """Return the names of all shards of a file.

    Examples
    --------
    >>> [shard.name for shard in shard_paths(Path("m.gguf"), 2)]
    ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf']
    """
    stem = path.name.removesuffix(".gguf")
    return [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def shard_count(header: Header) -> int:
    """Return the number of shards that a file's metadata gives (0: none).

    Raises
    ------
    ValueError
        If its value is not a number.
    """
    return _whole(header, "split.count", 0)


def shard_headers(header: Header) -> list[Header]:
    """Return the headers of all shards in order, given one of them (a single file: just its own).

    Raises
    ------
    FileNotFoundError
        If a shard is missing.
    ValueError
        If a shard has another number than its name says, or tensors are missing or there twice.
    """
    count = shard_count(header)
    if count <= 1:
        return [header]
    if count > MAX_SHARDS:
        raise ValueError(f"{header.path}: split.count={count}, need at most {MAX_SHARDS}. The file is damaged.")
    paths = [shard_path(header.path, number, count) for number in range(1, count + 1)]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: this shard of {count} is missing. Download it into the folder of the others."
            )
    headers = [read_header(path) for path in paths]
    for index, shard in enumerate(headers):
        number = _whole(shard, "split.no", -1)
        if number != index or _whole(shard, "split.count", 1) != count:
            raise ValueError(f"{shard.path}: split.no={number}, need {index} of {count}. Download the shards again.")
    names = [tensor.name for shard in headers for tensor in shard.tensors]
    expected = _whole(headers[0], "split.tensors.count", len(names))
    if len(set(names)) != len(names) or len(names) != expected:
        raise ValueError(
            f"{header.path}: {len(set(names))} different tensors in {len(names)} entries, "
            f"split.tensors.count={expected}. Download the shards again."
        )
    return headers


def _whole(header: Header, key: str, default: int) -> int:
    """Return a whole number of the metadata."""
    value = header.metadata.get(key, default)
    if not isinstance(value, np.integer | int):
        raise ValueError(f"{header.path}: {key}={short(value)}, need a whole number. The file is damaged or hostile.")
    return int(value)
