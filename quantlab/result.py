"""What all results share: they print as text, show as HTML, become a DataFrame and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


class Result:
    """Base of the results, which are frozen dataclasses.

    With the fields `protocol` and `rows` a subclass needs nothing more. Others say what differs: `_document` what JSON
    holds, `_lines` what stands above the table, `_shown` the table for people, `_look` how pandas writes it.

    A result has a length and can be iterated: rows of its table, as dicts. So `pandas.DataFrame(result)` is that table.
    """

    _look: dict[str, Any] = {"index": False}
    _indent: int | None = None  # of the JSON

    if TYPE_CHECKING:
        protocol: Any
        rows: Any

    def __init_subclass__(cls, **options):
        """Keep the table as what a result shows: `dataclass` writes a `__repr__` only where the class has none."""
        super().__init_subclass__(**options)
        if "__repr__" not in vars(cls):
            cls.__repr__ = Result.__repr__

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a table."""
        import pandas as pd  # takes longer to import than most results to print

        return pd.DataFrame([vars(row) if is_dataclass(row) else row for row in self.rows])

    def to_json(self) -> str:
        """Return `{"schema": 1, "protocol": {…}, "rows": [{…}]}`; what is not a finite number is null."""
        return json.dumps({"schema": 1} | _plain(self._document()), indent=self._indent)

    def _document(self) -> dict[str, Any]:
        return {"protocol": self.protocol, "rows": self.rows}

    def _lines(self) -> list[str]:
        return []

    def _shown(self) -> pd.DataFrame:
        return self.to_frame()

    def __len__(self) -> int:
        return len(self.to_frame())

    def __bool__(self) -> bool:
        return True  # however many rows there are

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.to_frame().to_dict("records"))  # pyright: ignore[reportReturnType]

    def __str__(self) -> str:
        return "\n".join([*self._lines(), self._shown().to_string(**self._look)])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        lines = "<br>".join(map(escape, self._lines()))
        return (f"<p>{lines}</p>" if lines else "") + self._shown().to_html(**self._look)


def _plain(value: Any) -> Any:
    """What JSON knows of a value: dataclasses and frames become dicts, paths texts, NaN and infinity None."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(value, "to_dict"):
        value = value.astype(object).to_dict("records")
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
