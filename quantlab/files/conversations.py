"""Conversations: read from a file of chat turns, and rendered by a model's own chat template.

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}     one conversation

A file holds one such object a line (`.jsonl`), or one or a list of them (`.json`). A bare list of messages stands for
one conversation; `conversations` with `from` and `value` (ShareGPT) is read too.

Source: `chat_template_utils.py` of transformers, for what a template may use.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from os.path import commonprefix
from pathlib import Path
from typing import Any

from quantlab.files.bundled import Text, how_to_install, read_text

__all__ = ["Answer", "answers", "is_chat", "read_conversations", "renderer"]

SUFFIXES = (".json", ".jsonl")
TODAY = datetime(2025, 1, 1)  # the date that a template is told, always the same one: it is part of what is measured
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}  # ShareGPT's words
_CHATML = (  # what llama.cpp takes for a model that has ChatML's marks and no template
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]


@dataclass(frozen=True)
class Answer:
    """A rendered conversation up to an assistant's answer, behind which stands the mark of its end."""

    text: str
    start: int  # character that the answer starts at
    end: int  # character that it ends before


def is_chat(text: object) -> bool:
    """Tell whether a text is a file of chat turns, by its name."""
    name = text.name if isinstance(text, Text) else str(text)
    return name.lower().endswith(SUFFIXES)


def read_conversations(text: str | Path | Text) -> list[list[Message]]:
    """Read the conversations of a file.

    Returns
    -------
    list of list of dict
        `role` and `content` of each message.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not JSON, a message lacks its role or content, or nobody answers in it.

    Examples
    --------
    >>> line = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}'
    >>> read_conversations(Text.from_bytes("a.jsonl", line.encode()))[0][1]["content"]
    'Hello'
    """
    text = read_text(text)
    items = _items(text)
    conversations = [_conversation(item, f"{text.name}: conversation {i}") for i, item in enumerate(items, 1)]
    if not any(message["role"] == "assistant" for messages in conversations for message in messages):
        raise ValueError(f"{text.name}: no message has role=assistant, and only answers are scored. Add answers.")
    return conversations


def _items(text: Text) -> list[Any]:
    """Return the conversations as JSON has them."""
    try:
        whole = json.loads(text.text)
    except (ValueError, RecursionError):
        whole = None
    if whole is not None:
        return whole if isinstance(whole, list) and not _is_message(whole[:1]) else [whole]
    items = []
    for number, line in enumerate(text.text.split("\n"), 1):  # a text may hold other signs that end a line
        if line.strip():
            try:
                items.append(json.loads(line))
            except (ValueError, RecursionError):
                raise ValueError(f"{text.name}: line {number} is not JSON. Write one conversation a line.") from None
    return items


def _is_message(items: list[Any]) -> bool:
    return bool(items) and isinstance(items[0], dict) and ("role" in items[0] or "from" in items[0])


def _conversation(item: Any, where: str) -> list[Message]:
    """Return the messages of one conversation."""
    if isinstance(item, Mapping):
        item = item.get("messages", item.get("conversations"))
    if not isinstance(item, list) or not item:
        raise ValueError(f"{where} has no list `messages`. Write {{'messages': [{{'role': …, 'content': …}}]}}.")
    messages = []
    for message in item:
        message = message if isinstance(message, Mapping) else {}
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, of which the texts are taken
            content = "".join(
                part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
            )
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"{where}: a message needs role and content, both text. Add them.")
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages


# ── rendering ───────────────────────────────────────────────────────────────────────────────────────────────────────


def renderer(metadata: Mapping[str, Any], vocab, *, source: str = "metadata") -> Render:
    """Return what renders messages with the chat template of a GGUF file, in a sandbox; `source` starts error texts.

    Returns
    -------
    callable
        `render(messages, with_prompt)`; the prompt makes the model answer.

    Raises
    ------
    ImportError
        If jinja2 is not installed.
    ValueError
        If the model has no chat template, or its template is damaged.
    """
    try:
        from jinja2 import TemplateError
    except ImportError:
        raise ImportError(
            f"jinja2, which renders chat templates, is not installed. Run: {how_to_install('lab')}"
        ) from None
    template = metadata.get("tokenizer.chat_template")
    if template is None and "<|im_start|>" in vocab.tokens:
        template = _CHATML
    if not isinstance(template, str):
        raise ValueError(f"{source}: has no chat template. Give texts that are not chat turns.")
    ids = {name: getattr(vocab, f"{name}_id") for name in ("bos", "eos", "unk")}
    marks = {f"{name}_token": "" if i is None else vocab.tokens[i] for name, i in ids.items()}
    try:
        compiled = _environment().from_string(template)
    except (TemplateError, RecursionError, SyntaxError) as error:
        raise ValueError(f"{source}: its chat template cannot be read ({error}). Convert the model again.") from None

    def render(messages: list[Message], with_prompt: bool) -> str:
        try:
            return compiled.render(messages=messages, add_generation_prompt=with_prompt, **marks)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{source}: its chat template refuses a conversation ({error}). Leave it out.") from None

    return render


def _environment():
    """Return jinja's sandbox with what transformers adds to it."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %} … {% endgeneration %}` around answers: passed through."""

        tags = frozenset(["generation"])  # pyright: ignore[reportAssignmentType]

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def fail(message: str):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": fail, "strftime_now": TODAY.strftime}
    return found


def answers(messages: list[Message], render: Render, *, source: str = "conversation") -> list[Answer]:
    """Render a conversation once for each of its answers, as the model was asked for it.

    What a template leaves out of earlier turns, thoughts for one, is so left out of the question. What it puts in front
    of an answer, such as empty thoughts, belongs to the question.

    Raises
    ------
    ValueError
        If an answer is not in what the template makes of it.
    """
    found = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, text = render(messages[:i], True), render(messages[: i + 1], False)
        start = len(commonprefix([asked, text]))
        content = message["content"].strip()
        if content not in text[start:]:
            raise ValueError(
                f"{source}: the chat template does not end with answer {i + 1}. Leave the conversation out."
            )
        start = text.index(content, start)
        found.append(Answer(text.rstrip(), start, start + len(content)))
    return found
