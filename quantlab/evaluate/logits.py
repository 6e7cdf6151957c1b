"""Logits of a short run of tokens, for a look at what a model says next."""

import numpy as np

from quantlab.evaluate import fused
from quantlab.evaluate.dense import Matrix, Workers
from quantlab.evaluate.llama import MODES, Llama, check_model, load_layer
from quantlab.evaluate.variants import Weights, as_is


def logits(model, tokens, *, mode: str = "float") -> np.ndarray:
    """Run a model over a few tokens.

    Parameters
    ----------
    model : Model
        An opened model.
    tokens : array_like of int [shape=(n_tokens,)]
        Token ids, BOS included where it is wanted.
    mode : str
        As for `perplexity`.

    Returns
    -------
    np.ndarray [shape=(n_tokens, n_vocab), dtype=float32]
        Row i says what follows tokens 0 … i.

    Raises
    ------
    ValueError
        If the architecture is not known here, the mode is none, or a token is not in the vocabulary.
    """
    check_model(model)
    tokens, hparams = np.asarray(tokens, np.int64), model.hparams
    if mode not in MODES:
        raise ValueError(f"mode={mode}, must be one of {', '.join(MODES)}.")
    if tokens.ndim != 1 or not tokens.size or tokens.min() < 0 or tokens.max() >= hparams.n_vocab:
        raise ValueError(f"tokens: shape={tokens.shape}, must be a row of ids within 0:{hparams.n_vocab}.")
    variant = as_is(model)
    used, place = np.unique(tokens, return_inverse=True)
    factors = model.tensor("rope_freqs.weight").floats() if "rope_freqs.weight" in model else None
    with Workers() as workers:
        weights = Weights(model, [variant], workers)
        x = weights.rows(variant, "token_embd.weight", used)[place]
        llama = Llama(hparams, len(tokens), mode, workers, factors)
        qkv = np.empty((len(tokens), llama.qkv_width), np.float32)
        for index in range(hparams.n_layer):
            layer = load_layer(model, index, lambda name, out: weights.fill(variant, name, out))
            llama.forward(layer, x, qkv)
            weights.forget()
        name = "output.weight" if "output.weight" in model else "token_embd.weight"
        matrix = np.empty(model.tensor(name).shape, np.float32)
        qtype = weights.fill(variant, name, matrix)
        fused.rms_norm(x, model.tensor("output_norm.weight").floats(), llama.eps, x)
        found = np.empty((len(tokens), hparams.n_vocab), np.float32)
        llama.product(x, Matrix(matrix, ((slice(0, len(matrix)), qtype),)), found)
    return found
