"""The pass that chooses a refined file's bytes, with its products on a graphics card.

The card holds the moments of one field, and need not hold the inputs of all tokens: for each field a layer is applied
to the quantized stream once more, as far as that field, some chunks at a time, and what they add to the moments is
summed. What goes column by column within a span (`quants.feedback`) stays on the CPU.
"""

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from numba import get_num_threads

from quantlab.evaluate import budget
from quantlab.evaluate.engine import Stored
from quantlab.evaluate.engine.card.engine import CardEngine, Enough
from quantlab.evaluate.engine.card.plan import PACKAGE, card_bytes, chunks_at_most, score_bytes, token_bytes
from quantlab.evaluate.engine.card.products import is_out_of_memory, measure
from quantlab.evaluate.engine.workers import Workers, blocks
from quantlab.evaluate.refinement import KEPT, RESIDUAL, Refinement, can_refine
from quantlab.evaluate.second_moments import Factor, damp, host, own, product
from quantlab.evaluate.variants import Variant, output_name
from quantlab.quants.block_numbers import GRIDS

AT_ONCE = 2048  # rows of a matrix that are refined together: enough for the threads of a card's machine
ARRAYS = 10  # of the size of these rows, in the machine and on the card
STREAMS = 8  # arrays [n_tokens, n_embd] in the machine: hidden states, and what is kept of the original ones
SHARE_OF_PEAK = 0.5  # of the speed of a large product that the products here reach
# seconds of a thread for a weight: scales and feedback, a sweep, and with each what searching a grid's points adds
FEEDBACK, SWEEP, SEARCH = 80e-9, 60e-9, 120e-9
DEPTH = 4096  # tokens whose products are summed at once: the same for all pieces that are multiples of it


def can_refine_here(variant: Variant, name: str) -> bool:
    """Tell whether a tensor of a variant can get refined bytes on a card: stacks, as of experts, do not."""
    return len(variant.model.tensor(name).shape) == 2 and can_refine(variant, name)


class CardRefinement(Refinement):
    """The pass on a `CardEngine`; see `Refinement`."""

    at_once = AT_ONCE

    def run(self, write: Callable[[str, np.ndarray], None] | None) -> None:
        """Do the whole pass; see `Refinement.run`.

        Raises
        ------
        MemoryError
            If the moments of one field do not fit into the card's memory.
        """
        try:
            with Workers() as self.workers:
                super().run(write)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                f"device={self.engine.name}: a layer's second moments do not fit into its memory. Use device=cpu."
            ) from None

    def _layer(self, index: int) -> None:
        """Apply a layer to the original stream, then choose its bytes field by field."""
        layer = self.engine.load(lambda name: self.weights.get(self.base, f"blk.{index}.{name}"), index)
        seen, streams = self._watch_original(layer)
        whole = slice(0, len(self.tokens))
        written = self.states.read(1, whole)
        fields = {f: [f"blk.{index}.{name}.weight" for name in names] for f, names in layer.does.products.items()}
        refined = {f: [n for n in names if can_refine_here(self.variant, n)] for f, names in fields.items()}
        for field in sorted(fields, key=lambda field: bool(refined[field])):  # others first, then as they are computed
            chosen = {}
            if refined[field]:
                target = self._target(field, layer, seen, streams, written)
                found = self._moments_of(layer, field, refined[field][0], written, target)
                chosen = {name: self._chosen(name, found) for name in refined[field]}
                del found
            parts = [chosen.get(name) or self.weights.get(self.variant, name) for name in fields[field]]
            layer.matrices[field] = []  # so that the card holds them once
            layer.matrices[field] = self.engine.operands(parts)
        self.engine.forward(layer, written)
        self.weights.forget()
        self.states.write(0, whole, streams["after"].reshape(written.shape))
        self.states.write(1, whole, written)
        self.states.advance()

    def _chosen(self, name: str, found: tuple) -> Stored:
        """Choose and write the bytes of one matrix."""
        qtype = self.variant.types[name]
        data = self._refine(name, qtype, *found)
        self.write(name, data)  # pyright: ignore[reportOptionalCall]
        return Stored(data, qtype, self.model.tensor(name).shape)

    def _watch_original(self, layer) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Apply a layer to the original stream; see `Refinement._original`."""
        states = self.states.read(0, slice(0, len(self.tokens)))
        after = states.reshape(-1, states.shape[-1])
        seen, streams, done = {}, {"before": after.copy(), "after": after}, Counter()
        first = next(field for field in layer.does.products if not field.startswith(("attn_", "latent_")))

        def put(arrays: dict, key: str, values: torch.Tensor) -> None:
            if key not in arrays:
                arrays[key] = np.empty((len(after), values.shape[1]), np.float32)
            arrays[key][done[key] : done[key] + len(values)] = host(values)
            done[key] += len(values)

        def keep(field: str, inputs) -> None:
            if field == first:
                put(streams, "attention", self.engine.layers.stream)
            if field in KEPT:
                put(seen, field, inputs)

        self.engine.forward(layer, states, observe=keep)
        return seen, streams

    def _target(self, field: str, layer, seen: dict, streams: dict, written: np.ndarray) -> Callable | None:
        """Return a function of rows of tokens, their inputs and their residual stream, all on the card.

        It gives what the original stream's inputs exceed them by, or of the fields that are added to the stream the
        outputs that are wanted; None where those are not known. See `Refinement._drift`.
        """
        if field not in RESIDUAL:
            inputs = seen.pop(field, None)
            return None if inputs is None else lambda rows, x, stream: own(inputs[rows], x) - x
        is_scaled = RESIDUAL[field] in layer.norms or self.model.hparams.residual_scale != 1
        if is_scaled or (field == "ffn_down" and "router" in layer.does.products):
            return None
        before, after = ("before", "attention") if field == "attn_output" else ("attention", "after")
        before, after, (bias,) = streams.pop(before), streams[after], layer.biases[field]
        states = written.reshape(after.shape)

        def wanted(rows: slice, x: torch.Tensor, stream: torch.Tensor | None) -> torch.Tensor:
            ours = own(states[rows], x) if stream is None else stream
            out = own(after[rows] - before[rows] / 2, x) - ours / 2
            return out if bias is None else out - bias

        return wanted

    def _moments_of(self, layer, field: str, name: str, written: np.ndarray, target: Callable | None) -> tuple:
        """Collect the moments of a field's inputs in the quantized stream; return what `_refine` needs of them."""
        sums, done = Sums(self.model.tensor(name).shape[-1], field in RESIDUAL, self.engine.device), 0

        def take(at: str, inputs) -> None:
            nonlocal done
            if at != field:
                return
            rows = slice(done, done + len(inputs))
            sums.add(inputs, target and target(rows, inputs, self.engine.layers.stream))
            done = rows.stop
            raise Enough

        self.engine.forward(layer, written, observe=take)
        return self._factored(name, sums)

    def _factored(self, name: str, sums: "Sums") -> tuple[torch.Tensor, Factor, Callable]:
        """Return the damped moments, their factor and the outputs' deficit; see `Refinement._moments`."""
        h = sums.mean()
        added = damp(h, self.damping)
        if not np.isfinite(host(h.diagonal())).all():
            raise ValueError(f"{name}: its inputs are not all finite. Check the model with inspect.")

        def change(weight: np.ndarray, rows: slice) -> torch.Tensor:
            """Return the deficit of the weights' outputs, as second moments with the inputs."""
            w = own(weight, h)
            if sums.cross is None:
                return torch.zeros_like(w)
            if not sums.has_outputs:
                return product(w, sums.cross, self.workers)
            return (sums.cross[rows] - product(w, h, self.workers)).addcmul_(w, added)

        return h, Factor(h, self.workers), change

    def _encode(self, weight: np.ndarray, rows: slice, *parts) -> np.ndarray:
        """Choose the bytes of some rows, of fewer at a time where the card's memory does not suffice."""
        try:
            return super()._encode(weight, rows, *parts)
        except RuntimeError as error:
            step = self.engine.fewer(error, len(weight), "rows of a matrix")
        pieces = zip(blocks(len(weight), step), blocks(rows.stop, step, rows.start), strict=True)
        return np.concatenate([self._encode(weight[some], piece, *parts) for some, piece in pieces])

    def _output(self) -> None:
        """Choose the bytes of the output matrix, unless it is also the embedding."""
        name = output_name(self.model)
        if not can_refine_here(self.variant, name):
            return
        norm, _ = self.weights.output(self.base)
        sums = Sums(self.model.tensor(name).shape[-1], False, self.engine.device)
        for chunks in self._chunks():
            rows = [self.engine.output_inputs(norm, self.states.read(i, chunks)) for i in (1, 0)]
            x, original = (torch.as_tensor(x).to(self.engine.device) for x in rows)
            sums.add(x, original - x)
        self._chosen(name, self._factored(name, sums))


class Sums:
    """Sums over tokens, on a card: second moments of inputs, and moments of these with what is wanted.

    Parameters
    ----------
    n : int
        Inputs of the matrix.
    has_outputs : bool
        Whether outputs are wanted, else inputs.
    device : torch.device

    Attributes
    ----------
    h : torch.Tensor [shape=(n, n), dtype=float32]
    cross : torch.Tensor [shape=(n_out, n) of outputs, else (n, n), dtype=float32] or None
        Of outputs their moments with the inputs, else those of the inputs with what is wanted.
    """

    def __init__(self, n: int, has_outputs: bool, device: torch.device):
        self.has_outputs, self.count = has_outputs, 0
        self.h, self.cross = torch.zeros(n, n, device=device), None

    def add(self, x: torch.Tensor, wanted: torch.Tensor | None) -> None:
        """Add the inputs of some tokens and what is wanted of each: all of it, or nothing where memory runs out."""
        if wanted is not None and self.cross is None:
            n_out = wanted.shape[1]
            self.cross = self.h.new_zeros(n_out, x.shape[1])
        for rows in blocks(len(x), DEPTH):
            self.h.addmm_(x[rows].T, x[rows])
            if wanted is not None:
                a, b = (wanted, x) if self.has_outputs else (x, wanted)
                self.cross.addmm_(a[rows].T, b[rows])  # pyright: ignore[reportOptionalMemberAccess]
        self.count += len(x)

    def mean(self) -> torch.Tensor:
        """Divide the sums by the number of tokens; return the second moments."""
        if self.cross is not None:
            self.cross /= self.count
        self.h /= self.count
        return self.h


def needs(engine: CardEngine, variant: Variant, tokens: np.ndarray, sweeps: int, operations: float) -> tuple:
    """Return the fields of the `Plan` of a pass.

    `operations` are those of `Refinement`, which applies a layer once to each stream.

    Raises
    ------
    ValueError
        If the card refines none of these types, or has no room for a layer, one chunk at a time.
    """
    model, h, device = variant.model, variant.model.hparams, engine.device
    layers = [[model.tensor(name) for name in budget.layer_shapes(model, index)] for index in range(h.n_layer)]
    sizes = [sum(tensor.n_weights for tensor in layer) for layer in layers]
    refined = [tensor for tensor in model if can_refine_here(variant, tensor.name)]
    if not refined:
        raise ValueError(f"device={engine.name}: refines no tensor of {model.path} at these types. Give device=cpu.")
    widest = max(tensor.shape[-1] for tensor in refined)
    kinds = {(engine.record.layer_at(h, index), h.at(index)) for index in range(h.n_layer)}
    one, piece = (
        max(
            chunks * token_bytes(*kind, engine.products, engine.n_ctx, observed=True)
            + score_bytes(*kind, engine.n_ctx, chunks)
            for kind in kinds
        )
        for chunks in (1, min(len(tokens), chunks_at_most(device, engine.n_ctx)))
    )
    rows = 4 * ARRAYS * AT_ONCE * widest
    layer = engine.products.weight_bytes * max(sizes) + 4 * 3 * widest**2
    if 0 < card_bytes(engine) < layer + one:
        raise ValueError(
            f"device_memory={engine.device_memory or card_bytes(engine)}, must be at least "
            f"{(layer + one) / 2**30:.2f} GiB for a layer. Use device=cpu."
        )
    card = layer + max(piece, rows)
    memory = budget.PROCESS + PACKAGE[device.type] + 4 * STREAMS * tokens.size * h.n_embd + rows
    memory += max(sum(tensor.nbytes for tensor in layer) for layer in layers)
    again = 4 * tokens.size * sum(sizes)  # the quantized stream, once for each field
    seconds = (operations + again) / (SHARE_OF_PEAK * measure("float32", device))
    for tensor in refined:
        searched = SEARCH * (GRIDS[variant.types[tensor.name]].points.weights > 1)
        seconds += tensor.n_weights * (FEEDBACK + searched + sweeps * (SWEEP + searched)) / get_num_threads()
    where = f"{engine.name}, {engine.precision}"
    of_cpu = device.type == "cpu"
    return memory + of_cpu * card, seconds, can_refine_here, where, (not of_cpu) * card
