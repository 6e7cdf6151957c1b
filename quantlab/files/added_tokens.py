"""Tokens that a checkpoint's files add to its vocabulary, and those that they name as special.

    added_tokens.json        text -> id                      of old transformers
    tokenizer_config.json    added_tokens_decoder            of transformers 4
    tokenizer.json           added_tokens                    alone in transformers 5

Source: `conversion/base.py` of llama.cpp for the types; `tokenization_utils_base.py` of transformers for the files.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quantlab.files.recognize import short
from quantlab.files.vocab import CONTROL, USER_DEFINED
from quantlab.files.weights import read_json

__all__ = ["AddedToken", "added_tokens", "check_id", "special_texts", "too_large"]

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in a text before all others.

    `is_special`: it controls the model, so that a text's own characters never become it. `only_in_json`: tokenizer.json
    alone has it.
    """

    text: str
    is_special: bool
    only_in_json: bool = False

    @property
    def type(self) -> int:
        """The token's type in GGUF."""
        return CONTROL if self.is_special else USER_DEFINED


def added_tokens(
    folder: Path,
    tokenizer: dict[str, Any],
    tokenizer_config: dict[str, Any],
    n_vocab: int,
    *,
    beside_model: bool = False,
    as_llama_cpp: bool = False,
) -> dict[int, AddedToken]:
    """Return the added tokens by id.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    tokenizer, tokenizer_config : dict
        Its tokenizer.json and tokenizer_config.json.
    n_vocab : int
        Rows of the embedding.
    beside_model : bool
        There is a tokenizer.model: tokens of tokenizer.json that lie beyond the embedding are left out.
    as_llama_cpp : bool
        Read what llama.cpp's converter reads beside a tokenizer.model: not tokenizer.json, and no names.

    Raises
    ------
    ValueError
        If an entry is not a token, or its id lies beyond the embedding.
    """
    named = set() if as_llama_cpp else special_texts(folder, tokenizer_config)
    tokens = {}
    for text, token_id in read_json(folder / "added_tokens.json").items():
        check_id(folder, token_id, n_vocab)
        tokens[token_id] = AddedToken(text, text in named) if beside_model else _read(text, text in named)
    for token_id, text, is_marked in _decoder_entries(folder, tokenizer_config):
        check_id(folder, token_id, n_vocab)
        tokens[token_id] = _read(text, is_marked or text in named)
    for token_id, text, is_marked in () if as_llama_cpp else _json_entries(folder, tokenizer):
        if beside_model and type(token_id) is int and token_id >= n_vocab:
            continue
        check_id(folder, token_id, n_vocab)
        known = tokens.get(token_id)
        if known is None:
            tokens[token_id] = replace(_read(text, is_marked or text in named), only_in_json=True)
        elif known.text == text:
            tokens[token_id] = replace(known, is_special=known.is_special or _read(text, is_marked).is_special)
    return tokens


def _read(text: str, is_special: bool) -> AddedToken:
    """Return a token, with U+2581 as a space where the file marks it as special, as llama.cpp does."""
    is_special = is_special or _looks_special(text)
    return AddedToken(text if is_special else text.replace("▁", " "), is_special)


def special_texts(folder: Path, tokenizer_config: dict[str, Any]) -> set[str]:
    """Return the texts that the settings name as special tokens, by role or in a list.

    transformers 4 keeps the list as `additional_special_tokens`, 5 as `extra_special_tokens`, a list or a table.
    """
    found: list[Any] = []
    for table in (read_json(folder / "special_tokens_map.json"), tokenizer_config):
        found += [table.get(f"{role}_token") for role in _ROLES]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            more = table.get(key)
            found += more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
    texts = (entry.get("content") if isinstance(entry, dict) else entry for entry in found)
    return {text for text in texts if isinstance(text, str)}


def too_large(folder: Path, n_tokens: int, n_vocab: int) -> ValueError:
    """Return the error for a tokenizer with more tokens than the embedding has rows."""
    return ValueError(
        f"{folder}: tokenizer has {n_tokens} tokens, the embedding has {n_vocab} rows. "
        f"Use this model's own tokenizer, or remove the added tokens."
    )


def check_id(folder: Path, token_id: Any, n_vocab: int) -> None:
    """Refuse an id that has no row in the embedding."""
    if type(token_id) is not int or token_id < 0:
        raise ValueError(
            f"{folder}: added token has id {short(token_id)}, need a whole number. Download the tokenizer again."
        )
    if token_id >= n_vocab:
        raise too_large(folder, token_id + 1, n_vocab)


def _decoder_entries(folder: Path, tokenizer_config: dict[str, Any]) -> Iterator[tuple[int, str, bool]]:
    """Yield (id, text, special) for each token that tokenizer_config.json adds."""
    table = tokenizer_config.get("added_tokens_decoder", {})
    for key, entry in table.items() if isinstance(table, dict) else ():
        is_token = isinstance(entry, dict) and isinstance(entry.get("content"), str)
        if not re.fullmatch("[0-9]{1,10}", key) or not is_token:
            raise ValueError(
                f"{folder}: added_tokens_decoder: {short(key)} is not a token. Download tokenizer_config.json again."
            )
        yield int(key), entry["content"], bool(entry.get("special"))


def _json_entries(folder: Path, tokenizer: dict[str, Any]) -> Iterator[tuple[int, str, bool]]:
    """Yield (id, text, special) for each token that tokenizer.json adds."""
    added = tokenizer.get("added_tokens") or []
    if not isinstance(added, list):
        raise ValueError(f"{folder}: tokenizer.json: added_tokens={short(added)}, need a list. Download it again.")
    for entry in added:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise ValueError(f"{folder}: tokenizer.json: added token {short(entry)} has no text. Download it again.")
        yield entry.get("id"), entry["content"], bool(entry.get("special"))  # pyright: ignore[reportReturnType]


def _looks_special(text: str) -> bool:
    """Tell whether a token that is not marked as special looks like a special one."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(text.startswith(left) and text.endswith(right) for left, right in brackets)
