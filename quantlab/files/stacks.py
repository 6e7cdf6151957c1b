"""Experts of a checkpoint, stored one by one or fused, seen as GGUF's stacks of matrices.

See `changes.py` for what a source is. A stack has the shape (n_expert, n_out, n_in); its rows are those of all experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from quantlab.files.changes import Changed, Source
from quantlab.quants.ggml_types import block_size, row_bytes

__all__ = ["STACK_CHANGES", "Stacked", "stack_change"]


@dataclass(frozen=True)
class _Stack(Changed):
    """A source whose shape differs from that of the tensors it is made from."""

    def _of_expert(self, expert: int, first: int, last: int) -> np.ndarray:
        """Read rows of one expert."""
        raise NotImplementedError

    def _cuts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (expert, first, last) of the rows `start:stop`, each range within one expert."""
        height = self.shape[-2]
        while start < stop:
            expert, first = divmod(start, height)
            last = min(height, first + stop - start)
            yield expert, first, last
            start += last - first

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows `start:stop` of the tensor seen as (nrows, n_per_row)."""
        parts = [self._of_expert(*cut) for cut in self._cuts(start, stop)]
        return np.concatenate(parts) if parts else self.source.rows(0, 0).reshape(0, -1)[:, : self.shape[-1]]


@dataclass(frozen=True)
class Stacked(_Stack):
    """One matrix per expert, all of one shape, as one tensor; `source` is the first."""

    parts: tuple[Source, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.parts), *self.source.shape)

    def _of_expert(self, expert: int, first: int, last: int) -> np.ndarray:
        return self.parts[expert].rows(first, last)


@dataclass(frozen=True)
class Half(_Stack):
    """The first or the second half of each expert's rows."""

    part: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.source.shape[:-2], self.source.shape[-2] // 2, self.source.shape[-1])

    def _of_expert(self, expert: int, first: int, last: int) -> np.ndarray:
        begin = (2 * expert + self.part) * self.shape[-2]
        return self.source.rows(begin + first, begin + last)


@dataclass(frozen=True)
class Heads(_Stack):
    """Some rows of each head, from row `first` of its `height` on."""

    n_head: int
    height: int
    first: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.n_head, self.size, self.source.shape[-1])

    def _of_expert(self, expert: int, first: int, last: int) -> np.ndarray:
        begin = expert * self.height + self.first
        return self.source.rows(begin + first, begin + last)


@dataclass(frozen=True)
class Every(Half):
    """The even or the odd rows of each expert."""

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.source.rows(2 * start, 2 * stop)[self.part :: 2]


@dataclass(frozen=True)
class Columns(_Stack):
    """Every other number of each row."""

    part: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.source.shape[:-1], self.source.shape[-1] // 2)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return np.ascontiguousarray(self.source.rows(start, stop)[:, self.part :: 2])


@dataclass(frozen=True)
class Transposed(_Stack):
    """The transposed matrix of each expert; the last expert read is cached, as its rows come in pieces."""

    _last: dict = field(default_factory=dict, compare=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.source.shape[:-2], self.source.shape[-1], self.source.shape[-2])

    def _of_expert(self, expert: int, first: int, last: int) -> np.ndarray:
        matrix = self._last.get(expert)
        if matrix is None:
            height = self.source.shape[-2]
            matrix = np.ascontiguousarray(self.source.rows(expert * height, (expert + 1) * height).T)
            self._last.clear()
            self._last[expert] = matrix
        return matrix[first:last]


@dataclass(frozen=True)
class Mxfp4(_Stack):
    """MXFP4 codes and their scales from two tensors, as GGUF's MXFP4 blocks.

    checkpoint: code 2j in the low half of byte j, 2j + 1 in the high one
    GGUF:       the scale, then code j in the low half of byte j, j + 16 in the high one
    """

    scales: Source
    part: int | None = None  # 0: the even rows of each expert, 1: the odd ones

    @property
    def dtype(self) -> str:
        return "MXFP4"

    @property
    def shape(self) -> tuple[int, ...]:
        *lead, height, n_blocks = self.scales.shape
        return (*lead, height if self.part is None else height // 2, n_blocks * block_size("MXFP4"))

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows as uint8 blocks."""
        n_blocks, step = self.scales.shape[-1], 1 if self.part is None else 2
        wanted, first, last = slice(self.part or 0, None, step), step * start, step * stop
        codes = self.source.rows(first * n_blocks, last * n_blocks).reshape(-1, n_blocks, 16)[wanted]
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(-1, n_blocks, 32)
        out = np.empty((stop - start, n_blocks, 17), np.uint8)
        out[..., 0] = self.scales.rows(first, last)[wanted]
        out[..., 1:] = codes[..., :16] | codes[..., 16:] << 4
        return out.reshape(stop - start, row_bytes("MXFP4", n_blocks * block_size("MXFP4")))


STACK_CHANGES = ("half", "every", "columns", "transpose", "head")


def stack_change(source: Source, how: tuple[str, ...], config, where: str) -> Source:
    """Apply a record's change to a stack: one of `STACK_CHANGES`, with the wanted part.

    Raises
    ------
    ValueError
        If the rows are not those of keys and values of all heads, beginning with `where`.
    """
    kind, *part = how
    if kind == "head":
        height, n_nope = config.n_nope + config.head_dim_v, config.n_nope
        if source.shape[0] != config.n_head * height:
            raise ValueError(
                f"{where}: {source.shape[0]} rows are not {config.n_head} heads of {height}. Check its configuration."
            )
        of_heads = source, config.n_head, height
        return Transposed(Heads(*of_heads, 0, n_nope)) if part == ["k"] else Heads(*of_heads, n_nope, config.head_dim_v)
    if kind == "transpose":
        source = Transposed(source)
        return Every(source, int(*part)) if part else source
    return {"half": Half, "every": Every, "columns": Columns}[kind](source, int(*part))
