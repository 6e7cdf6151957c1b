"""The pass that chooses a refined file's bytes: layer after layer, field after field.

Two streams of hidden states go through the model side by side: x with the original weights, x̂ with those written so
far. For each field (q,k,v, attn_output, gate,up, ffn_down, at last the output) the second moments of x̂ are collected,
and the weights W chosen so that their outputs from x̂ come close to those of W from x:

    H = E[x̂ x̂ᵀ]      W* = W + (W E[(x - x̂) x̂ᵀ] + ½ E[(r - r̂) x̂ᵀ]) H⁻¹      bytes: least tr((Ŵ - W*) H (Ŵ - W*)ᵀ)

r is the residual stream before the addition; its term is for the fields that are added to it.

An expert has H and the cross term from its own tokens: those that the router sends to it in x̂, as it will in the file.
Each is paired with the same token in x. Where x does not send the token to this expert, the input of its last matrix is
not known there, and counts as equal. An expert with fewer tokens than half the inputs of a matrix keeps its ordinary
bytes.

Source: GPTQ (Frantar et al. 2022) for the feedback, GPTAQ (Li et al. 2025) for the target from the original stream.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from quantlab.evaluate.engine import ExpertInputs, Stored
from quantlab.evaluate.engine.workers import blocks
from quantlab.evaluate.refine_experts import OriginalExperts, Rows
from quantlab.evaluate.refine_rows import refine_rows
from quantlab.evaluate.second_moments import Factor, accumulate, damped_moments, host, product
from quantlab.evaluate.states import HiddenStates
from quantlab.evaluate.variants import Variant, Weights, as_is, output_name
from quantlab.quants.validate import check_encoded
from quantlab.transform.refined import MOVED, has_refined_bytes, limited, near, ordinary_distance
from quantlab.transform.rules import layer_of

AT_ONCE = 512  # rows of a matrix that are refined together
TOKENS_AT_ONCE = 4096  # tokens of the original stream that a layer is applied to together
KEPT = ("attn_qkv", "latent_q", "ffn_in")  # fields whose inputs are kept from the original stream, experts aside
FEWEST = 0.5  # tokens for each input of its matrix that refining an expert takes; it does harm with fewer
# of the fields whose outputs are added to the residual stream the norm that may come before
RESIDUAL = {"attn_output": "attn_post_norm", "ffn_down": "ffn_post_norm"}


def damping_for(n_tokens: int, n: int) -> float:
    """Return the damping for `n` inputs seen in this number of tokens: more if each input has few tokens."""
    return float(np.clip(1.6 * n / max(1, n_tokens), 0.05, 0.3))


def fewest_tokens(n: int) -> int:
    """Return the number of tokens that an expert must have seen to be refined, its matrix having `n` inputs."""
    return int(np.ceil(FEWEST * n))


def can_refine(variant: Variant, name: str) -> bool:
    """Tell whether a tensor of a variant can get refined bytes."""
    is_used = layer_of(name) < variant.model.hparams.n_layer  # not by layers that guess tokens ahead
    return is_used and has_refined_bytes(variant.model.tensor(name), variant.types[name])


class Refinement:
    """The pass that chooses the bytes of one file.

    Parameters
    ----------
    variant : Variant
        Types of the file, and what its ordinary bytes are made with; `variant.model` is the base.
    tokens : np.ndarray [shape=(n_chunks, n_ctx), dtype=int32]
    engine : Engine
        Entered; of the CPU, or see `CardRefinement`.
    sweeps : int
        How often codes and scales are gone through after the feedback.
    damping : float
        Share of each diagonal element of H that is added to it.
    bar : tqdm
        Counts layers.
    scratch : Path or None
        Folder of the hidden states.
    key : str
        What the hidden states in `scratch` belong to.
    """

    at_once = AT_ONCE

    def __init__(
        self,
        variant: Variant,
        tokens: np.ndarray,
        engine: Any,
        *,
        sweeps: int,
        damping: float,
        bar: tqdm,
        scratch: Path | None = None,
        key: str = "",
    ):
        self.model, self.variant, self.tokens, self.engine = variant.model, variant, tokens, engine
        self.sweeps, self.damping, self.bar = sweeps, damping, bar
        self.workers: Any = getattr(engine, "workers", None)
        self.ordinary = ordinary_distance(self.model, variant.types)
        self.few = 0  # matrices of experts that keep ordinary bytes
        self._routed = np.empty(0, np.int64)
        self.base = as_is(self.model)
        self.weights = Weights(self.model, [self.base, variant])
        n_chunks, n_ctx = tokens.shape
        self.states = HiddenStates(2, n_chunks, n_ctx, self.model.hparams.n_embd, scratch, key)

    @property
    def is_new(self) -> bool:
        """True if no hidden states of an earlier run exist."""
        return self.states.layer < 0

    def run(self, write: Callable[[str, np.ndarray], None] | None) -> None:
        """Do the whole pass, from where the hidden states on disk leave off.

        `write(name, data)` takes the bytes [shape=(nrows, row_bytes), dtype=uint8] of each refined tensor.
        """
        self.write = write
        if self.is_new:
            self._embed()
        self.bar.update(self.states.layer)
        for index in range(self.states.layer, self.model.hparams.n_layer):
            self._layer(index)
            self.bar.update(1)
        self._output()

    def forget(self) -> None:
        """Delete the hidden states, once the refined file is delivered or lost."""
        self.states.close(delete=True)

    def _embed(self) -> None:
        used, places = np.unique(self.tokens, return_inverse=True)
        for i, variant in enumerate((self.base, self.variant)):
            table = self.weights.embeddings(variant, used)
            for chunks in self._chunks():
                self.states.write(i, chunks, self.engine.embed(table, places.reshape(self.tokens.shape)[chunks]))
        self.states.advance()

    def _chunks(self) -> Iterator[slice]:
        """Yield the chunks, a few at a time."""
        yield from blocks(len(self.tokens), max(1, TOKENS_AT_ONCE // self.tokens.shape[1]))

    def _layer(self, index: int) -> None:
        """Apply a layer to the original stream, then choose its bytes while applying it to the quantized stream."""
        layer = self.engine.load(lambda name: self.weights.get(self.base, f"blk.{index}.{name}"), index)
        seen, streams, experts = self._original(layer)
        whole = slice(0, len(self.tokens))
        written = self.states.read(1, whole)
        written_stream = written.reshape(streams["after"].shape)  # a view, which the forward pass changes in place

        def choose(field: str, inputs: np.ndarray):
            self.engine.release(layer)  # the products before this one are done
            names = [f"blk.{index}.{name}.weight" for name in layer.does.products[field]]
            if isinstance(inputs, ExpertInputs):
                chosen = self._choose_stacks(field, names, inputs, experts)
            else:
                chosen = self._choose(names, inputs, *self._drift(field, layer, seen, streams, written_stream))
            others = {name: self.weights.get(self.variant, name) for name in names if name not in chosen}
            return lambda name: (chosen | others)[f"blk.{index}.{name}"]

        self.engine.release(layer)
        self.engine.forward(layer, written, observe=choose)
        self.weights.forget()
        self.states.write(0, whole, streams["after"].reshape(written.shape))
        self.states.write(1, whole, written)
        self.states.advance()

    def _original(self, layer) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], OriginalExperts]:
        """Apply a layer to the original stream (in memory: in place).

        Returns
        -------
        seen : dict
            Inputs [n_tokens, n_in] of the fields that are not added to the residual stream.
        streams : dict
            The residual stream [n_tokens, n_embd] `before` the layer, after `attention` and `after` the layer.
        experts : OriginalExperts
        """
        states = self.states.read(0, slice(0, len(self.tokens)))
        after = states.reshape(-1, states.shape[-1])  # once the layer has been applied
        seen, streams, experts = {}, {"before": after.copy(), "after": after}, OriginalExperts(len(after))
        for chunks in self._chunks():
            rows, done = slice(*(states.shape[1] * i for i in (chunks.start, chunks.stop))), set()

            def keep(field: str, inputs, rows=rows, done=done) -> None:
                if not field.startswith(("attn_", "latent_")) and "attention" not in done:
                    done.add("attention")
                    _put(streams, "attention", rows, after[rows], len(after))
                if field.startswith("experts"):
                    experts.keep(field, rows, inputs)
                elif field in KEPT:
                    _put(seen, field, rows, inputs, len(after))

            self.engine.forward(layer, states[chunks], observe=keep)
        return seen, streams, experts

    def _drift(self, field: str, layer, seen: dict, streams: dict, written: np.ndarray) -> tuple:
        """Return the original stream's inputs of a field, or `wanted(rows)`: the target of some outputs.

        The outputs that are wanted make up for half the drift of the residual stream. They are not known where outputs
        are scaled before they are added, or experts add theirs.
        """
        if field not in RESIDUAL:
            return seen.pop(field, None), None
        is_scaled = RESIDUAL[field] in layer.norms or self.model.hparams.residual_scale != 1
        if is_scaled or (field == "ffn_down" and "router" in layer.does.products):
            return None, None
        before, after = ("before", "attention") if field == "attn_output" else ("attention", "after")
        before, after = streams.pop(before), streams[after]
        bias = layer.biases.get(field, np.zeros(after.shape[1], np.float32))
        return None, lambda rows: after[:, rows] - (before[:, rows] + written[:, rows]) / 2 - bias[rows]

    def _output(self) -> None:
        """Choose the bytes of the output matrix, unless it is also the embedding."""
        name = output_name(self.model)
        if not can_refine(self.variant, name):
            return
        norm, _ = self.weights.output(self.base)
        whole = slice(0, len(self.tokens))
        inputs, original = (self.engine.output_inputs(norm, self.states.read(i, whole)) for i in (1, 0))
        self._choose([name], inputs, original, None)

    def _choose(self, names: Sequence[str], inputs: np.ndarray, original, wanted) -> dict[str, Stored]:
        """Choose the bytes of one field's matrices; `original` and `wanted` come from `_drift`."""
        names = [name for name in names if can_refine(self.variant, name)]
        if not names:
            return {}
        found = self._moments(names[0], inputs, original if original is None else (original, inputs), wanted)
        chosen = {}
        for name in names:
            qtype = self.variant.types[name]
            data = self._refine(name, qtype, *found)
            self.write(name, data)  # pyright: ignore[reportOptionalCall]
            chosen[name] = Stored(data, qtype, self.model.tensor(name).shape)
        return chosen

    def _choose_stacks(
        self, field: str, names: Sequence[str], inputs: ExpertInputs, original: OriginalExperts
    ) -> dict[str, Stored]:
        """Choose the bytes of one field's stacks of matrices."""
        wanted = [(self.variant, name) for name in names if can_refine(self.variant, name)]
        if field == "experts_in":
            self._routed = inputs.rows  # tokens, expert by expert

        def pair(expert: int, mine: slice):
            """Return an expert's inputs in both streams; heads of latent attention go without the original stream."""
            rows, tokens = inputs.rows[mine], self._routed[mine]
            return original.pair(field, expert, inputs.x, rows, tokens) if field.startswith("experts") else None

        data = self._refine_stacks(wanted, inputs, pair)
        for (_, name), bytes_ in zip(wanted, data, strict=True):
            self.write(name, bytes_)  # pyright: ignore[reportOptionalCall]
        original.forget(field)
        return {
            name: Stored(bytes_, self.variant.types[name], self.model.tensor(name).shape)
            for (_, name), bytes_ in zip(wanted, data, strict=True)
        }

    def _refine_stacks(
        self, wanted: Sequence[tuple[Variant, str]], inputs: ExpertInputs, pair: Callable
    ) -> list[np.ndarray]:
        """Return chosen bytes [shape=(n_mat, nrows, row_bytes)] of stacks over the same inputs, matrix after matrix."""
        stacks: list[Any] = [self.weights.get(*one) for one in wanted]
        for expert, (start, stop) in enumerate(pairwise(inputs.ends) if wanted else ()):
            mine = slice(start, stop)
            seen = Rows(inputs.x, inputs.rows[mine])
            if len(seen) < fewest_tokens(seen.shape[1]):
                self.few += len(wanted)
                continue
            damping = max(self.damping, damping_for(len(seen), seen.shape[1]))
            found = self._moments(wanted[0][1], seen, pair(expert, mine), None, damping)
            for (variant, name), stored in zip(wanted, stacks, strict=True):
                stored.data[expert] = self._refine(name, variant.types[name], *found, expert=expert)
        return [stored.data for stored in stacks]

    def _moments(
        self, name: str, inputs, pair, wanted, damping: float | None = None
    ) -> tuple[np.ndarray, Factor, Callable]:
        """Return the second moments of a field's inputs, their factor, and the outputs' deficit.

        `pair` are inputs of the same tokens, in the original stream and in this one.
        """
        n_tokens, n = inputs.shape
        h = damped_moments(inputs, self.damping if damping is None else damping, self.workers)
        if not np.isfinite(h.diagonal()).all():
            raise ValueError(f"{name}: its inputs are not all finite. Check the model with inspect.")
        factor = Factor(h, self.workers)
        cross = np.zeros((n, n) if pair else 0, np.float32)  # E[x̂ (x - x̂)ᵀ]
        if pair and len(pair[0]):
            accumulate(cross, pair[1], pair[0], self.workers, minus=pair[1])
            cross /= n_tokens

        def change(weight: np.ndarray, rows: slice) -> np.ndarray:
            """Return the deficit of the weights' outputs, as second moments with the inputs."""
            if pair:
                return product(weight, cross, self.workers)
            found = np.zeros_like(weight)
            if wanted is not None:
                accumulate(found, wanted(rows) - product(inputs, weight, self.workers), inputs, self.workers)
                found /= n_tokens
            return found

        return h, factor, change

    def _refine(self, name: str, qtype: str, h: np.ndarray, factor: Factor, change: Callable, expert: int = 0):
        """Return chosen bytes [shape=(nrows, row_bytes)] of one matrix, made some rows at a time."""
        tensor, data = self.model.tensor(name), []
        nrows, first = tensor.shape[-2], expert * tensor.shape[-2]
        for rows in blocks(nrows, self.at_once):
            weight = tensor.floats(first + rows.start, first + rows.stop)
            data.append(self._encode(weight, rows, qtype, h, factor, change))
            check_encoded(data[-1], weight, qtype, name=name, first_row=first + rows.start)
        return np.concatenate(data)

    def _encode(self, weight: np.ndarray, rows: slice, qtype: str, h, factor: Factor, change: Callable) -> np.ndarray:
        """Choose the bytes of some rows of a matrix."""
        target = weight + limited(host(factor.solve(change(weight, rows))), weight, qtype, MOVED * self.ordinary)
        data = refine_rows(target, h, factor, qtype, self.workers, sweeps=self.sweeps)
        return near(data, weight, qtype, self.ordinary)


def _put(arrays: dict[str, np.ndarray], key: str, rows: slice, values: np.ndarray, nrows: int) -> None:
    """Put rows into an array of `nrows`, which the first rows create."""
    if key not in arrays:
        arrays[key] = np.empty((nrows, values.shape[1]), values.dtype)
    arrays[key][rows] = values
