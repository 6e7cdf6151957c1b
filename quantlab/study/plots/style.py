"""What the figures share: colours, told apart by everybody (Okabe and Ito's), and how a figure is begun and written."""

import io
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from quantlab.files.output import is_picture, replacing
from quantlab.quants.ggml_types import FAMILIES, GGML_TYPES, Family

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"


def new_axes(size: tuple[float, float]) -> Axes:
    """Begin a figure of `size` inches, width and height, whose labels have room."""
    return plt.subplots(figsize=size, layout="constrained")[1]


def by_family(frame: pd.DataFrame, qtypes: pd.Series) -> list[tuple[Family, pd.DataFrame]]:
    """Part the rows of a frame by the family of their types; rows without a type are left out.

    Parameters
    ----------
    frame : pd.DataFrame
    qtypes : pd.Series
        The ggml type of each row, or None.

    Returns
    -------
    list of (Family, pd.DataFrame)
        The families that there are rows of.
    """
    names = qtypes.map({record.name: record.family for record in GGML_TYPES.values()})
    parts = ((family, frame[names == name]) for name, family in FAMILIES.items())
    return [(family, rows) for family, rows in parts if len(rows)]


def save(ax: Axes, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the figure that `ax` belongs to as PNG, small enough for a page on the web.

    Raises
    ------
    FileExistsError
        If the file exists, is not a picture that quantlab wrote, and `overwrite` is false.
    """
    png = io.BytesIO()
    figure: Any = ax.figure  # or a part of one
    figure.savefig(png, format="png", dpi=110, metadata={"Software": "quantlab"})
    with replacing(path, overwrite=overwrite, own=is_picture) as part:
        part.write_bytes(png.getvalue())
    return Path(path)


def panels(rows: int, columns: int, **look) -> np.ndarray:
    """Make a figure of several Axes, as `matplotlib.pyplot.subplots` does, and return them."""
    return plt.subplots(rows, columns, **look)[1]
