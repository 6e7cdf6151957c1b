"""Importance matrices on disk, in both of llama.cpp's formats: read, written and merged.

An importance matrix holds, for the matrix of each tensor, the sum of the squared input activations per column and the
number of rows summed. The quantizers weight the error of column j with the mean, ``sum[j] / count``.

GGUF format: metadata ``general.type="imatrix"``, ``imatrix.datasets``, ``imatrix.chunk_count``, ``imatrix.chunk_size``;
per tensor ``NAME.in_sum2`` F32 (n_mat, n_per_row) and ``NAME.counts`` F32 (n_mat, 1), sorted by name.

Older format (``.dat``), little-endian, no magic bytes:

    int32 n_entries
    per entry: int32 length, name; int32 ncall; int32 nval; float32[nval] = mean · ncall
    int32 number of chunks; int32 length, path of the calibration text       (may be missing)

Source: llama.cpp, common/imatrix-loader.cpp, tools/imatrix/imatrix.cpp and tools/quantize/quantize.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from quantlab.files.arguments import check_path
from quantlab.files.byte_range import ByteRange
from quantlab.files.gguf_file import Strings, TensorSpec, read_header, write_gguf
from quantlab.files.imatrix_statistics import statistics
from quantlab.files.output import replacing
from quantlab.files.recognize import short
from quantlab.result import Result

if TYPE_CHECKING:
    import pandas as pd

_KEYS = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_ENTRIES = 1 << 16
_MAX_NAME = 1 << 10  # bytes


@dataclass(frozen=True, repr=False)
class ImportanceMatrix(Result):
    """The squared activations of a model, by tensor name.

    Attributes
    ----------
    sums : dict[str, np.ndarray [shape=(n_mat, n_per_row), dtype=float32]]
        Sum of the squared activations per column; in an older file the mean times `counts`.
    counts : dict[str, np.ndarray [shape=(n_mat,), dtype=float32]]
        Rows summed; in an older file the number of calls.
    chunk_count : int
        Chunks of text the matrix was collected on.
    chunk_size : int
        Tokens per chunk; 0 in an older file, which does not say.
    datasets : tuple[str, ...]
        Names of the calibration texts.
    """

    sums: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]
    chunk_count: int
    chunk_size: int
    datasets: tuple[str, ...] = ()

    @property
    def is_legacy(self) -> bool:
        """True if it was read from an older file, which holds means instead of sums."""
        return self.chunk_size == 0

    @property
    def entries(self) -> dict[str, np.ndarray]:
        """The weights per column for the quantizers: tensor name → float32 (n_mat · n_per_row,)."""
        return {name: self.weights(name) for name in self.sums}

    def weights(self, name: str) -> np.ndarray:
        """Return one tensor's weights per column, as llama-quantize computes them.

        Returns
        -------
        np.ndarray [shape=(n_mat * n_per_row,), dtype=float32]
            ``sums / counts``; where nothing was counted, ones (an older file: the value as it is).
        """
        sums, counts = self.sums[name], self.counts[name][:, None]
        empty = sums if self.is_legacy else np.ones_like(sums)
        return np.where(counts > 0, np.divide(sums, counts, out=empty.copy(), where=counts > 0), empty).reshape(-1)

    def keep(self, wanted: Callable[[str], bool]) -> ImportanceMatrix:
        """Return the matrix with the entries whose names pass `wanted`."""
        names = [name for name in self.sums if wanted(name)]
        return replace(self, sums={n: self.sums[n] for n in names}, counts={n: self.counts[n] for n in names})

    def save(self, path: str | Path, *, legacy: bool = False, overwrite: bool = False) -> Path:
        """Write the matrix to a file, see `write_imatrix`."""
        return write_imatrix(self, path, legacy=legacy, overwrite=overwrite)

    _look = {"index": False, "float_format": "{:.4g}".format}

    def to_frame(self) -> pd.DataFrame:
        """Return the statistics of each tensor, see `imatrix_statistics.statistics`."""
        return statistics(self)

    def _document(self) -> dict[str, Any]:
        protocol = {"datasets": self.datasets, "chunks": self.chunk_count, "n_ctx": self.chunk_size}
        return {"protocol": protocol, "rows": self.to_frame()}

    def _lines(self) -> list[str]:
        text = ", ".join(name if name.isprintable() else short(name) for name in self.datasets) or "an unnamed text"
        return [f"importance matrix of {len(self.sums)} tensors: {self.chunk_count} chunks of {text}"]


def read_imatrix(path: str | Path) -> ImportanceMatrix:
    """Read an importance matrix of either format, which its content decides.

    Raises
    ------
    FileNotFoundError, OSError
        If there is no such file, or it is a folder, a pipe or a device.
    ValueError
        If the file is neither, is damaged, has no entries, or has negative or non-finite values.
    """
    check_path(imatrix=path)
    path = Path(path)
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: is not a file on disk, must be an importance matrix.  Save it in a file first.")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such importance matrix. Check the name, or run quantlab imatrix first.")
    with open(path, "rb") as file:
        is_gguf = file.read(4) == b"GGUF"
        file.seek(0)
        matrix = _read_gguf(path) if is_gguf else _read_legacy(path, file, path.stat().st_size)
    if not matrix.sums:
        raise ValueError(f"{path}: has no entries, must have at least one. Collect the matrix again.")
    for name, sums in matrix.sums.items():
        counts = matrix.counts[name]
        if not (np.isfinite(sums).all() and np.isfinite(counts).all() and sums.min() >= 0):
            raise ValueError(f"{path}: {name}: values must be finite and not negative. Collect the matrix again.")
    return matrix


# what functions take where they need an importance matrix: a file, or a matrix
MatrixLike = str | Path | ImportanceMatrix


def as_matrix(matrix: MatrixLike | None) -> ImportanceMatrix | None:
    """Return an importance matrix or None unchanged, or read it from a file."""
    return matrix if matrix is None or isinstance(matrix, ImportanceMatrix) else read_imatrix(matrix)


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = read_header(path)
    missing = [key for key in _KEYS if key not in header.metadata]
    if missing:
        raise ValueError(f"{path}: {missing[0]} is missing, but every importance matrix has it. Check the name.")
    datasets, chunk_count, chunk_size = (header.metadata[key] for key in _KEYS)
    if not isinstance(datasets, Strings):
        raise ValueError(f"{path}: imatrix.datasets={short(datasets)}, must be names. Collect the matrix again.")
    if not all(isinstance(number, np.integer) for number in (chunk_count, chunk_size)) or chunk_size < 1:
        what = f"imatrix.chunk_count={short(chunk_count)}, imatrix.chunk_size={short(chunk_size)}"
        raise ValueError(f"{path}: {what}, must be whole numbers, the second positive. Collect the matrix again.")
    values: dict[str, np.ndarray] = {}
    for tensor in header.tensors:
        if tensor.qtype != "F32":
            raise ValueError(f"{path}: {tensor.name}: type={tensor.qtype}, must be F32. Collect the matrix again.")
        values[tensor.name] = ByteRange(path, tensor.offset, tensor.nbytes).read().view(np.float32)
    sums, counts = {}, {}
    for full, value in values.items():
        name = full.removesuffix(_SUMS)
        if name != full and full.endswith(_SUMS):
            count = values.get(name + _COUNTS)
            if count is None or value.size % count.size:
                raise ValueError(f"{path}: {name}: sums and counts do not match. Collect the matrix again.")
            sums[name] = value.reshape(count.size, -1)
            with np.errstate(invalid="ignore"):  # a NaN is refused later
                counts[name] = np.floor(count + np.float32(0.5))
    if 2 * len(sums) != len(values):
        raise ValueError(
            f"{path}: {len(values)} tensors, must be {_SUMS} and {_COUNTS} in pairs. Collect the matrix again."
        )
    return ImportanceMatrix(sums, counts, int(chunk_count), int(chunk_size), tuple(datasets))


def _read_legacy(path: Path, file: BinaryIO, size: int) -> ImportanceMatrix:
    """Read an older file field by field."""

    def take(n: int, what: str) -> bytes:
        pos = file.tell()
        if n < 0 or pos + n > size:
            raise ValueError(
                f"{path}: {what} takes {n} bytes at byte {pos}, the file has {size}. "
                f"It is not an importance matrix, or it is truncated."
            )
        return file.read(n)

    def text(length: int, what: str) -> str:
        name = take(length, what).decode("utf-8", "surrogateescape")
        if not name.isprintable():
            raise ValueError(f"{path}: {what} is {short(name)}, must be printable. The file is damaged.")
        return name

    def int32(what: str) -> int:
        return struct.unpack("<i", take(4, what))[0]

    n_entries = int32("number of entries")
    if not 1 <= n_entries <= _MAX_ENTRIES:
        raise ValueError(
            f"{path}: first 4 bytes are {struct.pack('<i', n_entries)!r}, must be b'GGUF' or a number of entries. "
            f"It is not an importance matrix; collect one with llama-imatrix or quantlab imatrix."
        )
    sums, counts = {}, {}
    for i in range(n_entries):
        length = int32(f"length of name {i}")
        if not 1 <= length <= _MAX_NAME:
            raise ValueError(f"{path}: length of name {i}={length}, must be 1 to {_MAX_NAME}. The file is damaged.")
        name = text(length, f"name {i}")
        ncall, nval = int32(f"{name}: ncall"), int32(f"{name}: nval")
        if nval < 1 or name in sums:
            raise ValueError(f"{path}: {name}: nval={nval}, must be positive, each name once. The file is damaged.")
        sums[name] = np.frombuffer(take(4 * nval, name), "<f4").astype(np.float32).reshape(1, nval)
        counts[name] = np.array([ncall], np.float32)
    chunk_count, datasets = 0, ()
    if file.tell() < size:
        chunk_count = int32("number of chunks")
        if file.tell() < size:
            name = text(int32("length of the text's name"), "the text's name")
            datasets = (name,) if name else ()
    return ImportanceMatrix(sums, counts, max(chunk_count, 0), 0, datasets)


def write_imatrix(matrix: ImportanceMatrix, path: str | Path, *, legacy: bool = False, overwrite: bool = False) -> Path:
    """Write an importance matrix, byte for byte as llama-imatrix does.

    Parameters
    ----------
    matrix, path
    legacy : bool
        Write the older format, for tools that read no other.
    overwrite : bool
        Whether a file of that name may be replaced.

    Raises
    ------
    FileExistsError
        If `path` exists and `overwrite` is false.
    ValueError
        If a matrix of means is to be written as GGUF; `merge` it first.
    """
    if matrix.is_legacy and not legacy:
        raise ValueError(f"{path}: the matrix holds means, a GGUF matrix needs sums. Merge it first.")
    with replacing(path, overwrite=overwrite) as part:
        if legacy:
            part.write_bytes(b"".join(_legacy_parts(matrix)))
        else:
            _write_gguf(matrix, part)
    return Path(path)


def _write_gguf(matrix: ImportanceMatrix, path: Path) -> None:
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": list(matrix.datasets),
        "imatrix.chunk_count": np.uint32(matrix.chunk_count),
        "imatrix.chunk_size": np.uint32(matrix.chunk_size),
    }
    specs, data = [], []
    for name in sorted(matrix.sums):
        sums, counts = matrix.sums[name], matrix.counts[name]
        n_mat, n_per_row = sums.shape
        specs.append(TensorSpec(name + _SUMS, sums.shape if n_mat > 1 else (n_per_row,), "F32"))
        specs.append(TensorSpec(name + _COUNTS, (n_mat, 1) if n_mat > 1 else (1,), "F32"))
        data += [sums, counts]
    write_gguf(path, metadata, specs, data)


def _legacy_parts(matrix: ImportanceMatrix) -> Iterable[bytes]:
    """Yield the pieces of an older file, without entries that were never counted."""
    names = [name for name in sorted(matrix.sums) if matrix.is_legacy or matrix.counts[name].any()]
    yield struct.pack("<i", len(names))
    for name in names:
        sums, counts = matrix.sums[name], matrix.counts[name]
        ncall = int(counts.max())
        if not matrix.is_legacy:
            ncall = -(-ncall // matrix.chunk_size)
            seen = counts[:, None] > 0
            means = np.divide(sums, counts[:, None], out=np.ones_like(sums), where=seen)
            sums = means * np.float32(ncall)
        raw = name.encode("utf-8", "surrogateescape")
        yield struct.pack("<i", len(raw)) + raw + struct.pack("<ii", ncall, sums.size) + sums.astype("<f4").tobytes()
    text = (matrix.datasets[-1] if matrix.datasets else "").encode("utf-8", "surrogateescape")
    yield struct.pack("<ii", matrix.chunk_count, len(text)) + text


def merge(matrices: Iterable[ImportanceMatrix], *, chunk_size: int = 512) -> ImportanceMatrix:
    """Add up importance matrices, as llama-imatrix does with several ``--in-file``.

    Parameters
    ----------
    matrices : Iterable[ImportanceMatrix]
        Of the same model.
    chunk_size : int
        Tokens per chunk of the result, and what an older file is taken to have had.

    Raises
    ------
    ValueError
        If a tensor's columns differ between two matrices, a sum is beyond float32, or there is no matrix.
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    datasets: tuple[str, ...] = ()
    for matrix in matrices:
        scale = np.float32(chunk_size if matrix.is_legacy else 1)
        for name, own in matrix.sums.items():
            n_mat = max(len(own), len(sums.get(name, own)))
            if name in sums and (sums[name].size != own.size or not {len(sums[name]), len(own)} <= {1, n_mat}):
                shapes = f"{sums[name].shape} and {own.shape}"
                raise ValueError(f"{name}: shapes {shapes}, must be equal. Merge matrices of one model.")
            with np.errstate(over="ignore"):  # llama-imatrix counts once for all heads of latent attention
                sums[name] = (own * scale + sums.get(name, np.zeros_like(own)).reshape(own.shape)).reshape(n_mat, -1)
                counts[name] = matrix.counts[name] * scale + counts.get(name, np.float32(0))
            if not (np.isfinite(sums[name]).all() and np.isfinite(counts[name]).all()):
                raise ValueError(f"{name}: the sum exceeds {np.finfo(np.float32).max:.4g}. Collect the matrices again.")
        datasets += matrix.datasets
    if not sums:
        raise ValueError("merge: no importance matrix, must be at least one. Give a model, or files (in_files).")
    most = max(int(count.max()) for count in counts.values())
    return ImportanceMatrix(sums, counts, most // chunk_size, chunk_size, datasets)
