"""The forward pass of a Llama, one layer at a time over as many chunks as are at hand.

    x ─ norm ─ q,k,v ─ rope ─ attention ─ attn_output ─ + x ─ norm ─ gate,up ─ silu·mul ─ ffn_down ─ + x

Architectures that differ only in their knobs (rotary positions, biases, q/k norms, tied embeddings, head counts)
share it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from quantlab.arch import find
from quantlab.evaluate import dense, fused, ggml_products, ggml_steps
from quantlab.evaluate.activations import round_f16
from quantlab.evaluate.attention import QUERIES, causal_attention
from quantlab.evaluate.dense import Matrix, Workers, blocks
from quantlab.evaluate.ggml_products import Packed, PackedMatrix
from quantlab.evaluate.rope import rope_angles, rope_angles_as_ggml
from quantlab.evaluate.tiles import COLUMNS, n_panels, panels_size

MODES = ("float", "ggml-cpu")
ROWS = 192  # rows of activations that a thread takes at a time: whole tiles, and small enough for an even share


@dataclass(frozen=True)
class Layer:
    """The weights of one layer as the forward pass takes them; a field is None where the model has no such tensor."""

    attn_norm: np.ndarray
    qkv: Matrix | PackedMatrix
    qkv_bias: np.ndarray | None
    q_norm: np.ndarray | None
    k_norm: np.ndarray | None
    attn_output: Matrix | PackedMatrix
    attn_output_bias: np.ndarray | None
    ffn_norm: np.ndarray
    gate_up: Matrix | PackedMatrix
    ffn_down: Matrix | PackedMatrix


def layer_shapes(model, index: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of layer `index`."""
    return {tensor.name: tensor.shape for tensor in model if tensor.name.startswith(f"blk.{index}.")}


def layer_weights(model, index: int) -> int:
    """Return how many float32 numbers the matrices of layer `index` take in memory, in whole panels."""
    return sum(panels_size(shape) for shape in layer_shapes(model, index).values() if len(shape) == 2)


def load_layer(
    model,
    index: int,
    read: Callable[[str, np.ndarray], None],
    memory: np.ndarray | None = None,
    pack: Callable[[str], Packed] | None = None,
) -> Layer:
    """Read the weights of one layer.

    Parameters
    ----------
    model : Model
    index : int
    read : callable
        `read(name, out)` fills `out`, a vector or the panels of a matrix, with the tensor's values.
    memory : np.ndarray [shape=(`layer_weights` or more,), dtype=float32], optional
        Where to put the matrices.
    pack : callable, optional
        `pack(name)` returns a weight matrix taken apart for mode `ggml-cpu`; then all matrices are.

    Returns
    -------
    Layer
        Its matrices are views of `memory`.
    """
    used = 0
    if memory is None and pack is None:
        memory = np.empty(layer_weights(model, index), np.float32)

    def matrix(*kinds: str) -> Matrix | PackedMatrix:
        """Matrices over the same input."""
        nonlocal used
        names, parts = [f"blk.{index}.{kind}.weight" for kind in kinds], []
        if pack is not None:
            return PackedMatrix(tuple(pack(name) for name in names))
        for name in names:
            shape = model.tensor(name).shape
            panels = memory[used : used + panels_size(shape)].reshape(-1, shape[1], COLUMNS)
            used += panels.size
            read(name, panels)
            parts.append((panels, shape[0]))
        return Matrix(tuple(parts))

    def vector(*kinds: str, suffix: str = "weight") -> np.ndarray | None:
        """Vectors one after the other."""
        names = [f"blk.{index}.{kind}.{suffix}" for kind in kinds]
        if any(name not in model for name in names):
            return None
        pieces = [np.empty(model.tensor(name).shape, np.float32) for name in names]
        for name, piece in zip(names, pieces, strict=True):
            read(name, piece)
        return np.concatenate(pieces)

    return Layer(
        attn_norm=vector("attn_norm"),
        qkv=matrix("attn_q", "attn_k", "attn_v"),
        qkv_bias=vector("attn_q", "attn_k", "attn_v", suffix="bias"),
        q_norm=vector("attn_q_norm"),
        k_norm=vector("attn_k_norm"),
        attn_output=matrix("attn_output"),
        attn_output_bias=vector("attn_output", suffix="bias"),
        ffn_norm=vector("ffn_norm"),
        gate_up=matrix("ffn_gate", "ffn_up"),
        ffn_down=matrix("ffn_down"),
    )


class Llama:
    """The forward pass for one shape of model.

    Parameters
    ----------
    hparams : Hparams
    n_ctx : int
        Tokens of a chunk.
    mode : str
        `float`: activations stay float32. `ggml-cpu`: all is computed as ggml's CPU code does, in its order, with
        activations rounded before each product, and k and v kept in float16.
    workers : Workers
    rope_factors : np.ndarray or None
        See `rope_angles`.
    """

    def __init__(self, hparams, n_ctx: int, mode: str, workers: Workers, rope_factors: np.ndarray | None = None):
        self.hparams, self.n_ctx, self.workers = hparams, n_ctx, workers
        self.as_ggml = mode == "ggml-cpu"
        self.steps = ggml_steps if self.as_ggml else fused
        self.rope = getattr(self.steps, f"rope_{find(hparams.arch).layer.rope}")
        angles = rope_angles_as_ggml if self.as_ggml else rope_angles
        self.cos, self.sin = angles(hparams, n_ctx, rope_factors)
        self.eps = np.float32(hparams.rms_eps)
        self.n_q, self.n_kv = hparams.n_head * hparams.head_dim, hparams.n_head_kv * hparams.head_dim

    def forward(self, layer: Layer, x: np.ndarray, qkv: np.ndarray, first: int = 0) -> None:
        """Apply one layer in place.

        Parameters
        ----------
        layer : Layer
        x : np.ndarray [shape=(n_chunks * n_ctx, n_embd), dtype=float32, C-contiguous]
            Hidden states of whole chunks, one after the other.
        qkv : np.ndarray [shape=(n_chunks * n_ctx, `qkv_width`), dtype=float32]
            Scratch space.
        first : int
            Position of each chunk from which on the result is wanted; what is before it stays as it is.
        """
        chunks, by_rows = blocks(len(x), self.n_ctx), blocks(len(x), ROWS)
        self.workers.map(lambda rows: self._project(layer, x, qkv, rows), by_rows)
        pieces = [(chunk, head) for chunk in chunks for head in range(self.hparams.n_head_kv)]
        self.workers.map(lambda piece: self._attend(qkv, first, *piece), pieces)
        if first:
            by_rows = [rows for chunk in chunks for rows in blocks(chunk.stop, ROWS, chunk.start + first)]
        self.workers.map(lambda rows: self._mix(layer, x, qkv[:, self.n_q + 2 * self.n_kv :], rows), by_rows)

    @property
    def qkv_width(self) -> int:
        """Columns of the scratch space of `forward`: q, k, v and what attention makes of them."""
        return 2 * self.n_q + 2 * self.n_kv

    def product(self, x: np.ndarray, matrix: Matrix | PackedMatrix, out: np.ndarray) -> None:
        """Compute out = x · weightᵀ in this pass's mode; every product with weights goes through here."""
        if self.as_ggml:
            ggml_products.product(x, matrix, out, self.workers)
        else:
            dense.product(x, matrix, out)

    def _project(self, layer: Layer, x: np.ndarray, qkv: np.ndarray, rows: slice) -> None:
        """Norm, q, k, v and their rotation for a block of rows."""
        hparams, n_q, n_kv = self.hparams, self.n_q, self.n_kv
        x, out = x[rows], qkv[rows, : n_q + 2 * n_kv]
        normed = self.workers.scratch("normed", *x.shape)
        self.steps.rms_norm(x, layer.attn_norm, self.eps, normed)
        self.product(normed, layer.qkv, out)
        if layer.qkv_bias is not None:
            self.steps.add(out, layer.qkv_bias[None])
        q = heads(out[:, :n_q], hparams.head_dim)
        k = heads(out[:, n_q : n_q + n_kv], hparams.head_dim)
        if layer.q_norm is not None:
            self.steps.head_norm(q, layer.q_norm, self.eps)
            self.steps.head_norm(k, layer.k_norm, self.eps)
        position = np.arange(rows.start, rows.stop) % self.n_ctx
        cos, sin = self.cos[position], self.sin[position]
        self.rope(q, cos, sin)
        self.rope(k, cos, sin)
        if self.as_ggml:
            round_f16(out[:, n_q:], out[:, n_q:])

    def _attend(self, qkv: np.ndarray, first: int, chunk: slice, head: int) -> None:
        """Attention of one chunk from position `first` on, for the query heads that share one k and v head."""
        dim, n_q, n_kv = self.hparams.head_dim, self.n_q, self.n_kv
        group = self.hparams.n_head // self.hparams.n_head_kv
        every = heads(qkv[chunk], dim)  # the heads of q, of k, of v, and of the result
        k, v = every[:, n_q // dim + head], every[:, (n_q + n_kv) // dim + head]
        q, out = (every[:, start + head * group :][:, :group] for start in (0, (n_q + 2 * n_kv) // dim))
        if self.as_ggml:
            scale = np.float32(1) / np.sqrt(np.float32(dim))
            ggml_steps.flash_attention(q[first:], k, v, first, scale, out[first:])
            return
        keys = self.workers.scratch("keys", n_panels(self.n_ctx), dim, COLUMNS)
        values = self.workers.scratch("values", n_panels(dim), self.n_ctx, COLUMNS)
        scores = self.workers.scratch("scores", QUERIES * self.n_ctx)
        causal_attention(q, k, v, first, np.float32(dim**-0.5), out, keys, values, scores)

    def _mix(self, layer: Layer, x: np.ndarray, attended: np.ndarray, rows: slice) -> None:
        """Everything after attention for a block of rows."""
        x, n_ff = x[rows], self.hparams.n_ff
        change = self.workers.scratch("change", *x.shape)
        normed = self.workers.scratch("normed", *x.shape)
        gate_up = self.workers.scratch("gate_up", len(x), 2 * n_ff)
        inner = self.workers.scratch("inner", len(x), n_ff)
        self.product(attended[rows], layer.attn_output, change)
        if layer.attn_output_bias is not None:
            self.steps.add(change, layer.attn_output_bias[None])
        self.steps.add(x, change)
        self.steps.rms_norm(x, layer.ffn_norm, self.eps, normed)
        self.product(normed, layer.gate_up, gate_up)
        self.steps.silu_mul(gate_up, inner)
        self.product(inner, layer.ffn_down, change)
        self.steps.add(x, change)


def heads(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """View rows [nrows, n_heads * head_dim] as [nrows, n_heads, head_dim]."""
    return np.lib.stride_tricks.as_strided(
        rows,
        (len(rows), rows.shape[1] // head_dim, head_dim),
        (rows.strides[0], head_dim * rows.itemsize, rows.itemsize),
    )
