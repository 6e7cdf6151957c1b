"""One pass over the base model that evaluates all variants: layer after layer, each layer's weights read once.

embeddings → layer 0: every variant, every chunk → … → last layer → logits of the scored positions → token scores

A variant that agrees with an earlier one in its first layers takes over that one's hidden states there.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from quantlab.evaluate import fused
from quantlab.evaluate.budget import Budget
from quantlab.evaluate.dense import Matrix, Workers, blocks
from quantlab.evaluate.ggml_products import PackedMatrix
from quantlab.evaluate.llama import Llama, layer_weights
from quantlab.evaluate.metrics import TokenScores
from quantlab.evaluate.protocol import Windows
from quantlab.evaluate.states import HiddenStates
from quantlab.evaluate.variants import Variant, Weights, identity, shared_layers


class Sweep:
    """The pass over `variants`, the first of which is the base that the others are measured against.

    Parameters
    ----------
    variants : sequence of Variant
    windows : Windows
    mode : str
    budget : Budget
        How much is done at once.
    workers : Workers
    key : str
        What the hidden states in `scratch` belong to.
    scratch : Path or None
        Folder of the hidden states; None keeps them in memory.
    bar : tqdm
        Counts tokens of all variants.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        windows: Windows,
        mode: str,
        budget: Budget,
        workers: Workers,
        key: str,
        scratch: Path | None,
        bar: tqdm,
    ):
        base = variants[0].model
        self.variants, self.windows, self.budget, self.workers, self.bar = variants, windows, budget, workers, bar
        self.base, self.hparams, self.mode = base, base.hparams, mode
        self.weights = Weights(base, variants, workers)
        factors = base.tensor("rope_freqs.weight").floats() if "rope_freqs.weight" in base else None
        self.llama = Llama(base.hparams, windows.tokens.shape[1], mode, workers, factors)
        self.shared = shared_layers(variants)
        self.states = HiddenStates(len(variants), *windows.tokens.shape, base.hparams.n_embd, scratch, key)
        self._share = windows.tokens.size  # of the bar that one layer of one variant is worth, or its output

    def run(self) -> list[TokenScores]:
        """Do the whole pass, from where the hidden states on disk leave off."""
        if self.states.layer < 0:
            self._embed()
        done = self.states.layer - np.array([max(0, layer) for _, layer in self.shared])
        self.bar.update(self._share * int(done.clip(0).sum()))
        memory = np.empty(max(layer_weights(self.base, i) for i in range(self.hparams.n_layer)), np.float32)
        rows = self.budget.chunks_at_once * self.windows.tokens.shape[1]
        qkv = np.empty((rows, self.llama.qkv_width), np.float32)
        for index in range(self.states.layer, self.hparams.n_layer):
            self._layer(index, memory, qkv)
        del memory, qkv
        scores = self._score()
        self.states.close(delete=True)
        return scores

    def _batches(self) -> list[slice]:
        """The chunks, as many at a time as the budget allows."""
        return blocks(len(self.windows.tokens), self.budget.chunks_at_once)

    def _embed(self) -> None:
        """Look up the embeddings of all tokens, for each variant."""
        used, place = np.unique(self.windows.tokens, return_inverse=True)
        place = place.reshape(self.windows.tokens.shape)
        for i, variant in enumerate(self.variants):
            if self.shared[i][1] >= 0:
                continue
            table = self.weights.rows(variant, "token_embd.weight", used)
            for chunks in self._batches():
                self.states.write(i, chunks, table[place[chunks]])
        self.states.advance()

    def _layer(self, index: int, memory: np.ndarray, qkv: np.ndarray) -> None:
        """Apply layer `index` of every variant to every chunk; the last one only where positions are scored."""
        first = self.windows.first if index == self.hparams.n_layer - 1 else 0
        for i, variant in reversed(list(enumerate(self.variants))):  # in memory, `write` replaces what others take over
            source, since = self.shared[i]
            if since > index:
                continue
            layer = self.weights.layer(variant, index, self.mode, memory)
            for chunks in self._batches():
                x = self.states.read(i, chunks) if since < index else self.states.read(source, chunks).copy()
                rows = x.reshape(-1, self.hparams.n_embd)
                self.llama.forward(layer, rows, qkv[: len(rows)], first)
                self.states.write(i, chunks, x)
                self.bar.update(len(rows))
        self.weights.forget()
        self.states.advance()

    def _score(self) -> list[TokenScores]:
        """Compute the scored logits block by block, the base's beside those of as many variants as fit."""
        scores = [TokenScores.empty(*self.windows.targets.shape) for _ in self.variants]
        base = self._output(0)
        for group in blocks(len(self.variants) - 1, self.budget.outputs_at_once) or [slice(0, 0)]:
            members = [0] * (group.start == 0) + list(range(1, len(self.variants)))[group]
            outputs = {
                i: base if self._same_output(i) else self.weights.output(self.variants[i], self.mode) for i in members
            }
            self.weights.forget()
            scored = range(self.windows.scored.start, self.windows.scored.stop)
            pieces = [
                (chunk, rows)
                for chunk in range(len(self.windows.tokens))
                for rows in blocks(len(scored), self.budget.logit_rows)
            ]
            self.workers.map(lambda piece, o=outputs: self._score_piece(base, o, scores, *piece), pieces)
            self.bar.update(self._share * len(members))
            del outputs
        return scores

    def _same_output(self, i: int) -> bool:
        """Whether a variant has the base's output norm and output matrix."""
        if self.variants[i].model is not self.base:
            return False
        names = ["output_norm.weight", "output.weight" if "output.weight" in self.base else "token_embd.weight"]
        return all(identity(self.variants[i], name) == identity(self.variants[0], name) for name in names)

    def _output(self, i: int) -> tuple[np.ndarray, Matrix | PackedMatrix]:
        return self.weights.output(self.variants[i], self.mode)

    def _logits(
        self, i: int, output: tuple[np.ndarray, Matrix | PackedMatrix], chunk: int, rows: slice, name: str
    ) -> np.ndarray:
        """Logits of some scored positions of a chunk, in this thread's space called `name`."""
        first, (source, since) = self.windows.first, self.shared[i]
        i = source if since == self.hparams.n_layer else i
        x = self.states.read(i, slice(chunk, chunk + 1))[0, first + rows.start : first + rows.stop]
        normed = self.workers.scratch("normed", *x.shape)
        logits = self.workers.scratch(name, len(x), output[1].n_out)
        self.llama.steps.rms_norm(x, output[0], self.llama.eps, normed)
        self.llama.product(normed, output[1], logits)
        return logits

    def _score_piece(self, base, outputs: dict, scores: Sequence[TokenScores], chunk: int, rows: slice) -> None:
        """Score a few positions of one chunk for the base and a group of variants."""
        expected = self._logits(0, base, chunk, rows, "base_logits")
        targets = self.windows.targets[chunk, rows]
        for i, output in outputs.items():
            logits = expected if i == 0 else self._logits(i, output, chunk, rows, "logits")
            s = scores[i]
            results = (part[chunk, rows] for part in (s.nll, s.kld, s.same_top, s.top5, s.top10, s.correct))
            fused.score(expected, logits, targets, *results)
