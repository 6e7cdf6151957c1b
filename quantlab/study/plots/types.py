"""Figures of the types: contents of a block, search for its scale, signal to noise ratio."""

from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from quantlab.study.plots.style import (
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    by_family,
    label_points,
    new_axes,
    panels,
)

_SUB_BLOCKS = [BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, "#B8A900", "0.55"]  # then from the beginning
_BLOCK = "0.25"  # colour of what belongs to the whole block
_DARK = (BLUE, GREEN, VERMILION, _BLOCK)  # on which white is easier to read


def bit_map(frame: pd.DataFrame, *, per_row: int = 32, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw the bits of a block, each in the colour of its sub-block, with the name of its field.

    Parameters
    ----------
    frame : pd.DataFrame
        A row per bit: `byte`, `bit`, `field`, `sub_block`, `weight`, `place`, as `quantlab.lab.blocks.bit_map`
        gives them; any range of bytes.
    per_row : int
        Bytes side by side.
    """
    first, lines = frame["byte"].min(), -(-frame["byte"].nunique() // per_row)
    ax = ax or new_axes((11, 0.7 + 1.8 * lines))
    bit: Any  # a row of a table has the columns' types, which no checker sees
    for bit in frame.itertuples():
        line, column = divmod(bit.byte - first, per_row)
        y = 9.4 * line + 7 - bit.bit
        colour = _BLOCK if bit.sub_block < 0 else _SUB_BLOCKS[bit.sub_block % len(_SUB_BLOCKS)]
        pale = 0.35 if bit.field == "code" else 0.6 if bit.field == "m" else 1.0
        ax.add_patch(Rectangle((column, y), 1, 1, fc=colour, ec="white", lw=0.7, alpha=pale))
        name = f"w{bit.weight}" if bit.field == "code" else f"{bit.field}{bit.sub_block if bit.sub_block >= 0 else ''}"
        ink = "white" if pale == 1 and colour in _DARK else "black"
        size = min(8, 1000 / per_row / (len(name) + 1))
        ax.text(column + 0.5, y + 0.5, f"{name}{_small(bit.place)}", ha="center", va="center", fontsize=size, color=ink)
    for column in range(per_row):
        for line in range(lines):
            if first + line * per_row + column <= frame["byte"].max():
                ax.text(column + 0.5, 9.4 * line - 0.15, first + line * per_row + column, ha="center", fontsize=7)
    ticks = [9.4 * line + 7.5 - bit for line in range(lines) for bit in (0, 7)]
    ax.set_yticks(ticks, [f"bit {bit}" for _ in range(lines) for bit in (0, 7)], fontsize=7)
    ax.set(xlim=(0, per_row), ylim=(9.4 * lines - 1.4, -1.2), xticks=[], title=title)
    ax.set_xlabel("byte (above each column); in a cell: what the bit belongs to, and which of its bits it is")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def _small(number: int) -> str:
    """Return a number in subscript."""
    return "".join(chr(0x2080 + int(digit)) for digit in str(number))


def scale_search(
    tries: pd.DataFrame, fine: pd.DataFrame | None = None, *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Plot the search for a scale: the error of each try over its number of levels.

    Parameters
    ----------
    tries : pd.DataFrame
        A row per try, in order: `steps` (levels on the range) and `error`. Of equal steps the first is plain
        rounding, without a fit.
    fine : pd.DataFrame, optional
        The same columns on a finer grid: what lies between the tries.
    """
    ax = ax or new_axes((9, 4.2))
    if fine is not None:
        ax.plot(fine["steps"][1:], fine["error"][1:], color="0.7", lw=1, zorder=1, label="in between, not tried")
    plain, fitted = tries.iloc[0], tries.iloc[1:]
    better = fitted[fitted["error"] < tries["error"].cummin().shift()[1:]]
    chosen = tries.iloc[tries["error"].argmin()]
    ax.plot(plain["steps"], plain["error"], "X", color=VERMILION, ms=10, label="plain rounding, nothing fitted")
    ax.plot(fitted["steps"], fitted["error"], "o", color=BLUE, ms=5, label="tried, scale and minimum fitted")
    ax.plot(better["steps"], better["error"], "o", mfc="none", mec=ORANGE, mew=2, ms=10, label="better than all before")
    ax.plot(chosen["steps"], chosen["error"], "*", color=GREEN, mec="black", ms=16, label="chosen")
    for number, row in enumerate(fitted.itertuples(), 1):
        above = (0, 11 if row.steps == chosen["steps"] else 8)
        ax.annotate(str(number), (row.steps, row.error), above, textcoords="offset points", ha="center", fontsize=7)
    ax.set(xlabel="levels that the range is spread on: 1 / candidate scale × range", ylabel="weighted squared error")
    ax.set(title=title, ylim=(0, None))
    ax.margins(y=0.12)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=8)
    return ax


def block_weights(frame: pd.DataFrame, *, title: str = "", axes: np.ndarray | None = None) -> np.ndarray:
    """Draw the weights of a block between the levels that they could take, and their errors.

    Parameters
    ----------
    frame : pd.DataFrame
        A row per weight: `sub_block`, `x`, `decoded`, `error`, `step`, `lowest`, `highest`, as
        `quantlab.lab.blocks.weights` gives them.
    title : str
        Type and what was lost, by default.
    axes : np.ndarray of Axes, optional
        Where to draw, two Axes; a new figure by default.
    """
    if axes is None:
        axes = panels(2, 1, figsize=(10, 6), sharex=True, height_ratios=(2, 1), layout="constrained")
    top, bottom = axes
    loss = np.square(frame["error"]).mean() ** 0.5
    ratio = 20 * np.log10(np.square(frame["x"]).mean() ** 0.5 / loss) if loss else np.inf
    first = frame.drop_duplicates("sub_block")
    edges = [*first.index, len(frame)]
    row: Any
    for row, left, right in zip(first.itertuples(), edges[:-1], edges[1:], strict=True):
        levels = np.arange(row.lowest, row.highest + row.step / 2, row.step) if row.step else [row.lowest]
        if len(levels) <= 64:
            top.hlines(levels, left - 0.5, right - 0.5, color="0.85", lw=0.6, zorder=0)
        top.fill_between([left - 0.5, right - 0.5], row.lowest, row.highest, color=SKY, alpha=0.15, lw=0, zorder=0)
        bottom.fill_between([left - 0.5, right - 0.5], -row.step / 2, row.step / 2, color=SKY, alpha=0.35, lw=0)
    top.vlines(frame.index, frame["x"], frame["decoded"], color=VERMILION, lw=1)
    top.plot(frame.index, frame["x"], "o", color=BLUE, ms=3, label="weight")
    top.plot(frame.index, frame["decoded"], "_", color=VERMILION, ms=6, label="decoded")
    top.fill_between([], [], color=SKY, alpha=0.3, label="range of the levels (lines: levels)")
    bottom.bar(frame.index, frame["error"], color=VERMILION, width=1)
    bottom.fill_between([], [], color=SKY, alpha=0.5, label="± half a step")
    top.set(ylabel="weight")
    top.set_title(title or f"{frame.attrs['type']}: rms error {loss:.3g}, signal to noise {ratio:.1f} dB")
    bottom.set(ylabel="error", xlabel="weight's place in the block", xlim=(-0.5, len(frame) - 0.5))
    bottom.set_xticks(range(0, len(frame) + 1, 32))
    for ax in axes:
        ax.legend(frameon=False, fontsize=8, ncols=3, loc="upper right")
        ax.margins(y=0.25)
    return axes


def bit_budget(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw the use of each type's bits.

    Parameters
    ----------
    frame : pd.DataFrame
        Index the type; columns `code`, `sc`, `m`, `d`, `dmin` in bits per weight, as
        `quantlab.lab.blocks.budget` gives them.
    """
    ax = ax or new_axes((9, 1.2 + 0.28 * len(frame)))
    parts = (
        ("code", "codes", BLUE, ""),
        ("sc", "sub-blocks' scales", ORANGE, ""),
        ("m", "minima", VERMILION, "//"),
        ("d", "block's scale", GREEN, ".."),
        ("dmin", "scale of the minima", PURPLE, "xx"),
    )
    left = pd.Series(0.0, index=frame.index)
    for column, label, colour, hatch in parts:
        ax.barh(frame.index, frame[column], left=left, color=colour, hatch=hatch, ec="white", lw=0.5, label=label)
        left += frame[column]
    for name, total in left.items():
        ax.text(total + 0.05, name, f"{total:.4g}", va="center", fontsize=8)  # pyright: ignore[reportArgumentType]
    ax.invert_yaxis()
    ax.set(xlabel="bits per weight", title=title, xlim=(0, 1.08 * left.max()))
    ax.legend(frameon=False, fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.22))
    return ax


def snr_against_bits(
    frame: pd.DataFrame, lines: Mapping[str, pd.DataFrame], *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Plot the signal to noise ratio of types over bits per weight, with the theoretical bound.

    Parameters
    ----------
    frame : pd.DataFrame
        A row per type: `type`, `bpw`, `snr_db`.
    lines : mapping
        Label → frame with `bpw` and `snr_db`: bounds and plain quantizers, drawn as lines; points where there are
        fewer than ten.
    """
    ax = ax or new_axes((9, 6))
    looks = [("0.2", "-"), ("0.45", "--"), ("0.45", ":"), (GREEN, "-."), (PURPLE, "--")]
    for (label, line), (colour, style) in zip(lines.items(), looks, strict=False):
        marker = "." if len(line) < 10 else ""
        ax.plot(line["bpw"], line["snr_db"], color=colour, ls=style, lw=1.2, marker=marker, label=label, zorder=1)
    frame = frame[np.isfinite(frame["snr_db"])]  # what loses nothing has no place on the axis
    families = by_family(frame, frame["type"])
    for family, rows in families:
        ax.plot(rows["bpw"], rows["snr_db"], family.marker, color=family.colour, mec="black", ms=8, label=family.label)
    low, high = frame["bpw"].min(), frame["bpw"].max()
    ax.set(xlabel="size (bits per weight)", ylabel="signal to noise ratio (dB)", title=title)
    ax.set(xlim=(low - 0.8, high + 0.8), ylim=(frame["snr_db"].min() - 4, frame["snr_db"].max() + 7))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9, loc="best")
    shown = pd.concat([rows for _, rows in families])
    label_points(ax, shown["type"], shown["bpw"], shown["snr_db"])
    return ax


def by_outlier(frame: pd.DataFrame, *, title: str = "", axes: np.ndarray | None = None) -> np.ndarray:
    """Plot the effect of an outlier on the other weights of its sub-block and of its block.

    Parameters
    ----------
    frame : pd.DataFrame
        A row per type and size: `type`, `size` (rms of the block), `near` and `far` (rms errors over the rms of the
        block), as `quantlab.lab.blocks.outliers` gives them.
    axes : np.ndarray of Axes, optional
        Where to draw, two Axes; a new figure by default.
    """
    if axes is None:
        axes = panels(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
        axes[0].figure.suptitle(title)
    looks = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "D"), (VERMILION, ":", "^"), (PURPLE, "-", "v"))
    for (name, rows), (colour, style, marker) in zip(frame.groupby("type", sort=False), cycle(looks), strict=False):
        for ax, column in zip(axes, ("near", "far"), strict=True):
            ax.plot(rows["size"], rows[column], color=colour, ls=style, marker=marker, ms=4, label=name)
    for ax, where in zip(axes, ("neighbours within the sub-block", "weights of the other sub-blocks"), strict=True):
        ax.set(xlabel="size of the outlier (rms of the block)", title=where, yscale="log")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("rms error (rms of the block)")
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    return axes
