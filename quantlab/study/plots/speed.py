"""Figures of speed: types beside each other and beside ggml, and threads."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from quantlab.study.plots.style import BLUE, ORANGE, VERMILION, new_axes, panels

_LOOKS = {"quantlab": (BLUE, "o"), "ggml": (VERMILION, "s")}


def throughput(frame: pd.DataFrame, *, title: str = "", axes: np.ndarray | None = None) -> np.ndarray:
    """Plot the speed of encoding and decoding types, compared with ggml's.

    Parameters
    ----------
    frame : pd.DataFrame
        A row per type, direction, number of threads and library: `type`, `what`, `threads`, `by`, `speed`, `spread` in
        million weights per second, as `quantlab.lab.speed.measure` gives them.
    axes : np.ndarray of Axes, optional
        Where to draw: a row per number of threads, columns for encoding and decoding; a new figure by default.
    """
    counts = sorted(frame["threads"].unique())
    if axes is None:
        look = {"sharex": True, "sharey": "col", "squeeze": False, "layout": "constrained"}
        axes = panels(len(counts), 2, figsize=(11, 0.6 + 2.9 * len(counts)), **look)
        axes[0, 0].figure.suptitle(title)
    order = list(dict.fromkeys(frame["type"]))
    for line, n in zip(axes, counts, strict=True):
        for ax, what in zip(line, ("encode", "decode"), strict=True):
            part = frame[(frame["threads"] == n) & (frame["what"] == what)]
            libraries = [by for by in _LOOKS if by in set(part["by"])]
            for i, by in enumerate(libraries):
                rows = part[part["by"] == by].set_index("type").loc[order]
                colour, marker = _LOOKS[by]
                places = np.arange(len(order)) + (i - (len(libraries) - 1) / 2) * 0.2
                look = {"fmt": marker, "color": colour, "ms": 6, "lw": 1, "capsize": 3, "label": by}
                ax.errorbar(places, rows["speed"], yerr=rows["spread"], **look)
            ax.set_xticks(range(len(order)), order, rotation=45, ha="right")
            ax.set(yscale="log", title=f"{what}, {n} thread{'s' if n > 1 else ''}")
            ax.grid(alpha=0.3, which="both", axis="y")
            ax.grid(alpha=0.3, axis="x")
        line[0].set_ylabel("million weights per second")
    axes[0][0].legend(frameon=False, fontsize=8)
    return axes


def scaling(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot the speedup of all threads over one.

    Parameters
    ----------
    frame : pd.DataFrame
        As for `throughput`; ours alone are drawn.
    """
    ax = ax or new_axes((9, 3.6))
    ours = frame[frame["by"] == "quantlab"]
    most = ours["threads"].max()
    order = list(dict.fromkeys(ours["type"]))
    for i, (what, colour, hatch) in enumerate((("encode", BLUE, ""), ("decode", ORANGE, "//"))):
        part = ours[ours["what"] == what]
        one, many = (part[part["threads"] == n].set_index("type").loc[order] for n in (ours["threads"].min(), most))
        ratio = many["speed"] / one["speed"]
        error = ratio * np.hypot(many["spread"] / many["speed"], one["spread"] / one["speed"])
        look = {"color": colour, "hatch": hatch, "ec": "white", "lw": 0.5, "label": what}
        ax.bar(np.arange(len(order)) + 0.4 * i - 0.2, ratio, 0.4, yerr=error, capsize=2, **look)
    ax.axhline(most, color="0.3", ls="--", lw=1, label=f"{most} times: nothing in the way")
    ax.axhline(1, color="0.3", ls=":", lw=1, label="one thread")
    ax.set_xticks(range(len(order)), order)
    ax.set(ylabel=f"speed of {most} threads over that of one", title=title, ylim=(0, None))
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax
