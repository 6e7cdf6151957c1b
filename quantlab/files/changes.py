"""Changes that a converter applies to a checkpoint's tensors; each is a tensor that yields changed rows.

A source has `shape`, `dtype` (a key of `PLAIN_DTYPES`), `nrows` and `rows(start, stop)`, as a stored tensor has.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Protocol

import numpy as np

__all__ = ["Added", "Changed", "Joined", "Permuted", "Source", "change"]


class Source(Protocol):
    """A tensor of a checkpoint, stored or changed."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows `start:stop` of the tensor seen as (nrows, n_per_row)."""
        ...

    @property
    def nrows(self) -> int:
        """Number of rows of `shape[-1]` values."""
        return prod(self.shape[:-1])


@dataclass(frozen=True)
class Changed(Source):
    """A source made from another one of the same shape and type."""

    source: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> str:
        return self.source.dtype


@dataclass(frozen=True)
class Permuted(Changed):
    """The rows or biases of q or k, reordered in each head from halves (Hugging Face) to pairs (GGUF)."""

    n_head: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        if start == stop:
            return self.source.rows(start, stop)
        if len(self.source.shape) == 1:
            return self.source.rows(start, stop).reshape(self.n_head, 2, -1).swapaxes(1, 2).reshape(1, -1)
        head_dim = self.source.nrows // self.n_head
        heads = -(-start // head_dim) * head_dim, stop // head_dim * head_dim  # whole ones lie between these
        cuts = sorted({start, *(cut for cut in heads if start < cut < stop), stop})
        parts = [self._pairs(first, last, head_dim) for first, last in pairwise(cuts)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _pairs(self, start: int, stop: int, head_dim: int) -> np.ndarray:
        """Read the rows of whole heads, or the needed part of both halves of one large head."""
        head = start // head_dim * head_dim
        if start == head and stop % head_dim == 0:
            halves = self.source.rows(start, stop).reshape(-1, 2, head_dim // 2, self.source.shape[-1])
        else:
            low, high = (start - head) // 2, -(-(stop - head) // 2)
            halves = np.stack([self.source.rows(at + low, at + high) for at in (head, head + head_dim // 2)])[None]
        pairs = halves.swapaxes(1, 2).reshape(-1, self.source.shape[-1])
        skipped = (start - head) % 2
        return pairs[skipped : skipped + stop - start]


@dataclass(frozen=True)
class Added(Changed):
    """Values plus a number, added in float16 for float16 values (as torch does), else in float32."""

    number: float

    @property
    def dtype(self) -> str:
        return "F16" if self.source.dtype == "F16" else "F32"

    def rows(self, start: int, stop: int) -> np.ndarray:
        number = np.float16 if self.dtype == "F16" else np.float32
        return self.source.rows(start, stop).astype(number) + number(self.number)


@dataclass(frozen=True)
class Tiled(Changed):
    """The last rows, columns or values, reordered so that heads of v alternate between the heads of k."""

    order: tuple[int, ...]
    is_columns: bool
    is_decay: bool  # -e^x

    @property
    def shape(self) -> tuple[int, ...]:
        # a convolution's [n, 1, size]
        return tuple(size for i, size in enumerate(self.source.shape) if size > 1 or i == 0)

    @property
    def dtype(self) -> str:
        return "F32" if self.is_decay and self.source.dtype != "F16" else self.source.dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        if len(self.shape) == 1 or self.is_columns:
            rows = np.ascontiguousarray(self.source.rows(start, stop)[:, self.order])
            width = np.float16 if self.dtype == "F16" else np.float32  # as torch, see `Added`
            return -np.exp(rows.astype(np.float64)).astype(width) if self.is_decay else rows
        first = self.shape[0] - len(self.order)  # rows before it keep their order
        return _rows_at(self.source, [i if i < first else first + self.order[i - first] for i in range(start, stop)])


@dataclass(frozen=True)
class Picked(Changed):
    """Some rows, in an order of their own."""

    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.order), *self.source.shape[1:])

    def rows(self, start: int, stop: int) -> np.ndarray:
        return _rows_at(self.source, self.order[start:stop])


def _rows_at(source: Source, index: Sequence[int]) -> np.ndarray:
    """Read rows by their numbers, neighbours together."""
    cuts = [0, *(i for i in range(1, len(index)) if index[i] != index[i - 1] + 1), len(index)]
    parts = [source.rows(index[a], index[b - 1] + 1) for a, b in pairwise(cuts) if a < b]
    return np.concatenate(parts) if parts else source.rows(0, 0)


@dataclass(frozen=True)
class Joined(Source):
    """The parts of one tensor, joined: axis 0 stacks rows, axis 1 lengthens them."""

    parts: tuple[Source, ...]
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.axis] = sum(part.shape[self.axis] for part in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    def rows(self, start: int, stop: int) -> np.ndarray:
        if self.axis == 1:
            return np.concatenate([part.rows(start, stop) for part in self.parts], axis=1)
        blocks, first = [], 0
        for part in self.parts:
            low, high = (min(max(row - first, 0), part.nrows) for row in (start, stop))
            blocks.append(part.rows(low, high))
            first += part.nrows
        return np.concatenate(blocks)


def change(source: Source, how: tuple[str, ...], config, where: str) -> Source:
    """Apply the change that an architecture's record asks for to a tensor.

    `how` is `change` of the tensor's record, empty for none; `config` gives the sizes that it names. `where` starts the
    error text.

    Raises
    ------
    ValueError
        If the rows do not divide into heads.
    """
    if not how:
        return source
    kind, argument = how
    if kind == "add":
        return Added(source, float(argument))
    if kind == "part":
        height = config.conv_width + config.ssm_inner
        if source.shape[0] != height:
            raise ValueError(
                f"{where}: {source.shape[0]} rows are not {height}, those of q, k, v and z. Check its configuration."
            )
        return Picked(source, _part_of_groups(config, argument))
    if kind in ("decay", "squeeze"):
        return Tiled(source, tuple(range(source.shape[0])), False, kind == "decay")
    if kind.startswith("tile"):
        size = int(argument) if argument.isdecimal() else getattr(config, argument)
        order = np.arange(config.ssm_heads * size).reshape(config.ssm_groups, -1, size).swapaxes(0, 1).reshape(-1)
        return Tiled(source, tuple(order.tolist()), kind == "tile_columns", kind == "tile_decay")
    n_head = getattr(config, argument)
    if source.shape[0] % (2 * n_head):
        raise ValueError(
            f"{where}: {source.shape[0]} rows cannot be split into {n_head} heads. "
            f"Check num_attention_heads in config.json."
        )
    return Permuted(source, n_head)


def _part_of_groups(config, part: str) -> tuple[int, ...]:
    """Return the rows of q, k and v, or of z, where they lie group by group: q, k, v and z of each head of k."""
    values = config.ssm_heads // config.ssm_groups * config.ssm_value
    sizes = {"q": config.ssm_state, "k": config.ssm_state, "v": values, "z": values}
    starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    firsts = range(0, config.ssm_groups * sum(sizes.values()), sum(sizes.values()))
    return tuple(at + starts[name] + i for name in part for at in firsts for i in range(sizes[name]))
