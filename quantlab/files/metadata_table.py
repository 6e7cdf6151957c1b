"""GGUF metadata as a table: long values are shortened, control characters are written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from quantlab.files.gguf_file import Strings

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["metadata_table"]

MAX_SHOWN = 80  # characters of a value
N_ITEMS = 3  # of an array


def metadata_table(metadata: Mapping[str, Any]) -> pd.DataFrame:
    """Return the table of metadata, as `read_header` returns it: key, type, value as short text.

    Examples
    --------
    >>> table = metadata_table({"general.name": "a\\x1b[31m", "tokenizer.ggml.tokens": ["a", "b", "c", "d"]})
    >>> table["value"].tolist()
    ["'a\\\\x1b[31m'", "['a', 'b', 'c', …]"]
    >>> table["type"].tolist()
    ['string', 'string[4]']
    """
    import pandas as pd  # takes longer to import than a header to read

    rows = [(key, _type(value), _shown(value)) for key, value in metadata.items()]
    return pd.DataFrame(rows, columns=["key", "type", "value"])


def _type(value: Any) -> str:
    """Name the type of a value, with the length of an array."""
    if isinstance(value, list | Strings):
        item = "string" if not value or isinstance(value[0], str) else "array"
        return f"{item}[{len(value)}]"
    if isinstance(value, np.ndarray):
        return f"{value.dtype}[{len(value)}]"
    return {str: "string", bool: "bool"}.get(type(value)) or type(value).__name__


def _shown(value: Any) -> str:
    """Return a value as text of at most MAX_SHOWN characters, with control characters written out."""
    if isinstance(value, list | Strings | np.ndarray):
        items = [_shown(item) for item in value[:N_ITEMS]] + ["…"] * (len(value) > N_ITEMS)
        text = f"[{', '.join(items)}]"
    else:
        text = repr(value[: MAX_SHOWN + 1]) if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
