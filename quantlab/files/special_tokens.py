"""Special tokens of a checkpoint's tokenizer as GGUF metadata: ids, whether BOS and EOS are added, chat template.

Three files are asked, the first that knows wins: tokenizer.json with tokenizer_config.json, then config.json.
Keys, order and precedence are those of llama.cpp's converter.

Source: class SpecialVocab in gguf-py of llama.cpp.
"""

from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import numpy as np

from quantlab.files.weights import read_json

__all__ = ["special_metadata"]

MAX_TEMPLATE = 1 << 20  # bytes
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# GGUF's names of the roles; the classifier's token has none
_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
_KEYS |= {"eot": "eot", "eom": "eom", "prefix": "prefix", "suffix": "suffix", "middle": "middle"}


def special_metadata(
    folder: Path, *, n_vocab: int | None = None, fixed: dict[str, int] | None = None
) -> dict[str, Any]:
    """Return the keys of the special tokens.

    Parameters
    ----------
    folder : Path
        The checkpoint.
    n_vocab : int, optional
        Ids from here on are left out.
    fixed : dict, optional
        Ids by role that are known without asking; then these roles alone are looked for.
    """
    tokenizer, config = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    has_config = bool(config)
    roles = list(fixed) if fixed else list(_ROLES)
    adds = _added_by_template(tokenizer, config, roles) if tokenizer else {}
    ids: dict[str, int] = {}
    if has_config:
        _from_tokenizer_config(tokenizer, config, roles, ids, adds)
    table = read_json(folder / "config.json")
    for role in roles:
        value = table.get(f"{role}_token_id")
        if type(value) is int and 0 <= value < 1 << 31:
            ids.setdefault(role, value)
    ids |= {role: token_id for role, token_id in (fixed or {}).items() if role not in ids}
    keys: dict[str, Any] = {}
    for role, token_id in ids.items():
        if role in _KEYS and (n_vocab is None or token_id < n_vocab):
            keys[f"tokenizer.ggml.{_KEYS[role]}_token_id"] = np.uint32(token_id)
    keys |= {f"tokenizer.ggml.add_{role}_token": value for role, value in adds.items() if role in ("bos", "eos", "sep")}
    if has_config:
        keys |= _chat_template(folder, config)
    return keys | _normalizer(tokenizer.get("normalizer"))


def _content(entry: Any) -> Any:
    """Return the text of a token that is written as text or as a table."""
    return entry.get("content") if isinstance(entry, dict) else entry


def _from_tokenizer_config(
    tokenizer: dict, config: dict, roles: list[str], ids: dict[str, int], adds: dict[str, bool]
) -> None:
    """Look the roles' texts up among the added tokens; what the template said of adding them stands."""
    added: dict[str, Any] = {}
    for entry in tokenizer.get("added_tokens") or []:
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            added.setdefault(entry["content"], entry.get("id"))
    for role in roles:
        adds_role = config.get(f"add_{role}_token")
        if isinstance(adds_role, bool):
            adds.setdefault(role, adds_role)
        text = _content(config.get(f"{role}_token"))
        token_id = added.get(text) if isinstance(text, str) else None
        if type(token_id) is int and 0 <= token_id < 1 << 31:
            ids.setdefault(role, token_id)


def _added_by_template(tokenizer: dict, config: dict, roles: list[str]) -> dict[str, bool]:
    """Read from the post-processor which tokens it puts around a text; roles that only it knows go into `config`."""
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
    """Return the id of a template's item if it is of this kind."""
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
    """Say whether the template for two texts parts them by a separator; None where nothing stands between them."""
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


def _read_text(path: Path) -> str:
    """Read a template's file."""
    if path.stat().st_size > MAX_TEMPLATE:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, need at most {MAX_TEMPLATE}. Download it again.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no UTF-8. Download it again.") from None


def _chat_template(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the chat template, or several by name; files beside the configuration stand in for it."""
    template = config.get("chat_template")
    if "chat_template" not in config:
        jinja = folder / "chat_template.jinja"
        if jinja.is_file():
            template = _read_text(jinja)
            more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
            if more:
                named = [{"name": path.stem, "template": _read_text(path)} for path in more]
                template = [{"name": "default", "template": template}, *named]
        else:
            template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, str):
        return {"tokenizer.chat_template": template}
    keys: dict[str, Any] = {}
    names, default = [], None
    choices = template if isinstance(template, list) else []
    for choice in (choice for choice in choices if isinstance(choice, dict)):
        name = "".join(char if char in ascii_letters + digits else "_" for char in str(choice.get("name", "")))
        if name == "default":
            default = choice.get("template")
        elif name and isinstance(choice.get("template"), str):
            keys[f"tokenizer.chat_template.{name}"] = choice["template"]
            names.append(name)
    if names:
        keys["tokenizer.chat_templates"] = sorted(set(names))
    return keys | ({"tokenizer.chat_template": default} if isinstance(default, str) else {})


def _normalizer(entry: Any) -> dict[str, bool]:
    """Return the keys of a lower-casing or accent-stripping normalizer."""
    if not isinstance(entry, dict):
        return {}
    keys: dict[str, bool] = {}
    steps = entry.get("normalizers") if entry.get("type") == "Sequence" else None
    for step in [entry, *(steps if isinstance(steps, list) else [])]:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "Lowercase":
            keys["lowercase"] = True
        elif kind == "StripAccents":
            keys["strip_accents"] = True
    order = [name for name in ("lowercase", "strip_accents") if name in keys]
    return {f"tokenizer.ggml.normalizer.{name}": keys[name] for name in order}
