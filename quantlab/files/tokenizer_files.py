"""A checkpoint's tokenizer files as GGUF metadata, with the keys, types and order of llama.cpp's converter.

    tokenizer.model                      SentencePiece                        -> tokenizer.ggml.model "llama"
    tokenizer.model of Llama 3           tiktoken's byte-level BPE            -> "gpt2"
    tokenizer.json with byte fallback    the same vocabulary without scores   -> "llama"
    tokenizer.json of bytes              byte-level BPE, or Gemma's           -> "gpt2"

Where the converter gives a text other ids than the model was trained with, the right value is written and one line says
so. `as_llama_cpp` keeps its bytes.

Source: `conversion/base.py` of llama.cpp (_set_vocab_sentencepiece, _set_vocab_llama_hf, _set_vocab_gpt2).
"""

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.files.added_tokens import added_tokens, special_texts, too_large
from quantlab.files.chat_template import template_metadata
from quantlab.files.checkpoint_metadata import Config
from quantlab.files.recognize import short
from quantlab.files.sentencepiece_file import read_sentencepiece
from quantlab.files.special_tokens import special_metadata
from quantlab.files.tiktoken_file import is_tiktoken, read_tiktoken, special_tokens
from quantlab.files.tokenizer_json import (
    adds_space,
    byte_level_merges,
    is_byte_level,
    known_pre_tokenizer,
    pre_tokenizer_name,
    read_merges,
    read_texts,
)
from quantlab.files.vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from quantlab.files.weights import read_json

__all__ = ["vocab_metadata"]

MAX_MODEL = 32 << 20  # bytes of a tokenizer.model
MAX_TOKENS = 1 << 20  # the largest vocabularies have 262 k
_SHOWN = ("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')
_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0


@dataclass(frozen=True)
class _Files:
    """The tokenizer files of a checkpoint, and the settings for reading them."""

    folder: Path
    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    n_vocab: int
    as_llama_cpp: bool
    known: Mapping[str, str]  # texts of special tokens by role
    differences: list[str] = field(default_factory=list)  # from llama.cpp's converter, filled while reading


@dataclass
class _Tokens:
    """Tokens by id: texts, scores, types."""

    texts: list[str]
    scores: list[float]
    types: list[int]

    def pad(self, n_vocab: int, score: float) -> None:
        """Add unused tokens up to the number of the embedding's rows."""
        ids = range(len(self.texts), n_vocab)
        self.texts += [f"[PAD{i}]" for i in ids]
        self.scores += [score] * len(ids)
        self.types += [UNUSED] * len(ids)

    def set(self, token_id: int, text: str, score: float, kind: int) -> None:
        """Replace a token."""
        self.texts[token_id], self.scores[token_id], self.types[token_id] = text, score, kind


def vocab_metadata(folder: Path, config: Config, *, as_llama_cpp: bool = False) -> dict[str, Any]:
    """Return the `tokenizer.*` keys of a checkpoint.

    Parameters
    ----------
    folder, config
        The checkpoint, and its configuration.
    as_llama_cpp : bool
        Whether llama.cpp's values are kept where they give a text wrong ids.

    Raises
    ------
    FileNotFoundError
        If there is no tokenizer.
    ValueError
        If the tokenizer cannot be read, is of a kind that GGUF cannot hold, has two tokens of one text, or more tokens
        than the embedding has rows.

    Warns
    -----
    UserWarning
        If a value differs from llama.cpp's converter, or the pre-tokenizer is not known.
    """
    if config.n_vocab > MAX_TOKENS:
        raise ValueError(f"{folder}: vocab_size={config.n_vocab}, need at most {MAX_TOKENS}. Check its configuration.")
    tokenizer, tokenizer_config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    files = _Files(folder, tokenizer, tokenizer_config, config.n_vocab, as_llama_cpp, config.record.special)
    keys: dict[str, Any] = {}
    prefix = tokenizer_config.get("add_prefix_space")
    is_llama = config.record.has_llama_vocab
    if is_llama and isinstance(prefix, bool):
        keys["tokenizer.ggml.add_space_prefix"] = prefix
    keys |= _vocabulary(files, config)
    _check_texts_differ(folder, keys["tokenizer.ggml.tokens"])
    if is_llama and config.n_vocab == 32016:  # Code Llama's tokens for filling in the middle
        infill = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
        keys |= _special(files, fixed=infill)
    if is_llama and config.n_vocab == 49152:  # the converter's rule for small Granite models
        keys["tokenizer.ggml.add_bos_token"] = False
    if template_metadata(folder, tokenizer_config) != template_metadata(folder, tokenizer_config, as_llama_cpp=True):
        files.differences.append("the chat template is the one that transformers uses")
    if files.differences and not as_llama_cpp:
        warnings.warn(
            f"{folder}: the vocabulary differs from what llama.cpp's converter writes: {'; '.join(files.differences)}. "
            f"as_llama_cpp (--as-llama-cpp) writes its bytes.",
            stacklevel=2,
        )
    return keys


def _vocabulary(files: _Files, config: Config) -> dict[str, Any]:
    """Read the tokenizer, of any supported kind."""
    raw = _read_model(files.folder / "tokenizer.model")
    if config.record.vocab == "gemma4" and isinstance(files.tokenizer.get("model"), dict):
        return _gemma4(files)
    if raw is not None and not is_tiktoken(raw):
        added = {f"tokenizer.ggml.{key}": value for key, value in config.record.tokenizer.items()}
        return _sentencepiece(files, raw) | added
    if isinstance(files.tokenizer.get("model"), dict):
        if is_byte_level(files.folder, files.tokenizer):
            return _with_merges(files)
        # llama.cpp's converter gives Llama a vocabulary with scores; other architectures keep the merges (Gemma)
        pre = None if config.record.has_llama_vocab else known_pre_tokenizer(files.folder, files.tokenizer)
        return _without_scores(files) if pre is None else _with_merges(files, pre)
    if raw is not None:
        return _tiktoken(files.folder, raw, config)
    raise FileNotFoundError(
        f"{files.folder}: holds neither tokenizer.model nor tokenizer.json. Download the whole checkpoint."
    )


def _keys(kind: str, pre: str, texts: list[str], scores: list[float] | None, types: list[int]) -> dict[str, Any]:
    keys: dict[str, Any] = {"model": kind, "pre": pre, "tokens": texts}
    if scores is not None:
        keys["scores"] = np.array(scores, np.float32)
    keys["token_type"] = np.array(types, np.int32)
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def _check_texts_differ(folder: Path, texts: list[str]) -> None:
    """Refuse two tokens with the same text: llama.cpp aborts when it loads such a file."""
    ids = {text: i for i, text in enumerate(texts) if text}
    if len(ids) + texts.count("") == len(texts):
        return
    text = next(text for i, text in enumerate(texts) if text and ids[text] != i)
    raise ValueError(
        f"{folder}: tokens {texts.index(text)} and {ids[text]} are both {short(text)}, every token needs its own text. "
        f"Remove the second from the tokenizer's added tokens."
    )


def _read_model(path: Path) -> bytes | None:
    """Return the bytes of tokenizer.model (None: missing)."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_MODEL:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, need at most {MAX_MODEL}. Download it again.")
    return path.read_bytes()


def _tiktoken(folder: Path, raw: bytes, config: Config) -> dict[str, Any]:
    """Read Meta's Llama 3 vocabulary; its special tokens are written out here."""
    texts, merges = read_tiktoken(folder / "tokenizer.model", raw)
    special = special_tokens(is_3_1=config.rope["rope_type"] == "llama3")
    n_tokens = len(texts) + len(special)
    if n_tokens > config.n_vocab:
        raise too_large(folder, n_tokens, config.n_vocab)
    padding = [f"[PAD{i}]" for i in range(n_tokens, config.n_vocab)]
    types = [NORMAL] * len(texts) + [CONTROL] * len(special) + [UNUSED] * len(padding)
    keys = _keys("gpt2", "llama-bpe", [*texts, *special, *padding], None, types)
    keys["tokenizer.ggml.merges"] = merges
    for role, text in (("bos", "<|begin_of_text|>"), ("eos", "<|end_of_text|>")):
        keys[f"tokenizer.ggml.{role}_token_id"] = np.uint32(len(texts) + special.index(text))
    return keys | {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False}


def _sentencepiece(files: _Files, raw: bytes) -> dict[str, Any]:
    """Read tokenizer.model, then the tokens that other files add."""
    path, n_vocab, ours = files.folder / "tokenizer.model", files.n_vocab, not files.as_llama_cpp
    pieces = read_sentencepiece(path, raw)
    if len(pieces.tokens) > n_vocab:
        raise too_large(files.folder, len(pieces.tokens), n_vocab)
    if ours and pieces.model_type != "bpe":
        raise ValueError(
            f"{path}: model_type={pieces.model_type}, need bpe: GGUF's 'llama' vocabulary merges as BPE does. "
            f"as_llama_cpp (--as-llama-cpp) writes it anyway, with other ids."
        )
    tokens = _Tokens(list(pieces.tokens), list(pieces.scores), list(pieces.types))
    user_defined = [i for i, kind in enumerate(tokens.types) if kind == USER_DEFINED]
    for i in user_defined:
        tokens.types[i] = USER_DEFINED if ours else NORMAL
        tokens.texts[i] = tokens.texts[i].replace("▁", " ") if ours else tokens.texts[i]
    if ours and user_defined:
        files.differences.append(
            f"{len(user_defined)} user-defined pieces are matched in texts; llama.cpp's file never matches them"
        )
    tokens.pad(n_vocab, _PADDING_SCORE)
    _add(files, tokens)
    keys = _keys("llama", "default", tokens.texts, tokens.scores, tokens.types) | _special(files, n_vocab=files.n_vocab)
    return keys | (_without_space(files) if not pieces.adds_space else {})


def _add(files: _Files, tokens: _Tokens) -> None:
    """Put the added tokens of other files at their ids."""
    tables = files.folder, files.tokenizer, files.tokenizer_config, files.n_vocab
    theirs = added_tokens(*tables, beside_model=True, as_llama_cpp=True)
    added = theirs if files.as_llama_cpp else added_tokens(*tables, beside_model=True)
    known, changes = set(tokens.texts), Counter()
    for token_id, token in added.items():
        text, kind = tokens.texts[token_id], tokens.types[token_id]
        if token.only_in_json and token.text in known:  # transformers too leaves the id of a text that it knows
            if text == token.text and kind in (NORMAL, USER_DEFINED, UNUSED) and kind != token.type:
                tokens.types[token_id] = token.type
                changes["type"] += 1
            continue
        tokens.set(token_id, token.text, _ADDED_SCORE, token.type)
        changes["type"] += token_id in theirs and theirs[token_id].type != token.type
        changes["new"] += token.only_in_json
    if changes["new"]:
        files.differences.append(f"{changes['new']} added tokens of tokenizer.json are kept; llama.cpp writes [PADn]")
    if changes["type"]:
        files.differences.append(f"{changes['type']} added tokens have the type that transformers gives them")


def _without_scores(files: _Files) -> dict[str, Any]:
    """Read a SentencePiece vocabulary from tokenizer.json, which stores no scores."""
    texts = read_texts(files.folder, files.tokenizer, files.n_vocab)
    added = added_tokens(files.folder, files.tokenizer, files.tokenizer_config, files.n_vocab)
    n_base, n_tokens = len(texts), len(texts | added)
    texts |= {token_id: token.text for token_id, token in added.items()}
    if files.as_llama_cpp:
        return _as_llama_hf(files, texts, n_base)
    merges = read_merges(files.folder, files.tokenizer)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    unknown = files.tokenizer["model"].get("unk_token") or files.tokenizer_config.get("unk_token")
    unknown = unknown.get("content") if isinstance(unknown, dict) else unknown
    tokens = _Tokens([], [], [])
    for token_id in range(max(texts) + 1):
        text = texts.get(token_id, f"[PAD{token_id}]")
        kind = NORMAL if token_id in texts else UNUSED
        if re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
            kind = BYTE
        elif token_id in added:
            kind = UNKNOWN if text == unknown else added[token_id].type
        tokens.texts.append(text)
        tokens.scores.append(float(-ranks.get(text, len(merges))))
        tokens.types.append(kind)
    tokens.pad(files.n_vocab, float(-len(merges)))
    files.differences.append("scores are -rank of the merges, so texts get the original ids; llama.cpp writes -1000")
    if n_tokens < files.n_vocab:
        files.differences.append(f"padded to the embedding's {files.n_vocab} rows, so that llama.cpp loads the file")
    keys = _keys("llama", "default", tokens.texts, tokens.scores, tokens.types) | _special(files, n_vocab=files.n_vocab)
    return keys | (_without_space(files) if not adds_space(files.tokenizer) else {})


def _as_llama_hf(files: _Files, texts: dict[int, str], n_base: int) -> dict[str, Any]:
    """Build the vocabulary that llama.cpp's converter makes from a tokenizer.json with byte fallback."""
    ordered, types = _texts_and_types(files, texts, n_base)
    keys = _keys("llama", "default", ordered, [_ADDED_SCORE] * len(ordered), types)
    return keys | _special(files, n_vocab=len(ordered))


def _gemma4(files: _Files) -> dict[str, Any]:
    """Read Gemma 4's vocabulary: characters with byte fallback, and the merges."""
    texts = read_texts(files.folder, files.tokenizer, files.n_vocab)
    added = added_tokens(files.folder, files.tokenizer, files.tokenizer_config, files.n_vocab)
    ordered, types = _texts_and_types(files, texts | {i: token.text for i, token in added.items()}, len(texts))
    types = [USER_DEFINED if text in _SHOWN else kind for text, kind in zip(ordered, types, strict=True)]
    keys = _keys("gemma4", "", ordered, [_ADDED_SCORE] * len(ordered), types)
    del keys["tokenizer.ggml.pre"]
    keys["tokenizer.ggml.merges"] = byte_level_merges(read_merges(files.folder, files.tokenizer))
    return keys | _special(files) | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": True}


def _texts_and_types(files: _Files, texts: dict[int, str], n_base: int) -> tuple[list[str], list[int]]:
    """Return tokens as transformers' library numbers them; those from `n_base` on were added."""
    special, types = special_texts(files.folder, files.tokenizer_config), []
    for token_id in range(len(texts)):
        if token_id not in texts:
            raise ValueError(f"{files.folder}: tokenizer.json has no token {token_id}. Download it again.")
        byte = re.fullmatch("<0x[0-9A-Fa-f]{2}>", texts[token_id])
        plain = NORMAL if token_id < n_base else USER_DEFINED
        types.append(BYTE if byte else CONTROL if texts[token_id] in special else plain)
    return [texts[token_id] for token_id in range(len(texts))], types


def _without_space(files: _Files) -> dict[str, Any]:
    """Return the key that stops llama.cpp from putting a space before a text."""
    if files.as_llama_cpp or isinstance(files.tokenizer_config.get("add_prefix_space"), bool):
        return {}
    files.differences.append("no space is put before a text, as the tokenizer says; llama.cpp's file adds one")
    return {"tokenizer.ggml.add_space_prefix": False}


def _with_merges(files: _Files, pre: str | None = None) -> dict[str, Any]:
    """Read a BPE vocabulary of bytes (or of characters, as Gemma's) with its merges."""
    texts = read_texts(files.folder, files.tokenizer, files.n_vocab)
    added = added_tokens(files.folder, files.tokenizer, files.tokenizer_config, files.n_vocab)
    tokens, types = [], []
    for token_id in range(files.n_vocab):
        token = added.get(token_id)
        text = token.text if token else texts.get(token_id)
        tokens.append(f"[PAD{token_id}]" if text is None else text)
        types.append(token.type if token else UNUSED if text is None else NORMAL)
    keys = _keys("gpt2", pre or pre_tokenizer_name(files.folder, files.tokenizer), tokens, None, types)
    keys["tokenizer.ggml.merges"] = byte_level_merges(read_merges(files.folder, files.tokenizer))
    return keys | _special(files)


def _special(files: _Files, *, n_vocab: int | None = None, fixed: dict[str, int] | None = None) -> dict[str, Any]:
    """Return the keys of the special tokens and the chat templates."""
    tables = files.folder, files.tokenizer, files.tokenizer_config
    return special_metadata(*tables, n_vocab=n_vocab, fixed=fixed, known=files.known, as_llama_cpp=files.as_llama_cpp)
