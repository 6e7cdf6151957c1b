"""Log-likelihoods of texts and of continuations of texts, as evaluation harnesses ask for them.

context ids + continuation ids → rows of similar length, padded on the right → one pass each → Σ ln p(continuation)

A token sees only what comes before it, so the padding changes nothing.

Source: the class HFLM of lm-evaluation-harness 0.4.13 for where a context ends and which tokens are put before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from quantlab.evaluate.budget import ROWS_AT_ONCE, allowed_bytes
from quantlab.evaluate.check import check_model
from quantlab.evaluate.engine import find
from quantlab.evaluate.forward_pass import ForwardPass
from quantlab.evaluate.protocol import Windows
from quantlab.evaluate.variants import as_is
from quantlab.files.arguments import check_whole
from quantlab.files.model import as_model
from quantlab.files.vocab import Vocab

LEAST = 4  # tokens of a row; shorter ones are padded

Tokens = list[int]


class Likelihood:
    """Answers the requests of an evaluation harness with one model.

    A request has the attribute `args`: `(context, continuation)`, or `(text,)`.

    Parameters
    ----------
    path : str, Path or Model
        A GGUF file, a checkpoint folder, a bundled model's name, or an opened model.
    mode, device, device_memory, memory
        As for `perplexity`.
    max_length : int, optional
        Tokens that the model sees at once (default: the model's own context).
    progress : bool
        Show a progress bar.

    Raises
    ------
    FileNotFoundError
        If the model is not there.
    ValueError
        If the architecture or an option is unknown here, `max_length` is out of range, or the vocabulary has no BOS
        and no EOS, or ends every text with EOS.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> requests = [SimpleNamespace(args=("The weights of the", text)) for text in (" model", " the the")]
    >>> likely, unlikely = Likelihood("tiny", progress=False).loglikelihood(requests)
    >>> likely > unlikely
    True
    """

    def __init__(
        self,
        path,
        *,
        mode: str = "float",
        device: str = "auto",
        device_memory: str | int | None = None,
        memory: str | int | None = None,
        max_length: int | None = None,
        progress: bool = True,
    ):
        check_whole(max_length=max_length)
        self._choice = find(mode, device, device_memory)
        self._model = as_model(path)
        check_model(self._model)
        self._memory, self._progress = memory, progress
        own = self._model.hparams.n_ctx
        self.max_length = own if max_length is None else max_length
        if self.max_length < 1 or own and self.max_length > own:
            raise ValueError(f"max_length={self.max_length}, must be 1 to {own}, the model's context. Leave it out.")
        vocab = self._model.vocab
        prefix = vocab.eos_id if vocab.bos_id is None else vocab.bos_id
        if prefix is None:
            raise ValueError(f"{self._model.path}: has neither BOS nor EOS, a first token cannot be scored without.")
        self._prefix = prefix
        if vocab.add_eos:
            raise ValueError(
                f"{self._model.path}: the vocabulary ends every text with EOS, which must not precede a continuation."
            )

    def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score a continuation of a context for each request.

        Parameters
        ----------
        requests : sequence
            `args`: `(context, continuation)`. Spaces at the end of a context count as the continuation's. An empty
            context is BOS, or EOS where there is no BOS.
        disable_tqdm : bool
            Show no progress bar.

        Returns
        -------
        list of (float, bool)
            Sum of ln p over the continuation's tokens, nats; and whether each of them is the most probable one.
            Contexts that are too long lose their beginning.

        Raises
        ------
        ValueError
            If a continuation has no tokens, or more than `max_length`.
        """
        pairs = [self._pair(*request.args) for request in requests]
        return self._score(pairs, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Score the whole text of each request, in windows of `max_length` tokens that do not overlap.

        Parameters
        ----------
        requests : sequence
            `args`: `(text,)`.
        disable_tqdm : bool
            Show no progress bar.

        Returns
        -------
        list of float
            Sum of ln p over the text's tokens, nats. The first one follows BOS, or EOS where there is no BOS. A BOS
            that the vocabulary puts before the text counts as a token of it.
        """
        windows = [self._windows(self._encode(*request.args)) for request in requests]
        found = iter(self._score([pair for pairs in windows for pair in pairs], disable_tqdm))
        return [sum((next(found)[0] for _ in pairs), 0.0) for pairs in windows]

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Refuse to generate.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(
            "generate_until: quantlab scores texts only. Choose tasks of type multiple_choice or loglikelihood, or "
            "generate through quantlab serve and the harness's model local-completions."
        )

    # ---- tokens

    def _encode(self, text: str, add_bos: bool | None = None) -> Tokens:
        """Ids of a text, in which the texts of special tokens stand for them; BOS where the vocabulary wants it."""
        vocab: Vocab = self._model.vocab
        if add_bos is None:
            add_bos = vocab.add_bos and not text.startswith(vocab.tokens[self._prefix])
        ids = vocab.encode(text, add_special=False, parse_special=True).tolist()
        return [vocab.bos_id, *ids] if add_bos else ids  # pyright: ignore[reportReturnType]

    def _pair(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """Ids of a context and its continuation, cut where the context alone would end."""
        if context:
            stripped = context.rstrip()
            whole, before = self._encode(context + continuation), self._encode(stripped)
            pair = before, whole[len(before) :]
        else:
            ids = self._encode(continuation, add_bos=False)
            pair = ([self._prefix], ids) if ids[:1] != [self._prefix] else (ids[:1], ids[1:])
        n_tokens = len(pair[1])
        if not 1 <= n_tokens <= self.max_length:
            raise ValueError(
                f"continuation {continuation!r:.60}: n_tokens={n_tokens}, must be 1 to max_length={self.max_length}."
            )
        return pair

    def _windows(self, ids: Tokens) -> list[tuple[Tokens, Tokens]]:
        """Cut a text so that each token is scored once; the last window is filled up with what came before."""
        n, ids = self.max_length, [self._prefix, *ids]
        pairs = []
        for start in range(1, len(ids), n):
            stop = min(start + n, len(ids))
            pairs.append((ids[max(0, stop - n - 1) : start], ids[start:stop]))
        return pairs

    # ---- scores

    def _score(self, pairs: Sequence[tuple[Tokens, Tokens]], silent: bool) -> list[tuple[float, bool]]:
        """Sum of ln p of each continuation, and whether all its tokens are the most probable ones."""
        rows = [(before + after)[-self.max_length - 1 :] for before, after in pairs]
        asked: dict[tuple[int, ...], list[int]] = {}  # what the model reads → pairs that need it
        for i, row in enumerate(rows):
            asked.setdefault(tuple(row[:-1]), []).append(i)
        inputs = sorted(asked, key=lambda ids: (-len(ids), ids))
        groups, n_layer = self._groups(inputs), self._model.hparams.n_layer
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        total = (n_layer + 1) * sum(len(group) * _width(group) for group in groups)
        shown: dict[str, Any] = dict(unit="tokens", unit_scale=1 / (n_layer + 1), disable=silent or not self._progress)
        bar_format = "{desc}{percentage:3.0f}%|{bar}| {rate_fmt} [{elapsed}<{remaining}]"
        with tqdm(total=total, bar_format=bar_format, **shown) as bar:
            for group in groups:
                users = [(i, row) for row, ids in enumerate(group) for i in asked[ids]]
                targets = [np.array(pairs[i][1], np.int32) for i, _ in users]
                stops = [len(group[row]) for _, row in users]
                scores = self._run(group, [row for _, row in users], stops, targets, bar)
                for (i, _), score in zip(users, scores, strict=True):
                    found[i] = score
        return found

    def _groups(self, inputs: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
        """Cut inputs, the longest first, into groups of similar length whose hidden states fit in memory."""
        most = max(ROWS_AT_ONCE, allowed_bytes(self._memory) // 8 // (4 * self._model.hparams.n_state))
        groups: list[list[tuple[int, ...]]] = []
        for ids in inputs:
            n = len(groups[-1]) * _width(groups[-1]) if groups else 0
            is_similar = n and (4 * len(ids) >= 3 * _width(groups[-1]) or n < ROWS_AT_ONCE)
            if is_similar and n + _width(groups[-1]) <= most:
                groups[-1].append(ids)
            else:
                groups.append([ids])
        return groups

    def _run(
        self, group: list[tuple[int, ...]], rows: list[int], stops: list[int], targets: list[np.ndarray], bar: tqdm
    ) -> list[tuple[float, bool]]:
        """Do one pass over a group; the last token of `targets[j]` follows the first `stops[j]` of row `rows[j]`."""
        width, counts = _width(group), [len(ids) for ids in targets]
        tokens = np.array([[*ids, *[0] * (width - len(ids))] for ids in group], np.int32)
        positions = np.concatenate([np.arange(stop - n, stop) for stop, n in zip(stops, counts, strict=True)])
        places = _Places(np.repeat(rows, counts), positions, np.concatenate(targets))
        first = int(positions.min())
        windows = Windows(tokens, np.zeros((len(group), width - first), np.int32), first)
        variants = [as_is(self._model)]
        with self._choice(self._model, width) as engine, ExitStack() as stack:
            budget = engine.plan(variants, windows, self._memory, keep_states=False)
            scratch = None
            if not budget.in_memory:
                scratch = Path(stack.enter_context(TemporaryDirectory(prefix="quantlab-", ignore_cleanup_errors=True)))
            nll, correct = ForwardPass(variants, windows, engine, budget, bar, scratch).run(places)
        ends = np.cumsum(counts)[:-1]
        return [
            (-float(values.sum()), bool(right.all()))
            for values, right in zip(np.split(nll, ends), np.split(correct, ends), strict=True)
        ]


def _width(group: list[tuple[int, ...]]) -> int:
    """Tokens of each row of a group, the longest of which comes first."""
    return max(LEAST, len(group[0]))


class _Places:
    """A consumer of a `ForwardPass` that scores some positions of some rows, ascending by row."""

    observe = None

    def __init__(self, rows: np.ndarray, positions: np.ndarray, targets: np.ndarray):
        self._rows, self._positions, self._targets = rows, positions, targets

    def output(self, forward_pass: ForwardPass) -> tuple[np.ndarray, np.ndarray]:
        """Return nll (float64) and whether the target is the most probable token, at each place."""
        p, output = forward_pass, forward_pass.output(0)
        p.weights.forget()
        nll, correct = np.empty(len(self._rows)), np.empty(len(self._rows), bool)
        for chunks in p.batches():
            here = slice(*np.searchsorted(self._rows, [chunks.start, chunks.stop]))
            rows, positions = self._rows[here] - chunks.start, self._positions[here] - p.windows.first
            states = p.last_states(0, chunks)[rows, positions][None]
            (scores,) = p.engine.score([output], [states], self._targets[None, here])
            nll[here], correct[here] = scores.nll[0], scores.correct[0]
            p.bar.update((chunks.stop - chunks.start) * p.windows.tokens.shape[1])
        return nll, correct
