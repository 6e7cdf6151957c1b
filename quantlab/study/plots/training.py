"""Figures of training: the loss curve."""

import pandas as pd
from matplotlib.axes import Axes

from quantlab.study.plots.style import BLUE, VERMILION, new_axes


def loss_curve(history: pd.DataFrame, *, unigram: float, ax: Axes | None = None) -> Axes:
    """Plot the loss over the tokens seen in training.

    Parameters
    ----------
    history : pd.DataFrame
        Columns `tokens`, `loss` and `heldout`, nats per token: the lines of a training run's history.
    unigram : float
        Loss of a model that knows only the tokens' frequencies, nats per token.
    """
    ax = ax or new_axes((8, 4))
    for column, colour, label in (("loss", BLUE, "training text"), ("heldout", VERMILION, "held-out text")):
        ax.plot(history["tokens"] / 1e6, history[column], color=colour, marker="o", ms=3, label=label)
    ax.axhline(unigram, color="0.4", lw=1, ls="--", label=f"frequencies alone: {unigram:.2f}")
    ax.set(xlabel="tokens seen (millions)", ylabel="loss (nats per token)")
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return ax
