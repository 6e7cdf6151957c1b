"""Figures with sliders, for notebooks that are open in JupyterLab."""

import io

import matplotlib.pyplot as plt
import numpy as np

from quantlab.files.bundled import how_to_install
from quantlab.lab import blocks
from quantlab.study.plots.types import block_weights


def outlier(x: np.ndarray, qtypes: list[str], *, qtype: str = "Q4_K", size: float = 8.0):
    """Draw a block with an outlier, its size on a slider and the type in a list.

    Parameters
    ----------
    x : np.ndarray [shape=(256,), dtype=float32, finite]
        A block.
    qtypes : list of str
        Types to choose from.
    qtype : str
        The type at first.
    size : float
        The outlier's size at first, in rms of the block.

    Returns
    -------
    ipywidgets.Widget or str
        A line that says what is missing, where ipywidgets is not installed.
    """
    try:
        import ipywidgets
    except ImportError:
        return f"Sliders need ipywidgets. The figure above shows one setting. Run: {how_to_install('lab')}"

    look = {"description": "outlier (rms of the block)", "style": {"description_width": "initial"}}
    look |= {"continuous_update": False, "layout": {"width": "480px"}}
    slider = ipywidgets.FloatSlider(value=size, max=max(40.0, size), step=0.5, **look)
    types = ipywidgets.Dropdown(options=qtypes, value=qtype, description="type")
    picture = ipywidgets.Image(format="png", layout={"max_width": "1000px"})  # nbclient can hang at an Output widget

    def draw(change=None):
        axes = block_weights(blocks.weights(blocks.with_outlier(x, slider.value), types.value))  # pyright: ignore[reportArgumentType]
        png = io.BytesIO()
        axes[0].figure.savefig(png, dpi=100)
        plt.close(axes[0].figure)
        picture.value = png.getvalue()

    slider.observe(draw, "value")
    types.observe(draw, "value")
    draw()
    return ipywidgets.VBox([slider, types, picture])
