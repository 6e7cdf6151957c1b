"""llama.cpp's CPU arithmetic, to the last bit: the layers of the CPU engine with ggml's order of every operation."""

from collections.abc import Sequence

import numpy as np

from quantlab import arch
from quantlab.evaluate.budget import Budget
from quantlab.evaluate.engine import Stored, ggml_steps
from quantlab.evaluate.engine.attention import flash_attention
from quantlab.evaluate.engine.cpu import CpuEngine, Matrix
from quantlab.evaluate.engine.ggml_activations import Blocks, round_bf16, round_f16
from quantlab.evaluate.engine.ggml_products import ORDERS, ORDERS_OF_EXPERTS, Packed, pack, product
from quantlab.evaluate.engine.rope import rope_angles_as_ggml
from quantlab.evaluate.engine.tiles import BLAS, WIDTH, multiply, multiply_in_lanes, sort_columns
from quantlab.evaluate.variants import output_name


class GgmlEngine(CpuEngine):
    """Activations rounded before each product, k and v kept in float16, and all sums in ggml's order."""

    modes = ("ggml-cpu",)
    steps = ggml_steps
    sums_experts_first = True
    angles = staticmethod(rope_angles_as_ggml)

    def __init__(self, model, n_ctx: int):
        layer, h = arch.known(model.hparams.arch).layer, model.hparams
        beyond = {
            "latent attention": h.n_lora_kv,
            "delta nets": any(h.recurrent_layers),
            "gates of attention": layer.query_width > 1,
            "layer_scale": layer.layer_scale,
            "experts beside others": layer.shared_gate or layer.experts_norm,
        }
        if others := [name for name, value in beyond.items() if value]:
            raise ValueError(
                f"{model.path}: mode=ggml-cpu does not compute {', '.join(others)} of {h.arch}. "
                f"Evaluate it in mode float, or in llama.cpp."
            )
        super().__init__(model, n_ctx)

    def plan(self, variants: Sequence, windows, memory, keep_states: bool, observed: bool = False) -> Budget:
        """Return the `Budget` of a pass over `variants`; refuse weights whose products have no order here."""
        for variant in variants:
            for name, qtype in variant.types.items():
                is_product = name != "token_embd.weight" or name == output_name(variant.model)
                if is_product and qtype not in ORDERS:
                    raise ValueError(
                        f"{variant.name}: {name}: {qtype} in mode ggml-cpu, must be one of {', '.join(ORDERS)}. "
                        "Evaluate it in mode float, or in llama.cpp."
                    )
        return super().plan(variants, windows, memory, keep_states, observed)

    def packed_size(self, stored: Stored) -> int:
        """Return how many float32 numbers of memory `pack` is given: none for a type with an order."""
        return 0 if ORDERS[stored.qtype].group else super().packed_size(stored)

    def pack(self, stored: Stored, memory: np.ndarray) -> Packed | tuple[str, int, np.ndarray]:
        """Return a matrix taken apart into integers and scales; of a float type the type, partial sums, panels."""
        order = (ORDERS_OF_EXPERTS if stored.is_expert else ORDERS)[stored.qtype]
        if order.group:
            return pack(stored.data, stored.qtype, stored.shape, order, self.workers)
        n_out, n_in = stored.shape
        lanes = 64 if stored.is_expert or n_out % 4 else 16  # ggml_vec_dot_f32, ggml_vec_dot_f16; tinyBLAS
        lanes = 1 if BLAS or stored.qtype == "BF16" or n_in % lanes else lanes
        return stored.qtype, lanes, super().pack(stored, memory, lanes)

    def multiply(self, x: np.ndarray, matrix: Matrix, out: np.ndarray) -> None:
        """Compute out = x · weightᵀ on this thread, after rounding x to what each type of weights asks for."""
        start, done, rounded = 0, None, x
        for part, width in zip(matrix.parts, matrix.widths, strict=True):
            target, is_ordered = out[:, start : start + width], isinstance(part, Packed)
            start += width
            how = (part.order.activations, part.order.run, 1) if is_ordered else (part[0], 0, part[1])
            if done != how:
                done, rounded = how, self._round(x, *how)
            if is_ordered:
                product(rounded, part, target)  # pyright: ignore[reportArgumentType]
            elif part[1] > 1:
                multiply_in_lanes(rounded, part[2], part[1], target)
            else:
                multiply(rounded, part[2], target)

    def _round(self, x: np.ndarray, qtype: str, run: int, lanes: int) -> Blocks | np.ndarray:
        """Round activations to a type: blocks of integers for products in runs, else numbers sorted into lanes."""
        if run:
            return Blocks(x, qtype, run, self.workers)
        if qtype != "F32":
            out = self.workers.scratch("rounded", *x.shape)
            (round_f16 if qtype == "F16" else round_bf16)(x, out)
            x = out
        return x if lanes == 1 else sort_columns(x, lanes, self.workers.scratch("sorted", *x.shape))

    def round_cache(self, k_v: np.ndarray) -> None:
        """Round k and v to float16."""
        round_f16(k_v, k_v)

    def attention(self, q, k, v, h: arch.Hparams, first: int, sinks: np.ndarray, out: np.ndarray) -> None:
        """Causal attention of some heads [n_ctx, heads, head_dim] over one k and v [n_ctx, head_dim]."""
        dim, n_ctx = q.shape[2], self.n_ctx
        keys = self.workers.scratch("keys", -(-n_ctx // WIDTH), dim, WIDTH)
        values = self.workers.scratch("values", -(-dim // WIDTH), n_ctx, WIDTH)
        scale = np.float32(h.attn_scale) if h.attn_scale else np.float32(1) / np.sqrt(np.float32(dim))
        if self.record.layer.scaled_queries:
            q *= scale
            scale = np.float32(1)
        window, cap = h.window or n_ctx, np.float32(h.attn_softcap)
        flash_attention(q[first:], k, v, first, window, scale, cap, sinks, out[first:], keys, values)
