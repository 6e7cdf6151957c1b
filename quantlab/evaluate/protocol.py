"""Protocols: rules from a text to scored tokens, recorded in every result."""

import hashlib
from dataclasses import asdict, dataclass
from importlib.metadata import version

import numpy as np

import quantlab
from quantlab.files.arguments import check_whole
from quantlab.files.bundled import Text
from quantlab.files.vocab import Vocab

BESIDE = ("versions", "device", "precision")  # of a record: results of one mode agree to 1e-4 nats on every device

# name -> what it scores
PROTOCOLS = {
    "llama.cpp": "the second half of each window; BOS, where there is one, replaces the first token of each; "
    "one newline at the end of the text is dropped",
    "full": "every token but the first of each window; BOS, where there is one, starts the text",
}


@dataclass(frozen=True)
class Protocol:
    """The record of a measurement: results are comparable only if all fields except `BESIDE` agree.

    Attributes
    ----------
    name, mode, rules : str
    text, text_sha256 : str
        Name and digest of the text.
    n_tokens : int
        Tokens of the whole text; under `llama.cpp` without one newline at its end.
    tokens_sha256 : str
        Digest of the token ids of the evaluated chunks, int32 little-endian.
    tokenizer : str
        Digest of the vocabulary.
    n_ctx, chunks : int
        Tokens per window, and windows evaluated.
    bos : str
        `first of each chunk`, `first of the text` or `none`.
    versions : dict
        Package → version.
    device : str
        What computed: `cpu`, or a kind of card with its name.
    precision : str
        How products were computed.
    """

    name: str
    mode: str
    rules: str
    text: str
    text_sha256: str
    n_tokens: int
    tokens_sha256: str
    tokenizer: str
    n_ctx: int
    chunks: int
    bos: str
    versions: dict[str, str]
    device: str = "cpu"
    precision: str = "float32"


@dataclass(frozen=True)
class Windows:
    """The chunks of a text, ready for evaluation."""

    tokens: np.ndarray  # int32 (n_chunks, n_ctx)
    targets: np.ndarray  # int32 (n_chunks, n_scored): the tokens to be predicted
    first: int  # position whose logits predict the first target; the others follow without a gap
    # int32 (n_chunks, n_ctx): the text's own tokens, before BOS replaced the first of a chunk
    original: np.ndarray | None = None

    @property
    def scored(self) -> slice:
        """Positions within a chunk whose logits are scored."""
        return slice(self.first, self.first + self.targets.shape[1])


def cut(
    text: Text, vocab: Vocab, *, n_ctx: int, chunks: int | None, name: str, mode: str, rules: str
) -> tuple[Windows, Protocol]:
    """Cut a text into windows by a named protocol.

    Parameters
    ----------
    text : Text
    vocab : Vocab
    n_ctx : int
        Tokens per window.
    chunks : int or None
        Windows to evaluate at most; None takes all.
    name : str
        A name from `PROTOCOLS`.
    mode, rules : str
        Recorded.

    Returns
    -------
    Windows, Protocol

    Raises
    ------
    ValueError
        If the protocol is not known, `n_ctx` or `chunks` is out of range, the vocabulary ends texts with a token of its
        own, or the text is shorter than two windows.

    Source: llama-perplexity of llama.cpp (`llama.cpp`); the evaluation of GPTQ and its successors (`full`).
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol={name}, must be one of {', '.join(PROTOCOLS)}. Choose one of them.")
    check_whole(n_ctx=n_ctx, chunks=chunks)
    if n_ctx is None or n_ctx < 4:
        raise ValueError(f"n_ctx={n_ctx}, must be at least 4. Give 512, the usual value.")
    if chunks is not None and chunks < 1:
        raise ValueError(f"chunks={chunks}, must be at least 1. Leave it out to evaluate the whole text.")
    if vocab.add_eos:
        raise ValueError(
            f"{text.name}: the vocabulary ends every text with EOS, which is wrong within a text. Use another model."
        )
    tokens = vocab.encode(_prompt(text.text) if name == "llama.cpp" else text.text)
    if len(tokens) < 2 * n_ctx:
        raise ValueError(
            f"{text.name}: n_tokens={len(tokens)}, must be at least 2 * n_ctx = {2 * n_ctx}. "
            "Give a longer text or a smaller n_ctx."
        )
    n_chunks = min(len(tokens) // n_ctx, chunks or len(tokens))
    original = tokens[: n_chunks * n_ctx].reshape(n_chunks, n_ctx)
    return windows_of(
        original, vocab, name=name, mode=mode, rules=rules, text=text.name, sha256=text.sha256, n_tokens=len(tokens)
    )


def windows_of(
    original: np.ndarray, vocab: Vocab, *, name: str, mode: str, rules: str, text: str, sha256: str, n_tokens: int
) -> tuple[Windows, Protocol]:
    """Return windows and protocol for tokens [shape=(n_chunks, n_ctx)] that are already cut."""
    evaluated, bos, first = original.copy(), "first of the text" if vocab.add_bos else "none", 0
    if name == "llama.cpp":
        first = original.shape[1] // 2
        if vocab.add_bos:
            evaluated[:, 0] = vocab.bos_id
            bos = "first of each chunk"
    record = Protocol(
        name=name,
        mode=mode,
        rules=rules,
        text=text,
        text_sha256=sha256,
        n_tokens=n_tokens,
        tokens_sha256=hashlib.sha256(original.astype("<i4").tobytes()).hexdigest(),
        tokenizer=vocab.digest,
        n_ctx=original.shape[1],
        chunks=len(original),
        bos=bos,
        versions={"quantlab": quantlab.__version__, **{name: version(name) for name in ("numpy", "numba")}},
    )
    return Windows(evaluated, original[:, first + 1 :].copy(), first, original), record


def _prompt(text: str) -> str:
    r"""Drop one `\n` at the end, as llama.cpp does for `-f`, and keep a `\r` before it.

    Source: the option `-f` in common/arg.cpp of llama.cpp.
    """
    return text.removesuffix("\n")


def require_same(protocols: list[Protocol]) -> None:
    """Refuse to compare results that were measured differently.

    Raises
    ------
    ValueError
        Naming the first field that differs.
    """
    first, *others = (asdict(protocol) | dict.fromkeys(BESIDE) for protocol in protocols)
    for other in others:
        for field, value in first.items():
            if other[field] != value:
                raise ValueError(
                    f"protocol: {field}={value} and {field}={other[field]}, must be the same. "
                    f"Measure both the same way."
                )
