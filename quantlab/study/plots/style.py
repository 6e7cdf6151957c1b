"""Shared style of the figures: Okabe and Ito's colours, new axes, and writing of files."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from quantlab.files.output import is_picture, replacing
from quantlab.quants.ggml_types import FAMILIES, GGML_TYPES, Family

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"


def new_axes(size: tuple[float, float]) -> Axes:
    """Begin a figure of `size` inches, width and height, whose labels have room."""
    return plt.subplots(figsize=size, layout="constrained")[1]


def by_family(frame: pd.DataFrame, qtypes: pd.Series) -> list[tuple[Family, pd.DataFrame]]:
    """Group the rows of a frame by the family of their types, `qtypes`, without rows that have none."""
    names = qtypes.map({record.name: record.family for record in GGML_TYPES.values()})
    parts = ((family, frame[names == name]) for name, family in FAMILIES.items())
    return [(family, rows) for family, rows in parts if len(rows)]


def label_points(
    ax: Axes, names: Iterable[str], xs: Iterable[float], ys: Iterable[float], others: Iterable[tuple[float, float]] = ()
) -> None:
    """Write each point's name at the nearest free place, with a thin line to the point if it is far.

    Call it last: places depend on the size of the axes and on the legend. `others` are points without names.
    """
    ax.figure.canvas.draw()
    named = list(zip(names, xs, ys, strict=True))
    centres = ax.transData.transform([*((x, y) for _, x, y in named), *others])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in centres]
    if legend := ax.get_legend():
        taken.append(legend.get_window_extent())
    inside = ax.get_window_extent()
    for name, x, y in named:
        for dx, dy in _PLACES:
            far = abs(dx) + abs(dy) > 24
            line = {"arrowstyle": "-", "lw": 0.5, "color": "0.5", "shrinkB": 4} if far else None
            look = {"ha": "left" if dx > 0 else "right" if dx < 0 else "center", "va": "center_baseline", "fontsize": 8}
            look |= {"arrowprops": line, "bbox": _PLAIN}
            label = ax.annotate(name, (x, y), (dx, dy), textcoords="offset points", **look)
            label.set_in_layout(False)
            box = _text_box(label)
            if inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) and not box.count_overlaps(taken):
                break
            label.remove()
        else:
            continue  # no free place: better no label than two on top of each other
        taken.append(box)


_PLAIN = {"fc": "white", "ec": "none", "alpha": 0.7, "pad": 0.5}  # behind a label, so that lines do not cross it
_PLACES = [
    (dx * r, dy * r)
    for r in (1, 1.6, 2.4, 3.4, 4.6)
    for dx, dy in ((7, 0), (-7, 0), (6, 8), (6, -8), (-6, 8), (-6, -8), (0, 10), (0, -10))
]


def _text_box(label: Annotation) -> Bbox:
    """Return the place of a label's text, without its line."""
    label.update_positions(label.figure.canvas.get_renderer())  # pyright: ignore[reportAttributeAccessIssue]
    return Text.get_window_extent(label)


def save(ax: Axes, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the figure of `ax` as a PNG that is small enough for a web page.

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
