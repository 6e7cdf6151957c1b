"""Conversations as scored tokens: each in its own window, with only the answers counted."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np

import quantlab
from quantlab.evaluate.protocol import Protocol
from quantlab.files.arguments import check_whole
from quantlab.files.bundled import Text
from quantlab.files.conversations import Answer, answers, read_conversations, renderer
from quantlab.files.vocab import NORMAL, Vocab

NAME = "answers"  # of the protocol


@dataclass(frozen=True)
class Turns:
    """The conversations of a text as tokens.

    Attributes
    ----------
    ids : list of np.ndarray [dtype=int32]
        Tokens of each sequence.
    scored : list of np.ndarray [dtype=bool]
        For each token whether it belongs to an answer.
    question : str
        The text in front of the first answer.
    protocol : Protocol
        `n_ctx` is the longest sequence, `chunks` counts sequences.
    """

    ids: list[np.ndarray]
    scored: list[np.ndarray]
    question: str
    protocol: Protocol

    def windows(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [shape=(n, width), dtype=int32], zeros behind each sequence, and a mask of scored targets.

        The mask has shape (n, width - 1): its column j belongs to the token that follows position j. What stands
        behind a sequence changes nothing in it.
        """
        tokens, mask = np.zeros((len(self.ids), width), np.int32), np.zeros((len(self.ids), width - 1), bool)
        for row, (ids, scored) in enumerate(zip(self.ids, self.scored, strict=True)):
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids) - 1] = scored[1:]
        return tokens, mask


def cut_answers(text: Text, model, *, n_ctx: int, chunks: int | None, mode: str, rules: str) -> Turns:
    """Render the conversations of a text by a model's chat template, and turn them into tokens.

    Where one question continues the text of another, both answers are scored in one sequence; where the template
    changes earlier turns, each answer has its own. What is longer than `n_ctx` loses its end.

    Parameters
    ----------
    text : Text
        JSON or JSON lines, see `quantlab.files.conversations`.
    model : Model
    n_ctx : int
        Tokens of a sequence at most.
    chunks : int or None
        Sequences at most; None takes all.
    mode, rules : str
        Recorded.

    Returns
    -------
    Turns

    Raises
    ------
    ValueError
        If there is no chat template, the text holds no conversations, or no answer begins within `n_ctx` tokens.
    ImportError
        If jinja2 is not installed.
    """
    check_whole(n_ctx=n_ctx, chunks=chunks)
    vocab, render = model.vocab, renderer(model.metadata, model.vocab, source=str(model.path))
    ids, scored, question = [], [], None
    for number, messages in enumerate(read_conversations(text), 1):
        found = answers(messages, render, source=f"{text.name}: conversation {number}")
        for tokens, mask in _sequences(found, vocab):
            if mask[1:n_ctx].any():
                question = found[0].text[: found[0].start].rstrip(" ") if question is None else question
                ids.append(tokens[:n_ctx])
                scored.append(mask[:n_ctx])
    ids, scored = ids[:chunks], scored[:chunks]
    if not ids:
        raise ValueError(f"{text.name}: no answer begins within n_ctx={n_ctx} tokens. Give a larger n_ctx.")
    record = Protocol(
        name=NAME,
        mode=mode,
        rules=rules,
        text=text.name,
        text_sha256=text.sha256,
        n_tokens=sum(map(len, ids)),
        tokens_sha256=hashlib.sha256(np.concatenate(ids).astype("<i4").tobytes()).hexdigest(),
        tokenizer=vocab.digest,
        n_ctx=max(map(len, ids)),
        chunks=len(ids),
        bos="first of each conversation" if vocab.add_bos else "as the template has it",
        versions={"quantlab": quantlab.__version__, **{name: version(name) for name in ("numpy", "numba", "jinja2")}},
    )
    return Turns(ids, scored, _without_bos(question, vocab), record)  # pyright: ignore[reportArgumentType]


def _sequences(rendered: Sequence[Answer], vocab: Vocab) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return tokens and marks of scored ones, a sequence that another continues left out."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for answer in rendered:
        tokens, asked = _encode(answer.text, vocab), _encode(answer.text[: answer.start], vocab)
        tokens = tokens[: _stop(tokens, _common(tokens, _encode(answer.text[: answer.end], vocab)), vocab)]
        mask = np.arange(len(tokens)) >= _common(tokens, asked)
        if found and _common(found[-1][0], tokens) == len(found[-1][0]):
            before = found.pop()[1]
            mask[: len(before)] |= before
        found.append((tokens, mask))
    return found


def _stop(tokens: np.ndarray, start: int, vocab: Vocab) -> int:
    """Return where an answer stops that ends before `start`: behind the first mark there, or at the end."""
    marks = np.flatnonzero(vocab.types[tokens[start:]] != NORMAL)
    return start + int(marks[0]) + 1 if marks.size else len(tokens)


def _encode(text: str, vocab: Vocab) -> np.ndarray:
    """Return the tokens of a rendered text."""
    ids = vocab.encode(_without_bos(text, vocab), parse_special=True)
    return ids[:-1] if vocab.add_eos else ids


def _without_bos(text: str, vocab: Vocab) -> str:
    """Leave out a BOS that the template writes where the vocabulary adds one."""
    return text.removeprefix(vocab.tokens[vocab.bos_id]) if vocab.add_bos and vocab.bos_id is not None else text


def _common(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Count the tokens that two sequences begin with alike."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(np.asarray(a[:n]) != np.asarray(b[:n]))
    return int(differing[0]) if differing.size else n
