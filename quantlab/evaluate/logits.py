"""Logits of a few windows of tokens, for a look at what a model says next."""

import numpy as np

from quantlab.evaluate.budget import Budget
from quantlab.evaluate.check import check_model
from quantlab.evaluate.engine import find
from quantlab.evaluate.forward_pass import ForwardPass
from quantlab.evaluate.protocol import Windows
from quantlab.evaluate.variants import as_is


def logits(model, tokens, *, mode: str = "float") -> np.ndarray:
    """Run a model over a few tokens.

    Parameters
    ----------
    model : Model
        An opened model.
    tokens : array_like of int [shape=(n_tokens,) or (n_windows, n_tokens)]
        Token ids, BOS included where it is wanted; the windows know nothing of each other.
    mode : str
        As for `perplexity`.

    Returns
    -------
    np.ndarray [shape=(*tokens.shape, n_vocab), dtype=float32]
        Row i of a window says what follows its tokens 0 … i.

    Raises
    ------
    ValueError
        If the architecture is not known here, the mode is none, or a token is not in the vocabulary.
    """
    check_model(model)
    tokens, hparams = np.asarray(tokens, np.int64), model.hparams
    engine = find(mode)
    if tokens.ndim not in (1, 2) or not tokens.size or tokens.min() < 0 or tokens.max() >= hparams.n_vocab:
        raise ValueError(f"tokens: shape={tokens.shape}, must be a row or windows of ids within 0:{hparams.n_vocab}.")
    rows = tokens.reshape(-1, tokens.shape[-1])
    variants, windows = [as_is(model)], Windows(rows, rows, 0)
    with engine(model, rows.shape[1]) as running:
        found = ForwardPass(variants, windows, running, Budget(len(rows), 1, True, 0, 0, 0.0)).run(_Logits())
    return found.reshape(*tokens.shape, hparams.n_vocab)


class _Logits:
    """Consumer of a `ForwardPass`: the base's logits at every scored position."""

    observe = None

    def output(self, forward_pass: ForwardPass) -> np.ndarray:
        """Return the logits [n_chunks, n_scored, n_vocab]."""
        p, output = forward_pass, forward_pass.output(0)
        return np.concatenate([p.engine.logits(output, p.last_states(0, chunks)) for chunks in p.batches()])
