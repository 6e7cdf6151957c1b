"""Logits of a few windows of tokens, to see a model's next-token predictions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from quantlab.evaluate.budget import Budget
from quantlab.evaluate.check import check_model
from quantlab.evaluate.engine import Choice, find
from quantlab.evaluate.engine.fused import score
from quantlab.evaluate.engine.rounded import RoundedEngine, activations_of
from quantlab.evaluate.forward_pass import ForwardPass
from quantlab.evaluate.metrics import TokenScores
from quantlab.evaluate.protocol import Windows
from quantlab.evaluate.variants import Variant, as_is, output_name
from quantlab.files.model import Model

NOISE_TOKENS = 512  # enough for two digits of a mean divergence


def logits(model: Model, tokens: ArrayLike, *, mode: str = "float", device: str = "auto") -> np.ndarray:
    """Run a model over a few tokens.

    Parameters
    ----------
    model : Model
        An opened model.
    tokens : array_like of int [shape=(n_tokens,) or (n_windows, n_tokens)]
        Token ids, BOS included where it is wanted; the windows know nothing of each other.
    mode, device : str
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
    choice = find(mode, device)
    if tokens.ndim not in (1, 2) or not tokens.size or tokens.min() < 0 or tokens.max() >= hparams.n_vocab:
        raise ValueError(f"tokens: shape={tokens.shape}, must be a row or windows of ids within 0:{hparams.n_vocab}.")
    found = _logits(model, tokens.reshape(-1, tokens.shape[-1]), choice)
    return found.reshape(*tokens.shape, hparams.n_vocab)


def half_noise(model, windows: Windows, choice: Choice) -> dict[str, float]:
    """Measure the effect of mode `half` alone on a KLD.

    Parameters
    ----------
    model : Model
    windows : Windows
    choice : Choice

    Returns
    -------
    dict of str to float
        `kld_noise`, nats: the mean divergence of the model's distribution in halves from that in `float` on the same
        device, over the first `NOISE_TOKENS` positions of the first chunk. A KLD of this size is not to be told from
        none. Empty in other modes.
    """
    if choice.mode != "half":
        return {}
    tokens = windows.tokens[:1, :NOISE_TOKENS]
    exact = _logits(model, tokens, find("float", choice.device))[0]
    return {"kld_noise": _mean_kld(exact, _logits(model, tokens, choice)[0])}


def activation_noise(model, variants: Sequence[Variant], tokens: np.ndarray) -> list[float]:
    """Measure what llama.cpp's rounding of activations alone does to the predictions of a model.

    A file is measured with activations in float32. llama.cpp's CPU code rounds them before every product, to a type
    that the weights' type asks for, and the keys and values of attention to float16.

    Parameters
    ----------
    model : Model
        The base, whose weights are used throughout.
    variants : sequence of Variant
        Their types alone count.
    tokens : np.ndarray [shape=(n_tokens,), dtype=int32]

    Returns
    -------
    list of float
        For each variant the mean divergence, nats, of the base with activations rounded as the variant's are from the
        base in float32. Weights that differ by less cannot be told apart when they are run there.
    """
    exact, found, output = _logits(model, tokens[None], find("float"))[0], {}, output_name(model)
    rounded = [_roundings(model, variant, output) for variant in variants]
    for key in dict.fromkeys(rounded):
        options = {"activations": dict(key), "output": output}
        choice = Choice(RoundedEngine, "float", "cpu", "float32", options=options)
        found[key] = _mean_kld(exact, _logits(model, tokens[None], choice)[0])
    return [found[key] for key in rounded]


def _roundings(model, variant: Variant, output: str) -> tuple[tuple[str, str], ...]:
    """Name of each matrix of a product, and the type of its inputs; Q8_1 rounds as Q8_0 does, and adds sums."""
    types = variant.types
    types = types | {output: types.get("output.weight", types["token_embd.weight"])}
    names = [tensor.name for tensor in model if len(tensor.shape) > 1 and tensor.name in types]
    single = output, "per_layer_model_proj.weight"
    names = [name for name in names if name in single or name.startswith("blk.")]
    return tuple((name, activations_of(types[name]).replace("Q8_1", "Q8_0")) for name in names)


def _mean_kld(exact: np.ndarray, other: np.ndarray) -> float:
    """Return the mean divergence of logits [n_tokens, n_vocab] from exact ones, nats."""
    scores = TokenScores.empty(1, len(exact))
    score(exact, other, np.zeros(len(exact), np.int32), **scores.at(0))
    return float(scores.kld.mean())


def _logits(model, rows: np.ndarray, choice: Choice) -> np.ndarray:
    """Return the logits [n_rows, n_tokens, n_vocab] of rows of tokens."""
    windows = Windows(rows, rows, 0)
    with choice(model, rows.shape[1]) as running:
        budget = Budget(len(rows), 1, True, 0, 0, 0.0)
        return ForwardPass([as_is(model)], windows, running, budget).run(_Logits())


class _Logits:
    """A consumer of a `ForwardPass`: the base's logits at every scored position."""

    observe = None

    def output(self, forward_pass: ForwardPass) -> np.ndarray:
        """Return the logits [n_chunks, n_scored, n_vocab]."""
        p, output = forward_pass, forward_pass.output(0)
        return np.concatenate([p.engine.logits(output, p.last_states(0, chunks)) for chunks in p.batches()])
