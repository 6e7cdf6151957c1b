"""Unfinished output files: written beside their final names, with a journal for resuming.

For an output ``m.gguf`` there is ``m.gguf.part``, which only ever grows, and ``m.gguf.part.json``: one line that
identifies the job, then one line per tensor, written once the tensor's bytes are in the file. A process that is killed
at any moment leaves a state from which the same job goes on; so does a disk that fills up. Wrong input leaves nothing.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from quantlab.files.output import beside, follow
from quantlab.transform.job import Output

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind
    fcntl = None


_JOURNAL = b'{"identity": '  # how every journal begins


class Unfinished:
    """The unfinished files of one job, as a context manager.

    All outputs have paths. `identity` is what the bytes depend on: a state of another identity is begun again.

    Attributes
    ----------
    records : list[dict]
        One per tensor that is there, those of an earlier run included: ``name``, and ``source``, the source's digest.
    """

    def __init__(self, outputs: Sequence[Output], identity: str):
        self.records: list[dict] = []
        self._outputs = outputs
        self._places = list(_places(outputs))
        self._finals = [follow(output.path) for output in outputs if output.path is not None]
        self._parts = [beside(path, ".part") for path in self._finals]
        self._journal_path = beside(self._finals[0], ".part.json")
        self._head = (json.dumps({"identity": identity}) + "\n").encode()
        self._file: Any = None  # open while its tensors are written
        self._journal: Any = None  # open from `__enter__` to `__exit__`

    def __enter__(self) -> Unfinished:
        self._check_own()
        self._journal = open(self._journal_path, "a+b", buffering=0)
        if fcntl is not None:
            try:
                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._journal.close()
                raise OSError(f"{self._outputs[0].path}: another run is writing it. Wait for it to end.") from None
        self._journal.seek(0)
        self.records = self._survivors(self._journal.read())
        lines = [self._head, *(_line(record) for record in self.records)]
        self._journal.truncate(0)
        self._journal.write(b"".join(lines))
        return self

    def _check_own(self) -> None:
        """Refuse to write if other files have the names of unfinished ones."""
        try:
            with open(self._journal_path, "rb") as file:
                start = file.read(len(_JOURNAL))
            others = [self._journal_path] if start and start != _JOURNAL else []
        except FileNotFoundError:
            others = [part for part in self._parts if os.path.lexists(part)]
        for path in others:
            raise FileExistsError(
                f"{path}: is not an unfinished output of quantlab. Move it, or choose another output."
            )

    def _survivors(self, journal: bytes) -> list[dict]:
        """Return the records of an earlier run whose bytes are in the files."""
        if not journal.startswith(self._head):
            return []
        sizes = [part.stat().st_size if part.exists() else 0 for part in self._parts]
        records = []
        for line, (i, name, _, end) in zip(journal[len(self._head) :].splitlines(True), self._places, strict=False):
            if not line.endswith(b"\n") or json.loads(line)["name"] != name or sizes[i] < end:
                break
            records.append(json.loads(line))
        return records

    def write(self, block: np.ndarray) -> None:
        """Append bytes of the next tensor."""
        if self._file is None:
            self._open_part()
        view = memoryview(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
        while len(view):
            view = view[self._file.write(view) :]  # pyright: ignore[reportOptionalMemberAccess]

    def _open_part(self) -> None:
        """Open the file of the next tensor at its position."""
        i, _, start, _ = self._places[len(self.records)]
        is_first = len(self.records) == 0 or self._places[len(self.records) - 1][0] != i
        self._file = open(self._parts[i], "wb" if is_first else "r+b", buffering=0)
        if is_first:
            self.write(np.frombuffer(self._outputs[i].header, np.uint8))
        self._file.truncate(start)
        self._file.seek(start)

    def finish(self, source: str) -> None:
        """Pad the finished tensor, and record it in the journal."""
        i, name, _, end = self._places[len(self.records)]
        self.write(np.zeros(end - self._file.tell(), np.uint8))
        self.records.append({"name": name, "source": source})
        self._journal.write(_line(self.records[-1]))
        if len(self.records) == len(self._places) or self._places[len(self.records)][0] != i:
            self._file.close()
            self._file = None

    def rename(self) -> None:
        """Give the complete files their final names, the first shard last."""
        for part, output in zip(self._parts, self._outputs, strict=True):
            if not output.steps:  # a vocabulary alone, or a first shard for the metadata
                part.write_bytes(output.header)
        for part, final in list(zip(self._parts, self._finals, strict=True))[::-1]:
            os.replace(part, final)
        self._journal_path.unlink()

    def __exit__(self, kind, error, traceback) -> None:
        for file in (self._file, self._journal):
            if file is not None:
                file.close()
        if isinstance(error, ValueError | TypeError):
            for path in (*self._parts, self._journal_path):
                path.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                f"{self._outputs[0].path}: no space left on the disk after {len(self.records)} of {len(self._places)} "
                f"tensors. Free some space and run the same command again; it resumes there."
            ) from error


class Sink:
    """One output to an object with ``.write``, without a journal for resuming."""

    def __init__(self, file: BinaryIO, output: Output):
        self.records: list[dict] = []
        self._file, self._output, self._at = file, output, 0
        if not output.steps:
            file.write(output.header)

    def write(self, block: np.ndarray) -> None:
        """Append bytes of the next tensor."""
        if not self._at:
            self._at += len(self._output.header)
            self._file.write(self._output.header)
        self._file.write(memoryview(np.ascontiguousarray(block).reshape(-1).view(np.uint8)))
        self._at += block.nbytes

    def finish(self, source: str) -> None:
        """Pad the finished tensor."""
        self._file.write(bytes(-self._at % self._output.alignment))
        self._at += -self._at % self._output.alignment
        self.records.append({"name": self._output.steps[len(self.records)].tensor.name, "source": source})


def _line(record: dict) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _places(outputs: Sequence[Output]):
    """Yield every tensor's output number, name, first byte and end including padding."""
    for i, output in enumerate(outputs):
        start = len(output.header)
        for step in output.steps:
            end = start + -(-step.spec.nbytes // output.alignment) * output.alignment
            yield i, step.tensor.name, start, end
            start = end
