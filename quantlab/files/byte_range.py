"""Byte ranges of files, read with plain reads: a file that shrank raises, and a memory map would crash."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.lib.stride_tricks import as_strided

from quantlab.quants.ggml_types import GGML_TYPES

__all__ = ["PLAIN_DTYPES", "STORED_DTYPES", "ByteRange", "StoredTensor", "StridedTensor"]

# ggml types whose rows are plain numbers; rows of every other type are uint8 blocks
PLAIN_DTYPES = {record.name: np.dtype(record.dtype).type for record in GGML_TYPES.values() if record.dtype}
# of a checkpoint's tensors: bytes hold codes of a packed one, FP8 needs scales
STORED_DTYPES = PLAIN_DTYPES | {"U8": np.uint8, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


@dataclass(frozen=True)
class ByteRange:
    """A range of `nbytes` bytes of the file `path` that begins at `offset`."""

    path: Path
    offset: int
    nbytes: int

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read bytes `start:stop` of the range.

        Returns
        -------
        np.ndarray [shape=(stop - start,), dtype=uint8]
            Freshly allocated.

        Raises
        ------
        ValueError
            If the range lies outside the stretch, or the file ends before it.
        """
        stop = self.nbytes if stop is None else stop
        if not 0 <= start <= stop <= self.nbytes:
            raise ValueError(
                f"{self.path}: bytes {start}:{stop} lie outside the {self.nbytes} bytes of this tensor. "
                f"Open the file again."
            )
        out = np.empty(stop - start, np.uint8)
        view, done = memoryview(out), 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset + start)
            while done < len(out):
                got = file.readinto(view[done:])
                if not got:
                    raise ValueError(
                        f"{self.path}: file ends at byte {self.offset + start + done}, "
                        f"{len(out) - done} bytes too early. Download or write it again."
                    )
                done += got
        return out


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of plain numbers in a checkpoint's file, in C order.

    `dtype` is a key of `STORED_DTYPES`; a scalar has shape `(1,)`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: ByteRange

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows `start:stop` of the tensor seen as (nrows, n_per_row)."""
        number = np.dtype(STORED_DTYPES[self.dtype])
        row_bytes = self.shape[-1] * number.itemsize
        return self.data.read(start * row_bytes, stop * row_bytes).view(number).reshape(stop - start, self.shape[-1])

    @property
    def nrows(self) -> int:
        """Number of rows of `shape[-1]` values."""
        return prod(self.shape[:-1])


@dataclass(frozen=True)
class StridedTensor(StoredTensor):
    """A matrix or vector with gaps between its values; `strides` counts values per row and column.

    `data` reaches from the first value to the last.
    """

    strides: tuple[int, int]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows `start:stop` of the tensor seen as (nrows, n_per_row), and skip the gaps."""
        number, n_per_row = np.dtype(PLAIN_DTYPES[self.dtype]), self.shape[-1]
        down, across = (stride * number.itemsize for stride in self.strides)
        if start == stop:
            return np.empty((0, n_per_row), number)
        end = (stop - 1) * down + (n_per_row - 1) * across + number.itemsize
        values = self.data.read(start * down, end).view(number)
        return np.ascontiguousarray(as_strided(values, (stop - start, n_per_row), (down, across)))
