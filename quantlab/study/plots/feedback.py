"""The figure of rounding with feedback."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse

from quantlab.study.plots.style import BLUE, GREEN, ORANGE, VERMILION, new_axes


def rounding_plane(
    h: np.ndarray,
    wanted: np.ndarray,
    rounded: Mapping[str, np.ndarray],
    *,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Plot two weights, their levels, and the pairs of equal error for each way of rounding.

    Parameters
    ----------
    h : np.ndarray [shape=(2, 2)]
        Second moments of the two inputs.
    wanted : np.ndarray [shape=(2,)]
        The weights.
    rounded : Mapping[str, np.ndarray]
        Name → the weights as rounded.
    """
    ax = ax or new_axes((6, 5))
    grid = np.arange(3)
    ax.plot(*np.meshgrid(grid, grid), "o", color="0.8", ms=8, zorder=1)
    ax.plot(*wanted, "x", color="0.1", ms=9, mew=2, label="wanted")
    sizes, axes = np.linalg.eigh(h)
    angle = np.degrees(np.arctan2(axes[1, 0], axes[0, 0]))
    for (name, point), colour in zip(rounded.items(), (VERMILION, BLUE, GREEN, ORANGE), strict=False):
        error = float((point - wanted) @ h @ (point - wanted))
        width, height = 2 * np.sqrt(error / sizes)
        ax.add_patch(Ellipse(wanted, width, height, angle=angle, fill=False, color=colour, lw=1))  # pyright: ignore[reportArgumentType]
        ax.plot(*point, "o", color=colour, ms=8, label=f"{name}: error {error:.3f}")
    ax.set(xlabel="first weight (steps)", ylabel="second weight (steps)", title=title, aspect="equal")
    ax.set(xlim=(-1.7, 2.7), ylim=(-1.7, 2.7))
    ax.legend(frameon=False, loc="lower left", fontsize=8)
    return ax
