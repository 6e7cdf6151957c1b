"""Drawings that explain: levels on a number line, a layer's tensors, the fields of a block."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from quantlab.study.plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, new_axes

_KINDS = {  # kind of tensor: place (column, row) and colour in the drawing of a layer
    "attn_norm": (0.5, 0, "0.75"),
    "attn_q": (-0.6, 1, SKY),
    "attn_k": (0.5, 1, SKY),
    "attn_v": (1.6, 1, ORANGE),
    "attn_output": (0.5, 3, SKY),
    "ffn_norm": (0.5, 5, "0.75"),
    "ffn_gate": (-0.1, 6, "#80CEB9"),
    "ffn_up": (1.1, 6, "#80CEB9"),
    "ffn_down": (0.5, 8, ORANGE),
}
_TENSOR = ("name", "shape", "qtype")
_STEPS = [  # (column, row, text): steps without tensors
    (0.5, 2, "softmax(q · kᵀ) · v, head by head"),
    (0.5, 7, "silu(gate) · up"),
]
_FIELDS = [BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION]
_DARK = (BLUE, GREEN, VERMILION)  # on which white is easier to read


def number_line(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw weights that fall onto the levels of a block, with the number of weights on each level.

    Parameters
    ----------
    frame : pd.DataFrame
        A row per weight of one block or sub-block: `x`, `decoded`, `error`, `step`, `lowest`, `highest`, as
        `quantlab.lab.blocks.weights` gives them for a type with equal steps.

    Raises
    ------
    ValueError
        If the weights do not share their levels, or all levels are the same.
    """
    lowest, highest, step = (frame[name].iloc[0] for name in ("lowest", "highest", "step"))
    if frame[["lowest", "highest", "step"]].nunique().max() > 1 or not step:
        raise ValueError("number_line: weights must share levels with a step above 0. Give one sub-block.")
    ax = ax or new_axes((11, 3.8))
    levels = np.linspace(lowest, highest, round((highest - lowest) / step) + 1)
    heights = np.empty(len(frame))
    heights[np.argsort(frame["x"])] = 0.55 + 0.15 * (np.arange(len(frame)) % 4)
    far = np.abs(frame["error"]) / step  # 0.5 is half a step
    shades = plt.get_cmap("plasma")(0.15 + 0.7 * np.minimum(1, 2 * far))
    for x, decoded, height, shade in zip(frame["x"], frame["decoded"], heights, shades, strict=True):
        ax.plot([x, x, decoded], [height, 0.3, 0.02], color=shade, lw=1)
        ax.plot(x, height, "o", color=shade, ms=6)
    ax.axhline(0, color="black", lw=1.2)
    ax.vlines(levels, -0.04, 0.04, color="black", lw=1.2)
    for code, level in enumerate(levels):
        ax.text(level, -0.09, str(code), ha="center", va="top", fontsize=9)
        for row in range(int(np.isclose(frame["decoded"], level, atol=step / 4).sum())):
            ax.plot(level, -0.28 - 0.09 * row, "o", color="0.45", ms=4)
    ax.set(xlabel="weight", yticks=[0.8, 0, -0.12, -0.32], title=title, ylim=(None, 1.1))
    ax.set_yticklabels(["weights", "levels", "code", "weights\non a level"], fontsize=8)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    return ax


def transformer_block(tensors: pd.DataFrame, *, layer: int = 0, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw one layer of a Llama: its tensors with their GGUF names, shapes and types, in the order of computation.

    Parameters
    ----------
    tensors : pd.DataFrame
        Columns `name`, `shape` and `qtype`, as `Model.tensors` has them.
    layer : int
        Number of the layer, from 0.

    Raises
    ------
    ValueError
        If the layer does not have a Llama's tensors.
    """
    said = {name: (shape, qtype) for name, shape, qtype in zip(*(tensors[key] for key in _TENSOR), strict=True)}
    missing = [kind for kind in _KINDS if f"blk.{layer}.{kind}.weight" not in said]
    if missing:
        raise ValueError(f"transformer_block: blk.{layer}.{missing[0]}.weight is missing. Give a Llama's tensors.")
    ax = ax or new_axes((8, 7.5))
    ax.plot([-1.6, -1.6], [-0.8, 8.8], color="0.4", lw=3)
    ax.text(-1.75, 5.5, "main path of the model", rotation=90, ha="right", va="center", color="0.3")
    for norm, last in ((0, 3), (5, 8)):
        arrow = {"arrowstyle": "-|>", "color": "0.4", "lw": 1.5, "shrinkA": 0}
        ax.annotate("", (-0.02, norm), (-1.6, norm), arrowprops=arrow)
        ax.annotate("", (-1.52, last), (0.5, last), arrowprops=arrow, zorder=0)
        ax.text(-1.6, last, "+", ha="center", va="center", fontsize=13, bbox={"fc": "white", "boxstyle": "circle"})
    for kind, (column, row, colour) in _KINDS.items():
        name = f"blk.{layer}.{kind}.weight"
        shape, qtype = said[name]
        box = {"fc": colour, "ec": "0.3", "boxstyle": "round,pad=0.35"}
        text = f"{name}\n{' × '.join(map(str, shape))}, {qtype}"
        ax.text(column, row, text, ha="center", va="center", fontsize=8, color="black", bbox=box)
    for column, row, text in _STEPS:
        ax.text(column, row, text, ha="center", va="center", fontsize=9, style="italic")
    for top, sides in ((0, (-0.6, 0.5, 1.6)), (5, (-0.1, 1.1))):
        for side in sides:
            _arrow(ax, (0.5, top), (side, top + 1))
            _arrow(ax, (side, top + 1), (0.5, top + 2))
        _arrow(ax, (0.5, top + 2), (0.5, top + 3))
    ax.set(xlim=(-2.1, 2.4), ylim=(9, -1), title=title)
    ax.axis("off")
    return ax


def _arrow(ax: Axes, start: tuple[float, float], stop: tuple[float, float]) -> None:
    """Draw an arrow between two rows of boxes."""
    look = {"arrowstyle": "-|>", "color": "0.5", "lw": 1, "shrinkA": 16, "shrinkB": 18}
    ax.annotate("", stop, start, arrowprops=look, zorder=0)


def block_layout(fields: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw the bytes of a block as ribbons, one colour per field.

    Parameters
    ----------
    fields : pd.DataFrame
        A row per run of bits: `line`, `bit` (the first one), `n_bits`, `field` and `label`, as
        `quantlab.lab.blocks.layout` gives them.
    """
    runs = list(zip(*(fields[key].tolist() for key in ("line", "bit", "n_bits", "field", "label")), strict=True))
    starts: dict[int, int] = {}
    for line, bit, *_ in runs:
        starts.setdefault(line, bit)
    ax = ax or new_axes((11, 0.9 + 0.62 * len(starts)))
    colours = dict(zip(dict.fromkeys(fields["field"]), _FIELDS, strict=False))
    widest = max(bit - starts[line] + n_bits for line, bit, n_bits, *_ in runs)
    for line, bit, n_bits, field, label in runs:
        left, colour = bit - starts[line], colours[field]
        ax.add_patch(Rectangle((left, line), n_bits, 0.72, fc=colour, ec="white", lw=1.5))
        ink = "white" if colour in _DARK else "black"
        size = min(9, 1150 * n_bits / widest / max(1, len(label)))
        ax.text(left + n_bits / 2, line + 0.37, label, ha="center", va="center", fontsize=size, color=ink)
    ax.set_yticks([line + 0.37 for line in starts], [f"byte {bit // 8}" for bit in starts.values()], fontsize=8)
    handles = [Rectangle((0, 0), 1, 1, fc=colour) for colour in colours.values()]
    ax.legend(handles, list(colours), frameon=False, ncols=len(colours), loc="lower left", bbox_to_anchor=(0, 1))
    ax.set(xlim=(0, widest), ylim=(max(starts) + 0.85, -0.1), xticks=[])
    ax.set_title(title, loc="right")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax
