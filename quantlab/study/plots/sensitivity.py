"""Figures of single changes: maps of damage, additivity, the rule for more bits, the proxy."""

from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from quantlab.study.plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, new_axes

_LOOKS = list(zip((BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, "0.3", "0.6"), "os^DvPX*", strict=True))


def damage_map(frame: pd.DataFrame, *, index: str, columns: str, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot damage as a map: one field per pair, its colour on a logarithmic scale.

    Parameters
    ----------
    frame : pd.DataFrame
        Rows of `Sensitivity.to_frame`, one per pair of `index` and `columns`. A `delta_kld` that is not above zero is
        left white.
    index, columns : str
        Columns of the frame: what goes down, what goes across, in order of appearance.
    """
    table = frame.pivot(index=index, columns=columns, values="delta_kld")
    table = table.loc[frame[index].unique(), frame[columns].unique()]
    shown = np.ma.masked_invalid(table.where(table > 0).to_numpy(float))
    ax = ax or new_axes((2.5 + 0.75 * table.shape[1], 1.3 + 0.3 * len(table)))
    image = ax.imshow(shown, norm=LogNorm(shown.min(), shown.max()), cmap="cividis", aspect="auto")
    ax.set_xticks(range(table.shape[1]), table.columns, rotation=0 if table.shape[1] < 8 else 45)
    ax.set_yticks(range(len(table)), table.index)
    middle = np.sqrt(shown.min() * shown.max())
    for y, x in zip(*np.nonzero(~np.ma.getmaskarray(shown)), strict=True):
        colour = "black" if shown[y, x] > middle else "white"
        ax.text(x, y, _short(float(shown[y, x])), ha="center", va="center", fontsize=7, color=colour)
    ax.set(xlabel=_NAMES.get(columns, columns), ylabel=_NAMES.get(index, index), title=title)
    ax.figure.colorbar(image, ax=ax, label="KL divergence (nats per token)")
    return ax


_NAMES = {"qtype": "type", "group": "changed", "kind": "kind of tensor"}


def _short(value: float) -> str:
    """Return a number with two digits and an exponent: 1.2e-4."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def additivity(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot the sum of single damages over the damage of all changes at once.

    Parameters
    ----------
    frame : pd.DataFrame
        Index: types. Column `joint`: the damage of everything at that type. Every other column: the sum of the damages
        of the parts into which the model was cut. Nats per token.
    """
    ax = ax or new_axes((7, 4.5))
    for (colour, marker), name in zip(cycle(_LOOKS), frame.columns.drop("joint"), strict=False):
        ax.plot(frame["joint"], frame[name] / frame["joint"], marker=marker, color=colour, lw=1, ms=5, label=name)
    for qtype, joint in frame["joint"].items():
        place = {"xycoords": ax.get_xaxis_transform(), "xytext": (0, 5), "textcoords": "offset points"}
        ax.annotate(str(qtype), (joint, 0), **place, ha="center", fontsize=8, color="0.3")
    ax.axhline(1, color="0.4", lw=1, ls="--")
    ax.set(xscale="log", xlabel="KL divergence of all changes at once (nats per token)", title=title)
    ax.set_ylabel("sum of the single divergences / joint divergence")
    ax.margins(x=0.1, y=0.12)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def more_bits(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot the gain per byte of widening each tensor, and whether rule or measurement picks it.

    Parameters
    ----------
    frame : pd.DataFrame
        As `quantlab.lab.more_bits.more_bits` returns it.
    """
    ax = ax or new_axes((8, 5))
    kinds = list(frame["kind"].unique())
    for (colour, marker), kind in zip(cycle(_LOOKS), kinds, strict=False):
        rows = frame[(frame["kind"] == kind) & (frame["gain_per_kib"] > 0)]
        x = rows["layer"] + (kinds.index(kind) - len(kinds) / 2) * 0.08
        ax.plot(x, rows["gain_per_kib"], marker, color=colour, ms=5, label=kind)
        for who, size, width in (("rule", 130, 1.5), ("measured", 230, 0.8)):
            ring = rows[who]
            edge = "black" if who == "rule" else GREEN
            ax.scatter(x[ring], rows["gain_per_kib"][ring], s=size, facecolors="none", edgecolors=edge, lw=width)
    ax.scatter([], [], s=130, facecolors="none", edgecolors="black", lw=1.5, label="the rule picks it")
    ax.scatter([], [], s=230, facecolors="none", edgecolors=GREEN, lw=0.8, label="the measurement picks it")
    ax.set(yscale="log", xlabel="layer", ylabel="divergence taken away per KiB added (nats per token)", title=title)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8, labelspacing=1.3, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def error_against_damage(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot measured damage over the proxy, a colour per kind of tensor.

    Parameters
    ----------
    frame : pd.DataFrame
        Columns `kind`, `error` (weighted squared error) and `delta_kld` (nats per token).
    """
    ax = ax or new_axes((8, 4.5))
    shown = frame[(frame["error"] > 0) & (frame["delta_kld"] > 0)]
    looks = [*_LOOKS, ("black", "1")]
    for (colour, marker), (kind, rows) in zip(cycle(looks), shown.groupby("kind", sort=False), strict=False):
        ax.plot(rows["error"], rows["delta_kld"], marker, color=colour, ms=4, label=kind)
    ax.set(xscale="log", yscale="log", title=title, ylabel="KL divergence (nats per token)")
    ax.set_xlabel("weighted squared error of the weights (the proxy)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax
