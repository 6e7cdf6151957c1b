"""The engine for graphics cards: whole layers in torch, see `layers`.

Weights are quantized and decoded on the CPU, and made into operands on the card, one layer ahead of the computation.
A layer is applied to a few chunks at a time; where the card's memory does not suffice, to fewer.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numba
import numpy as np
import torch

from quantlab import arch
from quantlab.evaluate.budget import Budget
from quantlab.evaluate.engine import ExpertInputs, Observe, Read, Stored, needed
from quantlab.evaluate.engine.card import plan, scores
from quantlab.evaluate.engine.card.layers import Layers, LayerWeights, check
from quantlab.evaluate.engine.card.products import (
    Operand,
    Products,
    is_out_of_memory,
    measure,
    memory_limited,
    synchronize,
)
from quantlab.evaluate.engine.card.transfers import Transfers
from quantlab.evaluate.engine.torch import TorchEngine
from quantlab.evaluate.metrics import TokenScores
from quantlab.transform.plan import parse_bytes

COLUMNS_ROWS = 1024  # rows whose squares are added up in float32 where there is no float64


class Enough(Exception):
    """Raised by an observer that needs nothing of a layer after the product it sees: the states stay as they are."""


@dataclass(frozen=True)
class Output:
    """Norm and matrix after the last layer."""

    norm: torch.Tensor
    matrix: Operand
    is_safe: bool

    def tensors(self) -> list[torch.Tensor]:
        """Return both."""
        return [self.norm, *self.matrix.tensors()]


class CardEngine(TorchEngine):
    """The engine for graphics cards, in torch; see `Engine`.

    Parameters
    ----------
    model : Model
    n_ctx : int
    device : str
        One of `devices`.
    precision : str
        One of `products.PRECISIONS`.
    device_memory : str, int or None
    """

    ahead = 1

    def __init__(self, model, n_ctx: int, device: str, precision: str, device_memory: str | int | None = None):
        self.hparams, self.n_ctx, self.name = model.hparams, n_ctx, device
        self.device = torch.device(device.removesuffix("-torch"))
        self.ahead = 0 if device == "mps" else 1  # a Mac's card has one queue for all threads
        self.precision, self.device_memory = precision, device_memory
        self.record = arch.known(self.hparams.arch)
        check(model, device)
        self.products, self.transfers = Products(precision, self.device), Transfers(self.device)
        self.layers = Layers(model, n_ctx, self.products, self.device, self.operands)
        self._chunks = plan.chunks_at_most(self.device, n_ctx)
        self._on_device, self._lock = False, threading.Lock()  # of the memory in which weights travel
        self._piece = threading.Lock()  # held while chunks are computed

    def __enter__(self) -> "CardEngine":
        self._before = torch.get_num_threads(), torch.backends.cuda.matmul.fp32_precision
        torch.set_num_threads(numba.get_num_threads())
        torch.backends.cuda.matmul.fp32_precision = "ieee"  # float32, not tf32
        given = None if self.device_memory is None else parse_bytes(self.device_memory)
        self._contexts = ExitStack()
        self._contexts.enter_context(memory_limited(self.device, given))
        self._contexts.enter_context(torch.inference_mode())
        return self

    def __exit__(self, *exc) -> None:
        self._contexts.close()
        self.transfers.close()
        torch.set_num_threads(self._before[0])
        torch.backends.cuda.matmul.fp32_precision = self._before[1]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # ---- weights

    def load(self, read: Read, index: int) -> LayerWeights:
        """Return the weights of layer `index`."""
        return self._make(lambda: self._layer_weights(read, index))

    def _layer_weights(self, read: Read, index: int) -> LayerWeights:
        does = self.record.layer_at(self.hparams, index)
        norms = {f: stored for f, name in does.norms.items() if (stored := read(f"{name}.weight")) is not None}
        vectors = {f: read(f"{name}.weight") or read(f"{name}.bias") or read(name) for f, name in does.vectors.items()}
        if (scale := vectors.get("router_scale")) is not None:
            vectors["router_scale"] = replace(scale, data=scale.floats() * np.float32(self.hparams.n_embd**-0.5))
        biases = {f: [read(f"{name}.bias") for name in names] for f, names in does.products.items()}
        return LayerWeights(
            {f: [self._matrix(needed(read, f"{name}.weight")) for name in names] for f, names in does.products.items()},
            {f: [None if bias is None else self._vector(bias) for bias in of] for f, of in biases.items()},
            {f: self._vector(stored) for f, stored in norms.items()},
            {f: self._vector(stored) for f, stored in vectors.items() if stored is not None},
            {f for f, stored in norms.items() if self._is_safe(stored)},
            does,
            self.hparams.at(index),
            index,
        )

    def _make(self, weights: Callable):
        """Return the weights on the device; where they do not fit beside chunks that are computed, wait for those."""
        try:
            return self._made(weights)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        with self._piece:
            try:
                return self._made(weights)
            except RuntimeError as error:
                self.fewer(error, 1, "layer's weights")
                raise

    def _made(self, weights: Callable):
        """Return the weights on the device."""
        with self._lock, torch.inference_mode(), self.transfers.loading():
            made = weights()
            self.transfers.loaded(made.tensors())
        return made

    def _matrix(self, stored: Stored) -> Operand:
        """Return a matrix as an operand, made piece by piece (experts: stacked)."""
        shape = int(np.prod(stored.shape[:-1])), stored.shape[-1]
        new = partial(torch.empty, shape, dtype=self.products.dtype, device=self.device)
        parts, scale = tuple(new() for _ in range(self.products.n_parts)), None
        for rows, x in self.transfers.floats(stored):
            operand = self.products.operand(x, self.products.is_safe(x))
            for whole, part in zip(parts, operand.parts, strict=True):
                whole[rows] = part
            if operand.scale is not None:
                scale = torch.ones(len(parts[0]), 1, device=self.device) if scale is None else scale
                scale[rows] = operand.scale
        return Operand(parts, scale)

    def operands(self, parts: Sequence[Stored]) -> list[Operand]:
        """Return the matrices of one of a layer's fields, to replace those that it has."""
        with self._lock:
            return [self._matrix(stored) for stored in parts]

    def _vector(self, stored: Stored) -> torch.Tensor:
        """Return a norm or a bias."""
        return torch.from_numpy(np.array(stored.floats())).to(self.device)

    def _is_safe(self, norm: Stored) -> bool:
        """Tell whether halves can hold every output of a norm: at most √n times the largest weight."""
        weight = norm.floats()
        return bool(np.sqrt(weight.size) * np.abs(weight).max() < 2**15)

    # ---- layers

    def empty_states(self, shape: tuple[int, ...]):
        """Return an array for hidden states, on the device or in pinned memory, as planned."""
        if self._on_device:
            try:
                return torch.empty(shape, dtype=torch.float32, device=self.device)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._on_device = False
        return self.transfers.pinned(shape)

    def wait(self) -> None:
        """Wait until all hidden states are stored."""
        self.transfers.wait()

    def embed(self, table: np.ndarray, places: np.ndarray):
        """Return the hidden states before the first layer."""
        if not self._on_device:
            return super().embed(table, places)
        try:
            return torch.from_numpy(table).to(self.device)[torch.from_numpy(places).to(self.device)]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        return torch.from_numpy(table[places])

    def learn(self, x: np.ndarray, own: np.ndarray, matrix: Stored, norm: Stored, out: np.ndarray) -> None:
        """Compute what all layers learn of tokens, from their embeddings `x` and from `own`; see `ForwardPass`."""
        weights, size = self.load_output(norm, matrix), self.hparams.n_embd_layer

        def work(rows: slice) -> None:
            found = self.products.multiply(self.products.operand(self.transfers.fetch(x[rows])), weights.matrix)
            found = found.mul_(self.hparams.n_embd**-0.5).unflatten(1, (-1, size))
            found = self.layers.rms_norm(found, weights.norm).flatten(1)
            found.add_(self.transfers.fetch(own[rows]), alpha=size**0.5).mul_(0.5**0.5)
            out[rows] = found.cpu().numpy()

        self._in_pieces(work, len(x))

    def forward(self, layer: LayerWeights, states, first: int = 0, observe: Observe | None = None) -> None:
        """Apply a layer in place; see `Engine.forward`."""
        start = 0
        while start < len(states):
            piece = states[start : start + self._chunks]
            self._apply(layer, piece, first, observe, set())
            start += len(piece)

    def _apply(self, layer: LayerWeights, piece, first: int, observe: Observe | None, seen: set[str]) -> None:
        """Apply a layer to some chunks, part by part after a failure; `seen` are the products observed before that."""

        def watch(field: str, inputs):
            if observe is None or field in seen:
                return None
            read = observe(field, inputs)
            seen.add(field)
            return read

        try:
            with self._piece:
                done = self.layers.apply(layer, self.transfers.fetch(piece), first, observe and watch)
                self.transfers.store(done, piece[:, first:])
            return
        except Enough:
            return
        except RuntimeError as error:
            step = self._chunks = self.fewer(error, len(piece), f"chunks of {self.n_ctx} tokens")
        finally:
            self.layers.stream = None
        for start in range(0, len(piece), step):
            self._apply(layer, piece[start : start + step], first, observe, set(seen))

    def fewer(self, error: RuntimeError, count: int, what: str) -> int:
        """Return half of a count that did not fit into the card's memory; raise MemoryError at 1."""
        if not is_out_of_memory(error):
            raise error
        if count == 1:
            raise MemoryError(
                f"device={self.name}: {count} {what} do not fit into its memory. "
                "Give a smaller device_memory or n_ctx, or device=cpu."
            ) from None
        synchronize(self.device)  # so that what other work held is free
        return count // 2

    # ---- output

    def load_output(self, norm: Stored, matrix: Stored) -> Output:
        """Return the weights after the last layer."""
        return self._make(lambda: Output(self._vector(norm), self._matrix(matrix), self._is_safe(norm)))

    def output_inputs(self, norm: Stored, states) -> torch.Tensor:
        """Return the inputs of the last product [shape=(-1, n_embd), dtype=float32], in the machine's memory."""
        found, x = [], states.reshape(-1, states.shape[-1])

        def work(piece: slice) -> None:
            found.append(self.layers.rms_norm(self.transfers.fetch(x[piece]), self._vector(norm)).cpu())

        self._in_pieces(work, len(x))
        return torch.cat(found)

    def _logits(self, output: Output, states) -> torch.Tensor:
        """Return the logits [rows, n_vocab] of hidden states [..., n_embd]."""
        x = self.transfers.fetch(states)
        normed = self.layers.rms_norm(x.reshape(-1, x.shape[-1]), output.norm)
        found = self.products.multiply(self.products.operand(normed, output.is_safe), output.matrix)
        if self.hparams.logit_scale != 1:
            found.mul_(self.hparams.logit_scale)
        if cap := self.hparams.logit_softcap:
            found = found.div_(cap).tanh_().mul_(cap)
        return found

    def logits(self, output: Output, states) -> np.ndarray:
        """Return the logits [*states.shape[:-1], n_vocab]."""
        rows = states.reshape(-1, states.shape[-1])
        out = np.empty((len(rows), len(output.matrix.parts[0])), np.float32)

        def work(piece: slice) -> None:
            out[piece] = self._logits(output, rows[piece]).cpu().numpy()

        self._in_pieces(work, len(rows))
        return out.reshape(*states.shape[:-1], -1)

    def score(self, outputs: Sequence[Output], states: Sequence, targets: np.ndarray) -> list[TokenScores]:
        """Score positions for the base and some variants; see `Engine.score`."""
        found = [TokenScores.empty(*targets.shape) for _ in outputs]

        def work(chunk: int, rows: slice) -> None:
            wanted, base = torch.from_numpy(targets[chunk, rows]).long().to(self.device), None
            for output, x, into in zip(outputs, states, found, strict=True):
                prediction = scores.Prediction.of(self._logits(output, x[chunk, rows]))
                base = prediction if base is None else base
                compared = scores.compare(base, prediction, wanted)
                for field, values in into.at((chunk, rows)).items():
                    values[:] = compared[field].cpu().numpy()

        for chunk in range(len(targets)):
            self._in_pieces(lambda rows, chunk=chunk: work(chunk, rows), targets.shape[1])
        return found

    def _in_pieces(self, work: Callable[[slice], None], n_rows: int) -> None:
        """Call `work` with slices of rows whose logits fit into memory, smaller ones after a failure."""
        step, start = plan.rows_of_logits(self.hparams.n_vocab, self.device), 0
        while start < n_rows:
            rows = slice(start, min(start + step, n_rows))
            try:
                work(rows)
            except RuntimeError as error:
                step = self.fewer(error, rows.stop - start, "tokens' logits")
                continue
            start = rows.stop

    def arithmetic(self) -> str:
        """Return device, precision and torch's version."""
        return f"{hardware(self.name) or self.name}, {self.precision}, torch {torch.__version__}"

    # ---- consumers

    def column_squares(self, inputs) -> np.ndarray:
        """Return the sums of squares of each column [shape=(1 or n_expert, n_in), dtype=float64]."""
        if isinstance(inputs, ExpertInputs):
            rows = torch.from_numpy(inputs.rows).to(self.device)
            return np.concatenate([self.column_squares(inputs.x[rows[a:b]]) for a, b in pairwise(inputs.ends)])
        wide = scores.wide(self.device)
        blocks = [block.float().square().sum(0, dtype=wide) for block in inputs.split(COLUMNS_ROWS)]
        return np.sum([block.cpu().numpy() for block in blocks], axis=0, dtype=np.float64)[None]  # pyright: ignore[reportIndexIssue]

    # ---- plan

    def plan(
        self, variants: Sequence, windows, memory: str | int | None, keep_states: bool, observed: bool = False
    ) -> Budget:
        """Return the `Budget` of a pass over `variants`; see `Engine.plan`."""
        budget = plan.fit(self, variants, windows, memory, keep_states, observed)
        self._chunks, self._on_device = budget.chunks_at_once, budget.states_on_device
        return budget


def precision(mode: str, device: str) -> str:
    """Return the precision of products in `mode` (`float` on CUDA: the faster one, measured)."""
    if mode == "half":
        return "half"
    if device != "cuda":
        return "float32"
    return max(("float32", "halves"), key=lambda name: measure(name, torch.device(device)))


def hardware(device: str) -> str:
    """Return the name of a card (empty text: another device)."""
    return torch.cuda.get_device_name() if device == "cuda" else ""
