"""The map of the course as a figure."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from quantlab.study.plots.style import BLUE, new_axes


def prerequisites(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw which notebook comes before which: arrows from left to right.

    Parameters
    ----------
    frame : pd.DataFrame
        Columns `notebook`, `time`, `before` (list of notebooks), each notebook after those before it.
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes
    """
    depth: dict[str, int] = {}
    for row in frame.itertuples():
        depth[row.notebook] = 1 + max((depth[name] for name in row.before), default=-1)
    before = dict(zip(frame["notebook"], frame["before"], strict=True))
    columns = [[name for name in depth if depth[name] == d] for d in range(max(depth.values()) + 1)]
    place: dict[str, tuple[float, float]] = {}
    for x, column in enumerate(columns):  # beside those that they build on, so that few arrows cross
        column.sort(key=lambda name: -np.mean([place[b][1] for b in before[name]] or [0]))
        place |= {name: (x, (len(column) - 1) / 2 - i) for i, name in enumerate(column)}
    ax = ax or new_axes((3 * len(columns), 1 + 0.8 * max(map(len, columns))))
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-max(map(len, columns)) / 2, max(map(len, columns)) / 2))
    ax.axis("off")
    times = dict(zip(frame["notebook"], frame["time"], strict=True))
    look = {"ha": "center", "va": "center", "fontsize": 9, "zorder": 2}
    box = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": BLUE}
    texts = {name: ax.text(*xy, f"{name}\n{times[name]}", bbox=box, **look) for name, xy in place.items()}
    ax.figure.canvas.draw()  # gives the boxes their sizes, at which the arrows end
    for name in place:
        for earlier in before[name]:
            ends = {"patchA": texts[earlier].get_bbox_patch(), "patchB": texts[name].get_bbox_patch()}
            arrow = {"arrowstyle": "-|>", "color": "0.4", "shrinkA": 0, "shrinkB": 2, **ends}
            ax.annotate("", place[name], place[earlier], arrowprops=arrow, zorder=1)
    return ax
