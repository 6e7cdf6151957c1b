"""Figures of what quantization costs: size against perplexity and divergence."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from quantlab.study.plots.style import BLUE, VERMILION

_FAMILIES = (  # label, what the names of its ftypes look like, colour, marker
    ("k-quants (super-blocks of 256)", r"^Q\d_K", BLUE, "o"),
    ("legacy types (blocks of 32)", r"^Q\d_[01]", VERMILION, "s"),
)


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
    families = [(*look, frame[frame["ppl"].notna() & frame["ftype"].str.match(look[1])]) for look in _FAMILIES]
    shown = pd.concat([rows for *_, rows in families])
    if shown.empty:
        raise ValueError("bpw_against_ppl: no quantized row has a perplexity. Measure the model first.")
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    base, error = shown["ppl"].iloc[0] - shown["delta_ppl"].iloc[0], shown["ppl_se"].min()
    for label, _, colour, marker, rows in families:
        look = {"fmt": marker, "color": colour, "ms": 5, "lw": 1, "capsize": 3}
        ax.errorbar(rows["bpw"], rows["ppl"], yerr=rows["delta_ppl_se"], label=label, **look)
    ax.axhline(base, color="0.4", lw=1, ls="--", label=f"the model as it is: {base:.2f} ± {error:.2f}")
    ax.set(xlabel="size (bits per weight)", ylabel="perplexity", title=title, ylim=ax.get_ylim())
    ax.axhspan(base - error, base + error, color="0.92", zorder=0)  # does not stretch the axis
    ax.margins(x=0.09)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    _label_points(ax, shown)
    return ax


def _label_points(ax: Axes, frame: pd.DataFrame) -> None:
    """Write each point's ftype beside it, where no other label or point is."""
    ax.figure.canvas.draw()
    places = [(7, 0, "left"), (-7, 0, "right"), (7, 9, "left"), (7, -9, "left"), (-7, 9, "right"), (-7, -9, "right")]
    points = ax.transData.transform(frame[["bpw", "ppl"]])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    for name, x, y in zip(frame["ftype"], frame["bpw"], frame["ppl"], strict=True):
        for dx, dy, side in [*places, *((dx, 2 * dy, side) for dx, dy, side in places[2:])]:
            label = ax.annotate(
                name, (x, y), (dx, dy), textcoords="offset points", ha=side, va="center_baseline", fontsize=8
            )
            box = label.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            ax.add_artist(label)
        taken.append(box)
