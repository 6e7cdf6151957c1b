"""Figures of protocols: the effect of the way of measuring."""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from quantlab.study.plots.style import BLUE, VERMILION, new_axes


def nll_by_position(nll: np.ndarray, *, scored_from: int, title: str = "", ax: Axes | None = None) -> Axes:
    """Plot the mean NLL of tokens over their context, with the scored part shaded.

    Parameters
    ----------
    nll : np.ndarray [shape=(n_windows, n_positions), dtype=float64]
        Nats per token; column i is the prediction made after i + 1 tokens.
    scored_from : int
        First column that the protocol scores.
    """
    ax = ax or new_axes((8, 4))
    edges = np.unique(np.geomspace(1, nll.shape[1] + 1, 14).round().astype(int))
    parts = [nll[:, low - 1 : high - 1] for low, high in pairwise(edges)]
    middle = np.sqrt(edges[:-1] * (edges[1:] - 1))
    error = [part.std() / np.sqrt(part.size) for part in parts]
    look = {"fmt": "o-", "color": BLUE, "ms": 4, "lw": 1, "capsize": 3, "label": "mean ± standard error"}
    ax.errorbar(middle, [part.mean() for part in parts], yerr=error, **look)
    ax.axvspan(scored_from + 1, nll.shape[1], color="0.92", zorder=0, label="scored by llama.cpp")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="context (tokens before the predicted one)", ylabel="surprise (nats per token)", title=title)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax


def effects(frame: pd.DataFrame, *, n_damage: int = 0, title: str = "") -> np.ndarray:
    """Plot the effect of each way of measuring on perplexity and KL divergence, as bars on logarithmic axes.

    Parameters
    ----------
    frame : pd.DataFrame
        Index: the effect. Columns `ppl_change` (relative, 0.01 is one per cent) and `kld` (nats per token), either of
        them NaN where it does not apply.
    n_damage : int
        How many rows at the top are damage, for scale; a line is drawn below them.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.6 + 0.26 * len(frame)), layout="constrained", sharey=True)
    names, percent = frame.index, 100 * frame["ppl_change"]
    for label, colour, rows in (("higher", VERMILION, percent > 0), ("lower", BLUE, percent < 0)):
        axes[0].barh(names, percent.abs().where(rows), color=colour, label=f"perplexity is {label}")
    axes[1].barh(names, frame["kld"].abs(), color="0.5")
    axes[0].set(xlabel="change of perplexity (%)", xscale="log")
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].set(xlabel="KL divergence (nats per token)", xscale="log")
    axes[0].invert_yaxis()
    for ax in axes:
        ax.grid(axis="x", alpha=0.3)
        if n_damage:
            ax.axhline(n_damage - 0.5, color="0.3", lw=1, ls="--")
    figure.suptitle(title)
    return axes
