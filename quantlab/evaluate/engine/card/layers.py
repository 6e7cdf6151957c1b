"""The layers in torch: attention, feed-forward, experts, as the architecture's record describes them.

Latent attention is computed head by head; see `engine.latent`.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from quantlab import arch
from quantlab.evaluate.engine import ExpertInputs, Observe
from quantlab.evaluate.engine.card.delta_net import mix_tokens
from quantlab.evaluate.engine.card.products import Operand, Products
from quantlab.evaluate.engine.rope import rope_angles, rope_factors

SCORE_BYTES = 1 << 28  # of the scores of attention, where they are kept, at a time
_LEAST_SUM = 6.103515625e-5  # what sums of weights of experts are at least, as in llama.cpp

# what is computed here; a layer with anything else is refused, see `check`
ACTIVATIONS: dict[str, Callable] = {
    "silu": lambda gate, up: functional.silu(gate).mul_(up),
    "gelu": lambda gate, up: functional.gelu(gate, approximate="tanh").mul_(up),
    "swiglu_oai": lambda gate, up: (x := gate.clamp(max=7)) * torch.sigmoid(1.702 * x) * (up.clamp(-7, 7) + 1),
}
GATINGS = ("softmax", "sigmoid", "softmax_chosen")
_LAYER = """attn_norm attn_qkv q_norm k_norm attn_output attn_post_norm ffn_norm router experts_in experts_down
shared_gate ffn_in ffn_down ffn_post_norm v_norm experts_norm shared_post_norm experts_post_norm router_scale
expert_scales layer_scale rope activation query_width sinks conv time_step decay state_norm in_groups gating
choice_bias sums_to_one scaled_queries latent_q_norm latent_q latent_norm latent_k latent_v layer_gate layer_out
layer_post_norm""".split()
_HPARAMS = """arch n_embd n_ff n_layer n_head n_head_kv n_vocab n_ctx head_dim n_rot rms_eps rope_base rope_base_window
head_dim_window n_rot_window v_is_k n_layer_nextn nextn rope_scaling window attn_scale attn_softcap attn_temp_scale
embd_scale residual_scale logit_scale logit_softcap n_expert
n_expert_used n_ff_exp n_ff_shexp expert_scale recurrent ssm_conv ssm_state ssm_groups ssm_heads ssm_inner
attention_interval tied_embeddings n_kv_shared kv_shared n_embd_layer n_lora_q n_lora_kv head_dim_mla head_dim_v
expert_gating expert_norm expert_groups expert_groups_used n_expert_shared n_dense dense""".split()


def check(model, device: str) -> None:
    """Refuse a model with a part that this engine does not support.

    Raises
    ------
    ValueError
        If its record or its hyper-parameters say something that this module does not know.
    """
    hparams = model.hparams
    record = arch.known(hparams.arch)
    found = [(f.name, getattr(hparams, f.name), f.default) for f in fields(hparams) if f.name not in _HPARAMS]
    for index in range(hparams.n_layer):
        does = record.layer_at(hparams, index)
        found += [(f.name, getattr(does, f.name), f.default) for f in fields(does) if f.name not in _LAYER]
        known = {"rope": ("pairs", "halves"), "activation": ACTIVATIONS, "gating": GATINGS}
        found += [(name, value, None) for name, of in known.items() if (value := getattr(does, name)) not in of]
    for name, value, default in found:
        if value != default:
            raise ValueError(f"{model.path}: {name}={value} is not supported on device={device}. Use device=cpu.")


@dataclass
class LayerWeights:
    """The weights of one layer on the device."""

    matrices: dict[str, list[Operand]]  # by field of the layer's description; those of experts one below the other
    biases: dict[str, list[torch.Tensor | None]]
    norms: dict[str, torch.Tensor]  # by field, where there is one
    vectors: dict[str, torch.Tensor]  # what else there is, by field
    safe: set[str]  # norms whose results halves hold, however large the inputs are
    does: arch.Layer
    hparams: arch.Hparams  # this layer's
    index: int

    def tensors(self) -> list[torch.Tensor]:
        """Return all tensors on the device."""
        biases = [bias for of in self.biases.values() for bias in of if bias is not None]
        operands = [operand for of in self.matrices.values() for operand in of]
        return [*self.norms.values(), *self.vectors.values(), *biases, *(t for o in operands for t in o.tensors())]


class Layers:
    """The layers of a model, applied to hidden states.

    Parameters
    ----------
    model : Model
    n_ctx : int
    products : Products
    device : torch.device
    matrices : callable
        `matrices(parts)` makes a field's operands of what an observer read.

    Attributes
    ----------
    stream : torch.Tensor or None
        For observers: the residual stream [rows, n_embd] after attention of the chunks that are computed.
    """

    stream: torch.Tensor | None = None

    def __init__(self, model, n_ctx: int, products: Products, device: torch.device, matrices: Callable):
        self.hparams, self.n_ctx, self.products, self.device = model.hparams, n_ctx, products, device
        self._matrices = matrices
        self._factors = rope_factors(model, n_ctx)
        self._window_rope = arch.known(self.hparams.arch).window_rope
        self._rotations, self._masks = {}, {}

    def apply(self, layer: LayerWeights, x: torch.Tensor, first: int, observe: Observe | None) -> torch.Tensor:
        """Apply a layer to hidden states [n_chunks, n_ctx, n_state]; return those from position `first` on.

        What states hold beside the stream is changed in place, and so is the stream then, once all is computed.
        """
        n_chunks, n_ctx, n_state = x.shape
        n_embd, wide = self.hparams.n_embd, x if n_state > self.hparams.n_embd else None
        x = x[..., :n_embd]
        normed, is_safe = self._norm(layer, "attn_norm", x.reshape(-1, n_embd))
        parts = self._products(layer, "attn_qkv", normed, is_safe, observe)
        del normed
        kept = None if wide is None else wide[..., self.hparams.kept(layer.index)]
        attended = self._mix_tokens(layer, parts, kept, observe)[:, first:].reshape(n_chunks * (n_ctx - first), -1)
        del parts
        (change,) = self._products(layer, "attn_output", attended, False, observe)
        del attended
        x = self._add(layer, "attn_post_norm", x[:, first:].reshape(-1, n_embd), change)
        del change
        self.stream = x if observe is not None else None
        x = self._feed_forward(layer, x, observe)
        if wide is not None and "layer_gate" in layer.matrices:
            start, size = n_embd + layer.index * layer.hparams.n_embd_layer, layer.hparams.n_embd_layer
            x = self._add_own(layer, x, wide[:, first:, start : start + size].reshape(-1, size), observe)
        if "layer_scale" in layer.vectors:
            x.mul_(layer.vectors["layer_scale"])
        x = x.view(n_chunks, n_ctx - first, n_embd)
        if wide is None:
            return x
        wide[:, first:, :n_embd] = x
        return wide[:, first:]

    def _feed_forward(self, layer: LayerWeights, x: torch.Tensor, observe: Observe | None) -> torch.Tensor:
        """Apply all steps after attention to rows."""
        normed, is_safe = self._norm(layer, "ffn_norm", x)
        routes = routed = shared = None
        if "router" in layer.matrices:
            scored = routed = normed, is_safe
            if "experts_norm" in layer.norms:
                routed = self._norm(layer, "experts_norm", x)
                scored = self.rms_norm(x, layer.vectors["router_scale"]), False
            (scores,) = self._products(layer, "router", *scored, observe)
            routes = choose(scores, layer)
            del scored, scores
        if "shared_gate" in layer.matrices:
            (shared,) = self._products(layer, "shared_gate", normed, is_safe, observe)
        if "ffn_in" in layer.matrices:
            inner = self._activate(layer, self._products(layer, "ffn_in", normed, is_safe, observe))
            del normed
            (change,) = self._products(layer, "ffn_down", inner, False, observe)
            del inner
            if routes is not None and "experts_norm" in layer.norms:
                dense, _ = self._norm(layer, "shared_post_norm", change)
                del change
                sums = self._add_experts(layer, torch.zeros_like(x), routed, routes, observe)
                sums, _ = self._norm(layer, "experts_post_norm", sums)
                return self._add(layer, "ffn_post_norm", x, sums.add_(dense))
            gate = None if shared is None else shared.sigmoid()
            x = self._add(layer, "ffn_post_norm", x, change, gate)
        return x if routes is None else self._add_experts(layer, x, routed, routes, observe)

    def _add_own(self, layer: LayerWeights, x, own: torch.Tensor, observe: Observe | None) -> torch.Tensor:
        """Add what a layer makes of what it learns of each token, `own`."""
        (gate,) = self._products(layer, "layer_gate", x, False, observe)
        inner = ACTIVATIONS["gelu"](gate, own)
        del gate
        (change,) = self._products(layer, "layer_out", inner, False, observe)
        return self._add(layer, "layer_post_norm", x, change)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Return rows divided by their root mean square, times a weight (None: 1)."""
        return functional.rms_norm(x, x.shape[-1:], weight, self.hparams.rms_eps)

    def _norm(self, layer: LayerWeights, field: str, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """Normalize rows if the layer does, and tell whether halves can hold them without a scale."""
        if field not in layer.norms:
            return x, False
        return self.rms_norm(x, layer.norms[field]), field in layer.safe

    def _add(self, layer: LayerWeights, field: str, x, change, gate=None) -> torch.Tensor:
        """Return x + change in the memory of `change`, first normalized, gated and scaled as the layer says."""
        if field in layer.norms:
            change = self.rms_norm(change, layer.norms[field])
        if gate is not None:
            change.mul_(gate)
        if self.hparams.residual_scale != 1:
            change.mul_(self.hparams.residual_scale)
        return change.add_(x)

    def _products(self, layer: LayerWeights, field: str, x, is_safe: bool, observe: Observe | None) -> list:
        """Return the products of a field with their biases, each [rows, n_out]."""
        self._observe(layer, field, x, observe)
        operand = self.products.operand(x, is_safe)
        found = [self.products.multiply(operand, matrix) for matrix in layer.matrices[field]]
        return [out if bias is None else out.add_(bias) for out, bias in zip(found, layer.biases[field], strict=True)]

    def _observe(self, layer: LayerWeights, field: str, inputs, observe: Observe | None) -> None:
        if observe is not None and (read := observe(field, inputs)) is not None:
            layer.matrices[field] = self._matrices([read(f"{name}.weight") for name in layer.does.products[field]])

    def _activate(self, layer: LayerWeights, gate_up: list[torch.Tensor]) -> torch.Tensor:
        """Apply the activation to gate and up, given as one or two products."""
        gate, up = gate_up if len(gate_up) == 2 else gate_up[0].chunk(2, 1)
        return ACTIVATIONS[layer.does.activation](gate, up)

    # ---- attention

    def _mix_tokens(self, layer: LayerWeights, parts: list[torch.Tensor], kept, observe) -> torch.Tensor:
        """Return what tokens see of those before them [n_chunks, n_ctx, ...]: takes the products out of `parts`.

        Keys and values that several layers use go to `kept`, or come from there.
        """
        if "conv" in layer.vectors:
            return mix_tokens(layer.hparams, layer.vectors, parts, self.n_ctx, layer.does.in_groups)
        if "latent_k" in layer.matrices:
            return self._attend_latents(layer, parts, observe)
        gate = None
        if layer.does.query_width > 1:
            q, gate = parts[0].unflatten(1, (-1, 2, layer.hparams.head_dim)).unbind(2)
            parts[0] = q.flatten(1)
        q, k, v = self._queries_keys_values(layer, parts, kept)
        parts.clear()
        attended = self._attend(layer, q, k, v)
        return attended if gate is None else attended * gate.sigmoid().unflatten(0, (-1, self.n_ctx))

    def _queries_keys_values(self, layer: LayerWeights, parts: list[torch.Tensor], kept) -> list[torch.Tensor]:
        """Return q, k and v [n_chunks, heads, n_ctx, head_dim], normalized, rotated and scaled."""
        h = layer.hparams
        if len(parts) == 1 and not h.kv_shared:
            parts = list(parts[0].split([h.n_q, h.n_kv, h.n_kv], 1))
        if h.v_is_k and not h.kv_shared:
            parts = [*parts, parts[1].clone()]
        found = [part.unflatten(1, (-1, h.head_dim)).unflatten(0, (-1, self.n_ctx)) for part in parts]
        for name, part, rows in zip(("q_norm", "k_norm"), found, parts, strict=False):
            if name in layer.norms:
                whole = part if layer.norms[name].numel() == h.head_dim else rows
                whole.copy_(self.rms_norm(whole, layer.norms[name]))
            if h.n_rot:
                self._rotate(layer, part)
        if layer.does.v_norm:
            found[2].copy_(self.rms_norm(found[2], None))
        if h.attn_temp_scale:
            step = h.rope_scaling.orig_ctx if h.rope_scaling and h.rope_scaling.orig_ctx else h.n_ctx
            scale = (1 + h.attn_temp_scale * np.log(1 + np.arange(self.n_ctx) // step)).astype(np.float32)
            found[0].mul_(torch.from_numpy(scale).to(self.device)[:, None, None])
        if h.kv_shared:
            found += [part.unflatten(2, (-1, h.head_dim)) for part in kept.chunk(2, -1)]
        elif kept is not None and kept.shape[-1]:
            for columns, part in zip(kept.chunk(2, -1), found[1:], strict=True):
                columns.copy_(part.flatten(2))
        return [part.transpose(1, 2) for part in found]

    def _rotate(self, layer: LayerWeights, x: torch.Tensor) -> None:
        """Rotate pairs of dimensions of [n_chunks, n_ctx, heads, head_dim] in place."""
        h = layer.hparams
        is_other = bool(h.window) and self._window_rope is not None  # than those that factors are for
        key = h.n_rot, h.rope_base, h.rope_scaling, is_other
        if key not in self._rotations:
            tables = rope_angles(h, self.n_ctx, None if is_other else self._factors)
            self._rotations[key] = [torch.from_numpy(table).to(self.device)[:, None] for table in tables]
        cos, sin = self._rotations[key]
        pairs = layer.does.rope == "pairs"
        a, b = (x[..., 0 : h.n_rot : 2], x[..., 1 : h.n_rot : 2]) if pairs else x[..., : h.n_rot].chunk(2, -1)
        turned = a * cos - b * sin
        b.mul_(cos).add_(a * sin)
        a.copy_(turned)

    def _attend(self, layer: LayerWeights, q, k, v) -> torch.Tensor:
        """Apply causal attention to q, k and v: [n_chunks, n_ctx, heads, head_dim]."""
        h, group = layer.hparams, q.shape[1] // k.shape[1]
        if self.products.precision == "half":
            q, k, v = q.half(), k.half(), v.half()
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        window = h.window if 0 < h.window < self.n_ctx else 0
        if h.attn_softcap or "sinks" in layer.vectors:
            return self._attend_in_steps(layer, q, k, v, window).transpose(1, 2)
        seen: dict[str, Any] = {"attn_mask": self._mask(window)} if window else {"is_causal": True}
        return functional.scaled_dot_product_attention(q, k, v, scale=h.score_scale, **seen).transpose(1, 2)

    def _attend_in_steps(self, layer: LayerWeights, q, k, v, window: int) -> torch.Tensor:
        """Apply attention with capped scores or a sink, a few chunks at a time."""
        h, out, sinks = layer.hparams, torch.empty_like(q), layer.vectors.get("sinks")
        step = max(1, SCORE_BYTES // (4 * q.shape[1] * self.n_ctx**2))
        for start in range(0, len(q), step):
            some = slice(start, start + step)
            scores = (q[some] @ k[some].transpose(2, 3)).float().mul_(h.score_scale)
            if h.attn_softcap:
                scores = torch.tanh(scores / h.attn_softcap).mul_(h.attn_softcap)
            scores.masked_fill_(~self._mask(window), -torch.inf)
            if sinks is not None:
                beside = sinks.view(-1, 1, 1).expand(*scores.shape[:3], 1)
                scores = torch.cat([scores, beside], -1)
            out[some] = scores.softmax(-1)[..., : self.n_ctx].to(v.dtype) @ v[some]
        return out

    def _mask(self, window: int) -> torch.Tensor:
        """Return the visible keys of each position [n_ctx, n_ctx, dtype=bool]: the last `window` (0: all)."""
        if window not in self._masks:
            position = torch.arange(self.n_ctx, device=self.device)
            distance = position[:, None] - position
            self._masks[window] = (distance >= 0) & (distance < (window or self.n_ctx))
        return self._masks[window]

    def _attend_latents(self, layer: LayerWeights, parts: list[torch.Tensor], observe: Observe | None) -> torch.Tensor:
        """Apply latent attention [n_chunks, n_ctx, n_v], head by head: takes the products out of `parts`."""
        h, (q, kv) = layer.hparams, parts
        parts.clear()
        if "latent_q" in layer.matrices:
            q, is_safe = self._norm(layer, "latent_q_norm", q)
            (q,) = self._products(layer, "latent_q", q, is_safe, observe)
        latents, q = kv[:, : h.n_lora_kv], q.unflatten(1, (h.n_head, -1))
        latents.copy_(self.rms_norm(latents, layer.norms["latent_norm"]))
        for part in (q[..., h.n_nope :], kv[:, None, h.n_lora_kv :]):
            self._rotate(layer, part.unflatten(0, (-1, self.n_ctx)))
        keys = kv.unflatten(0, (-1, 1, self.n_ctx))
        if self.products.precision == "half":
            keys = keys.half()
        mix = partial(self._mix_latents, layer, q, keys)
        if observe is not None:
            self._observe(layer, "latent_k", _by_head(q[..., : h.n_nope].transpose(0, 1)), observe)
            mixed = keys.new_empty(h.n_head, len(q), h.n_lora_kv)
            for head in range(h.n_head):
                mixed[head] = mix(head)
            self._observe(layer, "latent_v", _by_head(mixed), observe)
            mix = mixed.__getitem__
        out = q.new_empty(len(q), h.n_v)
        for head, columns in enumerate(out.chunk(h.n_head, 1)):
            columns.copy_(self._of_expert(layer, "latent_v", self.products.operand(mix(head)), head, h.n_head)[0])
        return out.unflatten(0, (-1, self.n_ctx))

    def _mix_latents(self, layer: LayerWeights, q: torch.Tensor, keys: torch.Tensor, head: int) -> torch.Tensor:
        """Return what a head's attention makes of latents, which are the first columns of `keys` [rows, n_lora_kv].

        Values are whole keys, so that they are as wide: some of torch's kernels need that.
        """
        h, q = layer.hparams, q[:, head]
        (query,) = self._of_expert(layer, "latent_k", self.products.operand(q[:, : h.n_nope]), head, h.n_head)
        query = torch.cat([query, q[:, h.n_nope :]], 1).view(keys.shape)
        return self._attend(layer, query, keys, keys)[..., : h.n_lora_kv].flatten(0, 2)

    # ---- experts

    def _add_experts(self, layer: LayerWeights, x, routed: Any, routes: "Routes", observe) -> torch.Tensor:
        """Add the outputs of each token's experts to its row, one expert after the other."""
        normed, is_safe = routed
        self._observe(layer, "experts_in", routes.inputs(normed), observe)
        operand, n_expert = self.products.operand(normed, is_safe), layer.hparams.n_expert
        inner: Any = None  # as soon as its width is known: [n_seen, n_ff]
        for expert, mine in routes.each():
            seen = operand.rows(routes.tokens[mine])
            made = self._activate(layer, self._of_expert(layer, "experts_in", seen, expert, n_expert))
            inner = made.new_empty(len(routes.tokens), made.shape[1]) if inner is None else inner
            inner[mine] = made
            del seen, made  # before the next expert's are there
        self._observe(layer, "experts_down", routes.inputs(inner, sorted_already=True), observe)
        for expert, mine in routes.each():
            seen = self.products.operand(inner[mine])
            (change,) = self._of_expert(layer, "experts_down", seen, expert, n_expert)
            x.index_add_(0, routes.tokens[mine], change.mul_(routes.weights[mine, None]))
            del seen, change
        return x

    def _of_expert(self, layer: LayerWeights, field: str, seen: Operand, expert: int, n_expert: int) -> list:
        """Return the products of one expert, with its biases."""
        found = []
        for matrix, bias in zip(layer.matrices[field], layer.biases[field], strict=True):
            height = len(matrix.parts[0]) // n_expert
            out = self.products.multiply(seen, matrix.rows(slice(expert * height, (expert + 1) * height)))
            found.append(out if bias is None else out.add_(bias[expert]))
        return found


def _by_head(x: torch.Tensor) -> ExpertInputs:
    """Return an observer's inputs of a product of each head [n_head, n_rows, n_in]."""
    n_head, n_rows, n_in = x.shape
    return ExpertInputs(x.reshape(-1, n_in), np.arange(n_head * n_rows), np.arange(n_head + 1) * n_rows)


@dataclass(frozen=True)
class Routes:
    """Tokens sorted by their experts, see `routing.Routes`; `ends` is in the machine's memory."""

    tokens: torch.Tensor
    weights: torch.Tensor
    ends: np.ndarray

    def each(self):
        """Yield the experts in use, each with the positions of its tokens."""
        for expert in np.flatnonzero(np.diff(self.ends)).tolist():
            yield expert, slice(int(self.ends[expert]), int(self.ends[expert + 1]))

    def inputs(self, x: torch.Tensor, sorted_already: bool = False) -> ExpertInputs:
        """Return an observer's inputs for rows `x`, one for each token or for each entry."""
        rows = np.arange(len(x)) if sorted_already else self.tokens.cpu().numpy()
        return ExpertInputs(x, rows, self.ends)


def choose(scores: torch.Tensor, layer: LayerWeights) -> Routes:
    """Choose the experts of tokens by the scores [n_tokens, n_expert] of the router.

    Source: build_moe_ffn in src/llama-graph.cpp of llama.cpp.
    """
    does, h = layer.does, layer.hparams
    if does.gating != "softmax_chosen":
        scores = scores.softmax(-1) if does.gating == "softmax" else scores.sigmoid()
    bias = layer.vectors.get("choice_bias")
    chosen_by = scores if bias is None else scores + bias
    if h.expert_groups > 1:
        of_groups = chosen_by.unflatten(-1, (h.expert_groups, -1))
        best = of_groups.topk(2, -1).values.sum(-1).topk(h.expert_groups_used, -1).indices
        is_left_out = torch.ones_like(of_groups[..., 0], dtype=torch.bool).scatter_(1, best, False)
        chosen_by = of_groups.masked_fill(is_left_out[..., None], -torch.inf).flatten(1)
    ids = chosen_by.topk(h.n_expert_used, -1).indices
    weights = scores.gather(1, ids)
    if does.gating == "softmax_chosen":
        weights = weights.softmax(-1)
    if does.sums_to_one:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=_LEAST_SUM)
    order = ids.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=h.n_expert).cpu().numpy()
    weights = weights * h.expert_scale
    if "expert_scales" in layer.vectors:
        weights = weights * layer.vectors["expert_scales"][ids]
    weights = weights.flatten()[order]
    return Routes(order // h.n_expert_used, weights, np.concatenate([[0], counts.cumsum()]))
