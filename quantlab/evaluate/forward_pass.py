"""One pass over a model and its variants: layer after layer, each layer's weights read once.

embeddings → layer 0: every variant, every chunk → … → last layer → what a consumer makes of the output

A variant that agrees with an earlier one in its first layers takes over that one's hidden states there. What is wanted
of the pass is a consumer: token scores (`scores`), an importance matrix (`imatrix`), or logits (`logits`).
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numba
import numpy as np
from tqdm.auto import tqdm

from quantlab.evaluate.budget import Budget
from quantlab.evaluate.engine import Engine
from quantlab.evaluate.protocol import Windows
from quantlab.evaluate.states import HiddenStates
from quantlab.evaluate.variants import Variant, Weights, identity, output_name, shared_layers


class Consumer(Protocol):
    """The consumer of a pass: its scored positions, observers and result.

    `observe(variant, layer, field, inputs)`, by index, is called before each product (see `Engine.forward`); None
    where nobody needs to. `output(forward_pass)` returns the result, once the last layer is done.
    """

    @property
    def observe(self) -> Callable | None: ...

    def output(self, forward_pass: "ForwardPass") -> Any: ...


class ForwardPass:
    """The pass over `variants`, of which the first is the base.

    Parameters
    ----------
    variants : sequence of Variant
    windows : Windows
        All positions are scored where inputs are observed.
    engine : Engine
        Entered.
    budget : Budget
        How much is done at once.
    bar : tqdm, optional
        Counts tokens of all variants, once a layer and once for the output.
    scratch : Path, optional
        Folder of the hidden states (default: in memory).
    key : str
        What the hidden states in `scratch` belong to.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        windows: Windows,
        engine: Engine,
        budget: Budget,
        bar: tqdm | None = None,
        scratch: Path | None = None,
        key: str = "",
    ):
        self.base, self.hparams = variants[0].model, variants[0].model.hparams
        self.variants, self.windows, self.engine, self.budget = variants, windows, engine, budget
        self.bar = tqdm(disable=True) if bar is None else bar
        self.weights = Weights(self.base, variants)
        self.shared = shared_layers(variants)
        n_chunks, n_ctx = windows.tokens.shape
        shape = (len(variants), n_chunks, n_ctx, self.hparams.n_state)
        self.states = HiddenStates(*shape, scratch, key, engine.empty_states)

    def run(self, consumer: Consumer) -> Any:
        """Run the whole pass, resumed from hidden states on disk, and return the consumer's result."""
        if self.states.layer < 0:
            self._embed()
        done = self.states.layer - np.array([max(0, layer) for _, layer in self.shared])
        self.bar.update(self.windows.tokens.size * int(done.clip(0).sum()))
        with closing(_ahead(self._layers(self.states.layer), self.engine.ahead)) as layers:
            for index in range(self.states.layer, self.hparams.n_layer):
                self._layer(index, layers, consumer.observe)
        self.weights.forget()
        result = consumer.output(self)
        self.states.close(delete=True)
        return result

    def batches(self) -> Iterator[slice]:
        """Yield the chunks in batches that the budget allows."""
        n_chunks, step = len(self.windows.tokens), self.budget.chunks_at_once
        for start in range(0, n_chunks, step):
            yield slice(start, min(start + step, n_chunks))

    def _embed(self) -> None:
        """Look up the embeddings of all tokens, for each variant."""
        used, places = np.unique(self.windows.tokens, return_inverse=True)
        places = places.reshape(self.windows.tokens.shape)
        for i, variant in enumerate(self.variants):
            if self.shared[i][1] >= 0:
                continue
            table = self.weights.embeddings(variant, used)
            table = self._with_layers(variant, table, used)
            for chunks in self.batches():
                self.states.write(i, chunks, self.engine.embed(table, places[chunks]))
        self.states.advance()

    def _with_layers(self, variant: Variant, table: np.ndarray, used: np.ndarray) -> np.ndarray:
        """Return the states of some tokens [shape=(len(used), n_state)]: their embeddings, and what comes after them.

        That is what each layer learns of them, from embeddings of its own and from those that all layers have, and
        room for keys and values.
        """
        h = self.hparams
        if h.n_state == h.n_embd:
            return table
        found = np.zeros((len(used), h.n_state), np.float32)
        found[:, : h.n_embd] = table
        if h.n_embd_layer:
            own = self.weights.rows(variant, "per_layer_token_embd.weight", used)
            names = "per_layer_model_proj.weight", "per_layer_proj_norm.weight"
            matrix, norm = (self.weights.get(variant, name) for name in names)
            self.engine.learn(table, own, matrix, norm, found[:, h.n_embd :][:, : h.n_embd_layers])  # pyright: ignore[reportAttributeAccessIssue]
            self.weights.forget()
        return found

    def _changed(self, index: int) -> list[int]:
        """Return the variants that need layer `index`; those that share another's states come later."""
        return [i for i, (_, since) in enumerate(self.shared) if since <= index][::-1]

    def _layers(self, start: int) -> Iterator[Any]:
        """Load the weights for `_layer` from layer `start` on, in order."""
        for index in range(start, self.hparams.n_layer):
            self.weights.forget()
            for i in self._changed(index):
                variant = self.variants[i]
                yield self.engine.load(lambda name, v=variant, k=index: self.weights.get(v, f"blk.{k}.{name}"), index)

    def _layer(self, index: int, layers: Iterator[Any], observe: Callable | None) -> None:
        """Apply layer `index` of every variant to every chunk (last layer: only at scored positions)."""
        first = self.windows.first if index == self.hparams.n_layer - 1 else 0
        for i in self._changed(index):
            layer, (source, since) = next(layers), self.shared[i]
            see = None if observe is None else partial(observe, i, index)
            for chunks in self.batches():
                x = self.states.take(i, i if since < index else source, chunks)
                self.engine.forward(layer, x, first, see)
                self.states.write(i, chunks, x)
                self.bar.update(x.shape[0] * x.shape[1])
            del layer
        self.engine.wait()
        self.states.advance()

    def last_states(self, i: int, chunks: slice) -> np.ndarray:
        """Return variant i's hidden states [chunks, n_scored, n_embd] after the last layer."""
        source, since = self.shared[i]
        found = self.states.read(source if since == self.hparams.n_layer else i, chunks)[:, self.windows.scored]
        if found.shape[-1] == (n := self.hparams.n_embd):
            return found
        return np.ascontiguousarray(found[..., :n]) if isinstance(found, np.ndarray) else found[..., :n]

    def output(self, i: int) -> Any:
        """Load variant i's output norm and output matrix."""
        return self.engine.load_output(*self.weights.output(self.variants[i]))

    def same_output(self, i: int) -> bool:
        """Tell whether a variant has the base's output norm and output matrix."""
        if self.variants[i].model is not self.base:
            return False
        names = ["output_norm.weight", output_name(self.base)]
        return all(identity(self.variants[i], name) == identity(self.variants[0], name) for name in names)


def _ahead(items: Iterator[Any], count: int) -> Generator[Any]:
    """Yield items, while another thread makes the next `count`."""
    if not count:
        yield from items
        return
    threads, end = numba.get_num_threads(), object()

    def one() -> Any:
        numba.set_num_threads(threads)  # numba counts them for each thread that calls it
        return next(items, end)

    with ThreadPoolExecutor(1) as pool:
        waiting = [pool.submit(one) for _ in range(count)]
        try:
            while (item := waiting.pop(0).result()) is not end:
                waiting.append(pool.submit(one))
                yield item
                del item
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
