"""A checkpoint's chat template, or several by name, as GGUF metadata.

    chat_template.jinja and additional_chat_templates/NAME.jinja     of transformers 4.49 and later
    tokenizer_config.json: chat_template                             where there is none of these; a text or a list
    chat_template.json                                               where the settings have none

Source: `tokenization_utils_base.py` of transformers for the order; class SpecialVocab in gguf-py of llama.cpp, and its
`add_chat_template`, for the keys.
"""

from pathlib import Path
from string import ascii_letters, digits
from typing import Any

from quantlab.files.weights import read_json

__all__ = ["template_metadata"]

MAX_TEMPLATE = 1 << 20  # bytes


def template_metadata(folder: Path, tokenizer_config: dict[str, Any], *, as_llama_cpp: bool = False) -> dict[str, Any]:
    """Return the keys of the chat templates.

    With `as_llama_cpp` the settings' template goes before the files', `null` too, as in llama.cpp's converter.

    Raises
    ------
    ValueError
        If a template's file is too large or not UTF-8.
    """
    if as_llama_cpp:
        if not tokenizer_config:
            return {}
        given = "chat_template" in tokenizer_config
        template = tokenizer_config["chat_template"] if given else _from_files(folder, needs_default=True)
    else:
        template, given = _from_files(folder, needs_default=False), False
        if template is None:
            template = tokenizer_config.get("chat_template")
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
    if template is None and not given:
        template = read_json(folder / "chat_template.json").get("chat_template")
    return {"tokenizer.chat_template": template} if isinstance(template, str) else _by_name(template)


def _from_files(folder: Path, *, needs_default: bool) -> str | list[dict[str, str]] | None:
    """Read the folder's template files: one text, or several by name."""
    default = folder / "chat_template.jinja"
    named = [{"name": "default", "template": _read_text(default)}] if default.is_file() else []
    if named or not needs_default:
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        named += [{"name": path.stem, "template": _read_text(path)} for path in more]
    return named[0]["template"] if len(named) == 1 and default.is_file() else named or None


def _read_text(path: Path) -> str:
    """Read a template's file."""
    if path.stat().st_size > MAX_TEMPLATE:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, need at most {MAX_TEMPLATE}. Download it again.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8. Download it again.") from None


def _by_name(choices: Any) -> dict[str, Any]:
    """Return the keys of a list of named templates."""
    keys: dict[str, Any] = {}
    names, default = set(), None
    for choice in choices if isinstance(choices, list) else []:
        if not isinstance(choice, dict) or not isinstance(choice.get("template"), str):
            continue
        name = "".join(char if char in ascii_letters + digits else "_" for char in str(choice.get("name", "")))
        if name == "default":
            default = choice["template"]
        elif name:
            keys[f"tokenizer.chat_template.{name}"] = choice["template"]
            names.add(name)
    if names:
        keys["tokenizer.chat_templates"] = sorted(names)
    return keys | ({} if default is None else {"tokenizer.chat_template": default})
