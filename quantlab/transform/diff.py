"""Differences between two model files: metadata, types, shapes, order, bytes and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from quantlab.files.model import Model, as_model
from quantlab.result import Result
from quantlab.transform.compare import Change, Tally, cuts, metadata_changes, read, root_mean_square
from quantlab.transform.inspect import text_table
from quantlab.transform.rules import layer_of, squeezed
from quantlab.transform.slabs import in_order

COLUMNS = ["name", "change", "a", "b", "blocks", "differing", "rmse", "max_abs", "relative"]


@dataclass(frozen=True)
class Difference(Result):
    """The result of `diff`.

    Attributes
    ----------
    a, b : Path
    metadata : tuple[Change, ...]
        Keys that were added, removed or changed.
    tensors : pd.DataFrame
        One row per tensor of either file: `name`, `change` ("", "bytes", "type", "shape", "added", "removed"), type
        and shape in `a` and in `b`, `blocks`, how many of them are `differing`, and from the values `rmse`, `max_abs`,
        `relative` (rmse over the root mean square of a's weights).
    same_order : bool
        Whether the tensors that both have come in the same order.
    """

    a: Path
    b: Path
    metadata: tuple[Change, ...]
    tensors: pd.DataFrame
    same_order: bool

    @property
    def is_same(self) -> bool:
        """True if metadata, tensors and their order are the same."""
        return not self.metadata and self.same_order and not self.tensors["change"].any()

    def to_frame(self) -> pd.DataFrame:
        """Return the table of the tensors."""
        return self.tensors

    def _document(self) -> dict[str, Any]:
        protocol = {"a": self.a, "b": self.b, "same": self.is_same, "same_order": self.same_order}
        return {"protocol": protocol | {"metadata": self.metadata}, "rows": self.tensors}

    def _lines(self) -> list[str]:
        lines = [f"a {str(self.a)!r}", f"b {str(self.b)!r}"]
        if self.is_same:
            return [*lines, f"the same: {len(self.tensors)} tensors and all metadata"]
        counts = self.tensors["change"].replace("", "same").value_counts()
        names = {"bytes": "with other bytes", "type": "of another type", "shape": "of another shape"}
        lines.append("tensors: " + ", ".join(f"{n} {names.get(change, change)}" for change, n in counts.items()))
        if not self.same_order:
            lines.append("order: the tensors are in a different order")
        return lines + self._layout_lines() + [f"metadata {change}" for change in self.metadata]

    def _layout_lines(self) -> list[str]:
        """Describe the differences of layouts: each kind of tensor, its two types, and the layers."""
        changed = self.tensors[self.tensors["change"] == "type"]
        groups: dict[tuple[str, str, str], list[int]] = {}
        for name, a, b in zip(changed["name"], changed["a"], changed["b"], strict=True):
            kind = name if layer_of(name) < 0 else name.split(".", 2)[2]
            groups.setdefault((kind, a.split()[0], b.split()[0]), []).append(layer_of(name))
        return [
            f"layout {kind}: {a} → {b}" + (f" in {len(layers)} layers: {_runs(layers)}" if layers[0] >= 0 else "")
            for (kind, a, b), layers in groups.items()
        ]

    def _shown(self) -> pd.DataFrame:
        return self.tensors[self.tensors["change"] != ""]

    def __str__(self) -> str:
        changed = self._shown()
        return "\n".join(self._lines()) + (f"\n\n{_shown(changed)}" if len(changed) else "")


def diff(a: str | Path | Model, b: str | Path | Model) -> Difference:
    """Compare two models: GGUF files, shards, or checkpoints (as if converted).

    Memory holds a few slabs of rows; the files are read once, tensors that differ in part twice.

    Parameters
    ----------
    a, b : str, Path or Model
        As `quantlab.open` takes them.

    Raises
    ------
    FileNotFoundError
        If there is nothing at a path, or a shard is missing.
    ValueError
        If a file is damaged or of a kind that is not read.

    Examples
    --------
    >>> diff("tiny", "tiny").is_same
    True
    """
    a, b = as_model(a), as_model(b)
    rows = {tensor.name: _row(tensor.name, a, b) for tensor in (*a, *b)}
    pairs = [
        (row, a.tensor(name), b.tensor(name))
        for name, row in rows.items()
        if row["change"] not in ("added", "removed", "shape")
    ]
    for row, tally in _tallies(pairs):
        tensor = a.tensor(row["name"])
        row["blocks"], row["differing"] = tally.n_blocks, tally.differing
        row["rmse"], row["max_abs"] = tally.rmse(tensor.n_weights), tally.largest
        if tally.differing or row["change"]:
            row["change"] = row["change"] or "bytes"
            power = root_mean_square(tensor) if row["rmse"] == row["rmse"] else 0.0
            row["relative"] = row["rmse"] / power if power else float("nan")
    names = [[name for name in model.names if name in a and name in b] for model in (a, b)]
    table = pd.DataFrame(rows.values(), columns=COLUMNS)
    return Difference(a.path, b.path, tuple(metadata_changes(a.metadata, b.metadata)), table, names[0] == names[1])


def _row(name: str, a: Model, b: Model) -> dict:
    """Begin the row of one tensor with the figures of the tensor tables."""
    one, other = (model.tensor(name) if name in model else None for model in (a, b))
    row = {"name": name, "change": "", "blocks": 0, "differing": 0, "relative": 0.0, "rmse": 0.0, "max_abs": 0.0}
    row |= {"a": one and f"{one.qtype} {one.shape}", "b": other and f"{other.qtype} {other.shape}"}
    if one is None or other is None:
        row["change"] = "added" if one is None else "removed"
    elif squeezed(one.shape) != squeezed(other.shape):
        row["change"] = "shape"
    elif one.qtype != other.qtype:
        row["change"] = "type"
    if row["change"] in ("added", "removed", "shape"):
        row |= dict.fromkeys(("rmse", "max_abs", "relative"), float("nan"))
    return row


def _tallies(pairs: list[tuple]) -> Iterator[tuple[dict, Tally]]:
    """Compare the tensors of all pairs, and read the next slabs meanwhile."""
    total = sum(one.nbytes + other.nbytes for _, one, other in pairs)
    qtypes = {row["name"]: (one.qtype, other.qtype) for row, one, other in pairs}
    tally = Tally()
    with tqdm(total=total, unit="B", unit_scale=True, desc="diff") as bar:
        slabs = in_order(read, cuts(((row, one.shape[-1]), one, other) for row, one, other in pairs))
        for (row, n_per_row), one, other, last in slabs:
            tally.add(one, other, qtypes[row["name"]], n_per_row)
            bar.update(one.nbytes + other.nbytes)
            if last:
                yield row, tally
                tally = Tally()


def _runs(numbers: list[int]) -> str:
    """Write 0 1 2 3 7 as 0-3 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return " ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def _shown(table: pd.DataFrame) -> str:
    """Return the table of tensors that differ, for a terminal."""
    shown = table.copy()
    for column in ("rmse", "max_abs", "relative"):
        shown[column] = [f"{value:.3g}" if value == value else "" for value in shown[column]]
    shown["differing"] = [
        f"{n} of {of}" if of else "" for n, of in zip(table["differing"], table["blocks"], strict=True)
    ]
    return text_table(shown.drop(columns="blocks").fillna(""))
