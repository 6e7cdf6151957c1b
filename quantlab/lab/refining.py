"""One matrix of a layer: its inputs on a text, and its weights refined for them alone."""

import numpy as np

from quantlab import arch, quants
from quantlab.evaluate.engine import find
from quantlab.evaluate.engine.workers import Workers
from quantlab.evaluate.forward_pass import ForwardPass
from quantlab.evaluate.protocol import Windows, cut
from quantlab.evaluate.refine_rows import refine_rows
from quantlab.evaluate.second_moments import Factor, damped_moments
from quantlab.evaluate.variants import as_is
from quantlab.files.bundled import read_text
from quantlab.files.model import as_model


def layer_inputs(model, name: str, text="sampled", *, n_ctx: int = 512, chunks: int | None = 16) -> np.ndarray:
    """Return the inputs of a layer's matrix while the model reads a text.

    Parameters
    ----------
    name : str
        GGUF name of the matrix.
    model, text, n_ctx, chunks
        As for `quantlab.imatrix`.

    Returns
    -------
    np.ndarray [shape=(n_tokens, n_per_row), dtype=float32]

    Raises
    ------
    FileNotFoundError, ValueError
        As `quantlab.imatrix`; and if the tensor is not the matrix of a layer.

    Examples
    --------
    >>> layer_inputs("tiny", "blk.0.ffn_down.weight", chunks=1).shape
    (512, 512)
    """
    opened = as_model(model)
    windows, _ = cut(
        read_text(text), opened.vocab, n_ctx=n_ctx, chunks=chunks, name="llama.cpp", mode="float", rules="current"
    )
    windows = Windows(windows.tokens, windows.tokens, 0)  # all positions
    with find("float")(opened, n_ctx) as engine:
        budget = engine.plan([as_is(opened)], windows, None, keep_states=False, observed=True)
        found = ForwardPass([as_is(opened)], windows, engine, budget).run(_Inputs(opened, name))
    if not found:
        raise ValueError(
            f"{name}: must be the matrix of a layer, such as blk.0.ffn_down.weight. Run quantlab inspect for the names."
        )
    return np.concatenate(found)


class _Inputs:
    """A consumer of a `ForwardPass` that keeps the inputs of one product."""

    def __init__(self, model, name: str):
        self._model, self._name, self._found = model, name, []
        self._record = arch.known(model.hparams.arch)

    def observe(self, variant: int, layer: int, field: str, inputs) -> None:
        """Keep the inputs of the product that the matrix takes part in."""
        names = self._record.layer_at(self._model.hparams, layer).products[field]
        if self._name in [f"blk.{layer}.{name}.weight" for name in names]:
            self._found.append(inputs.copy())

    def output(self, forward_pass: ForwardPass) -> list[np.ndarray]:
        """Return the kept inputs, in the order of the chunks."""
        return self._found


def refined(
    weights: np.ndarray, inputs: np.ndarray, qtype: str, *, damping: float = 0.1, sweeps: int = 2
) -> np.ndarray:
    """Return weights quantized and decoded, with codes and scales chosen for these inputs.

    This is what `quantlab.refine` does with a matrix, without making up for the layers before it.

    Parameters
    ----------
    weights : np.ndarray [shape=(nrows, n_per_row), dtype=float32]
    inputs : np.ndarray [shape=(n_tokens, n_per_row), dtype=float32]
    qtype : str
        Q2_K to Q6_K, Q4_0 to Q5_1, or IQ2_XXS to IQ4_XS.
    damping : float
        Share of the diagonal of the second moments that is added to it.
    sweeps : int
        How often codes and scales are gone through after the feedback.
    """
    with Workers() as workers:
        h = damped_moments(inputs, damping, workers)
        data = refine_rows(weights, h, Factor(h, workers), qtype, workers, sweeps=sweeps)
    return quants.dequantize(data, qtype, weights.shape)
