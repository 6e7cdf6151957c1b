"""Figures of running: the memory that a model needs."""

import pandas as pd
from matplotlib.axes import Axes

from quantlab.study.plots.style import BLUE, GREEN, ORANGE, PURPLE, new_axes

_PARTS = (  # column of Fit.to_frame(), label, colour
    ("bytes", "weights", BLUE),
    ("kv_bytes", "KV cache", ORANGE),
    ("compute_bytes", "compute buffer", GREEN),
    ("output_bytes", "logits", PURPLE),
)


def memory(frame: pd.DataFrame, *, vram: int = 0, ram: int = 0, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot the memory that each ftype needs as stacked bars, with the available memory as lines.

    Parameters
    ----------
    frame : pd.DataFrame
        Columns `ftype`, `bytes`, `kv_bytes`, `compute_bytes`, `output_bytes`, as `quantlab.fit` gives them.
    vram, ram : int
        Bytes of the graphics card and of the machine; 0 draws no line.
    """
    ax = ax or new_axes((8, 1.5 + 0.28 * len(frame)))
    unit, divisor = ("GiB", 2**30) if frame["bytes"].max() > 2**30 else ("MiB", 2**20)
    left = pd.Series(0.0, index=frame.index)
    for column, label, colour in _PARTS:
        width = frame[column] / divisor
        ax.barh(frame["ftype"], width, left=left, color=colour, label=label)
        left += width
    lines = ((vram, "card", "--"), (ram, "machine", ":"), (vram + ram if vram and ram else 0, "both", "-"))
    for amount, label, style in lines:
        if 0 < amount / divisor < 2 * left.max():
            ax.axvline(amount / divisor, color="0.3", lw=1, ls=style, label=f"{label}: {amount / divisor:.4g} {unit}")
    ax.invert_yaxis()
    ax.set(xlabel=f"memory to run ({unit})", title=title)
    ax.legend(frameon=False, fontsize=8)
    return ax
