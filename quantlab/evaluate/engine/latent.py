"""Latent attention: all heads see one short row per token, which is also what their values are made of.

    x ─ norm ─┬─ q, or a short row ─ norm ─ q ─ of each head: the part without positions ─ latent_k ─┐
              │                                               the part with positions ─ rope ────────┤ attention
              └─ latent ─ norm ──────────────────────────────────────────────────────────────────────┤
                 the part of keys with positions ─ rope ─────────────────────────────────────────────┘
    what attention gives of the latents ─ latent_v ─ the head's columns of the input of `attn_output`

Source: DeepSeek-AI 2024, "DeepSeek-V2"; `src/models/deepseek2.cpp` of llama.cpp, whose products these are.
"""

from collections.abc import Iterator

import numpy as np

from quantlab.evaluate.engine import ExpertInputs, Observe, needed, stacked
from quantlab.evaluate.engine.attention import heads
from quantlab.evaluate.engine.workers import blocks

_NO_SINK = np.full(1, -np.inf, np.float32)


class Latent:
    """Latent attention of one layer over the rows `x` of some chunks.

    Parameters
    ----------
    engine : CpuEngine
    layer : LayerWeights
    x : np.ndarray [shape=(n_chunks * n_ctx, n_embd), dtype=float32]
    observe : callable or None
        As `Engine.forward` has it; heads are observed as experts are, each with all rows.
    """

    def __init__(self, engine, layer, x: np.ndarray, observe: Observe | None):
        h = layer.hparams
        self.engine, self.layer, self.x, self.observe = engine, layer, x, observe
        self.q, self.kv = np.empty((len(x), h.n_q_mla), np.float32), np.empty((len(x), h.head_dim), np.float32)

    def attended(self, first: int) -> np.ndarray:
        """Return the input of `attn_output` [shape=(n_chunks * n_ctx, n_v), dtype=float32].

        Of each chunk only the rows from position `first` on are computed.
        """
        engine, layer, h = self.engine, self.layer, self.layer.hparams
        by_rows = blocks(len(self.x), engine.rows_at_once)
        engine.run(self._project, by_rows, layer, {}, self.observe)
        out = np.zeros((len(self.x), h.n_v), np.float32)
        chunks = blocks(len(self.x), engine.n_ctx)
        pieces = [(chunk, head) for chunk in chunks for head in range(h.n_head)]
        if self.observe is None:
            engine.workers.map(lambda piece: self._values(piece, self._mix(piece, first), out), pieces)
            return out
        self._see("latent_k", heads(self.q, h.head_dim_mla)[:, :, : h.n_nope])
        mixed = np.zeros((len(self.x), h.n_head, h.n_lora_kv), np.float32)

        def mix(piece: tuple[slice, int]) -> None:
            mixed[piece[0], piece[1]] = self._mix(piece, first)

        engine.workers.map(mix, pieces)
        self._see("latent_v", mixed)
        engine.workers.map(lambda piece: self._values(piece, mixed[piece[0], piece[1]], out), pieces)
        return out

    def _project(self, rows: slice, space) -> Iterator:
        """Compute queries, latents and rotated keys of a block of rows."""
        engine, layer, h = self.engine, self.layer, self.layer.hparams
        normed, kv = space("normed", rows, self.x.shape[1]), self.kv[rows]
        engine.normalize("attn_norm", layer, self.x[rows], normed)
        yield "attn_qkv", "normed"
        width = layer.matrices["attn_qkv"].n_out - h.head_dim
        out = engine.workers.scratch("q_kv", len(normed), width + h.head_dim)
        engine.product("attn_qkv", layer, normed, out)
        kv[:] = out[:, width:]
        if "latent_q" in layer.matrices:
            short = space("short", rows, width)
            engine.normalize("latent_q_norm", layer, out[:, :width], short)
            yield "latent_q", "short"
            engine.product("latent_q", layer, short, self.q[rows])
        else:
            self.q[rows] = out[:, :width]
        engine.normalize("latent_norm", layer, kv[:, : h.n_lora_kv], kv[:, : h.n_lora_kv])
        cos, sin = (table[np.arange(rows.start, rows.stop) % engine.n_ctx] for table in engine.rotation(h))
        engine.steps.rope_pairs(heads(self.q[rows], h.head_dim_mla)[:, :, h.n_nope :], cos, sin)
        engine.steps.rope_pairs(kv[:, None, h.n_lora_kv :], cos, sin)

    def _mix(self, piece: tuple[slice, int], first: int) -> np.ndarray:
        """Return what a head's attention makes of the latents of a chunk [shape=(n_ctx, n_lora_kv)]."""
        (chunk, head), h, scratch = piece, self.layer.hparams, self.engine.workers.scratch
        own, keys = heads(self.q[chunk], h.head_dim_mla)[:, head], self.kv[chunk]
        query, mixed = scratch("query", len(keys), h.head_dim), scratch("mixed", len(keys), h.n_lora_kv)
        matrix = self.layer.matrices["latent_k"].one(head)
        self.engine.multiply(own[:, : h.n_nope], matrix, query[:, : h.n_lora_kv])
        query[:, h.n_lora_kv :] = own[:, h.n_nope :]
        mixed[:first] = 0
        values = keys[:, : h.n_lora_kv]
        self.engine.attention(query[:, None], keys, values, h, first, _NO_SINK, mixed[:, None])
        return mixed

    def _values(self, piece: tuple[slice, int], mixed: np.ndarray, out: np.ndarray) -> None:
        """Compute a head's columns of the result for a chunk."""
        chunk, head = piece
        matrix = self.layer.matrices["latent_v"].one(head)
        self.engine.multiply(mixed, matrix, heads(out[chunk], matrix.n_out)[:, head])

    def _see(self, field: str, inputs: np.ndarray) -> None:
        """Have the inputs [n_tokens, n_head, n_in] of a product of each head observed, and take its new weights."""
        n_tokens, n_head, n_in = inputs.shape
        rows = np.arange(n_tokens * n_head).reshape(n_tokens, n_head).T.reshape(-1)
        ends = np.arange(n_head + 1) * n_tokens
        read = self.observe(field, ExpertInputs(inputs.reshape(-1, n_in), rows, ends))  # pyright: ignore[reportOptionalCall]
        if read is not None:
            parts = [needed(read, f"{name}.weight") for name in self.layer.does.products[field]]
            self.layer.matrices[field] = self.engine.matrix(stacked(parts))[0]
