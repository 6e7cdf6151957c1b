"""tokenizer.json of Hugging Face's tokenizers: its kind, tokens, merges and pre-tokenizer.

Two kinds become GGUF: BPE over bytes (`gpt2`), and BPE over characters with bytes for the rest, as SentencePiece has it
(`llama`). Others are refused, because no text would be cut as it was in training.

Source: `conversion/base.py` of llama.cpp for the pre-tokenizer; the tokenizers library for the file.
"""

import hashlib
import warnings
from pathlib import Path
from typing import Any

from quantlab.files.added_tokens import check_id
from quantlab.files.pretokenizer_hashes import CHECK_TEXT, NAME_BY_HASH
from quantlab.files.pretokenizers import GPT2_REGEX, name_of_pieces, name_of_regexes
from quantlab.files.recognize import reason, short

__all__ = [
    "adds_space",
    "byte_level_merges",
    "is_byte_level",
    "known_pre_tokenizer",
    "pre_tokenizer_name",
    "read_merges",
    "read_texts",
]

MAX_GROWTH = 64  # times that a normalizer may lengthen the text that the pre-tokenizer is recognized by


def is_byte_level(folder: Path, tokenizer: dict[str, Any]) -> bool:
    """Tell whether a tokenizer.json is byte-level BPE (False: SentencePiece's).

    Raises
    ------
    ValueError
        If it is neither.
    """
    model = tokenizer["model"]
    kind, marks = model.get("type", "BPE"), [mark for mark in _MARKS if model.get(mark)]
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if kind == "BPE" and not marks:
        if any(step.get("type") == "ByteLevel" for step in steps + _normalizers(tokenizer)):
            return True
        if model.get("byte_fallback"):
            return False
        marks = [step["type"] for step in steps if isinstance(step.get("type"), str)]
    what = f"model type {short(kind)}" + (f" with {short(marks)}" if marks else "")
    raise ValueError(
        f"{folder}: tokenizer.json: {what}, need BPE with ByteLevel or with byte_fallback. "
        f"GGUF has no such vocabulary; use another model, or add its tokenizer.model."
    )


_MARKS = ("continuing_subword_prefix", "end_of_word_suffix")  # of parts of words


def read_texts(folder: Path, tokenizer: dict[str, Any], n_vocab: int) -> dict[int, str]:
    """Return the texts by id of the vocabulary, without the added tokens.

    Raises
    ------
    ValueError
        If there is none, an id lies beyond the embedding, or two texts have one id.
    """
    vocab = tokenizer["model"].get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise ValueError(f"{folder}: tokenizer.json holds no BPE vocabulary. Download it again.")
    texts: dict[int, str] = {}
    for text, token_id in vocab.items():
        check_id(folder, token_id, n_vocab)
        if token_id in texts:
            raise ValueError(
                f"{folder}: tokenizer.json: {short(texts[token_id])} and {short(text)} both have the id {token_id}, "
                f"every token needs its own. Download it again."
            )
        texts[token_id] = text
    return texts


def read_merges(folder: Path, tokenizer: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the merges in order of priority, from `"left right"` texts or from pairs.

    Raises
    ------
    ValueError
        If they are not a list of these.
    """
    merges = tokenizer["model"].get("merges") or []
    if not isinstance(merges, list):
        raise ValueError(f"{folder}: tokenizer.json: merges={short(merges)}, need a list. Download it again.")
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ValueError(f"{folder}: tokenizer.json: merge {short(merge)}, need two texts. Download it again.")
        pairs.append((pair[0], pair[1]))
    return pairs


def byte_level_merges(merges: list[tuple[str, str]]) -> list[str]:
    """Return merges as GGUF's `"left right"`, with spaces inside a part encoded as in byte-level BPE.

    Examples
    --------
    >>> byte_level_merges([("a", "b"), (" ", "c")])
    ['a b', 'Ġ c']
    """
    return [f"{left.replace(' ', 'Ġ')} {right.replace(' ', 'Ġ')}" for left, right in merges]


def adds_space(tokenizer: dict[str, Any]) -> bool:
    """Tell whether a normalizer or Metaspace puts a space before a text."""
    if any(step.get("type") == "Prepend" for step in _normalizers(tokenizer)):
        return True
    metaspaces = [s for s in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers") if s.get("type") == "Metaspace"]
    return any(s.get("prepend_scheme") != "never" and s.get("add_prefix_space", True) for s in metaspaces)


def known_pre_tokenizer(folder: Path, tokenizer: dict[str, Any]) -> str | None:
    """Recognize the pre-tokenizer by a test text's ids, as llama.cpp does (None: unknown)."""
    return NAME_BY_HASH.get(_digest(_library(folder, tokenizer)))


def pre_tokenizer_name(folder: Path, tokenizer: dict[str, Any]) -> str:
    """Recognize the pre-tokenizer as llama.cpp does, else by its expressions or its cut of the test text."""
    library = _library(folder, tokenizer)
    digest = _digest(library)
    if digest in NAME_BY_HASH:
        return NAME_BY_HASH[digest]
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    name = name_of_regexes(_regexes(tokenizer.get("pre_tokenizer")), ignore_merges)
    if name is None and library.pre_tokenizer is not None:
        name = name_of_pieces(library.pre_tokenizer, CHECK_TEXT, ignore_merges)
    what = f"its expressions are those of {name!r}" if name else "taking 'default'"
    warnings.warn(
        f"{folder}: pre-tokenizer {digest[:16]} is not in llama.cpp's list; {what}. "
        f"Compare a text's ids with transformers'.",
        stacklevel=2,
    )
    return name or "default"


def _digest(library: Any) -> str:
    return hashlib.sha256(str(library.encode(CHECK_TEXT).ids).encode()).hexdigest()


def _library(folder: Path, tokenizer: dict[str, Any]) -> Any:
    """Open tokenizer.json with its library, and encode the test text once."""
    from tokenizers import Tokenizer

    if _growth(tokenizer.get("normalizer")) > MAX_GROWTH:
        raise ValueError(
            f"{folder}: tokenizer.json: its normalizer makes a text more than {MAX_GROWTH} times as long. "
            f"The file is hostile."
        )
    if not _templates_fit(tokenizer.get("post_processor")):
        raise ValueError(f"{folder}: tokenizer.json: a template names an unknown token. Download it again.")
    try:
        library = Tokenizer.from_file(str(folder / "tokenizer.json"))
        library.encode(CHECK_TEXT)
    except BaseException as error:  # the library raises bare Exception; where it panics, none at all
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{folder}: tokenizer.json cannot be read ({reason(error)}). Download it again.") from None
    return library


def _normalizers(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the normalizer's steps."""
    return _steps(tokenizer.get("normalizer"), "normalizers")


def _steps(entry: Any, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or post-processor, with nested sequences (under `key`) unpacked."""
    steps, waiting = [], [entry]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict):
            steps.append(step)
            waiting += step[key] if isinstance(step.get(key), list) else []
    return steps


def _templates_fit(post_processor: Any) -> bool:
    """Tell whether every template describes the tokens it names; if not, the library panics."""
    for step in _steps(post_processor, "processors"):
        items = [item for key in ("single", "pair") if isinstance(step.get(key), list) for item in step[key]]
        tokens = [item.get("SpecialToken") for item in items if isinstance(item, dict)]
        names = {token["id"] for token in tokens if isinstance(token, dict) and isinstance(token.get("id"), str)}
        known = step.get("special_tokens")
        if not names <= set(known if isinstance(known, dict) else ()):
            return False
    return True


def _growth(normalizer: Any) -> int:
    """Return a bound on how many times longer a normalizer can make a text."""
    growth = 1
    for step in _steps(normalizer, "normalizers"):
        growth *= max(1, *(len(step[key]) for key in ("content", "prepend") if isinstance(step.get(key), str)), 1)
        if growth > MAX_GROWTH:
            break
    return growth


def _regexes(entry: Any) -> tuple[str, ...]:
    """Return the expressions of a tokenizer.json's pre_tokenizer, with named steps written out."""
    if not isinstance(entry, dict):
        return ()
    kind = entry.get("type")
    if kind == "Sequence":
        return tuple(regex for step in entry.get("pretokenizers") or [] for regex in _regexes(step))
    if kind == "Split" and isinstance(entry.get("pattern"), dict):
        return tuple(str(value) for value in entry["pattern"].values())
    if kind == "Digits":
        return (r"\p{N}",) if entry.get("individual_digits") else (r"\p{N}+",)
    if kind == "ByteLevel" and entry.get("use_regex", True):
        return (GPT2_REGEX,)
    return ()
