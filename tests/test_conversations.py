"""Chat turns: read, rendered by the model's own template, and scored on the answers alone."""

import json
import shutil

import numpy as np
import pytest

import quantlab as ql
from quantlab.evaluate.answers import cut_answers
from quantlab.files.bundled import Text, model_path
from quantlab.files.conversations import answers, is_chat, read_conversations, renderer

pytest.importorskip("jinja2")

TURNS = [
    {"role": "user", "content": "What is a weight?"},
    {"role": "assistant", "content": "A number."},
    {"role": "user", "content": "And a scale?"},
    {"role": "assistant", "content": "A number that many weights share."},
]
PLAIN = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[Q] {{ message['content'] }}\n"
    "{% else %}{% generation %}[A] {{ message['content'] }}{% endgeneration %}{{ eos_token }}\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
)
FORGETFUL = (  # answers of earlier turns are left out
    "{% for message in messages %}{% if message['role'] == 'user' or loop.last %}[{{ message['content'] }}]"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The bundled model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "chatty"
    shutil.copytree(model_path("tiny"), folder)
    (folder / "chat_template.jinja").write_text(PLAIN)
    return ql.open(folder)


def text_of(*conversations, name="turns.jsonl") -> Text:
    return Text.from_bytes(name, "\n".join(json.dumps(item) for item in conversations).encode())


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps({"messages": TURNS}),
        json.dumps([{"messages": TURNS}]),
        json.dumps(TURNS),
        json.dumps([TURNS]),
        "\n" + json.dumps({"messages": TURNS}) + "\n\n",
        json.dumps({"conversations": [{"from": "human", "value": m["content"]} for m in TURNS]}).replace("x", "x"),
        json.dumps({"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in TURNS]}),
    ],
    ids=["object", "list", "messages", "lists", "line", "sharegpt", "parts"],
)
def test_forms_of_conversations(raw):
    if "human" in raw:  # its second and fourth speaker is called gpt
        items = json.loads(raw)["conversations"]
        for item in items[1::2]:
            item["from"] = "gpt"
        raw = json.dumps({"conversations": items})
    assert read_conversations(Text.from_bytes("a.json", raw.encode())) == [TURNS]


def test_files_of_chat_turns_are_known_by_their_name():
    assert is_chat("a/turns.JSONL") and is_chat(Text("turns.json", "", "")) and not is_chat("primer")


def test_answers_start_where_the_prompt_ends(model):
    render = renderer(model.metadata, model.vocab)
    first, second = answers(TURNS, render)
    assert first.text == "<s>[Q] What is a weight?\n[A] A number.</s>"
    assert first.text[first.start : first.end] == "A number." and first.text[first.end :] == "</s>"
    assert second.text.startswith(first.text) and second.text[second.start :].startswith("A number that many")


def test_one_sequence_holds_all_answers_where_turns_only_grow(model):
    turns = cut_answers(text_of({"messages": TURNS}), model, n_ctx=256, chunks=None, mode="float", rules="none")
    assert turns.protocol.chunks == 1 and turns.ids[0].tolist().count(model.vocab.bos_id) == 1
    scored = model.vocab.decode(turns.ids[0][turns.scored[0]], special=True)
    assert scored.split("</s>") == ["A number.", " A number that many weights share.", ""]
    assert turns.question.endswith("What is a weight?\n[A]") and not turns.question.startswith("<s>")
    tokens, mask = turns.windows(300)
    assert tokens.shape == (1, 300) and mask.shape == (1, 299)
    assert mask.sum() == turns.scored[0].sum()
    assert np.array_equal(tokens[0, 1:][mask[0]], turns.ids[0][turns.scored[0]])


def test_what_a_template_puts_around_an_answer_is_not_scored(model, monkeypatch):
    asking = PLAIN.replace("[A] {{", "[A] <thought></thought> {{").replace(
        "{% if add_generation_prompt %}", "{% if true %}"
    )
    monkeypatch.setitem(model.metadata, "tokenizer.chat_template", asking)
    turns = cut_answers(text_of({"messages": TURNS[:2]}), model, n_ctx=256, chunks=None, mode="float", rules="none")
    assert model.vocab.decode(turns.ids[0][turns.scored[0]], special=True) == "A number.</s>"
    assert turns.scored[0][-1]


def test_each_answer_has_a_sequence_where_the_template_changes_earlier_turns(model):
    render = renderer({"tokenizer.chat_template": FORGETFUL}, model.vocab)
    found = answers(TURNS, render)
    written = [item.text[item.start : item.end] for item in found]
    assert written == ["A number.", "A number that many weights share."]
    assert "A number.]" not in found[1].text


def test_scores_do_not_depend_on_what_stands_behind_a_sequence(model, tmp_path):
    short = {"messages": TURNS[:2]}
    paths = [tmp_path / name for name in ("one.jsonl", "two.jsonl")]
    paths[0].write_text(json.dumps(short))
    paths[1].write_text("\n".join(json.dumps(item) for item in (short, {"messages": TURNS})))
    options = {"n_ctx": 128, "prompt": "", "progress": False}
    one, two = (ql.report(model, "Q4_0", path, **options) for path in paths)
    both = ql.report(model, "Q4_0", [*paths, "primer"], chunks=2, **options)
    assert [row["kld_mean"] for row in both.rows[:4]] == pytest.approx(
        [row["kld_mean"] for row in (*one.rows, *two.rows)], rel=1e-4, abs=1e-9
    )
    assert one.rows[1]["n_scored"] < two.rows[1]["n_scored"] and both.rows[4]["text"] == "primer"
    assert [text["name"] for text in both.protocol["texts"]] == ["answers", "answers", "llama.cpp"]
    assert "chat turns, rendered by the model's own chat template" in both.to_html()


def test_only_a_newline_ends_a_conversation():
    said = "one\u2028two\x85three"
    lines = [json.dumps({"messages": [*TURNS[:1], TURNS[1] | {"content": said}]}, ensure_ascii=False)] * 2
    read = read_conversations(Text.from_bytes("turns.jsonl", "\r\n".join(lines).encode()))
    assert [messages[1]["content"] for messages in read] == [said] * 2


def test_what_is_too_long_loses_its_end(model):
    text = text_of({"messages": TURNS}, {"messages": TURNS[:2]})
    whole = cut_answers(text, model, n_ctx=256, chunks=None, mode="float", rules="none")
    short = cut_answers(text, model, n_ctx=40, chunks=1, mode="float", rules="none")
    assert short.protocol.chunks == 1 and short.protocol.n_ctx == 40
    assert np.array_equal(short.ids[0], whole.ids[0][:40])


def test_bad_input(model):
    for raw, match in {
        "{": "turns.jsonl: line 1 is not JSON",
        '{"a": 1}': "turns.jsonl: conversation 1 has no list `messages`",
        '{"messages": [{"role": "user"}]}': "conversation 1: a message needs role and content",
        '{"messages": [{"role": "user", "content": "x"}]}': "no message has role=assistant",
    }.items():
        with pytest.raises(ValueError, match=match):
            read_conversations(Text.from_bytes("turns.jsonl", raw.encode()))
    with pytest.raises(ValueError, match="m: has no chat template"):
        renderer({}, model.vocab, source="m")
    with pytest.raises(ValueError, match="m: its chat template cannot be read"):
        renderer({"tokenizer.chat_template": "{% if %}"}, model.vocab, source="m")
    for template in ("{{ raise_exception('no') }}", "{{ messages.__class__.__mro__ }}", "{{ 1 / 0 }}", "{{ a.b.c }}"):
        with pytest.raises(ValueError, match="m: its chat template refuses a conversation"):
            renderer({"tokenizer.chat_template": template}, model.vocab, source="m")(TURNS, True)
    with pytest.raises(ValueError, match="c: the chat template does not end with answer 2"):
        answers(TURNS, renderer({"tokenizer.chat_template": "x"}, model.vocab), source="c")
    with pytest.raises(ValueError, match="turns.jsonl: no answer begins within n_ctx=8 tokens"):
        cut_answers(text_of({"messages": TURNS}), model, n_ctx=8, chunks=None, mode="float", rules="none")
