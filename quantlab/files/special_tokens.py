"""Special tokens of a checkpoint's tokenizer as GGUF metadata: their ids, and whether BOS and EOS are added.

Three files are asked, the first that knows wins: tokenizer.json with tokenizer_config.json, then config.json.
Keys, order and precedence are those of llama.cpp's converter.

Source: class SpecialVocab in gguf-py of llama.cpp.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.files.chat_template import template_metadata
from quantlab.files.weights import read_json

__all__ = ["special_metadata"]

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# GGUF's names of the roles; the classifier's token has none
_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_KEYS |= {"eot": "eot", "eom": "eom", "prefix": "prefix", "suffix": "suffix", "middle": "middle"}


def special_metadata(
    folder: Path,
    tokenizer: dict[str, Any],
    tokenizer_config: dict[str, Any],
    *,
    n_vocab: int | None = None,
    fixed: dict[str, int] | None = None,
    known: Mapping[str, str] | None = None,
    as_llama_cpp: bool = False,
) -> dict[str, Any]:
    """Return the keys of the special tokens.

    Parameters
    ----------
    folder, tokenizer, tokenizer_config
        As for `added_tokens`.
    n_vocab : int, optional
        Ids from here on are left out.
    fixed : dict, optional
        Ids by role that are known without asking; then these roles alone are looked for.
    known : mapping, optional
        Texts of added tokens by role, for roles that the files leave open.
    as_llama_cpp : bool
        Take the chat template that llama.cpp's converter takes.
    """
    config = dict(tokenizer_config)  # roles that only the post-processor knows are added
    has_config = bool(config)
    roles: list[str] = list(fixed) if fixed else list(_ROLES)
    adds = _added_by_template(tokenizer, config, roles) if tokenizer else {}
    ids: dict[str, int] = {}
    if has_config:
        _from_tokenizer_config(tokenizer, config, roles, ids, adds)
    table = read_json(folder / "config.json")
    text = table.get("text_config")
    for role in roles:
        value = table.get(f"{role}_token_id")
        if value is None and isinstance(text, dict):
            value = text.get(f"{role}_token_id")
        if type(value) is int and 0 <= value < 1 << 31:
            ids.setdefault(role, value)
    by_text = _added_ids(tokenizer) if known else {}
    fixed = {role: by_text[text] for role, text in (known or {}).items() if text in by_text} | (fixed or {})
    ids |= {role: token_id for role, token_id in fixed.items() if role not in ids}
    keys: dict[str, Any] = {}
    for role, token_id in ids.items():
        if role in _KEYS and (n_vocab is None or token_id < n_vocab):
            keys[f"tokenizer.ggml.{_KEYS[role]}_token_id"] = np.uint32(token_id)
    keys |= {f"tokenizer.ggml.add_{role}_token": value for role, value in adds.items() if role in ("bos", "eos", "sep")}
    keys |= template_metadata(folder, tokenizer_config, as_llama_cpp=as_llama_cpp)
    return keys | _normalizer(tokenizer.get("normalizer"))


def _content(entry: Any) -> Any:
    """Return the text of a token that is written as text or as a table."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _from_tokenizer_config(
    tokenizer: dict, config: dict, roles: list[str], ids: dict[str, int], adds: dict[str, bool]
) -> None:
    """Look up the roles' texts among the added tokens, and keep the template's add_bos and add_eos."""
    added = _added_ids(tokenizer)
    for role in roles:
        adds_role = config.get(f"add_{role}_token")
        if isinstance(adds_role, bool):
            adds.setdefault(role, adds_role)
        text = _content(config.get(f"{role}_token"))
        token_id = added.get(text) if isinstance(text, str) else None
        if type(token_id) is int and 0 <= token_id < 1 << 31:
            ids.setdefault(role, token_id)


def _added_ids(tokenizer: dict) -> dict[str, Any]:
    """Return the ids of tokenizer.json's added tokens, by text."""
    added: dict[str, Any] = {}
    for entry in tokenizer.get("added_tokens") or []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            added.setdefault(entry["content"], entry.get("id"))
    return added


def _added_by_template(tokenizer: dict, config: dict, roles: list[str]) -> dict[str, bool]:
    """Read the tokens that the post-processor puts around a text; add missing roles to `config`."""
    adds: dict[str, bool] = {}
    if config:
        for role, stand_in in (("bos", "cls"), ("eos", "sep")):
            if not config.get(f"{role}_token") and config.get(f"{stand_in}_token"):
                config[f"{role}_token"] = config[f"{stand_in}_token"]
    post = tokenizer.get("post_processor")
    steps = post.get("processors", [post]) if isinstance(post, dict) else []
    for step in steps if isinstance(steps, list) else []:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "ByteLevel":
            adds.setdefault("bos", False)
            adds.setdefault("eos", False)
        elif kind == "TemplateProcessing":
            _read_template(step, config, roles, adds)
    return adds


def _special(item: Any) -> str | None:
    """Return the special token of a template's item."""
    return _named(item, "SpecialToken")


def _named(item: Any, kind: str) -> str | None:
    """Return the id of a template's item of this kind (None: another kind)."""
    entry = item.get(kind) if isinstance(item, dict) else None
    name = entry.get("id") if isinstance(entry, dict) else None
    return name if isinstance(name, str) else None


def _read_template(step: dict, config: dict, roles: list[str], adds: dict[str, bool]) -> None:
    single, pair = (step[key] if isinstance(step.get(key), list) else [] for key in ("single", "pair"))
    known = bool(config)
    bos, eos = config.get("bos_token"), config.get("eos_token")
    first = _special(single[0]) if len(single) > 1 else None
    last = _special(single[-1]) if len(single) > 1 else None
    if first:
        if not known:
            bos = first
        elif first not in (bos, config.get("cls_token")):
            if not bos:
                config["bos_token"] = bos = first
            if not config.get("cls_token"):
                config["cls_token"] = first
        adds["bos"] = first in (bos, config.get("cls_token"))
    if last:
        if known and last != eos:
            for role in ("eot", "eom"):  # the token that was EOS ends a turn then
                if role not in roles:
                    roles.append(role)
                    config[f"{role}_token"] = eos
                    break
            config["eos_token"] = last
        eos = last
        adds["eos"] = True
    separates = _separates(pair, first, last, config, eos)
    if separates is not None:
        adds["sep"] = separates
        if separates and known and not config.get("sep_token"):
            config["sep_token"] = eos


def _separates(pair: list, first: str | None, last: str | None, config: dict, eos: Any) -> bool | None:
    """Tell whether the template for two texts has a separator between them (None: nothing between)."""
    begin = 1 if pair and first and _special(pair[0]) == first else 0
    end = len(pair) - 1 if pair and last and _special(pair[-1]) == last else len(pair)
    middle = pair[begin:end]
    texts = [_named(item, "Sequence") for item in middle[:1] + middle[-1:]]
    if texts != ["A", "B"] or len(middle) < 3:
        return None
    separators = (config.get("sep_token"), eos)
    between = [_special(item) for item in middle[1:-1]]
    separates = bool(between[0] and between[0] in separators and not last)
    return separates or bool(len(between) == 2 and between[1] and between[1] in separators)


def _normalizer(entry: Any) -> dict[str, bool]:
    """Return the keys of a lower-casing or accent-stripping normalizer."""
    if not isinstance(entry, dict):
        return {}
    steps = entry.get("normalizers") if entry.get("type") == "Sequence" else None
    steps = [entry, *(steps if isinstance(steps, list) else [])]
    kinds = [step.get("type") for step in steps if isinstance(step, dict)]
    names = {"Lowercase": "lowercase", "StripAccents": "strip_accents"}
    return {f"tokenizer.ggml.normalizer.{name}": True for kind, name in names.items() if kind in kinds}
