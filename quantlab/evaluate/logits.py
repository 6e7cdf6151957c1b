"""Logits of a few windows of tokens, for a look at what a model says next."""

import numpy as np

from quantlab.evaluate.check import check_model
from quantlab.evaluate.dense import Workers
from quantlab.evaluate.llama import MODES, Llama
from quantlab.evaluate.variants import Weights, as_is


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
    if mode not in MODES:
        raise ValueError(f"mode={mode}, must be one of {', '.join(MODES)}.")
    if tokens.ndim not in (1, 2) or not tokens.size or tokens.min() < 0 or tokens.max() >= hparams.n_vocab:
        raise ValueError(f"tokens: shape={tokens.shape}, must be a row or windows of ids within 0:{hparams.n_vocab}.")
    variant = as_is(model)
    used, place = np.unique(tokens, return_inverse=True)
    place = place.ravel()
    factors = model.tensor("rope_freqs.weight").floats() if "rope_freqs.weight" in model else None
    with Workers() as workers:
        weights = Weights(model, [variant], workers)
        x = weights.rows(variant, "token_embd.weight", used)[place]
        llama = Llama(hparams, tokens.shape[-1], mode, workers, factors)
        qkv = np.empty((len(x), llama.qkv_width), np.float32)
        for index in range(hparams.n_layer):
            llama.forward(weights.layer(variant, index, mode), x, qkv)
            weights.forget()
        norm, matrix = weights.output(variant, mode)
        llama.steps.rms_norm(x, norm, llama.eps, x)
        found = np.empty((len(x), hparams.n_vocab), np.float32)
        llama.product(x, matrix, found)
    return found.reshape(*tokens.shape, hparams.n_vocab)
