"""Contents of a model: metadata, types and sizes of its tensors, and the mixture that chose the types."""

from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from quantlab.files.metadata_table import metadata_table
from quantlab.files.model import Model, open
from quantlab.result import Result
from quantlab.transform.mixture import FTYPES, RULES, Ftype, choose_types
from quantlab.transform.rules import RULE_SETS

__all__ = ["Inspection", "inspect", "mixtures", "text_table"]


@dataclass(frozen=True)
class Inspection(Result):
    """The result of `inspect`.

    Attributes
    ----------
    model : Model
    mixtures : tuple of dict
        `ftype`, `rules`, `imatrix` of every mixture that gives each tensor the type it has; first the one that the
        file names in `general.file_type`. Small models leave several; empty where no mixture fits.
    """

    model: Model
    mixtures: tuple[dict[str, Any], ...]

    @cached_property
    def types(self) -> pd.DataFrame:
        """Table of the ggml types: tensors, n_weights, bytes, bpw (bits per weight)."""
        table = self.model.tensors.groupby("qtype", sort=False)
        table = table.agg(tensors=("name", "size"), n_weights=("n_weights", "sum"), bytes=("bytes", "sum"))
        return table.assign(bpw=8 * table["bytes"] / table["n_weights"]).sort_values("bytes", ascending=False)

    def to_frame(self) -> pd.DataFrame:
        """Return the table of the tensors."""
        return self.model.tensors

    def _document(self) -> dict[str, Any]:
        protocol = {"model": self.model.path, "n_weights": self.model.n_weights, "bytes": self.model.nbytes}
        protocol |= {"bpw": self._bpw, "mixtures": self.mixtures, "metadata": metadata_table(self.model.metadata)}
        return {"protocol": protocol, "rows": self.model.tensors}

    @property
    def _bpw(self) -> float:
        return 8 * self.model.nbytes / max(self.model.n_weights, 1)

    def _lines(self) -> list[str]:
        model = self.model
        named = [f"{m['ftype']}, rules {m['rules']}{', with imatrix' * m['imatrix']}" for m in self.mixtures]
        return [
            repr(str(model.path))[1:-1],
            f"{model.n_weights:,} weights, {model.nbytes:,} bytes, {self._bpw:.4f} bits per weight",
            f"mixture: {' · '.join(named) or 'unknown'}",
        ]

    def __str__(self) -> str:
        tables = (self.types.reset_index(), metadata_table(self.model.metadata), self.model.tensors)
        return "\n\n".join(["\n".join(self._lines()), *map(text_table, tables)])

    def _repr_html_(self) -> str:
        lines = "<br>".join(map(escape, self._lines()))
        return f"<p>{lines}</p>{self.types.to_html()}{self.model._repr_html_()}"


def text_table(table: pd.DataFrame) -> str:
    """Return a table as text, numbers aligned to the right, other cells to the left."""
    table = table.dropna(axis="columns", how="all")  # tensors of a checkpoint have no offset
    shown = {key: column.map("{:.4f}".format if column.dtype == float else str) for key, column in table.items()}
    lines = []
    for key, column in shown.items():
        width = max([len(key), *map(len, column)])  # pyright: ignore[reportArgumentType]
        align = ">" if pd.api.types.is_numeric_dtype(table[key]) else "<"
        lines.append([f"{cell:{align}{width}}" for cell in (key, *column)])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*lines, strict=True))


def inspect(path: str | Path) -> Inspection:
    """Inspect a GGUF file or a checkpoint, without reading any weights.

    Parameters
    ----------
    path : str or Path
        As `quantlab.open` takes it.

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`, or a shard is missing.
    ValueError
        If the file is damaged or of a kind that is not read.
    """
    model = open(path)
    return Inspection(model, tuple(mixtures(model)))


def mixtures(model: Model) -> list[dict[str, Any]]:
    """Find the mixtures that give every tensor its type."""
    has = {tensor.name: tensor.qtype for tensor in model}
    found = []
    for ftype, rules, imatrix in product(FTYPES.values(), RULES, (False, True)):
        if rules not in ftype.rules or not _may_be(ftype, set(has.values())):
            continue
        try:
            choices = choose_types(model.hparams, model.shapes, ftype.name, rules=rules, imatrix=imatrix, source=has)
        except ValueError:
            continue  # unknown to this rule set, or not a model
        same = all(choice.qtype == has[name] for name, choice in choices.items())
        known = {"ftype": ftype.name, "rules": rules, "imatrix": False}
        if same and known not in found:  # the matrix is spoken of only where it makes a difference
            found.append(known | {"imatrix": imatrix})
    return sorted(found, key=lambda mixture: FTYPES[mixture["ftype"]].number != model.ftype)


def _may_be(ftype: Ftype, types: set[str]) -> bool:
    """Tell whether a file of these types can have a ftype: its base type, or the fallback, is among them."""
    return not types.isdisjoint({ftype.qtype, *(rules.fallback.get(ftype.qtype) for rules in RULE_SETS.values())})
