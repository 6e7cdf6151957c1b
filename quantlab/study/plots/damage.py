"""Figures of damage: size against perplexity and divergence."""

import re

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from quantlab.study.plots.style import BLUE, VERMILION, by_family, label_points, new_axes
from quantlab.study.tables import pareto
from quantlab.transform.mixture import FTYPES

_RULE_SETS = ((BLUE, "o", "-"), (VERMILION, "s", "--"))  # colour, marker and line of each curve


def bpw_against_ppl(
    frame: pd.DataFrame, *, published: pd.DataFrame | None = None, title: str = "", ax: Axes | None = None
) -> Axes:
    """Plot the perplexity of each ftype over bits per weight.

    The bars are one standard error of the difference from the unquantized model. The band is the error of the model's
    own perplexity, which moves all points together.

    Parameters
    ----------
    frame : pd.DataFrame
        Columns `ftype`, `bpw` (bits per weight), `ppl`, `ppl_se`, `delta_ppl`, `delta_ppl_se`. Rows without a
        perplexity and rows of unquantized types are left out.
    published : pd.DataFrame, optional
        Points of another model: `ftype`, `bpw`, `ppl`, `delta_ppl`. The axis is then the increase in percent.

    Raises
    ------
    ValueError
        If no quantized row has a perplexity.
    """
    frame = frame[frame["ppl"].notna()]
    families = by_family(frame, frame["ftype"].map(_base_type))
    shown = pd.concat([frame.head(0), *(rows for _, rows in families)])
    if shown.empty:
        raise ValueError("bpw_against_ppl: needs a quantized row with a perplexity. Measure the model first.")
    ax = ax or new_axes((8, 5))
    base, error = shown["ppl"].iloc[0] - shown["delta_ppl"].iloc[0], shown["ppl_se"].min()
    marks: list[tuple[float, float]] = []
    zero, unit = (0, 1) if published is None else (base, 100 / base)  # perplexity, or its increase in percent
    for family, rows in families:
        look = {"fmt": family.marker, "color": family.colour, "ms": 5, "lw": 1, "capsize": 3}
        bars = rows["delta_ppl_se"] * unit
        heights = (rows["ppl"] - zero) * unit
        ax.errorbar(rows["bpw"], heights, yerr=bars, label=family.label, **look)
        for step in np.linspace(-1, 1, 9):  # no label on a bar
            marks += zip(rows["bpw"], heights + step * bars, strict=True)
    if published is not None:
        others = published[published["ftype"].map(_base_type).notna() & published["ppl"].notna()]
        increase = 100 * others["delta_ppl"] / (others["ppl"] - others["delta_ppl"])
        marks += zip(others["bpw"], increase, strict=True)
        ax.plot(others["bpw"], increase, "D", mfc="none", mec="0.35", ms=6, label="LLaMA-7B, published by llama.cpp")
        ax.set_yscale("symlog", linthresh=1)
        ax.yaxis.set_major_formatter("{x:g}")
    centre = (base - zero) * unit
    ax.axhline(centre, color="0.4", lw=1, ls="--", label=f"unquantized: {base:.2f} ± {error:.2f}")
    ylabel = "perplexity" if published is None else "increase of the perplexity (%)"
    ax.set(xlabel="size (bits per weight)", ylabel=ylabel, title=title, ylim=ax.get_ylim())
    ax.axhspan(centre - error * unit, centre + error * unit, color="0.92", zorder=0)  # does not stretch the axis
    ax.margins(x=0.09)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    label_points(ax, shown["ftype"], shown["bpw"], (shown["ppl"] - zero) * unit, marks)
    return ax


def size_against_kld(frame: pd.DataFrame, *, by: str = "rules", title: str = "", ax: Axes | None = None) -> Axes:
    """Plot the damage of each ftype over its size, with the Pareto front of each rule set or other group.

    Parameters
    ----------
    frame : pd.DataFrame
        Columns `rules`, `ftype`, `bpw` (bits per weight), `kld_mean`, `kld_se` (nats). Rows that are no quantized type
        or have no divergence are left out; a ftype that is the same by both rule sets is drawn once.
    by : str
        The column to group by, in place of `rules`: of two values.

    Raises
    ------
    ValueError
        If no quantized row has a KL divergence.
    """
    shown = frame[frame["ftype"].map(_base_type).notna() & (frame["kld_mean"] > 0)]
    if shown.empty:
        raise ValueError("size_against_kld: needs a quantized row with a KL divergence. Measure the model first.")
    points = shown.drop_duplicates(["ftype", "bpw"])
    ax = ax or new_axes((8, 5))
    for (group, rows), (colour, marker, line) in zip(shown.groupby(by, sort=False), _RULE_SETS, strict=False):
        front, new = pareto(rows, "bpw"), points[points[by] == group]
        look = {"fmt": marker, "color": colour, "ms": 5, "lw": 1, "capsize": 3}
        ax.errorbar(new["bpw"], new["kld_mean"], yerr=new["kld_se"], label=f"{by} {group}", **look)
        ax.plot(front["bpw"], front["kld_mean"], color=colour, lw=1, ls=line, label=f"Pareto front, {by} {group}")
    ax.set(xlabel="size (bits per weight)", ylabel="KL divergence (nats per token)", title=title, yscale="log")
    ax.margins(x=0.09)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    label_points(ax, points["ftype"], points["bpw"], points["kld_mean"])
    return ax


def _base_type(name: str) -> str | None:
    """Return the base type of a variant's ftype, `Q4_K` of `Q4_K_M+imatrix` (None: not quantized)."""
    ftype = FTYPES.get(re.split(r"\W", name)[0])
    return ftype.qtype if ftype and ftype.is_quantized else None
