"""The experts of a layer on the CPU: one expert after the other, for all of its tokens.

    routes: tokens of expert e ─ rows of x ─ experts_in ─ activation ─ experts_down ─ · weight ─ + to their rows

An expert's weights are unpacked by all threads, into memory that the next one uses again; then its tokens are shared
out in blocks. No token has an expert twice, so threads never add to the same row, and the order of every sum is that
of the experts, whatever the number of threads.
"""

import numpy as np

from quantlab.evaluate.engine import ExpertInputs, Observe
from quantlab.evaluate.engine.routing import Routes, add_rows, add_sums, choose, put_rows, sort_tokens, take_rows
from quantlab.evaluate.engine.workers import blocks

GATINGS = ("softmax", "sigmoid", "softmax_chosen")
_TILE = 6  # rows of a tile, see `tiles`


def route(engine, layer, scores: np.ndarray, tokens: np.ndarray) -> Routes:
    """Choose the experts of some tokens (rows of `scores`, modified) and sort the tokens by expert."""
    n_used, does = layer.hparams.n_expert_used, layer.does
    ids, weights = np.empty((len(tokens), n_used), np.int32), np.empty((len(tokens), n_used), np.float32)
    bias = layer.vectors.get("choice_bias", np.zeros(scores.shape[1], np.float32))
    how = GATINGS.index(does.gating), does.sums_to_one, np.float32(layer.hparams.expert_scale)
    how = *how, (layer.hparams.expert_groups, layer.hparams.expert_groups_used)
    seen = scores[tokens]
    parts = blocks(len(tokens), max(1, -(-len(tokens) // engine.workers.n_threads)))
    engine.workers.map(lambda part: choose(seen[part], bias, *how, ids[part], weights[part]), parts)
    if "expert_scales" in layer.vectors:
        weights *= layer.vectors["expert_scales"][ids]
    return sort_tokens(tokens, ids, weights, scores.shape[1])


class Experts:
    """The products of one layer's experts with normalized rows `x`.

    Parameters
    ----------
    engine : CpuEngine
    layer : LayerWeights
    routes : Routes
    x : np.ndarray [shape=(n_tokens, n_embd), dtype=float32]
    """

    def __init__(self, engine, layer, routes: Routes, x: np.ndarray):
        self.engine, self.layer, self.routes, self.x = engine, layer, routes, x
        self.activate = engine.activation(layer.does)
        self.outputs = np.empty((len(routes.tokens), x.shape[1]) if engine.sums_experts_first else 0, np.float32)

    def add_to(self, states: np.ndarray, observe: Observe | None) -> None:
        """Add the outputs of each token's experts to its row of `states`."""
        self._compute(states, observe)
        if self.outputs.size:
            ranks, tokens = self.routes.ranks, self.routes.tokens
            self.engine.workers.map(
                lambda part: add_sums(states, tokens[ranks[part, 0]], ranks[part], self.outputs),
                blocks(len(ranks), self.engine.rows_at_once),
            )

    def _compute(self, states: np.ndarray, observe: Observe | None) -> None:
        """Compute all experts; add their outputs to `states`, or keep them in `outputs`."""
        if observe is None:
            for expert in self.routes.used:
                into, down = self._weights("experts_in", expert), self._weights("experts_down", expert)
                self._share(expert, lambda part, e=expert, m=(into, down): self._all(e, part, m[0], m[1], states))
            return
        self._observe("experts_in", ExpertInputs(self.x, self.routes.tokens, self.routes.ends), observe)
        inner = np.empty((len(self.routes.tokens), self.layer.experts["experts_down"][0].shape[-1]), np.float32)
        for expert in self.routes.used:
            into = self._weights("experts_in", expert)
            self._share(expert, lambda part, e=expert, m=into: self._inner(e, part, m, inner[part]))
        rows = np.arange(len(inner))
        self._observe("experts_down", ExpertInputs(inner, rows, self.routes.ends), observe)
        for expert in self.routes.used:
            down = self._weights("experts_down", expert)
            self._share(expert, lambda part, e=expert, m=down: self._outer(e, part, m, inner[part], states))

    def _observe(self, field: str, inputs: ExpertInputs, observe: Observe) -> None:
        read = observe(field, inputs)
        if read is not None:
            self.layer.experts[field] = [read(f"{name}.weight") for name in self.layer.does.products[field]]

    def _weights(self, field: str, expert: int):
        """Unpack an expert's weights, each field into its own memory."""
        parts = [stored.expert(expert) for stored in self.layer.experts[field]]
        return self.engine.matrix(parts, self.layer.expert_memory[field])[0]

    def _share(self, expert: int, work) -> None:
        """Divide an expert's tokens into equal blocks of whole tiles."""
        mine, threads = self.routes.of(expert), self.engine.workers.n_threads
        n = mine.stop - mine.start
        rounds = -(-n // (threads * self.engine.rows_at_once))
        size = -(-n // (threads * rounds * _TILE)) * _TILE
        self.engine.workers.map(work, blocks(mine.stop, size, mine.start))

    def _all(self, expert: int, part: slice, into, down, states: np.ndarray) -> None:
        inner = self.engine.workers.scratch("inner", part.stop - part.start, into.n_out // 2)
        self._inner(expert, part, into, inner)
        self._outer(expert, part, down, inner, states)

    def _inner(self, expert: int, part: slice, into, out: np.ndarray) -> None:
        """Apply the first products and the activation to rows of x."""
        scratch, n = self.engine.workers.scratch, part.stop - part.start
        seen, gate_up = scratch("normed", n, self.x.shape[1]), scratch("gate_up", n, into.n_out)
        take_rows(self.x, self.routes.tokens[part], seen)
        self._product("experts_in", expert, seen, into, gate_up)
        self.activate(gate_up, out)

    def _outer(self, expert: int, part: slice, down, inner: np.ndarray, states: np.ndarray) -> None:
        """Apply the last product to inner rows, and add the weighted results to their tokens' rows."""
        change = self.engine.workers.scratch("change", len(inner), states.shape[1])
        self._product("experts_down", expert, inner, down, change)
        if self.outputs.size:
            put_rows(self.outputs[part], self.routes.weights[part], change)
        else:
            add_rows(states, self.routes.tokens[part], self.routes.weights[part], change)

    def _product(self, field: str, expert: int, x: np.ndarray, matrix, out: np.ndarray) -> None:
        self.engine.multiply(x, matrix, out)
        if field in self.layer.biases:
            self.engine.steps.add(out, self.layer.biases[field][expert][None])
