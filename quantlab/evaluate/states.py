"""Hidden states between two layers, in memory or in files that outlive the process."""

import json
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

_EMPTY = partial(np.empty, dtype=np.float32)


class HiddenStates:
    """One array [n_chunks, n_ctx, n_state] of float32 per variant, read and written chunk by chunk.

    Without a folder the arrays are in memory, and what `take` gives is changed in place. With one they are in two
    files: a layer reads from one and writes to the other, and `advance` makes the written one current, so that a
    process that is killed within a layer finds the layer's input whole.

    Parameters
    ----------
    n_variants, n_chunks, n_ctx, n_state : int
    folder : Path or None
        Created if missing.
    key : str
        What the states belong to; a folder with the states of another key is refused.
    empty : callable
        `empty(shape)` returns an array for what stays in memory (default: NumPy's).

    Raises
    ------
    ValueError
        If the folder holds the states of another run.
    """

    def __init__(
        self,
        n_variants: int,
        n_chunks: int,
        n_ctx: int,
        n_state: int,
        folder: Path | None = None,
        key: str = "",
        empty: Callable[[tuple[int, ...]], Any] = _EMPTY,
    ):
        self.shape = (n_variants, n_chunks, n_ctx, n_state)
        self.layer, self._files = -1, []  # -1: not even the embeddings are there
        self._folder, self._key, self._array, self._lent = folder, key, None, None
        if folder is None:
            self._array = empty(self.shape)
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self._progress.exists():
            self.layer = self._layer_reached()
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        self._files = [os.open(path, flags, 0o600) for path in self._paths]

    def _layer_reached(self) -> int:
        """Return the layer that an earlier run reached; refuse another run's or program's file."""
        try:
            found = json.loads(self._progress.read_text(encoding="utf-8"))
            if found["key"] == self._key:
                return int(found["layer"])
        except (ValueError, KeyError, TypeError):
            pass
        raise ValueError(f"{self._folder}: holds the states of another run. Give another scratch folder, or delete it.")

    @property
    def _paths(self) -> list[Path]:
        return [self._folder / f"states-{parity}.f32" for parity in (0, 1)]  # pyright: ignore[reportOptionalOperand]

    @property
    def _progress(self) -> Path:
        return self._folder / "progress.json"  # pyright: ignore[reportOptionalOperand]

    def _place(self, variant: int, chunks: slice) -> tuple[int, tuple[int, ...]]:
        """Return byte offset and shape of some chunks of a variant."""
        _, n_chunks, n_ctx, n_state = self.shape
        return 4 * (variant * n_chunks + chunks.start) * n_ctx * n_state, (chunks.stop - chunks.start, n_ctx, n_state)

    def read(self, variant: int, chunks: slice) -> np.ndarray:
        """Return [chunks, n_ctx, n_state] after the current layer, as a view of memory or a copy of a file."""
        if self._array is not None:
            return self._array[variant, chunks]
        offset, shape = self._place(variant, chunks)
        x = np.empty(shape, np.float32)
        read = 0
        while read < x.nbytes:
            count = _read_at(self._files[self.layer % 2], memoryview(x).cast("B")[read:], offset + read)
            if count == 0:
                raise OSError(
                    f"{self._folder}: the file of hidden states is truncated. Delete the folder and start again."
                )
            read += count
        return x

    def take(self, variant: int, source: int, chunks: slice) -> np.ndarray:
        """Return `source`'s [chunks, n_ctx, n_state] after the current layer, for `variant` to change."""
        if self._array is None:
            return self.read(source, chunks)
        self._lent = self._array[variant, chunks]
        if source != variant:
            self._lent[:] = self._array[source, chunks]
        return self._lent

    def write(self, variant: int, chunks: slice, x: np.ndarray) -> None:
        """Store [chunks, n_ctx, n_state] as the next layer's input."""
        if self._array is not None:
            if x is not self._lent:
                self._array[variant, chunks] = x
            return
        offset, written = self._place(variant, chunks)[0], 0
        while written < x.nbytes:
            view = memoryview(x).cast("B")[written:]
            written += _write_at(self._files[(self.layer + 1) % 2], view, offset + written)

    def advance(self) -> None:
        """Make the states written since the last call current."""
        if self._folder is not None:
            os.fsync(self._files[(self.layer + 1) % 2])
            draft = self._progress.with_suffix(".new")
            draft.write_text(json.dumps({"key": self._key, "layer": self.layer + 1}))
            os.replace(draft, self._progress)
        self.layer += 1

    def close(self, *, delete: bool = False) -> None:
        """Close the files; on request, delete them and their folder (if otherwise empty)."""
        for file in self._files:
            os.close(file)
        self._files = []
        if delete and self._folder is not None:
            for path in (*self._paths, self._progress):
                path.unlink(missing_ok=True)
            if not any(self._folder.iterdir()):
                self._folder.rmdir()


_SEEKING = threading.Lock()  # where a system cannot read at a place, no other thread may seek in between


def _read_at(file: int, view: memoryview, offset: int) -> int:
    """Read into `view` from a place in a file; return how many bytes there were."""
    if hasattr(os, "preadv"):
        return os.preadv(file, [view], offset)
    with _SEEKING:
        os.lseek(file, offset, os.SEEK_SET)
        data = os.read(file, len(view))
    view[: len(data)] = data
    return len(data)


def _write_at(file: int, view: memoryview, offset: int) -> int:
    """Write `view` at a place in a file; return how many bytes were written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(file, view, offset)
    with _SEEKING:
        os.lseek(file, offset, os.SEEK_SET)
        return os.write(file, view)
