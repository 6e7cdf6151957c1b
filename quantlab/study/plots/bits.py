"""Figures of the choice of bits: the importance matrix, the front of recipes, and the types that a recipe chose."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from quantlab.study.plots.style import BLUE, VERMILION, new_axes, panels
from quantlab.transform.plan import bits_per_weight


def importance(sums: Mapping[int, np.ndarray], *, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot the mean squared inputs of a kind of tensor by column, largest first, layer by layer.

    Parameters
    ----------
    sums : mapping of int to np.ndarray [shape=(n_per_row,)]
        Layer → mean squared input per column.

    Raises
    ------
    ValueError
        If there is no layer.
    """
    if not sums:
        raise ValueError("importance: needs at least one layer. Choose a kind that the matrix has.")
    ax = ax or new_axes((8, 4.5))
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(sums)))
    for colour, (layer, values) in zip(colours, sorted(sums.items()), strict=True):
        ordered = np.sort(values)[::-1] / values.mean()
        ax.plot(np.arange(1, len(ordered) + 1), ordered, color=colour, label=f"layer {layer}")
    ax.axhline(1, color="0.5", lw=1, ls="--")
    ax.set(xscale="log", yscale="log", title=title, xlabel="column, by rank", ylabel="mean squared input / its mean")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, ncols=2 if len(sums) > 6 else 1, fontsize=8)
    return ax


def matrix_gain(frame: pd.DataFrame, *, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot the damage that an importance matrix saves for each ftype.

    Parameters
    ----------
    frame : pd.DataFrame
        Columns `ftype`, `less`, `less_se`: the fraction of the KL divergence that the matrix takes away, and its error.
    """
    ax = ax or new_axes((8, 4))
    look = {"color": BLUE, "error_kw": {"lw": 1, "capsize": 4}}
    ax.bar(frame["ftype"], 100 * frame["less"], 0.6, yerr=100 * frame["less_se"], **look)
    ax.axhline(0, color="0.3", lw=1)
    ax.set(ylabel="KL divergence taken away (%)", title=title)
    ax.grid(alpha=0.3, axis="y")
    return ax


def recipe_front(
    frame: pd.DataFrame, judged: pd.DataFrame | None = None, *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Plot the predicted damage of the best recipe of every size, with the ftypes as points.

    Parameters
    ----------
    frame : pd.DataFrame
        Of `front(…).to_frame()`: `variant`, `bpw` (bits per weight), `predicted_kld` (nats).
    judged : pd.DataFrame, optional
        Of `judge(…).to_frame()`: what was measured on another text, `variant`, `bpw`, `kld_mean`, `kld_se`, `against`.
    """
    ax = ax or new_axes((8, 5))
    frame = frame[frame["predicted_kld"] > 0]
    recipes, ftypes = frame[frame["variant"] == "recipe"], frame[frame["variant"] != "recipe"]
    ax.plot(recipes["bpw"], recipes["predicted_kld"], "-", color=BLUE, label="best recipe, predicted")
    ax.plot(ftypes["bpw"], ftypes["predicted_kld"], "s", color=VERMILION, ms=5, label="ftype, predicted")
    for point, names in ftypes.groupby(["bpw", "predicted_kld"])["variant"]:
        look = {"xytext": (3, 4), "textcoords": "offset points", "fontsize": 8, "rotation": 40}
        ax.annotate(", ".join(names), point, **look)  # pyright: ignore[reportArgumentType]
    if judged is not None:
        measured = judged[judged["kld_mean"] > 0]
        for rows, colour, label in (
            (measured[measured["against"].notna()], BLUE, "best recipe, measured on another text"),
            (measured[measured["against"].isna()], VERMILION, "ftype, measured on another text"),
        ):
            look = {"fmt": "o", "color": colour, "mfc": "none", "ms": 9, "capsize": 3}
            ax.errorbar(rows["bpw"], rows["kld_mean"], yerr=rows["kld_se"], label=label, **look)
    ax.set(yscale="log", xlabel="size (bits per weight)", ylabel="KL divergence from the base (nats per token)")
    shown = frame[frame["bpw"] <= 1.15 * (ftypes if len(ftypes) else frame)["bpw"].max()]
    ax.set(title=title, xlim=(0.95 * shown["bpw"].min(), 1.03 * shown["bpw"].max()))
    ax.set(ylim=(shown["predicted_kld"].min() / 1.5, shown["predicted_kld"].max() * 3))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def type_map(types: Mapping[str, str], *, title: str = "", ax: Axes | None = None) -> Axes:
    """Draw the type of every tensor by layer and kind, darker for more bits.

    Parameters
    ----------
    types : mapping of str to str
        GGUF tensor name → ggml type, of a recipe or a ftype. Norms are left out; what is of no layer is in the title.

    Raises
    ------
    ValueError
        If no tensor is of a layer.
    """
    matrices = {name: q for name, q in types.items() if name.startswith("blk.") and "_norm." not in name}
    placed = {tuple(name.removesuffix(".weight").split(".")[1:]): q for name, q in matrices.items()}
    if not placed:
        raise ValueError("type_map: needs tensors of layers. Give the types of a whole model.")
    kinds = sorted({kind for _, kind in placed})
    layers = sorted({int(layer) for layer, _ in placed})
    bits = np.full((len(layers), len(kinds)), np.nan)
    ax = ax or new_axes((1 + len(kinds), 1 + 0.35 * len(layers)))
    for (layer, kind), qtype in placed.items():
        row, column = layers.index(int(layer)), kinds.index(kind)
        bits[row, column] = bits_per_weight(qtype)
        look = {"color": "white" if bits[row, column] > 6 else "black", "fontsize": 8}
        ax.text(column, row, qtype, ha="center", va="center", **look)
    ax.imshow(bits, cmap="Blues", vmin=1.5, vmax=8.5, aspect="auto")
    ax.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    ax.set_yticks(range(len(layers)), map(str, layers))
    outside = [name for name in types if name in ("token_embd.weight", "output.weight")]
    outer = ", ".join(f"{name.removesuffix('.weight')} {types[name]}" for name in outside)
    ax.set(ylabel="layer", title=f"{title}\n{outer}" if outer else title)
    return ax


def block_search(
    values: np.ndarray,
    importance: np.ndarray,
    errors: Mapping[str, np.ndarray],
    *,
    axes: Sequence[Axes] | np.ndarray | None = None,
) -> Sequence[Axes] | np.ndarray:
    """Plot one block: the importance of each weight, and its rounding error in either search.

    Parameters
    ----------
    values : np.ndarray [shape=(n,)]
        The weights of the block.
    importance : np.ndarray [shape=(n,)]
        Mean squared input of each weight's column.
    errors : mapping of str to np.ndarray [shape=(n,)]
        Label → rounded minus exact value; two of them.
    axes : sequence of two Axes, optional
        Where to draw, one above the other; a new figure by default.
    """
    if axes is None:
        axes = panels(2, 1, figsize=(8, 5), sharex=True, layout="constrained", height_ratios=[1, 2])
    place = np.arange(len(values))
    axes[0].bar(place, importance, color="0.5")
    axes[0].set(ylabel="mean squared input", yscale="log")
    for shift, colour, (label, error) in zip((-0.2, 0.2), (VERMILION, BLUE), errors.items(), strict=True):
        axes[1].bar(place + shift, error, 0.4, color=colour, label=label)
    step = np.abs(values).max()
    axes[1].axhline(0, color="0.3", lw=1)
    axes[1].set(xlabel="weight of the block", ylabel=f"rounding error (largest weight: {step:.3g})")
    axes[1].legend(frameon=False)
    axes[1].grid(alpha=0.3, axis="y")
    return axes
