"""llama-perplexity's `--kl-divergence-base` file: a base model's predictions in 16 bits each.

    "_logits_" │ int32 n_ctx │ int32 n_vocab │ int32 n_chunks │ int32 token × n_chunks · n_ctx
    per scored token:  float32 scale │ float32 lowest │ uint16 code × n_vocab       ln p = scale · code + lowest

The codes reach from the highest logit 16 nats down; what is less probable is stored as if it were 16 nats down.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from quantlab.evaluate.engine.fused import score
from quantlab.evaluate.forward_pass import ForwardPass
from quantlab.evaluate.metrics import TokenScores

MAGIC = b"_logits_"
PIECE = 16 << 20  # bytes of logits that are coded at once
NATS = np.float32(16)  # what the codes reach over at most
STEPS = np.float32(65535)


def stored_log_p(logits: np.ndarray) -> np.ndarray:
    """Return the log probabilities after writing to the file and reading back.

    Parameters
    ----------
    logits : np.ndarray [shape=(…, n_vocab), dtype=float32]

    Returns
    -------
    np.ndarray [shape=logits.shape, dtype=float32]
        Nats. Their exponentials add up to a little more than 1 where anything was cut off.

    Source: `log_softmax` in tools/perplexity/perplexity.cpp of llama.cpp.
    """
    return decode(encode(logits), logits.shape[-1])


def record_width(n_vocab: int) -> int:
    """Return the number of 16-bit words per scored token: two float32, the codes, a pad if `n_vocab` is odd."""
    return 2 * ((n_vocab + 1) // 2) + 4


def encode(logits: np.ndarray) -> np.ndarray:
    """Return the records of a file [shape=(…, record_width(n_vocab)), dtype=uint16] for logits [shape=(…, n_vocab)].

    Source: as `stored_log_p`.
    """
    n_vocab = logits.shape[-1]
    top = logits.max(axis=-1, keepdims=True)
    low = np.maximum(logits.min(axis=-1, keepdims=True), top - NATS)
    log_sum = np.log(np.exp(logits - top).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (top - low) / STEPS
    per_step = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    records = np.zeros((*logits.shape[:-1], record_width(n_vocab)), np.uint16)
    records[..., :4] = np.concatenate([scale, low - top - log_sum], axis=-1).astype("<f4").view("<u2")
    records[..., 4 : 4 + n_vocab] = np.where(logits > low, np.rint(per_step * (logits - low)), np.float32(0))
    return records


def decode(records: np.ndarray, n_vocab: int) -> np.ndarray:
    """Return the log probabilities [shape=(…, n_vocab), dtype=float32] of a file's records."""
    head = np.ascontiguousarray(records[..., :4], "<u2").view("<f4").astype(np.float32)
    return head[..., :1] * records[..., 4 : 4 + n_vocab].astype(np.float32) + head[..., 1:]


def stored_kld(stored: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Return the divergence of each position as llama-perplexity computes it from its file.

    Parameters
    ----------
    stored : np.ndarray [shape=(…, n_vocab)]
        What `stored_log_p` gives of the base.
    log_q : np.ndarray [shape=(…, n_vocab)]
        Log probabilities of the variant, nats.

    Returns
    -------
    np.ndarray [shape=(…,)]
        Nats. Only what is more probable than e⁻¹⁶ counts, and nothing is scaled to add up to 1, so that it can be
        negative.

    Source: as `stored_log_p`.
    """
    return np.where(stored > -NATS, np.exp(stored) * (stored - log_q), 0).sum(axis=-1, dtype=np.float64)


@dataclass(frozen=True)
class BaseFile:
    """A file of a base model's predictions."""

    path: Path
    tokens: np.ndarray  # int32 (n_chunks, n_ctx): the text's own, without a BOS in the place of each chunk's first
    n_vocab: int

    @classmethod
    def open(cls, path: str | Path) -> "BaseFile":
        """Read a file's header and tokens.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is something else, or not whole.
        """
        path = Path(path)
        with open(path, "rb") as file:
            start = file.read(20)
            if not start.startswith(MAGIC) or len(start) < 20:
                raise ValueError(f"{path}: must begin with {MAGIC.decode()}. Write one with kl_divergence_base.")
            n_ctx, n_vocab, n_chunks = (int(number) for number in np.frombuffer(start, "<i4", offset=8))
            if min(n_vocab, n_chunks) < 1 or n_ctx < 4 or max(n_ctx, n_vocab, n_chunks) > 1 << 28:
                raise ValueError(
                    f"{path}: n_ctx={n_ctx}, n_vocab={n_vocab}, n_chunks={n_chunks} are impossible. "
                    f"Write the file again."
                )
            size, needed = path.stat().st_size, file_bytes(n_chunks, n_ctx, n_vocab)
            if size != needed:
                raise ValueError(f"{path}: has {size} bytes, must have {needed}. It is truncated; write it again.")
            tokens = np.frombuffer(file.read(4 * n_chunks * n_ctx), "<i4").astype(np.int32).reshape(n_chunks, n_ctx)
        if tokens.min() < 0 or tokens.max() >= n_vocab:
            raise ValueError(
                f"{path}: tokens reach from {tokens.min()} to {tokens.max()}, must be 0 to {n_vocab - 1}. "
                f"Write the file again."
            )
        return cls(path, tokens, n_vocab)

    def records(self) -> np.ndarray:
        """Return all records [shape=(n_chunks, n_scored, record_width), dtype=uint16], read when they are used."""
        shape = (len(self.tokens), n_scored(self.tokens.shape[1]), record_width(self.n_vocab))
        return np.memmap(self.path, "<u2", "r", offset=20 + 4 * self.tokens.size, shape=shape)


def n_scored(n_ctx: int) -> int:
    """Return the number of scored tokens of a chunk: the second half without its first token."""
    return n_ctx - 1 - n_ctx // 2


def file_bytes(n_chunks: int, n_ctx: int, n_vocab: int) -> int:
    """Return the size of a file."""
    return 20 + 4 * n_chunks * n_ctx + 2 * record_width(n_vocab) * n_scored(n_ctx) * n_chunks


# ── consumers of a pass ─────────────────────────────────────────────────────────────────────────────────────────────


class WriteBase:
    """A consumer of a `ForwardPass` that scores the base's tokens and writes its predictions to a file.

    Parameters
    ----------
    file : object with `.write`
    """

    observe = None

    def __init__(self, file: BinaryIO):
        self.file = file

    def output(self, forward_pass: ForwardPass) -> list[TokenScores]:
        """Write the file; return the scores of the only variant."""
        p, original = forward_pass, forward_pass.windows.original
        scores = TokenScores.empty(*p.windows.targets.shape)
        self.file.write(MAGIC + np.array([original.shape[1], p.hparams.n_vocab, len(original)], "<i4").tobytes())  # pyright: ignore[reportOptionalMemberAccess, reportArgumentType]
        self.file.write(original.astype("<i4").tobytes())  # pyright: ignore[reportOptionalMemberAccess]
        for place, logits in _logits(p):
            score(logits, logits, p.windows.targets[place], **scores.at(place))
            self.file.write(encode(logits).astype("<u2").tobytes())
        return [scores]


class CompareWithFile:
    """A consumer of a `ForwardPass` that scores its only variant against the predictions in a file.

    Source: `kl_divergence` in tools/perplexity/perplexity.cpp of llama.cpp.
    """

    observe = None

    def __init__(self, file: BaseFile):
        self.file = file

    def output(self, forward_pass: ForwardPass) -> list[TokenScores]:
        """Return the scores of the base (as far as the file has them) and of the variant."""
        p, records = forward_pass, self.file.records()
        base, scores = (TokenScores.empty(*p.windows.targets.shape) for _ in range(2))
        for place, logits in _logits(p):
            targets = p.windows.targets[place]
            stored = decode(records[place], self.file.n_vocab)
            score(stored, logits, targets, **scores.at(place))  # all but the divergence, which counts otherwise
            rows = np.arange(len(targets))
            log_z = scores.nll[place] + logits[rows, targets]
            scores.kld[place] = stored_kld(stored, logits - log_z.astype(np.float32)[:, None])
            base.nll[place] = -stored[rows, targets]
            base.correct[place] = stored.argmax(axis=-1) == targets
            base.top_p[place] = np.exp(stored.max(axis=-1))
        return [base, scores]


def _logits(p: ForwardPass):
    """Yield places (chunk, rows) and the first variant's logits [rows, n_vocab] there, a few at a time."""
    output, n = p.output(0), p.windows.targets.shape[1]
    p.weights.forget()
    step = max(1, PIECE // (4 * p.hparams.n_vocab))
    for chunk in range(len(p.windows.targets)):
        states = p.last_states(0, slice(chunk, chunk + 1))[0]
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            yield (chunk, rows), p.engine.logits(output, states[rows])
        p.bar.update(p.windows.tokens.shape[1])
