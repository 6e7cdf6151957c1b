"""The map of the course as a figure."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from quantlab.study.plots.style import BLUE


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
    columns = [[name for name in depth if depth[name] == d] for d in range(max(depth.values()) + 1)]
    place = {name: (d, (len(c) - 1) / 2 - i) for d, c in enumerate(columns) for i, name in enumerate(c)}
    if ax is None:
        _, ax = plt.subplots(figsize=(3 * len(columns), 1 + 0.8 * max(map(len, columns))), layout="constrained")
    times = dict(zip(frame["notebook"], frame["time"], strict=True))
    for name, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": BLUE}
        ax.text(x, y, f"{name}\n{times[name]}", ha="center", va="center", fontsize=9, bbox=box, zorder=2)
    arrow = {"arrowstyle": "-|>", "color": "0.4", "shrinkB": 34}
    for row in frame.itertuples():
        for name in row.before:
            ax.annotate("", place[row.notebook], place[name], arrowprops=arrow, zorder=1)
    ax.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-max(map(len, columns)) / 2, max(map(len, columns)) / 2))
    ax.axis("off")
    return ax
