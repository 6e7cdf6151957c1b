"""Conversations with the bundled model: history, options, stopping; in the terminal and in a notebook."""

import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

import quantlab as ql
from quantlab.files import bundled
from quantlab.files.gguf_file import write_gguf
from quantlab.run.chat import HELP, Conversation, Sampling, talk
from quantlab.run.llama_cpp import Engine, Options, _only_continues, as_gguf
from quantlab.transform.quantize import quantize

GREEDY = Sampling(temp=0, n_predict=12)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pytest.importorskip("xllamacpp")
    return quantize("tiny", tmp_path_factory.mktemp("chat") / "tiny.gguf", ftype="F16")


@pytest.fixture(scope="module")
def engine(path):
    with Engine(path, Options(n_threads=1)) as engine:
        yield engine


def answer(conversation: Conversation, text: str) -> str:
    return "".join(conversation.ask(text))


def test_a_conversation_has_a_history(engine):
    conversation = Conversation(engine, "You are terse.", GREEDY)
    first = answer(conversation, "What is a weight?")
    second = answer(conversation, "And a scale?")
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 2]
    assert [message["content"] for message in conversation.messages] == [
        "You are terse.",
        "What is a weight?",
        first,
        "And a scale?",
        second,
    ]
    assert conversation.n_tokens == 12 and conversation.speed > 0
    conversation.clear()
    assert conversation.messages == [{"role": "system", "content": "You are terse."}]


def test_the_history_is_what_the_model_sees(engine):
    with_history, without = Conversation(engine, "", GREEDY), Conversation(engine, "", GREEDY)
    answer(with_history, "one two three " * 8)
    assert answer(with_history, "x") != answer(without, "x")


def test_a_model_without_a_chat_template_continues_the_text(engine, path, tmp_path):
    def continued(text):
        return engine.complete({"prompt": text, "temperature": 0, "max_tokens": 12})["choices"][0]["text"]

    conversation = Conversation(engine, "", GREEDY)
    first = answer(conversation, "What is a weight?")
    assert first == continued("What is a weight?")
    assert answer(conversation, "And a scale?") == continued(f"What is a weight?{first}\n\nAnd a scale?")
    for added in ({"tokenizer.chat_template": "{{ messages }}"}, {"tokenizer.ggml.tokens": ["<|im_start|>"]}):
        write_gguf(tmp_path / "a.gguf", ql.open(path).metadata | added, [], [])
        assert not _only_continues(tmp_path / "a.gguf")


def test_the_same_seed_gives_the_same_answer(engine):
    answers = [answer(Conversation(engine, "", Sampling(temp=1.5, seed=seed, n_predict=12)), "a") for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_stopped_answer_stays_in_the_history(engine):
    conversation = Conversation(engine, "", Sampling(temp=0, n_predict=400))
    asked = conversation.ask("Tell me everything.")
    said = [next(asked) for _ in range(3)]
    asked.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(said)}
    assert answer(Conversation(engine, "", GREEDY), "Still there?")


def test_a_conversation_beyond_the_context(engine):
    conversation = Conversation(engine, "", GREEDY)
    with pytest.raises(ValueError, match="exceeds the available context size"):
        answer(conversation, "word " * 600)
    assert conversation.messages == []


def scripted(*lines):
    """A terminal where these lines are typed; KeyboardInterrupt stands for Ctrl-C."""
    rest = iter(lines)

    def read(prompt):
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_the_terminal(engine):
    written = []
    conversation = Conversation(engine, "", GREEDY)
    talk(conversation, scripted("", "hello", "/help", KeyboardInterrupt, "/clear"), written.append)
    text = "".join(written)
    assert text.count(HELP) == 3
    assert "[12 tokens, " in text and "per second]" in text and "Forgotten." in text
    assert conversation.messages == []
    talk(conversation, scripted("word " * 600, "/exit", "never read"), written.append)
    assert "a larger --ctx-size" in written[-1]


def interrupt_answer(process) -> bool:
    """Ask, press Ctrl-C when the answer has begun, and tell whether it came before the answer's end."""
    process.stdin.write(b"/clear\nTell me everything.\n")
    process.stdin.flush()
    text = b""
    while len(text.partition(b"Forgotten.")[2]) < 20:  # some of the answer is there
        text += os.read(process.stdout.fileno(), 64) or pytest.fail(text.decode())
    process.send_signal(signal.SIGINT)
    while not re.search(rb"per second(, stopped)?\]", text):
        text += os.read(process.stdout.fileno(), 4096) or pytest.fail(text.decode())
    return b"stopped]" in text


def test_ctrl_c_in_the_terminal_stops_the_answer_and_not_the_program(path):
    command = [sys.executable, "-m", "quantlab.cli", "chat", str(path), "-t", "1", "--temp", "0", "--predict", "450"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        limit = threading.Timer(120, process.kill)  # ends every wait below
        limit.start()
        while not interrupt_answer(process):
            assert process.poll() is None
        limit.cancel()
        rest, errors = process.communicate(b"And now?\n", timeout=60)
    assert b"per second]" in rest
    assert process.returncode == 0
    assert b"Traceback" not in errors


def test_the_widget(engine):
    widgets = pytest.importorskip("ipywidgets")
    from quantlab.run.chat_widget import ChatWidget

    widget = ChatWidget(engine, sampling=GREEDY)
    assert isinstance(widget.box, widgets.VBox)
    widget.line.value = "<b>hello</b>"  # as typing and Enter do
    widget.wait()
    assert "&lt;b&gt;hello" in widget._shown.value and "12 tokens" in widget._shown.value
    assert widget.line.value == ""
    widget.clear.click()
    assert widget._shown.value == "" and widget.conversation.messages == []
    widget.line.value = "word " * 600
    widget.wait()
    assert "exceeds" in widget._shown.value


def test_a_checkpoint_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setattr("quantlab.run.llama_cpp.runs_dir", lambda: tmp_path)
    path = as_gguf("tiny")
    written = path.stat().st_mtime_ns
    assert as_gguf("tiny") == path and path.parent == tmp_path / "run" and path.name.startswith("tiny-")
    assert path.stat().st_mtime_ns == written


def test_without_the_extra_one_line_names_it(path):
    code = "import sys; sys.modules['xllamacpp'] = None; from quantlab.cli import main; main()"
    for word in (["chat", str(path)], ["serve", "-m", str(path)]):
        done = subprocess.run([sys.executable, "-c", code, *word], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, "")
        assert bundled.how_to_install("run") in done.stderr and len(done.stderr.splitlines()) == 1


def test_layers_on_a_card_that_is_not_there_are_warned_of(path):
    import xllamacpp

    if any("GPU" in device["type"].name for device in xllamacpp.get_device_info()):
        pytest.skip("there is a graphics card")
    with pytest.warns(UserWarning, match="n-gpu-layers=5, but this xllamacpp finds no graphics card"):
        Engine(path, Options(n_threads=1, n_gpu_layers=5)).close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[(name, value) for name in ("temp", "top_p", "min_p", "repeat_penalty") for value in (-1, np.nan, np.inf)],
        ("repeat_penalty", 0),
        *[(name, value) for name in ("top_k", "seed", "n_predict") for value in (-2, 2**40, -(10**20))],
    ],
)
def test_sampling_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value}, must be "):
        Sampling(**{name: value})


def test_minus_one_leaves_the_choice_to_llama_cpp(path):
    with Engine(path, Options(n_threads=-1, n_gpu_layers=-1)) as engine:
        assert answer(Conversation(engine, "", GREEDY), "word")


def test_bad_input(path, tmp_path):
    for n_ctx in (1, 513):
        with pytest.raises(ValueError, match=f"ctx-size={n_ctx}, must be 2 to 512"):
            Engine(path, Options(n_ctx=n_ctx))
    for n_threads in (0, -2, 513, 10**12):  # with which llama.cpp aborts the process
        with pytest.raises(ValueError, match=f"threads={n_threads}, must be 1 to 512. Leave it out, or give -1, for"):
            Engine(path, Options(n_threads=n_threads))
    for n_gpu_layers in (-2, 2**31, -(10**12)):
        with pytest.raises(ValueError, match=f"n-gpu-layers={n_gpu_layers}, must be 0 to 2147483647"):
            Engine(path, Options(n_gpu_layers=n_gpu_layers))
    with pytest.raises(FileNotFoundError, match="nothing.gguf"):
        Engine("nothing.gguf")
    metadata = ql.open(path).metadata | {"llama.block_count": np.uint32(1000)}
    write_gguf(tmp_path / "deep.gguf", metadata, [], [])
    with pytest.raises(ValueError, match=r"deep\.gguf: block_count=1000, layer 999 is missing"):
        Engine(tmp_path / "deep.gguf")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match="cut.gguf"):
        Engine(tmp_path / "cut.gguf")
