"""Figures of what quantization costs: size against perplexity and divergence."""

import re

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from quantlab.study.plots.style import BLUE, VERMILION, by_family, new_axes
from quantlab.study.tables import pareto
from quantlab.transform.mixture import FTYPES

_RULE_SETS = ((BLUE, "o", "-"), (VERMILION, "s", "--"))  # colour, marker and line of each curve


def bpw_against_ppl(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot what each ftype costs: perplexity over bits per weight.

    The bars are one standard error of the difference from the model as it is, the band is that of the model's own
    perplexity: it moves all points together.

    Parameters
    ----------
    frame : pd.DataFrame
        Columns `ftype`, `bpw` (bits per weight), `ppl`, `ppl_se`, `delta_ppl`, `delta_ppl_se`; rows without a
        perplexity, and rows that are no quantized type, are left out.
    title : str
        Model and text.
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If no quantized row has a perplexity.
    """
    frame = frame[frame["ppl"].notna()]
    families = by_family(frame, frame["ftype"].map(_base_type))
    shown = pd.concat([frame.head(0), *(rows for _, rows in families)])
    if shown.empty:
        raise ValueError("bpw_against_ppl: no quantized row has a perplexity. Measure the model first.")
    ax = ax or new_axes((8, 5))
    base, error = shown["ppl"].iloc[0] - shown["delta_ppl"].iloc[0], shown["ppl_se"].min()
    for family, rows in families:
        look = {"fmt": family.marker, "color": family.colour, "ms": 5, "lw": 1, "capsize": 3}
        ax.errorbar(rows["bpw"], rows["ppl"], yerr=rows["delta_ppl_se"], label=family.label, **look)
    ax.axhline(base, color="0.4", lw=1, ls="--", label=f"the model as it is: {base:.2f} ± {error:.2f}")
    ax.set(xlabel="size (bits per weight)", ylabel="perplexity", title=title, ylim=ax.get_ylim())
    ax.axhspan(base - error, base + error, color="0.92", zorder=0)  # does not stretch the axis
    ax.margins(x=0.09)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    _label_points(ax, shown)
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
    title : str
        Model and text.
    ax : Axes, optional
        Where to draw; a new figure by default.

    Returns
    -------
    Axes

    Raises
    ------
    ValueError
        If no quantized row has a KL divergence.
    """
    shown = frame[frame["ftype"].map(_base_type).notna() & (frame["kld_mean"] > 0)]
    if shown.empty:
        raise ValueError("size_against_kld: no quantized row has a KL divergence. Measure the model first.")
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
    _label_points(ax, points, "kld_mean")
    return ax


def _base_type(name: str) -> str | None:
    """The base type of a variant's ftype (`Q4_K` of `Q4_K_M+imatrix`); None where that is not a quantized one."""
    ftype = FTYPES.get(re.split(r"\W", name)[0])
    return ftype.qtype if ftype and ftype.is_quantized else None


def _label_points(ax: Axes, frame: pd.DataFrame, y: str = "ppl") -> None:
    """Write each point's ftype beside it, where no other label or point is."""
    ax.figure.canvas.draw()
    places = [(7, 0, "left"), (-7, 0, "right"), (7, 9, "left"), (7, -9, "left"), (-7, 9, "right"), (-7, -9, "right")]
    points = ax.transData.transform(frame[["bpw", y]])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    for name, x, height in frame[["ftype", "bpw", y]].itertuples(index=False):
        for dx, dy, side in [*places, *((dx, 2 * dy, side) for dx, dy, side in places[2:])]:
            label = ax.annotate(
                name, (x, height), (dx, dy), textcoords="offset points", ha=side, va="center_baseline", fontsize=8
            )
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            ax.add_artist(label)
        taken.append(box)
