"""DataFrame → matplotlib Axes: every figure of the notebooks. Colours are Okabe and Ito's, told apart by everybody."""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
_FAMILIES = (  # label, what the names of its ftypes look like, colour, marker
    ("k-quants (super-blocks of 256)", r"^Q\d_K", BLUE, "o"),
    ("legacy types (blocks of 32)", r"^Q\d_[01]", VERMILION, "s"),
)


def bpw_against_ppl(
    frame: pd.DataFrame, *, base_ppl: float | None = None, title: str = "", ax: Axes | None = None
) -> Axes:
    """Plot what each ftype costs: perplexity over bits per weight, with one standard error either way.

    Parameters
    ----------
    frame : pd.DataFrame
        Columns `ftype`, `bpw` (bits per weight), `ppl`, `ppl_se`; rows without a perplexity and rows of 16 bits and
        more are left out.
    base_ppl : float, optional
        Perplexity of the unquantized model, drawn as a line.
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
        If no row has a perplexity.
    """
    shown = frame[frame["ppl"].notna() & (frame["bpw"] < 16)]
    if shown.empty:
        raise ValueError("bpw_against_ppl: no row below 16 bits per weight has a perplexity. Measure the model first.")
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for label, pattern, colour, marker in _FAMILIES:
        family = shown[shown["ftype"].str.match(pattern)]
        ax.errorbar(
            family["bpw"],
            family["ppl"],
            yerr=family["ppl_se"],
            fmt=marker,
            color=colour,
            ms=5,
            lw=0.8,
            capsize=2,
            label=label,
        )
    _label_points(ax, shown)
    if base_ppl is not None:
        ax.axhline(base_ppl, color="0.4", lw=1, ls="--", label=f"unquantized: {base_ppl:.4g}")
    ax.set(xlabel="size (bits per weight)", ylabel="perplexity (± one standard error)", title=title)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def _label_points(ax: Axes, frame: pd.DataFrame) -> None:
    """Write each point's ftype beside it, in turn above and below so that neighbours stay readable."""
    for i, row in enumerate(frame.sort_values(["bpw", "ppl"]).itertuples()):
        above = i % 2 == 0
        ax.annotate(
            row.ftype,
            (row.bpw, row.ppl),
            textcoords="offset points",
            xytext=(6, 6 if above else -6),
            va="bottom" if above else "top",
            fontsize=8,
        )


def save(ax: Axes, path: str | Path) -> Path:
    """Write the figure that `ax` belongs to as PNG, small enough for a page on the web."""
    ax.figure.savefig(path, dpi=110)
    return Path(path)
