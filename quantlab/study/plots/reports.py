"""Figures of several reports at once: size against divergence by model, and where the divergence is."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from quantlab.study.plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, new_axes

_COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
_MARKERS = "osD^vP"


def kld_by_model(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot the divergence of each variant over its bits per weight, a line for each model.

    Parameters
    ----------
    frame : pd.DataFrame
        Columns `model`, `variant`, `bpw` (bits per weight), `kld_mean`, `kld_se` (nats), as `read_reports` gives them;
        rows that do not diverge, such as bases, are left out.

    Raises
    ------
    ValueError
        If no row diverges.
    """
    shown = frame[frame["kld_mean"] > 0].sort_values("bpw")
    if shown.empty:
        raise ValueError("kld_by_model: no row has a KL divergence above 0. Give the rows of variants.")
    ax = ax or new_axes((8, 5))
    for i, (model, rows) in enumerate(shown.groupby("model", sort=False)):
        look = {"color": _COLOURS[i % 6], "marker": _MARKERS[i % 6], "ms": 5, "lw": 1, "capsize": 3}
        ax.errorbar(rows["bpw"], rows["kld_mean"], yerr=rows["kld_se"], label=model, **look)
        for name, x, y in rows[["variant", "bpw", "kld_mean"]].itertuples(index=False):
            # lines apart, labels apart
            at: dict[str, Any] = {"xytext": (6, 5)} if i % 2 else {"xytext": (-6, -11), "ha": "right"}
            ax.annotate(name, (x, y), **at, textcoords="offset points", fontsize=8, color=look["color"])
    ax.set(xlabel="size (bits per weight)", ylabel="KL divergence (nats per token)", title=title, yscale="log")
    ax.margins(x=0.12)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def kld_by_confidence(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot which part of each variant's divergence is where the base is how sure, as stacked bars.

    Parameters
    ----------
    frame : pd.DataFrame
        Columns `model`, `variant`, `low`, `high` (edges of the base's top probability), `part` (of the divergence), as
        `read_reports(…, what="confidence")` gives them, of one text.

    Raises
    ------
    ValueError
        If there is no row.
    """
    if frame.empty:
        raise ValueError("kld_by_confidence: the frame has no row. Give bins of confidence.")
    names = frame["model"] + ": " + frame["variant"]
    wide = frame.assign(name=names).pivot_table(index="name", columns="low", values="part", sort=False).fillna(0.0)
    wide = wide[sorted(wide.columns)]
    ax, left = ax or new_axes((8, 0.9 + 0.32 * len(wide))), np.zeros(len(wide))
    edges = dict(zip(frame["low"], frame["high"], strict=True))
    shades = np.linspace(0.15, 0.95, len(wide.columns))
    for low, shade in zip(wide.columns, shades, strict=True):
        colour = tuple(1 - shade * (1 - c) for c in (0.0, 0.447, 0.698))
        ax.barh(wide.index, wide[low], left=left, color=colour, label=f"{100 * low:g}–{100 * edges[low]:g} %")
        left += wide[low].to_numpy()
    ax.invert_yaxis()
    ax.set(xlabel="part of the KL divergence", title=title, xlim=(0, 1))
    ax.legend(title="base's top probability", bbox_to_anchor=(1.01, 1), loc="upper left", frameon=False, fontsize=8)
    return ax
