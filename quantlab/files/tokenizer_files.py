"""A checkpoint's tokenizer files as GGUF metadata, with the keys, types and order of llama.cpp's converter.

    tokenizer.model                      SentencePiece                        -> tokenizer.ggml.model "llama"
    tokenizer.model of Llama 3           tiktoken's byte-level BPE            -> "gpt2"
    tokenizer.json with byte fallback    the same vocabulary without scores   -> "llama"
    tokenizer.json without               byte-level BPE                       -> "gpt2"

Source: `conversion/base.py` of llama.cpp (_set_vocab_sentencepiece, _set_vocab_llama_hf, _set_vocab_gpt2).
"""

import hashlib
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.files.checkpoint_metadata import Config
from quantlab.files.pretokenizer_hashes import CHECK_TEXT, NAME_BY_HASH
from quantlab.files.pretokenizers import GPT2_REGEX, name_of_regexes
from quantlab.files.recognize import reason, short
from quantlab.files.special_tokens import special_metadata
from quantlab.files.tiktoken_file import is_tiktoken, read_tiktoken, special_tokens
from quantlab.files.vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from quantlab.files.weights import read_json

__all__ = ["vocab_metadata"]

MAX_MODEL = 32 << 20  # bytes of a tokenizer.model
MAX_TOKENS = 1 << 20  # the largest vocabularies have 262 k
MAX_GROWTH = 64  # times that a normalizer may lengthen the text that the pre-tokenizer is recognized by
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0


def vocab_metadata(folder: Path, config: Config) -> dict[str, Any]:
    """Return the `tokenizer.*` keys of a checkpoint.

    Raises
    ------
    FileNotFoundError
        If there is no tokenizer.
    ValueError
        If the tokenizer cannot be read, or has more tokens than the embedding has rows.
    """
    if config.n_vocab > MAX_TOKENS:
        raise ValueError(f"{folder}: vocab_size={config.n_vocab}, need at most {MAX_TOKENS}. Check its configuration.")
    tokenizer, tokenizer_config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    keys: dict[str, Any] = {}
    prefix = tokenizer_config.get("add_prefix_space")
    if config.arch == "llama" and isinstance(prefix, bool):
        keys["tokenizer.ggml.add_space_prefix"] = prefix
    model = tokenizer.get("model") if isinstance(tokenizer.get("model"), dict) else {}
    raw = _read_model(folder / "tokenizer.model")
    if raw is not None and not is_tiktoken(raw):
        keys |= _sentencepiece(folder, raw, tokenizer_config, config.n_vocab)
    elif model.get("byte_fallback") and config.arch == "llama":
        keys |= _without_scores(folder, tokenizer, tokenizer_config, config.n_vocab)
    elif model:
        keys |= _byte_level(folder, tokenizer, config.n_vocab)
    elif raw is not None:
        keys |= _tiktoken(folder, raw, config)
    else:
        raise FileNotFoundError(
            f"{folder}: holds neither tokenizer.model nor tokenizer.json. Download the whole checkpoint."
        )
    if config.arch == "llama" and config.n_vocab == 32016:  # Code Llama's tokens for filling in the middle
        infill = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
        keys |= special_metadata(folder, fixed=infill)
    if config.arch == "llama" and config.n_vocab == 49152:  # the converter's rule for small Granite models
        keys["tokenizer.ggml.add_bos_token"] = False
    return keys


def _vocabulary(kind: str, pre: str, tokens: list[str], scores: list[float] | None, types: list[int]) -> dict[str, Any]:
    keys: dict[str, Any] = {"model": kind, "pre": pre, "tokens": tokens}
    if scores is not None:
        keys["scores"] = np.array(scores, np.float32)
    keys["token_type"] = np.array(types, np.int32)
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def _too_large(folder: Path, n_tokens: int, n_vocab: int) -> ValueError:
    return ValueError(
        f"{folder}: tokenizer has {n_tokens} tokens, the embedding has {n_vocab} rows. "
        f"Take the tokenizer of this model, or remove the tokens that were added to it."
    )


def _read_model(path: Path) -> bytes | None:
    """Return the bytes of tokenizer.model, None where there is none."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_MODEL:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, need at most {MAX_MODEL}. Download it again.")
    return path.read_bytes()


def _tiktoken(folder: Path, raw: bytes, config: Config) -> dict[str, Any]:
    """Read Meta's Llama 3; what the tokenizer.json of the same model says of its special tokens is written out here."""
    tokens, merges = read_tiktoken(folder / "tokenizer.model", raw)
    special = special_tokens(is_3_1=config.rope["rope_type"] == "llama3")
    n_tokens = len(tokens) + len(special)
    if n_tokens > config.n_vocab:
        raise _too_large(folder, n_tokens, config.n_vocab)
    padding = [f"[PAD{i}]" for i in range(n_tokens, config.n_vocab)]
    types = [NORMAL] * len(tokens) + [CONTROL] * len(special) + [UNUSED] * len(padding)
    keys = _vocabulary("gpt2", "llama-bpe", [*tokens, *special, *padding], None, types)
    keys["tokenizer.ggml.merges"] = merges
    for role, text in (("bos", "<|begin_of_text|>"), ("eos", "<|end_of_text|>")):
        keys[f"tokenizer.ggml.{role}_token_id"] = np.uint32(len(tokens) + special.index(text))
    return keys | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False}


def _sentencepiece(folder: Path, raw: bytes, tokenizer_config: dict[str, Any], n_vocab: int) -> dict[str, Any]:
    """Read tokenizer.model, then the tokens that two more files add."""
    tokens, scores, types = _read_pieces(folder / "tokenizer.model", raw)
    n_pieces = len(tokens)
    if n_pieces > n_vocab:
        raise _too_large(folder, n_pieces, n_vocab)
    tokens += [f"[PAD{i}]" for i in range(n_pieces, n_vocab)]
    scores += [_PADDING_SCORE] * (n_vocab - n_pieces)
    types += [UNUSED] * (n_vocab - n_pieces)
    for text, token_id in read_json(folder / "added_tokens.json").items():
        _check_id(folder, token_id, n_vocab)
        tokens[token_id], scores[token_id], types[token_id] = text, _ADDED_SCORE, USER_DEFINED
    for token_id, text, control in _decoder_entries(folder, tokenizer_config, n_vocab):
        tokens[token_id] = text if control else text.replace("▁", " ")
        scores[token_id], types[token_id] = _ADDED_SCORE, CONTROL if control else USER_DEFINED
    return _vocabulary("llama", "default", tokens, scores, types) | special_metadata(folder, n_vocab=n_vocab)


def _read_pieces(path: Path, raw: bytes) -> tuple[list[str], list[float], list[int]]:
    """Return texts, scores and types of a SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(raw)
        ids = list(range(processor.vocab_size()))
        return processor.id_to_piece(ids), processor.get_score(ids), [_piece_type(processor, i) for i in ids]
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"{path}: is no SentencePiece model ({reason(error)}). Download it again.") from None


def _piece_type(processor: Any, token_id: int) -> int:
    if processor.is_unknown(token_id):
        return UNKNOWN
    if processor.is_control(token_id):
        return CONTROL
    if processor.is_unused(token_id):
        return UNUSED
    return BYTE if processor.is_byte(token_id) else NORMAL


def _check_id(folder: Path, token_id: Any, n_vocab: int) -> None:
    if type(token_id) is not int or token_id < 0:
        raise ValueError(
            f"{folder}: added token has id {short(token_id)}, need a whole number. Download the tokenizer again."
        )
    if token_id >= n_vocab:
        raise _too_large(folder, token_id + 1, n_vocab)


def _decoder_entries(folder: Path, tokenizer_config: dict[str, Any], n_vocab: int) -> list[tuple[int, str, bool]]:
    """Return (id, text, whether it is a control token) of the tokens that tokenizer_config.json adds."""
    table = tokenizer_config.get("added_tokens_decoder", {})
    entries = []
    for key, entry in table.items() if isinstance(table, dict) else []:
        if (
            not re.fullmatch("[0-9]{1,10}", key)
            or not isinstance(entry, dict)
            or not isinstance(entry.get("content"), str)
        ):
            raise ValueError(
                f"{folder}: added_tokens_decoder: {short(key)} is no token. Download tokenizer_config.json again."
            )
        _check_id(folder, int(key), n_vocab)
        entries.append((int(key), entry["content"], bool(entry.get("special")) or _looks_special(entry["content"])))
    return entries


def _looks_special(text: str) -> bool:
    """Say whether a token that is not marked as special is one by its looks."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(text.startswith(left) and text.endswith(right) for left, right in brackets)


def _ids(folder: Path, tokenizer: dict[str, Any], n_vocab: int) -> tuple[dict[int, str], dict[int, dict]]:
    """Return texts by id of all tokens, and the entries by id of the added ones."""
    vocab, added = tokenizer["model"].get("vocab"), tokenizer.get("added_tokens") or []
    if not isinstance(vocab, dict) or not isinstance(added, list):
        raise ValueError(f"{folder}: tokenizer.json holds no BPE vocabulary. Download it again.")
    texts = {}
    for text, token_id in vocab.items():
        _check_id(folder, token_id, n_vocab)
        texts[token_id] = text
    entries = {}
    for entry in added:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise ValueError(f"{folder}: tokenizer.json: added token {short(entry)} has no text. Download it again.")
        _check_id(folder, entry.get("id"), n_vocab)
        texts[entry["id"]], entries[entry["id"]] = entry["content"], entry
    if not texts:
        raise ValueError(f"{folder}: tokenizer.json holds no tokens. Download it again.")
    return texts, entries


def _without_scores(
    folder: Path, tokenizer: dict[str, Any], tokenizer_config: dict[str, Any], n_vocab: int
) -> dict[str, Any]:
    """Read a SentencePiece vocabulary that is there as tokenizer.json alone; it keeps no scores."""
    texts, entries = _ids(folder, tokenizer, n_vocab)
    contents = [tokenizer_config.get(f"{role}_token") for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    more = tokenizer_config.get("additional_special_tokens")
    contents += more if isinstance(more, list) else []
    contents = [entry.get("content") if isinstance(entry, dict) else entry for entry in contents]
    special = {content for content in contents if isinstance(content, str)}
    tokens, types = [], []
    n_base = len(tokenizer["model"]["vocab"])
    for token_id in range(len(texts)):
        if token_id not in texts:
            raise ValueError(f"{folder}: tokenizer.json has no token {token_id}. Download it again.")
        text = texts[token_id]
        byte = re.fullmatch("<0x[0-9A-Fa-f]{2}>", text)
        plain = NORMAL if token_id < n_base else USER_DEFINED
        tokens.append(text)
        types.append(BYTE if byte else CONTROL if text in special else plain)
    scores = [_ADDED_SCORE] * len(tokens)
    return _vocabulary("llama", "default", tokens, scores, types) | special_metadata(folder, n_vocab=len(tokens))


def _byte_level(folder: Path, tokenizer: dict[str, Any], n_vocab: int) -> dict[str, Any]:
    """Read a byte-level BPE vocabulary with its merges."""
    texts, entries = _ids(folder, tokenizer, n_vocab)
    tokens, types = [], []
    for token_id in range(n_vocab):
        text = texts.get(token_id)
        if text is None:
            tokens.append(f"[PAD{token_id}]")
            types.append(UNUSED)
        elif token_id not in entries:
            tokens.append(text)
            types.append(NORMAL)
        else:
            control = entries[token_id].get("special") or _looks_special(text)
            tokens.append(text if control else text.replace("▁", " "))
            types.append(CONTROL if control else USER_DEFINED)
    keys = _vocabulary("gpt2", _pre(folder, tokenizer), tokens, None, types)
    merges = tokenizer["model"].get("merges") or []
    if not isinstance(merges, list):
        raise ValueError(f"{folder}: tokenizer.json: merges={short(merges)}, need a list. Download it again.")
    keys["tokenizer.ggml.merges"] = [_merge(folder, merge) for merge in merges]
    return keys | special_metadata(folder)


def _merge(folder: Path, merge: Any) -> str:
    """Return a merge as `"left right"`; spaces inside a part are encoded as byte-level BPE encodes them."""
    if isinstance(merge, str):
        return merge
    if isinstance(merge, list) and len(merge) == 2 and all(isinstance(part, str) for part in merge):
        return " ".join(part.replace(" ", "Ġ") for part in merge)
    raise ValueError(f"{folder}: tokenizer.json: merge {short(merge)}, need two texts. Download it again.")


def _pre(folder: Path, tokenizer: dict[str, Any]) -> str:
    """Recognize the pre-tokenizer: by what it makes of a test text, as llama.cpp does, else by its expressions."""
    from tokenizers import Tokenizer

    if _growth(tokenizer.get("normalizer")) > MAX_GROWTH:
        raise ValueError(
            f"{folder}: tokenizer.json: its normalizer makes a text more than {MAX_GROWTH} times as long. "
            f"The file is hostile."
        )
    if not _templates_fit(tokenizer.get("post_processor")):
        raise ValueError(f"{folder}: tokenizer.json: a template names a token it does not know. Download it again.")
    try:
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(CHECK_TEXT).ids
    except BaseException as error:  # the library raises bare Exception; where it panics, none at all
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{folder}: tokenizer.json cannot be read ({reason(error)}). Download it again.") from None
    digest = hashlib.sha256(str(ids).encode()).hexdigest()
    if digest in NAME_BY_HASH:
        return NAME_BY_HASH[digest]
    name = name_of_regexes(_regexes(tokenizer.get("pre_tokenizer")), bool(tokenizer["model"].get("ignore_merges")))
    warnings.warn(
        f"{folder}: pre-tokenizer {digest[:16]} is not in llama.cpp's list; "
        + (
            f"its expressions are those of {name!r}."
            if name
            else "taking 'default'. Compare the ids of a text with the original."
        ),
        stacklevel=2,
    )
    return name or "default"


def _steps(entry: Any, key: str) -> list[dict[str, Any]]:
    """Return a normalizer's or post-processor's steps, those of sequences within sequences (under `key`) too."""
    steps, waiting = [], [entry]
    while waiting:
        step = waiting.pop()
        if isinstance(step, dict):
            steps.append(step)
            waiting += step[key] if isinstance(step.get(key), list) else []
    return steps


def _templates_fit(post_processor: Any) -> bool:
    """Say whether every template describes the tokens it names; the library panics where one does not."""
    for step in _steps(post_processor, "processors"):
        items = [item for key in ("single", "pair") if isinstance(step.get(key), list) for item in step[key]]
        tokens = [item.get("SpecialToken") for item in items if isinstance(item, dict)]
        names = {token["id"] for token in tokens if isinstance(token, dict) and isinstance(token.get("id"), str)}
        known = step.get("special_tokens")
        if not names <= set(known if isinstance(known, dict) else ()):
            return False
    return True


def _growth(normalizer: Any) -> int:
    """Return how many times longer a normalizer may make a text; it is enough to know that it is more than allowed."""
    growth = 1
    for step in _steps(normalizer, "normalizers"):
        growth *= max(1, *(len(step[key]) for key in ("content", "prepend") if isinstance(step.get(key), str)), 1)
        if growth > MAX_GROWTH:
            break
    return growth


def _regexes(entry: Any) -> tuple[str, ...]:
    """Return the expressions of a tokenizer.json's pre_tokenizer, those that its named steps stand for written out."""
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
