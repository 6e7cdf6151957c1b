"""The CPU engine: float32 in numba.

    x ─ norm ─ q,k,v ─ rope ─ attention ─ attn_output ─ + x ─ norm ─ gate,up ─ silu·mul ─ ffn_down ─ + x

What a layer does beyond that, or leaves out, is in its architecture's `Layer` and in `Hparams`.

A layer is cut into blocks of rows, and attention into heads; each piece is done by one thread from start to end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import llvmlite.binding
import numba
import numpy as np
from threadpoolctl import ThreadpoolController

from quantlab import arch
from quantlab.evaluate import budget
from quantlab.evaluate.engine import (
    Engine,
    ExpertInputs,
    Observe,
    Read,
    Stored,
    cpu_plan,
    fused,
    joined,
    needed,
    stacked,
)
from quantlab.evaluate.engine.attention import QUERIES, causal_attention, heads
from quantlab.evaluate.engine.cpu_weights import LayerWeights, Matrix, Output
from quantlab.evaluate.engine.delta_net import mix_tokens
from quantlab.evaluate.engine.experts import Experts, route
from quantlab.evaluate.engine.latent import Latent
from quantlab.evaluate.engine.rope import rope_angles, rope_factors
from quantlab.evaluate.engine.tiles import BLAS, COLUMNS, fill_panels, multiply, n_panels, panels_size
from quantlab.evaluate.engine.workers import Workers, blocks
from quantlab.evaluate.metrics import TokenScores
from quantlab.quants.compiled import config

ROWS = 192  # rows of activations that a thread takes at a time: whole tiles, and small enough for an even share
PIECE = 1 << 22  # weights that are dequantized at a time on their way into panels
LOGITS = 6 << 20  # logits per thread and model at a time
SHARE_OF_PEAK = 0.7  # of the speed of one large product that a whole pass reaches
_PANEL_ROWS = 64  # rows that a thread puts into panels at a time


class CpuEngine(Engine):
    """Float32 on the CPU; see `Engine`."""

    modes, devices = ("float",), ("cpu",)
    steps = fused  # what a layer does between its products
    rows_at_once = ROWS
    sums_experts_first = False  # whether a token's experts are summed, the first chosen first, before they are added
    angles = staticmethod(rope_angles)

    def __init__(self, model, n_ctx: int):
        self.hparams, self.n_ctx, self.workers = model.hparams, n_ctx, Workers()
        self.record = arch.known(self.hparams.arch)
        self._factors = rope_factors(model, n_ctx)
        self._rotations = {}  # cosines and sines by what they follow from
        self.eps = np.float32(self.hparams.rms_eps)
        self.logit_rows = max(16, min(128, LOGITS // self.hparams.n_vocab))
        self._memory = self._qkv = np.empty(0, np.float32)

    def __enter__(self) -> "CpuEngine":
        self.workers.__enter__()
        return self

    def __exit__(self, *exc) -> None:
        self.workers.__exit__(*exc)

    def rotation(self, hparams: arch.Hparams) -> tuple[np.ndarray, np.ndarray]:
        """Return cosines and sines [n_ctx, n_rot / 2] for a layer with these hyper-parameters."""
        is_other = bool(hparams.window) and self.record.window_rope is not None  # than those that factors are for
        key = hparams.n_rot, hparams.rope_base, hparams.rope_scaling, is_other
        if key not in self._rotations:
            self._rotations[key] = self.angles(hparams, self.n_ctx, None if is_other else self._factors)
        return self._rotations[key]

    # ---- weights

    def load(self, read: Read, index: int) -> LayerWeights:
        """Return a layer's weights, with matrices in memory that the next call reuses."""
        does = self.record.layer_at(self.hparams, index)
        products = {field: [needed(read, f"{name}.weight") for name in names] for field, names in does.products.items()}
        packed = {f: parts if f.startswith("experts") else stacked(parts) for f, parts in products.items()}
        one = {f: [part.expert(0) if len(part.shape) > 2 else part for part in parts] for f, parts in packed.items()}
        sizes = {field: sum(self.packed_size(stored) for stored in parts) for field, parts in one.items()}
        if self._memory.size < sum(sizes.values()):
            self._memory = np.empty(sum(sizes.values()), np.float32)
        free, matrices, experts, expert_memory = self._memory, {}, {}, {}
        for field, parts in products.items():
            if field.startswith("experts"):
                experts[field], expert_memory[field] = parts, free[: sizes[field]]
                free = free[sizes[field] :]
            else:
                matrices[field], free = self.matrix(packed[field], free)
        norms = {field: read(f"{name}.weight") for field, name in does.norms.items()}
        vectors = {
            field: read(f"{name}.weight") or read(f"{name}.bias") or read(name) for field, name in does.vectors.items()
        }
        if "router_scale" in vectors:
            scale = vectors["router_scale"]
            vectors["router_scale"] = replace(scale, data=scale.floats() * np.float32(self.hparams.n_embd**-0.5))  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
        biases = {field: [read(f"{name}.bias") for name in names] for field, names in does.products.items()}
        return LayerWeights(
            matrices,
            {field: joined(parts, products[field]) for field, parts in biases.items() if any(parts)},
            {field: np.array(stored.floats()) for field, stored in norms.items() if stored is not None},
            {field: np.array(stored.floats()) for field, stored in vectors.items() if stored is not None},
            experts,
            expert_memory,
            does,
            self.hparams.at(index),
            index,
        )

    def release(self, layer: LayerWeights) -> None:
        """Release the memory of a layer's matrices, before an observer replaces all of them."""
        layer.matrices = {field: Matrix((), matrix.widths) for field, matrix in layer.matrices.items()}
        self._memory = np.empty(0, np.float32)

    def matrix(self, parts: Sequence[Stored], free: np.ndarray | None = None) -> tuple[Matrix, np.ndarray]:
        """Pack matrices into `free`; return them, and the free rest."""
        if free is None:
            free = np.empty(sum(self.packed_size(stored) for stored in parts), np.float32)
        packed = []
        for stored in parts:
            size = self.packed_size(stored)
            packed.append(self.pack(stored, free[:size]))
            free = free[size:]
        return Matrix(tuple(packed), tuple(stored.shape[0] for stored in parts)), free

    def packed_size(self, stored: Stored) -> int:
        """Return the number of float32 that `pack` needs."""
        return panels_size(stored.shape)

    def pack(self, stored: Stored, memory: np.ndarray, lanes: int = 1):
        """Return a matrix for `multiply`: float32 panels [n_panels(n_out), n_in, COLUMNS]; lanes: see `fill_panels`."""
        n_out, n_in = stored.shape
        panels = memory.reshape(n_panels(n_out), n_in, COLUMNS)
        for piece in blocks(n_out, max(_PANEL_ROWS, PIECE // n_in)):
            rows, at = stored.floats(piece), piece.start
            parts = blocks(len(rows), _PANEL_ROWS)
            self.workers.map(lambda part, x=rows, at=at: fill_panels(x[part], panels, at + part.start, lanes), parts)
        return panels

    def multiply(self, x: np.ndarray, matrix: Matrix, out: np.ndarray) -> None:
        """Compute out = x · weightᵀ on this thread; every product with weights uses this.

        Parameters
        ----------
        x : np.ndarray [shape=(nrows, n_in), dtype=float32]
        matrix : Matrix
        out : np.ndarray [shape=(nrows, n_out), dtype=float32]
        """
        start = 0
        for panels, width in zip(matrix.parts, matrix.widths, strict=True):
            multiply(x, panels, out[:, start : start + width])
            start += width

    # ---- layers

    def learn(self, x: np.ndarray, own: np.ndarray, matrix: Stored, norm: Stored, out: np.ndarray) -> None:
        """Compute what all layers learn of tokens, from their embeddings `x` and from `own`; see `ForwardPass`."""
        size, panels = self.hparams.n_embd_layer, self.matrix([matrix])[0]
        half, scale = np.float32(0.5**0.5), np.float32(size**0.5)

        def work(rows: slice) -> None:
            found = out[rows]
            self.multiply(x[rows], panels, found)
            found *= np.float32(self.hparams.n_embd**-0.5)
            self.steps.head_norm(heads(found, size), norm.floats(), self.eps)
            found[:] = (found + own[rows] * scale) * half

        self.workers.map(work, blocks(len(x), ROWS))

    def forward(self, layer: LayerWeights, states: np.ndarray, first: int = 0, observe: Observe | None = None) -> None:
        """Apply a layer in place; see `Engine.forward`."""
        wide, n_embd = states.reshape(-1, states.shape[-1]), self.hparams.n_embd
        x = wide if wide.shape[1] == n_embd else np.ascontiguousarray(wide[:, :n_embd])
        chunks, by_rows = blocks(len(x), self.n_ctx), blocks(len(x), ROWS)
        if "latent_k" in layer.matrices:
            q_k_v, whole = x[:, :0], {"attended": Latent(self, layer, x, observe).attended(first)}
        else:
            q_k_v, whole = self._mix_tokens(layer, x, first, observe, wide[:, self.hparams.kept(layer.index)])
        if first:
            by_rows = [rows for chunk in chunks for rows in blocks(chunk.stop, ROWS, chunk.start + first)]
        n_ff = layer.matrices["ffn_in"].n_out // 2 if "ffn_in" in layer.matrices else 0
        if observe is not None and 0 < n_ff <= q_k_v.shape[1]:
            whole["inner"] = q_k_v[:, :n_ff]  # attention is done with it
        if observe is not None and whole["attended"].shape[1] == x.shape[1]:
            whole["normed"] = whole["attended"]  # of a row the former come when the latter are done with
        if layer.experts:
            whole |= {"routed": np.empty_like(x), "scores": np.empty((len(x), layer.hparams.n_expert), np.float32)}
        if "shared_post_norm" in layer.norms:
            whole |= {"dense": np.empty_like(x), "sums": np.zeros_like(x)}
        of_tokens = wide[:, n_embd:][:, layer.index * layer.hparams.n_embd_layer :][:, : layer.hparams.n_embd_layer]
        whole["stream"] = x
        self.run(lambda rows, space: self._mix(layer, x, of_tokens, rows, space), by_rows, layer, whole, observe)
        if layer.experts:
            tokens = np.concatenate([np.arange(rows.start, rows.stop) for rows in by_rows])
            routes = route(self, layer, whole["scores"], tokens)
            Experts(self, layer, routes, whole["routed"]).add_to(whole.get("sums", x), observe)
        if "sums" in whole:
            self.workers.map(
                lambda rows: self._join(layer, x[rows], whole["dense"][rows], whole["sums"][rows]), by_rows
            )
        if "layer_scale" in layer.vectors:
            self.workers.map(lambda rows: np.multiply(x[rows], layer.vectors["layer_scale"], out=x[rows]), by_rows)
        if wide is not x:
            wide[:, :n_embd] = x

    def _mix_tokens(self, layer: LayerWeights, x: np.ndarray, first: int, observe: Observe | None, kept) -> tuple:
        """Return q, k, v side by side, and by name what attention or a delta net makes of them.

        k and v go to `kept`, or come from there.
        """
        h, is_delta = layer.hparams, "conv" in layer.vectors
        width = layer.matrices["attn_qkv"].n_out + (h.n_kv if h.v_is_k else 2 * h.n_kv if h.kv_shared else 0)
        size = len(x) * (width + (h.ssm_inner if is_delta else h.n_q))
        if self._qkv.size < size:
            self._qkv = np.empty(size, np.float32)
        qkv = self._qkv[:size].reshape(len(x), -1)  # q, k, v, and what attention makes of them
        q_k_v, mixed = qkv[:, :width], qkv[:, width:]
        chunks, by_rows, whole = blocks(len(x), self.n_ctx), blocks(len(x), ROWS), {"attended": mixed}
        self.run(lambda rows, space: self._project(layer, x, q_k_v, rows, space), by_rows, layer, whole, observe)
        pieces = [(chunk, head) for chunk in chunks for head in range(h.ssm_heads if is_delta else h.n_head_kv)]
        if kept.shape[1]:
            source, target = (kept, q_k_v[:, h.n_q :]) if h.kv_shared else (q_k_v[:, h.n_q :], kept)
            target[:] = source
        if is_delta:
            self.workers.map(lambda p: mix_tokens(self, layer, q_k_v[p[0]], mixed[p[0]], p[1]), pieces)
        else:
            self.workers.map(lambda piece: self._attend(qkv, layer, first, *piece), pieces)
        return q_k_v, whole

    def run(self, part, by_rows: list[slice], layer: LayerWeights, whole: dict, observe: Observe | None) -> None:
        """Run a part of a layer (a generator that stops before each product) on every block of rows.

        If nobody observes, a block goes from start to end while it is in a thread's cache. Else all blocks stop
        before each product, and `whole` holds the inputs of all of them by name.
        """

        def space(name: str, rows: slice, width: int) -> np.ndarray:
            """Return memory for a block of rows (without an observer: this thread's)."""
            if name not in whole and observe is None:
                return self.workers.scratch(name, rows.stop - rows.start, width)
            if name not in whole:
                whole.setdefault(name, np.empty((by_rows[-1].stop, width), np.float32))
            return whole[name][rows]

        if observe is None:
            self.workers.map(lambda rows: list(part(rows, space)), by_rows)
            return
        running = [part(rows, space) for rows in by_rows]
        while (stops := self.workers.map(lambda steps: next(steps, None), running))[0] is not None:
            field, name = stops[0]
            read = observe(field, whole[name])
            if read is not None:
                parts = [needed(read, f"{tensor}.weight") for tensor in layer.does.products[field]]
                layer.matrices[field] = self.matrix(parts)[0]

    def _project(self, layer: LayerWeights, x: np.ndarray, q_k_v: np.ndarray, rows: slice, space) -> Iterator:
        """Compute norm, q, k, v and their rotation for a block of rows."""
        h, out, normed = layer.hparams, q_k_v[rows], space("normed", rows, x.shape[1])
        n_q, wide = layer.does.query_width * h.n_q, layer.does.query_width
        q, k = out[:, :n_q], out[:, n_q : n_q + h.n_kv]
        self.normalize("attn_norm", layer, x[rows], normed)
        yield "attn_qkv", "normed"
        self.product("attn_qkv", layer, normed, out[:, : layer.matrices["attn_qkv"].n_out])
        if "conv" in layer.vectors:
            return
        v = out[:, n_q + h.n_kv :]
        if h.v_is_k:
            v[:] = k
        if layer.does.v_norm:
            self.steps.head_norm(heads(v, h.head_dim), np.ones(h.head_dim, np.float32), self.eps)
        for name, part in (("q_norm", q), ("k_norm", k)):
            if name in layer.norms and layer.norms[name].size == h.head_dim:
                every = heads(part, h.head_dim)
                self.steps.head_norm(every[:, :: wide if name == "q_norm" else 1], layer.norms[name], self.eps)
            elif name in layer.norms:
                self.steps.rms_norm(part, layer.norms[name], self.eps, part)
        position = np.arange(rows.start, rows.stop) % self.n_ctx
        if h.n_rot:
            rotate = getattr(self.steps, f"rope_{layer.does.rope}")
            cos, sin = (table[position] for table in self.rotation(h))
            rotate(heads(q, h.head_dim)[:, ::wide], cos, sin)
            rotate(heads(k, h.head_dim), cos, sin)
        if h.attn_temp_scale:
            step = h.rope_scaling.orig_ctx if h.rope_scaling and h.rope_scaling.orig_ctx else h.n_ctx
            q *= (1 + h.attn_temp_scale * np.log(1 + position // step)).astype(np.float32)[:, None]
        self.round_cache(out[:, n_q:])

    def product(self, field: str, layer: LayerWeights, x: np.ndarray, out: np.ndarray) -> None:
        """Compute a field's product, with its bias."""
        self.multiply(x, layer.matrices[field], out)
        if field in layer.biases:
            self.steps.add(out, layer.biases[field][None])

    def normalize(self, field: str, layer: LayerWeights, x: np.ndarray, out: np.ndarray) -> None:
        """Normalize if the layer does, else copy; `out` may be `x`."""
        if field in layer.norms:
            self.steps.rms_norm(x, layer.norms[field], self.eps, out)
        elif out is not x:
            out[:] = x

    def _add(self, x: np.ndarray, change: np.ndarray) -> None:
        """Add the change of half a layer to the stream."""
        if self.hparams.residual_scale != 1:
            change *= np.float32(self.hparams.residual_scale)
        self.steps.add(x, change)

    def round_cache(self, k_v: np.ndarray) -> None:
        """Round k and v in place to the precision of the cache (here: float32)."""

    def _attend(self, qkv: np.ndarray, layer: LayerWeights, first: int, chunk: slice, head: int) -> None:
        """Compute attention of one chunk from position `first` on, for the query heads that share one k and v head."""
        h, n_q = layer.hparams, layer.does.query_width * layer.hparams.n_head
        n_kv, group = h.n_head_kv, slice(head * h.n_head // h.n_head_kv, (head + 1) * h.n_head // h.n_head_kv)
        every = heads(qkv[chunk], h.head_dim)  # the heads of q, of k, of v, and of the result
        q, k, v = every[:, : n_q : layer.does.query_width][:, group], every[:, n_q + head], every[:, n_q + n_kv + head]
        sinks = layer.vectors.get("sinks", np.full(h.n_head, -np.inf, np.float32))[group]
        out = every[:, n_q + 2 * n_kv :][:, group]
        self.attention(q, k, v, h, first, sinks, out)
        if layer.does.query_width > 1:
            out[first:] /= 1 + np.exp(-every[first:, 1:n_q:2][:, group])

    def attention(self, q, k, v, h: arch.Hparams, first: int, sinks: np.ndarray, out: np.ndarray) -> None:
        """Compute causal attention of some heads [n_ctx, heads, head_dim] over one k and v [n_ctx, head_dim].

        A head of v, and of `out`, may have another size than one of q and k.
        """
        dim = q.shape[2]
        keys = self.workers.scratch("keys", n_panels(self.n_ctx), dim, COLUMNS)
        values = self.workers.scratch("values", n_panels(v.shape[1]), self.n_ctx, COLUMNS)
        scores = self.workers.scratch("scores", QUERIES * self.n_ctx)
        window, cap = h.window or self.n_ctx, np.float32(h.attn_softcap)
        causal_attention(q, k, v, first, window, np.float32(h.score_scale), cap, sinks, out, keys, values, scores)

    def _mix(self, layer: LayerWeights, x: np.ndarray, of_tokens: np.ndarray, rows: slice, space) -> Iterator:
        """Compute everything after attention for a block of rows."""
        x, n_embd = x[rows], x.shape[1]
        has_own = "experts_norm" in layer.norms
        inputs = "routed" if layer.experts and not has_own else "normed"  # the former stay until the experts saw them
        attended, normed = space("attended", rows, 0), space(inputs, rows, n_embd)
        yield "attn_output", "attended"
        change = self.workers.scratch("change", len(x), n_embd)
        self.product("attn_output", layer, attended, change)
        self.normalize("attn_post_norm", layer, change, change)
        self._add(x, change)
        self.normalize("ffn_norm", layer, x, normed)
        if layer.experts:
            scored = inputs
            if has_own:
                scored = "scored"
                self.normalize("experts_norm", layer, x, space("routed", rows, n_embd))
                self.steps.rms_norm(x, layer.vectors["router_scale"], self.eps, space(scored, rows, n_embd))
            yield "router", scored
            self.product("router", layer, space(scored, rows, n_embd), space("scores", rows, layer.hparams.n_expert))
        if "shared_gate" in layer.matrices:
            yield "shared_gate", inputs
            self.product("shared_gate", layer, normed, space("shared_gate", rows, 1))
        if "ffn_in" not in layer.matrices:
            return
        n_ff = layer.matrices["ffn_in"].n_out // 2
        yield "ffn_in", inputs
        gate_up, inner = self.workers.scratch("gate_up", len(x), 2 * n_ff), space("inner", rows, n_ff)
        self.product("ffn_in", layer, normed, gate_up)
        self.activation(layer.does)(gate_up, inner)
        yield "ffn_down", "inner"
        change = self.workers.scratch("change", len(x), n_embd)
        self.product("ffn_down", layer, inner, change)
        if has_own:
            self.normalize("shared_post_norm", layer, change, space("dense", rows, n_embd))
            return
        self.normalize("ffn_post_norm", layer, change, change)
        if "shared_gate" in layer.matrices:
            self.steps.scale_by_sigmoid(change, space("shared_gate", rows, 1))
        self._add(x, change)
        if "layer_gate" in layer.matrices:
            yield "layer_gate", "stream"
            width = of_tokens.shape[1]
            gate_up, inner = self.workers.scratch("gate_up", len(x), 2 * width), space("own", rows, width)
            self.product("layer_gate", layer, x, gate_up[:, :width])
            gate_up[:, width:] = of_tokens[rows]
            self.steps.gelu_mul(gate_up, inner)
            yield "layer_out", "own"
            change = self.workers.scratch("change", len(x), n_embd)
            self.product("layer_out", layer, inner, change)
            self.normalize("layer_post_norm", layer, change, change)
            self.steps.add(x, change)

    def _join(self, layer: LayerWeights, x: np.ndarray, dense: np.ndarray, sums: np.ndarray) -> None:
        """Add what the experts and the one that all tokens see give together, where each has a norm of its own."""
        self.normalize("experts_post_norm", layer, sums, sums)
        self.steps.add(sums, dense)
        self.normalize("ffn_post_norm", layer, sums, sums)
        self._add(x, sums)

    def activation(self, does: arch.Layer):
        """Return the activation function of a feed-forward part."""
        return getattr(self.steps, f"{does.activation}_mul")

    # ---- output

    def load_output(self, norm: Stored, matrix: Stored) -> Output:
        """Return the weights after the last layer, and release the memory of the layers."""
        self._memory = self._qkv = np.empty(0, np.float32)
        return Output(np.array(norm.floats()), self.matrix([matrix])[0])

    def output_inputs(self, norm: Stored, states: np.ndarray) -> np.ndarray:
        """Return the inputs of the last product [shape=(-1, n_embd), dtype=float32]."""
        x, weight = states.reshape(-1, states.shape[-1]), np.array(norm.floats())
        out = np.empty_like(x)
        self.workers.map(lambda rows: self.steps.rms_norm(x[rows], weight, self.eps, out[rows]), blocks(len(x), ROWS))
        return out

    def _logits(self, output: Output, x: np.ndarray, out: np.ndarray) -> None:
        """Compute the logits of some rows on this thread."""
        normed = self.workers.scratch("normed", *x.shape)
        self.steps.rms_norm(x, output.norm, self.eps, normed)
        self.multiply(normed, output.matrix, out)
        if self.hparams.logit_scale != 1:
            out *= np.float32(self.hparams.logit_scale)
        if self.hparams.logit_softcap:
            self.steps.softcap(out, np.float32(self.hparams.logit_softcap))

    def logits(self, output: Output, states: np.ndarray) -> np.ndarray:
        """Return the logits [*states.shape[:-1], n_vocab]."""
        x = states.reshape(-1, states.shape[-1])
        out = np.empty((len(x), output.matrix.n_out), np.float32)
        self.workers.map(lambda rows: self._logits(output, x[rows], out[rows]), blocks(len(x), self.logit_rows))
        return out.reshape(*states.shape[:-1], -1)

    def score(self, outputs: Sequence[Output], states: Sequence[np.ndarray], targets: np.ndarray) -> list[TokenScores]:
        """Score positions for the base and some variants; see `Engine.score`."""
        scores = [TokenScores.empty(*targets.shape) for _ in outputs]

        def work(piece: tuple[int, slice]) -> None:
            base = None
            for name, output, x, found in zip(names, outputs, states, scores, strict=True):
                logits = self.workers.scratch(name, piece[1].stop - piece[1].start, output.matrix.n_out)
                self._logits(output, x[piece], logits)
                base = logits if base is None else base
                fused.score(base, logits, targets[piece], **found.at(piece))

        names = ["base_logits"] + ["logits"] * (len(outputs) - 1)
        n_chunks, n_scored = targets.shape
        self.workers.map(work, [(i, rows) for i in range(n_chunks) for rows in blocks(n_scored, self.logit_rows)])
        return scores

    def arithmetic(self) -> str:
        """Return the kind of CPU and the compiler; on a Mac also the BLAS, which multiplies there."""
        kind = config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
        parts = [kind, f"numba {numba.__version__}", f"llvmlite {llvmlite.__version__}"]
        libraries = ThreadpoolController().info() if BLAS else ()
        return ", ".join([*parts, *sorted({f"{i['internal_api']} {i['version']}" for i in libraries})])

    # ---- consumers

    def column_squares(self, inputs: np.ndarray | ExpertInputs) -> np.ndarray:
        """Return the sums of squares of each column [shape=(1 or n_expert, n_in), dtype=float64]."""
        if isinstance(inputs, ExpertInputs):
            parts = [inputs.rows[start:stop] for start, stop in pairwise(inputs.ends)]
            return np.stack(self.workers.map(lambda rows: fused.column_squares(inputs.x[rows]), parts))
        totals = self.workers.map(lambda rows: fused.column_squares(inputs[rows]), blocks(len(inputs), ROWS))
        return np.sort(np.stack(totals), axis=0).sum(axis=0)[None]

    # ---- plan

    def plan(
        self, variants: Sequence, windows, memory: str | int | None, keep_states: bool, observed: bool = False
    ) -> budget.Budget:
        """Return the `Budget` of a pass over `variants`; see `Engine.plan`."""
        return budget.fit(
            variants,
            windows,
            memory,
            keep_states,
            layer_bytes=lambda chunks, in_memory: cpu_plan.layer_bytes(self, variants, chunks, in_memory, observed),
            output_bytes=lambda outputs: cpu_plan.output_bytes(self, outputs, PIECE),
            speed=SHARE_OF_PEAK * peak(self.workers),
        )


def peak(workers: Workers) -> float:
    """Measure the floating-point operations per second of all threads together, in large products."""
    return cpu_plan.peak(workers, ROWS)
