"""The CPU engine with activations rounded as llama.cpp's CPU code rounds them, for weights of other types than its own.

A file's weights decide what its activations are rounded to before each product. This engine takes the weights of one
model and the roundings of another: what is left between it and the CPU engine is the rounding alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from quantlab.evaluate.engine import Read, Stored
from quantlab.evaluate.engine.cpu import CpuEngine, LayerWeights, Matrix, Output
from quantlab.evaluate.engine.ggml_activations import Blocks, round_bf16, round_f16
from quantlab.evaluate.engine.ggml_products import ORDERS
from quantlab.evaluate.engine.tiles import multiply
from quantlab.quants.ggml_types import GGML_TYPES

RUN = 16  # columns of the sums that `Blocks` makes with the codes; none of them is used here


def activations_of(qtype: str) -> str:
    """Return the type that activations are rounded to before a product with weights of `qtype`.

    Examples
    --------
    >>> activations_of("Q4_K"), activations_of("Q5_1"), activations_of("F16")
    ('Q8_K', 'Q8_1', 'F16')

    Source: `vec_dot_type` of ggml-cpu.c, llama.cpp.
    """
    if qtype in ORDERS:
        return ORDERS[qtype].activations
    return "Q8_K" if GGML_TYPES[qtype].block == 256 else "Q8_0"


@dataclass(frozen=True)
class _Rounded(Stored):
    """A tensor, and what the activations of its product are rounded to."""

    activations: str = "F32"

    def expert(self, index: int) -> "_Rounded":
        """Return one matrix of a stack."""
        return _Rounded(self.data[index], self.qtype, self.shape[1:], is_expert=True, activations=self.activations)


class RoundedEngine(CpuEngine):
    """Products in float32 after the rounding; k and v are rounded to float16. It belongs to no mode.

    Parameters
    ----------
    model : Model
    n_ctx : int
    activations : mapping of str to str
        Tensor name → type that the inputs of its product are rounded to; others stay as they are.
    output : str
        Name of the matrix that gives the logits.
    """

    modes = ()

    def __init__(self, model, n_ctx: int, activations: Mapping[str, str], output: str):
        super().__init__(model, n_ctx)
        self._activations, self._output = activations, output

    def _marked(self, stored: Stored | None, name: str) -> Stored | None:
        if stored is None or len(stored.shape) < 2:
            return stored
        return _Rounded(stored.data, stored.qtype, stored.shape, activations=self._activations.get(name, "F32"))

    def load(self, read: Read, index: int) -> LayerWeights:
        """Return a layer's weights; see `CpuEngine.load`."""
        return super().load(lambda name: self._marked(read(name), f"blk.{index}.{name}"), index)

    def load_output(self, norm: Stored, matrix: Stored) -> Output:
        """Return the weights after the last layer."""
        return super().load_output(norm, self._marked(matrix, self._output))  # pyright: ignore[reportArgumentType]

    def learn(self, x: np.ndarray, own: np.ndarray, matrix: Stored, norm: Stored, out: np.ndarray) -> None:
        """Compute what all layers learn of tokens; see `CpuEngine.learn`."""
        super().learn(x, own, self._marked(matrix, "per_layer_model_proj.weight"), norm, out)  # pyright: ignore[reportArgumentType]

    def pack(self, stored: Stored, memory: np.ndarray) -> tuple[str, np.ndarray]:
        """Return the activations' type, and panels."""
        return stored.activations, super().pack(stored, memory)  # pyright: ignore[reportAttributeAccessIssue]

    def multiply(self, x: np.ndarray, matrix: Matrix, out: np.ndarray) -> None:
        """Compute out = x · weightᵀ on this thread, after rounding x to what each part asks for."""
        start, done, rounded = 0, None, x
        for (qtype, panels), width in zip(matrix.parts, matrix.widths, strict=True):
            if qtype != done:
                done, rounded = qtype, self._round(x, qtype)
            multiply(rounded, panels, out[:, start : start + width])
            start += width

    def _round(self, x: np.ndarray, qtype: str) -> np.ndarray:
        if qtype == "F32":
            return x
        out = self.workers.scratch("rounded", *x.shape)
        if qtype.startswith("Q8"):
            blocks = Blocks(x, qtype, RUN, self.workers)
            shape = (*blocks.d.shape, -1)
            np.multiply(blocks.codes.reshape(shape), blocks.d[..., None], out=out.reshape(shape))
            return out
        (round_f16 if qtype == "F16" else round_bf16)(x, out)
        return out

    def round_cache(self, k_v: np.ndarray) -> None:
        """Round k and v to float16."""
        round_f16(k_v, k_v)
