"""What the figures share: colours, told apart by everybody (Okabe and Ito's), and how a figure is begun and written."""

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"


def new_axes(size: tuple[float, float]) -> Axes:
    """Begin a figure of `size` inches, width and height, whose labels have room."""
    return plt.subplots(figsize=size, layout="constrained")[1]


def save(ax: Axes, path: str | Path) -> Path:
    """Write the figure that `ax` belongs to as PNG, small enough for a page on the web."""
    ax.figure.savefig(path, dpi=110)
    return Path(path)
