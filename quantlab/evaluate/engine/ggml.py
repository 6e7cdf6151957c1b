"""llama.cpp's CPU arithmetic, to the last bit: the layers of the CPU engine with ggml's order of every operation."""

import numpy as np

from quantlab.evaluate.engine import Stored, ggml_steps
from quantlab.evaluate.engine.cpu import CpuEngine, Matrix
from quantlab.evaluate.engine.ggml_activations import round_f16
from quantlab.evaluate.engine.ggml_products import Packed, pack, product
from quantlab.evaluate.engine.rope import rope_angles_as_ggml


class GgmlEngine(CpuEngine):
    """Activations rounded before each product, k and v kept in float16, and all sums in ggml's order."""

    modes = ("ggml-cpu",)
    steps = ggml_steps
    angles = staticmethod(rope_angles_as_ggml)

    def packed_size(self, stored: Stored) -> int:
        """Return 0: `pack` has its own memory."""
        return 0

    def pack(self, stored: Stored, memory: np.ndarray) -> Packed:
        """Return a matrix taken apart into integers and scales."""
        return pack(stored.data, stored.qtype, stored.shape)

    def multiply(self, x: np.ndarray, matrix: Matrix, out: np.ndarray) -> None:
        """Compute out = x · weightᵀ on this thread."""
        product(x, matrix.parts, out, self.workers)

    def round_cache(self, k_v: np.ndarray) -> None:
        """Round k and v to float16."""
        round_f16(k_v, k_v)

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, first: int, out: np.ndarray) -> None:
        """Causal attention of some heads [n_ctx, heads, head_dim] over one k and v [n_ctx, head_dim]."""
        scale = np.float32(1) / np.sqrt(np.float32(q.shape[2]))
        ggml_steps.flash_attention(q[first:], k, v, first, scale, out[first:])
