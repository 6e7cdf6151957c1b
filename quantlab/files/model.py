"""Models on disk, opened lazily: hyper-parameters, metadata, vocabulary and tensors that are read when asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from html import escape
from math import prod
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.arch import Hparams
from quantlab.files.bundled import model_path
from quantlab.files.byte_range import PLAIN_DTYPES, ByteRange
from quantlab.files.gguf_file import Header, read_header
from quantlab.files.gguf_shards import shard_headers
from quantlab.files.hparams import read_hparams
from quantlab.files.metadata_table import metadata_table
from quantlab.files.vocab import Vocab
from quantlab.quants.ggml_types import row_bytes

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["LazyTensor", "Model", "as_model", "is_checkpoint", "open"]

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")  # names of single files of weights


@dataclass(frozen=True, repr=False)
class LazyTensor:
    """A tensor that is read from disk when its values are requested.

    Attributes
    ----------
    name : str
        GGUF name, such as `blk.0.attn_q.weight`.
    shape : tuple of int
        NumPy order: rows last but one, `n_per_row` last.
    qtype : str
        ggml type, such as `"Q4_K"`.
    read_rows : callable
        `read_rows(start, stop)` gives rows of the tensor seen as (nrows, n_per_row), as `rows` returns them.
    offset : int or None
        Position of the data in its file; None where the data is made from other data.
    file : Path or None
        The GGUF file that holds the data; None for a checkpoint's tensor.
    """

    name: str
    shape: tuple[int, ...]
    qtype: str
    read_rows: Callable[[int, int], np.ndarray]
    offset: int | None = None
    file: Path | None = None

    @cached_property
    def nrows(self) -> int:
        """Number of rows of `shape[-1]` weights."""
        return prod(self.shape[:-1])

    @cached_property
    def n_weights(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.nrows * row_bytes(self.qtype, self.shape[-1], name=self.name)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows `start:stop` of the tensor seen as (nrows, n_per_row).

        Returns
        -------
        np.ndarray [shape=(stop - start, n_per_row), dtype=float32, float16 or bfloat16]
            For plain types; for quantized ones their blocks [shape=(stop - start, row_bytes), dtype=uint8].

        Raises
        ------
        ValueError
            If the rows do not exist, or the file ends before them.
        """
        if not 0 <= start <= stop <= self.nrows:
            raise ValueError(
                f"{self.name}: rows {start}:{stop}, must be a range within 0:{self.nrows}. Give a smaller range."
            )
        return self.read_rows(start, stop)

    def load(self) -> np.ndarray:
        """Read the whole tensor: numbers in `shape`, or uint8 blocks [shape=(*lead, row_bytes)]."""
        rows = self.read_rows(0, self.nrows)
        return rows.reshape(*self.shape[:-1], rows.shape[-1])

    def floats(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read rows `start:stop` as float32 (default: the whole tensor, in `shape`).

        Returns
        -------
        np.ndarray [shape=(stop - start, n_per_row) or `shape`, dtype=float32]
        """
        whole = start == 0 and stop is None
        stop = self.nrows if stop is None else stop
        rows = self.rows(start, stop)
        if self.qtype not in PLAIN_DTYPES:
            from quantlab import quants  # numba; only quantized tensors need it

            rows = quants.dequantize(rows, self.qtype, (stop - start, self.shape[-1]))
        rows = rows.astype(np.float32, copy=False)
        return rows.reshape(self.shape) if whole else rows

    def _facts(self) -> dict[str, str]:
        """A summary that needs no values."""
        place = (
            {} if self.offset is None or self.file is None else {"place": f"byte {self.offset:,} of {self.file.name}"}
        )
        bpw = 8 * self.nbytes / max(self.n_weights, 1)
        return {
            "tensor": self.name,
            "shape": " × ".join(map(str, self.shape)),
            "type": f"{self.qtype}, {bpw:.4g} bits per weight",
            "size": f"{self.n_weights:,} weights, {self.nbytes:,} bytes",
        } | place

    def __repr__(self) -> str:
        shape = " × ".join(map(str, self.shape))
        return f"LazyTensor({self.name}: {self.qtype}, {shape}, {self.nbytes:,} bytes)"

    def __str__(self) -> str:
        return "\n".join(f"{key:>6}  {value}" for key, value in self._facts().items())

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{key}</th><td>{escape(value)}</td></tr>" for key, value in self._facts().items())
        return f"<table>{rows}</table>"


class Model:
    """A model on disk, of which only the header is in memory.

    Parameters
    ----------
    path : Path
        The file or folder that was opened.
    metadata : dict
        GGUF metadata in file order, values typed as `read_header` returns them.
    tensors : iterable of LazyTensor
        In file order.
    files : sequence of Path
        The files that hold the weights: one GGUF file, all shards, or a checkpoint's.
    is_checkpoint : bool
        Whether it is a checkpoint, seen as the GGUF file that it would be converted to.
    """

    def __init__(
        self,
        path: Path,
        metadata: dict[str, Any],
        tensors: Iterable[LazyTensor],
        files: Sequence[Path] = (),
        *,
        is_checkpoint: bool = False,
    ):
        self.path, self.metadata, self.files, self.is_checkpoint = path, metadata, tuple(files), is_checkpoint
        self._tensors = {tensor.name: tensor for tensor in tensors}

    @cached_property
    def hparams(self) -> Hparams:
        """Hyper-parameters from the metadata."""
        return read_hparams(self.metadata, self._tensors, source=str(self.path))

    @cached_property
    def vocab(self) -> Vocab:
        """Vocabulary: text to token ids and back."""
        vocab = Vocab.from_metadata(self.metadata, source=str(self.path))
        rows = self._tensors["token_embd.weight"].nrows if "token_embd.weight" in self._tensors else vocab.n_vocab
        if rows != vocab.n_vocab:
            raise ValueError(
                f"{self.path}: token_embd.weight has {rows} rows, but the vocabulary has {vocab.n_vocab} tokens: "
                f"llama.cpp refuses the file. Convert the checkpoint again."
            )
        return vocab

    @property
    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self._tensors)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by name, in file order."""
        return {tensor.name: tensor.shape for tensor in self}

    @cached_property
    def tensors(self) -> pd.DataFrame:
        """Table of the tensors: name, shape, qtype, n_weights, bytes, bpw (bits per weight), offset."""
        import pandas as pd  # takes longer to import than a header to read

        rows = [(t.name, t.shape, t.qtype, t.n_weights, t.nbytes, 8 * t.nbytes / t.n_weights, t.offset) for t in self]
        return pd.DataFrame(rows, columns=["name", "shape", "qtype", "n_weights", "bytes", "bpw", "offset"])

    @property
    def n_weights(self) -> int:
        """Number of weights of all tensors."""
        return sum(tensor.n_weights for tensor in self)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors' data."""
        return sum(tensor.nbytes for tensor in self)

    @property
    def qtypes(self) -> Counter:
        """Number of tensors of each type."""
        return Counter(tensor.qtype for tensor in self)

    @property
    def ftype(self) -> int | None:
        """Mixture number of the file, `general.file_type` (None: missing or not a whole number)."""
        number = self.metadata.get("general.file_type")
        return int(number) if isinstance(number, np.integer) else None

    def tensor(self, name: str) -> LazyTensor:
        """Return the tensor called `name`.

        Raises
        ------
        KeyError
            If there is none.
        """
        if name not in self._tensors:
            raise KeyError(f"{self.path}: no tensor is called {name}. See its .names for all.")
        return self._tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[LazyTensor]:
        return iter(self._tensors.values())

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        types = ", ".join(f"{count} {qtype}" for qtype, count in self.qtypes.items())
        return f"Model({self.path.name}: {self.n_weights} weights, {self.nbytes} bytes; tensors: {types})"

    def _repr_html_(self) -> str:
        tables = (metadata_table(self.metadata).to_html(index=False), self.tensors.to_html(max_rows=12, index=False))
        return f"<p>{escape(repr(self))}</p>" + "".join(tables)  # tables escape by themselves; names are untrusted


def open(path: str | PathLike[str]) -> Model:
    """Open a GGUF file (or the shards that it belongs to) or a checkpoint, lazily.

    A checkpoint opens as the GGUF file that it would be converted to: GGUF names, GGUF metadata, rows of q and k
    in GGUF's order.

    Parameters
    ----------
    path : str or Path
        A GGUF file, any one shard of a sharded one, a checkpoint folder, a single checkpoint file, or the name of a
        bundled or fetched model ("tiny", "smollm2").

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`, or a shard is missing.
    ValueError
        If the file is damaged or of a kind that is not read.

    Examples
    --------
    >>> import tempfile
    >>> from quantlab.files.gguf_file import TensorSpec, write_gguf
    >>> path = Path(tempfile.mkdtemp()) / "a.gguf"
    >>> x = np.ones((2, 32), np.float32)
    >>> _ = write_gguf(path, {"general.architecture": "llama"}, [TensorSpec("x", x.shape, "F32")], [x])
    >>> open(path).tensor("x").load().sum()
    np.float32(64.0)
    """
    path = model_path(path)
    if is_checkpoint(path):
        from quantlab.files.checkpoint import open_checkpoint  # imports this module

        return open_checkpoint(path)
    headers = shard_headers(read_header(path))
    metadata = {key: value for key, value in headers[0].metadata.items() if not key.startswith("split.")}
    tensors = [tensor for header in headers for tensor in _lazy_tensors(header)]
    return Model(path, metadata, tensors, [header.path for header in headers])


# what functions take where they need a model: its path or bundled name, or a model that is open
ModelLike = str | PathLike[str] | Model


def as_model(model: ModelLike) -> Model:
    """Return an open model unchanged; open any other."""
    return model if isinstance(model, Model) else open(model)


def is_checkpoint(path: Path) -> bool:
    """Tell whether `open` treats a path as a checkpoint: a folder, or one file of weights."""
    return path.is_dir() or (path.suffix in WEIGHTS and path.is_file() and not _starts_as_gguf(path))


def _starts_as_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _lazy_tensors(header: Header) -> Iterator[LazyTensor]:
    for info in header.tensors:
        stored = ByteRange(header.path, info.offset, info.nbytes)
        n_bytes = row_bytes(info.qtype, info.shape[-1], name=info.name)
        read = partial(_read_stored, stored, n_bytes, PLAIN_DTYPES.get(info.qtype, np.uint8))
        yield LazyTensor(info.name, info.shape, info.qtype, read, info.offset, header.path)


def _read_stored(stored: ByteRange, row_bytes: int, dtype: type, start: int, stop: int) -> np.ndarray:
    """Read rows in their stored type."""
    raw = stored.read(start * row_bytes, stop * row_bytes)
    return raw.view(dtype).reshape(stop - start, row_bytes // np.dtype(dtype).itemsize)
