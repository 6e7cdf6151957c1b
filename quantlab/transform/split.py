"""One GGUF file ↔ several shards, byte for byte what llama-gguf-split writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from quantlab.files.arguments import check_path, check_whole
from quantlab.files.bundled import model_path
from quantlab.files.byte_range import ByteRange
from quantlab.files.gguf_file import ALIGNMENT, Header, TensorInfo, pack_header, read_header, write_gguf
from quantlab.files.gguf_shards import MAX_SHARDS, shard_count, shard_headers, shard_paths
from quantlab.files.inputs import input_files
from quantlab.files.output import check_apart, check_outputs, is_stream, replacing
from quantlab.result import Result

PIECE = 16 << 20  # bytes that are copied at once
MAX_TENSORS = 128  # of a shard, where no limit is given


@dataclass(frozen=True)
class Shard:
    """One file of the output: its path, its metadata, and the present places of its tensors."""

    path: Path
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the file."""
        alignment = int(self.metadata.get("general.alignment", ALIGNMENT))
        data = sum(-(-tensor.nbytes // alignment) * alignment for tensor in self.tensors)
        return len(pack_header(self.metadata, self.tensors)) + data


@dataclass(frozen=True)
class Split(Result):
    """The distribution of a GGUF file over shards, written or planned."""

    source: Path
    shards: tuple[Shard, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per shard: file, tensors, bytes."""
        rows = [(str(shard.path), len(shard.tensors), shard.nbytes) for shard in self.shards]
        return pd.DataFrame(rows, columns=["file", "tensors", "bytes"])

    def _document(self) -> dict[str, Any]:
        return {"protocol": {"source": self.source}, "rows": self.to_frame()}


def split(
    src: str | Path,
    outfile: str | Path | None = None,
    *,
    max_tensors: int | None = None,
    max_size: str | int | None = None,
    no_tensor_first_split: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
) -> Split:
    """Distribute a GGUF file over shards ``OUTFILE-00001-of-0000N.gguf``.

    Parameters
    ----------
    src : str or Path
        A GGUF file that is whole.
    outfile : str or Path, optional
        What the names of the shards begin with; ``.gguf`` at its end is dropped. Default: the name of `src`.
    max_tensors : int, optional
        Most tensors in a shard. Default: 128, unless `max_size` is given.
    max_size : str or int, optional
        Most bytes of tensors in a shard, as a number or as ``200M`` or ``4G`` (powers of 1000). A tensor that is
        larger gets a shard of its own.
    no_tensor_first_split : bool
        Leave the first shard to the metadata.
    dry_run : bool
        Write nothing.
    overwrite : bool
        Whether shards that exist may be replaced.

    Returns
    -------
    Split
        The shards, with their sizes.

    Raises
    ------
    FileNotFoundError, FileExistsError
        If the source is not there; if a shard is, and `overwrite` is false.
    ValueError
        If the source is damaged or a shard itself, or a limit has no meaning.

    Examples
    --------
    >>> import tempfile
    >>> from quantlab.files.gguf_file import TensorSpec
    >>> path = Path(tempfile.mkdtemp()) / "a.gguf"
    >>> x = np.ones((2, 32), np.float32)
    >>> _ = write_gguf(path, {}, [TensorSpec(name, x.shape, "F32") for name in "xyz"], [x, x, x])
    >>> [len(shard.tensors) for shard in split(path, max_tensors=2).shards]
    [2, 1]

    Source: llama.cpp, tools/gguf-split, for names, keys and where a shard ends.
    """
    check_whole(max_tensors=max_tensors)
    header = read_header(model_path(src))
    if shard_count(header) > 0:
        raise ValueError(f"{header.path}: is a shard already, must be a whole file. Run quantlab merge first.")
    groups = groups_within(header.tensors, max_tensors=max_tensors, max_size=max_size)
    groups = [[], *groups] if no_tensor_first_split else groups
    if len(groups) > MAX_SHARDS:
        raise ValueError(f"{header.path}: {len(groups)} shards, must be at most {MAX_SHARDS}. Use larger shards.")
    if outfile is not None and is_stream(outfile):
        raise ValueError(f"{outfile}: is a device or a pipe, shards must be files. Choose another output.")
    result = Split(header.path, tuple(_shards(header, Path(outfile or header.path), groups)))
    check_outputs([shard.path for shard in result.shards], [header.path], overwrite=overwrite)
    if not dry_run:
        _write(result.shards, {tensor.name: header.path for tensor in header.tensors}, overwrite)
    return result


def merge(src: str | Path, outfile: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Merge the shards of a GGUF file into the bytes that were split.

    llama-gguf-split leaves the keys ``split.no``, ``split.count`` (0) and ``split.tensors.count`` in what it merges;
    here they go, so that a hash of the file that was split holds.

    Parameters
    ----------
    src : str or Path
        Any one of the shards; the others lie beside it.
    outfile : str or Path, optional
        Default: the name of the shards without its numbers.
    overwrite : bool
        Whether an output that exists may be replaced.

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    FileNotFoundError, FileExistsError
        If a shard is missing; if the output is there, and `overwrite` is false.
    ValueError
        If `src` is no shard, or the shards do not belong together.
    """
    check_path(src=src)
    header = read_header(src)
    headers = shard_headers(header)
    if "split.count" not in header.metadata:
        raise ValueError(
            f"{header.path}: split.count is missing, must be one of several shards. Use the file directly."
        )
    path = _without_numbers(header.path) if outfile is None else Path(outfile)
    check_apart(path, input_files([header.path]))
    metadata = {key: value for key, value in headers[0].metadata.items() if not key.startswith("split.")}
    tensors = tuple(tensor for shard in headers for tensor in shard.tensors)
    places = {tensor.name: shard.path for shard in headers for tensor in shard.tensors}
    _write([Shard(path, metadata, tensors)], places, overwrite)
    return path


def _without_numbers(shard: Path) -> Path:
    """Return the name of a whole file, given the name of one of its shards."""
    name, found = re.subn(r"-\d{5}-of-\d{5}\.gguf$", ".gguf", shard.name)
    if not found:
        raise ValueError(f"{shard}: has no shard numbers, so the output has no name. Give outfile.")
    return shard.with_name(name)


def _limits(max_tensors: int | None, max_size: str | int | None) -> tuple[int | None, int | None]:
    """Check the two limits and return them as numbers."""
    if max_tensors is not None and max_size is not None:
        raise ValueError("max_tensors and max_size: must not both be given. Leave one out.")
    if max_size is None:
        max_tensors = MAX_TENSORS if max_tensors is None else max_tensors
        if max_tensors < 1:
            raise ValueError(f"max_tensors={max_tensors}, must be at least 1. Choose a larger number.")
        return max_tensors, None
    unit = {"M": 10**6, "G": 10**9}.get(str(max_size)[-1:], 1)
    digits = str(max_size)[:-1] if unit > 1 else str(max_size)
    if not (digits.isascii() and digits.isdecimal()) or not 0 < int(digits) * unit < 1 << 63:
        raise ValueError(
            f"max_size={max_size}, must be a positive number of bytes, or one followed by M or G. Correct it."
        )
    return None, int(digits) * unit


def groups_within(
    tensors: Sequence[TensorInfo], *, max_tensors: int | None = None, max_size: str | int | None = None
) -> list[list[TensorInfo]]:
    """Distribute the tensors in order; a shard is full if the next tensor would exceed its limit.

    Raises
    ------
    ValueError
        If both limits are given, or one has no meaning.
    """
    max_tensors, max_size = _limits(max_tensors, max_size)
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        full = len(groups[-1]) == max_tensors if max_size is None else size + nbytes > max_size
        if full and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += nbytes
    return groups


def _shards(header: Header, stem: Path, groups: Sequence[Sequence[TensorInfo]]) -> Iterator[Shard]:
    """Yield the shards, with all metadata in the first and the numbers in each."""
    own = {key: value for key, value in header.metadata.items() if not key.startswith("split.")}
    for i, (path, group) in enumerate(zip(shard_paths(stem, len(groups)), groups, strict=True)):
        numbers = shard_numbers(i, len(groups), len(header.tensors))
        yield Shard(path, (own if i == 0 else {}) | numbers, tuple(group))


def shard_numbers(i: int, count: int, n_tensors: int) -> dict[str, Any]:
    """Return the metadata that each shard has: its number from 0 on, that of shards, and of tensors in all of them."""
    return {"split.no": np.uint16(i), "split.tensors.count": np.int32(n_tensors), "split.count": np.uint16(count)}


def _write(shards: Sequence[Shard], places: dict[str, Path], overwrite: bool) -> None:
    """Write all files beside their final names, and rename them when all are complete."""
    total = sum(tensor.nbytes for shard in shards for tensor in shard.tensors)
    with ExitStack() as stack, tqdm(total=total, unit="B", unit_scale=True) as bar:
        parts = [stack.enter_context(replacing(shard.path, overwrite=overwrite)) for shard in shards]
        for shard, part in zip(shards, parts, strict=True):
            data = (_pieces(ByteRange(places[t.name], t.offset, t.nbytes)) for t in shard.tensors)
            write_gguf(part, shard.metadata, shard.tensors, data, progress=bar.update)


def _pieces(stored: ByteRange) -> Iterator[np.ndarray]:
    """Read a tensor's bytes a piece at a time."""
    for start in range(0, stored.nbytes, PIECE):
        yield stored.read(start, min(start + PIECE, stored.nbytes))
