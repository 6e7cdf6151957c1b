"""files/chat_template.py: the template is the one that transformers takes, or llama.cpp's converter where asked for."""

import json

import pytest

from quantlab.files.chat_template import template_metadata

KEY = "tokenizer.chat_template"
NAMED = [{"name": "default", "template": "D"}, {"name": "tool use", "template": "T"}]
SEVERAL = {f"{KEY}.tool_use": "T", "tokenizer.chat_templates": ["tool_use"], KEY: "D"}


@pytest.mark.parametrize(
    ("settings", "files", "ours", "theirs"),
    [
        ({"chat_template": "OLD"}, {}, {KEY: "OLD"}, {KEY: "OLD"}),
        ({"chat_template": "OLD"}, {"chat_template.jinja": "NEW"}, {KEY: "NEW"}, {KEY: "OLD"}),
        ({"chat_template": None}, {"chat_template.jinja": "NEW"}, {KEY: "NEW"}, {}),
        ({"a": 1}, {"chat_template.jinja": "NEW"}, {KEY: "NEW"}, {KEY: "NEW"}),
        ({}, {"chat_template.jinja": "NEW"}, {KEY: "NEW"}, {}),
        ({"chat_template": None}, {}, {}, {}),
        ({"chat_template": None}, {"chat_template.json": {"chat_template": "J"}}, {KEY: "J"}, {}),
        ({"chat_template": NAMED}, {}, SEVERAL, SEVERAL),
        ({"chat_template": {"default": "D", "tool use": "T"}}, {}, SEVERAL, {}),
        (
            {"chat_template": "OLD"},
            {"chat_template.jinja": "D", "additional_chat_templates/tool use.jinja": "T"},
            SEVERAL,
            {KEY: "OLD"},
        ),
        (
            {"a": 1},
            {"additional_chat_templates/rag.jinja": "R"},
            {f"{KEY}.rag": "R", "tokenizer.chat_templates": ["rag"]},
            {},
        ),
        ({"chat_template": NAMED[1:]}, {}, {k: v for k, v in SEVERAL.items() if k != KEY}, None),
        ({"chat_template": [7, {"name": "default"}, {"template": "x"}]}, {}, {}, {}),
    ],
    ids=range(13),
)
def test_which_template_counts(tmp_path, settings, files, ours, theirs):
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    assert template_metadata(tmp_path, settings) == ours
    assert template_metadata(tmp_path, settings, as_llama_cpp=True) == (ours if theirs is None else theirs)


def test_broken_files(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="chat_template.jinja: byte 0 is not UTF-8"):
        template_metadata(tmp_path, {})
