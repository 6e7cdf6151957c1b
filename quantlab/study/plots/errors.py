"""Figures of errors: their size, their tensors, and their places."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from quantlab.study.plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, new_axes, panels

_LINES = [(BLUE, "-"), (ORANGE, "-"), (GREEN, "--"), (VERMILION, "-."), (PURPLE, ":"), (SKY, "-"), ("0.3", "--")]
_MARKERS = "osD^vPX*"


def histograms(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot weights and the errors of some types as overlaid histograms, counts on a logarithmic scale.

    Parameters
    ----------
    frame : pd.DataFrame
        A row per bin: `of` (`weights`, or a type), `left`, `right` (in rms of the weights), `count`, as
        `quantlab.lab.errors.histograms` gives them.
    """
    ax = ax or new_axes((9, 4.5))
    lines = iter(_LINES * 2)
    for name, rows in frame.groupby("of", sort=False):
        edges = [*rows["left"], rows["right"].iloc[-1]]
        if name == "weights":
            ax.stairs(rows["count"], edges, fill=True, color="0.85", label="weights")
        else:
            colour, style = next(lines)
            ax.stairs(rows["count"], edges, color=colour, ls=style, lw=1.5, label=f"errors of {name}")
    ax.set(xlabel="size (rms of the tensor's weights); the outermost bins hold all beyond", ylabel="number of weights")
    ax.set(yscale="log", title=title, ylim=(0.7, None))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    return ax


def code_shares(frame: pd.DataFrame, *, title: str = "", axes: np.ndarray | None = None) -> np.ndarray:
    """Plot the frequency of each code, one panel per type, with the even share as a line.

    Parameters
    ----------
    frame : pd.DataFrame
        A row per type and code: `type`, `code`, `share`, as `quantlab.lab.errors.code_counts` gives them.
    axes : np.ndarray of Axes, optional
        Where to draw, one for each type; a new figure by default.
    """
    groups = list(frame.groupby("type", sort=False))
    if axes is None:
        figsize = (2.6 * len(groups) + 0.6, 3)
        axes = panels(1, len(groups), figsize=figsize, sharey=True, layout="constrained", squeeze=False).reshape(-1)
        axes[0].figure.suptitle(title)
    for ax, (name, rows) in zip(axes, groups, strict=True):
        ax.bar(rows["code"], rows["share"].where(rows["share"] > 0), width=1, color=BLUE, ec="white", lw=0.3)
        ax.axhline(1 / len(rows), color=VERMILION, lw=1.2, ls="--", label="all alike")
        ax.set(title=f"{name}: {len(rows)} codes", xlabel="code", yscale="log")
    axes[0].set_ylabel("share of the weights")
    axes[0].legend(fontsize=8, loc="lower center")
    return axes


def by_layer(frame: pd.DataFrame, value: str, *, ylabel: str, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot a measure of the tensors over the layers, a line per kind of tensor.

    Parameters
    ----------
    frame : pd.DataFrame
        A row per tensor: `layer`, `kind` and `value`; tensors outside the layers (-1) are left out.
    value : str
        Column to plot.
    ylabel : str
        Its meaning and unit.
    """
    ax = ax or new_axes((9, 4))
    inside = frame[frame["layer"] >= 0]
    for i, (kind, rows) in enumerate(inside.groupby("kind")):
        colour, style = _LINES[i % len(_LINES)]
        marker = _MARKERS[i % len(_MARKERS)]
        ax.plot(rows["layer"], rows[value], color=colour, ls=style, marker=marker, ms=5, lw=1.2, label=kind)
    ax.set(xlabel="layer", ylabel=ylabel, title=title)
    ax.xaxis.get_major_locator().set_params(integer=True)  # pyright: ignore[reportCallIssue]
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def percentile_bands(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot the size of errors in each tensor, from the median to the largest.

    Parameters
    ----------
    frame : pd.DataFrame
        A row per tensor: `tensor`, `layer`, `p50`, `p90`, `p99`, `p99.9`, `p100` in rms of the weights, as
        `quantlab.lab.errors.percentiles` gives them.
    """
    ax = ax or new_axes((11, 4.2))
    places = np.arange(len(frame))
    columns = ("p50", "p90", "p99", "p99.9", "p100")
    ax.vlines(places, frame["p50"], frame["p100"], color="0.85", lw=2, zorder=0)
    for column, marker, colour in zip(columns, "osD^X", (BLUE, SKY, GREEN, ORANGE, VERMILION), strict=True):
        label = {"p50": "median", "p100": "largest"}.get(column, f"{column[1:]} %")
        ax.plot(places, frame[column], marker, color=colour, ms=5, label=label)
    starts = np.flatnonzero(~frame["layer"].duplicated())
    names = ["outside" if layer < 0 else str(layer) for layer in frame["layer"].iloc[starts]]
    ax.set_xticks([start - 0.5 for start in starts], [])
    step = -(-len(names) // 16)
    for i, (start, end) in enumerate(zip(starts, [*starts[1:], len(frame)], strict=True)):
        if i % step == 0 or names[i] == "outside":
            ax.text((start + end - 1) / 2, -0.03, names[i], ha="center", va="top", transform=ax.get_xaxis_transform())
    ax.set(ylabel="magnitude of the error (rms of the weights)", title=title, yscale="log")
    ax.set_xlabel("tensors, by layer", labelpad=16)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def error_map(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw the places of a tensor's errors, with the rms of rows and columns at the sides.

    Parameters
    ----------
    frame : pd.DataFrame
        rms of the errors in the cells of a grid, as `quantlab.lab.errors.error_map` gives it.
    """
    ax = ax or new_axes((8, 6))
    values = frame.to_numpy()
    edges = [
        np.append(axis, 2 * axis[-1] - axis[-2] if len(axis) > 1 else axis[-1] + 1)
        for axis in (frame.columns.to_numpy(), frame.index.to_numpy())
    ]
    shown = np.maximum(values, values[values > 0].min()) if values.any() else values + 1
    image = ax.pcolormesh(*edges, shown, cmap="cividis", norm=LogNorm(), rasterized=True)
    ax.invert_yaxis()
    ax.set(xlabel="column (input)", ylabel="row (output)")
    top = ax.inset_axes((0, 1.03, 1, 0.18), sharex=ax)
    side = ax.inset_axes((1.03, 0, 0.18, 1), sharey=ax)
    top.stairs(np.sqrt(np.square(values).mean(axis=0)), edges[0], color=BLUE)
    side.stairs(np.sqrt(np.square(values).mean(axis=1)), edges[1], color=BLUE, orientation="horizontal")
    top.set(title=title, ylabel="rms", ylim=(0, None))
    side.set(xlabel="rms", xlim=(0, None))
    top.tick_params(labelbottom=False)
    side.tick_params(labelleft=False)
    side.locator_params(axis="x", nbins=2, prune="lower")
    ax.figure.colorbar(image, ax=ax, label="rms error in a cell (rms of the weights)", pad=0.24)
    return ax


def against_tails(frame: pd.DataFrame, *, title: str = "", axes: np.ndarray | None = None) -> np.ndarray:
    """Plot the signal to noise ratio of each tensor over two measures of its tails: kurtosis and crest.

    Parameters
    ----------
    frame : pd.DataFrame
        A row per tensor and type: `type`, `kurtosis`, `crest`, `snr_db`.
    axes : np.ndarray of Axes, optional
        Where to draw, two Axes; a new figure by default.
    """
    if axes is None:
        axes = panels(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
        axes[0].figure.suptitle(title)
    for i, (name, rows) in enumerate(frame.groupby("type", sort=False)):
        look = {"color": _LINES[i % len(_LINES)][0], "marker": _MARKERS[i % len(_MARKERS)], "ls": "", "ms": 5}
        for ax, column in zip(axes, ("kurtosis", "crest"), strict=True):
            ax.plot(rows[column], rows["snr_db"] - rows["snr_db"].median(), alpha=0.7, label=name, **look)
    if frame["kurtosis"].max() > 10:
        axes[0].set_xscale("symlog", linthresh=1)
    axes[0].set(xlabel="excess kurtosis of the tensor (0: normal)", ylabel="SNR less the type's median (dB)")
    axes[1].set_xlabel("crest: rms of the blocks' largest over rms of all")
    axes[1].legend(frameon=False, fontsize=8)
    for ax in axes:
        ax.grid(alpha=0.3)
    return axes
