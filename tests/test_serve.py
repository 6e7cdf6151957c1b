"""llama.cpp's server as users meet it: a process of its own, its page and its API, its end."""

import gzip
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest

from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.run.serve import is_loopback
from quantlab.transform.quantize import quantize

KEY = "a-key-that-nothing-prints"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    pytest.importorskip("xllamacpp")
    return quantize("tiny", tmp_path_factory.mktemp("serve") / "tiny.gguf", ftype="Q8_0")


def command(path, *options: str) -> list[str]:
    return [sys.executable, "-m", "quantlab.cli", "serve", "--model", str(path), "-t", "1", *options]


class Served:
    """A running server: its process, its address, what it printed."""

    def __init__(self, process: subprocess.Popen):
        self.process, self.printed = process, ""
        while "Ctrl-C" not in self.printed and (line := process.stdout.readline()):
            self.printed += line
        port = re.search(r"http://[\d.]+:(\d+)", self.printed)[1]
        self.address = f"http://127.0.0.1:{port}"

    def get(self, path: str, data: dict | None = None, key: str | None = None):
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        body = json.dumps(data).encode() if data else None
        return urllib.request.urlopen(urllib.request.Request(self.address + path, body, headers), timeout=60)

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        self.printed += self.process.communicate(timeout=30)[0]
        return self.process.returncode


@contextmanager
def served(path, *options: str, **environment: str):
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command(path, "--port", "0", *options),
        stdout=pipe,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )
    try:
        yield Served(process)
    finally:
        process.kill()
        process.wait()


def test_the_page_and_the_api(path):
    with served(path) as server:
        assert "warning" not in server.printed
        page = urllib.request.Request(server.address, headers={"Accept-Encoding": "gzip"})
        with urllib.request.urlopen(page) as answer:
            assert b"<!doctype html>" in gzip.decompress(answer.read())
        question = {"messages": [{"role": "user", "content": "What is a scale?"}], "max_tokens": 8, "temperature": 0}
        answer = json.load(server.get("/v1/chat/completions", question))
        assert answer["usage"]["completion_tokens"] == 8
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert [model["id"] for model in json.load(server.get("/v1/models"))["data"]] == ["tiny"]
        assert server.end(signal.SIGINT) == 0
        assert "Traceback" not in server.printed


def test_openais_client(path):
    openai = pytest.importorskip("openai")
    with served(path, "--api-key", KEY) as server:
        client = openai.OpenAI(base_url=f"{server.address}/v1", api_key=KEY)
        question = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 6,
            "temperature": 0,
        }
        whole = client.chat.completions.create(**question).choices[0].message.content
        pieces = client.chat.completions.create(**question, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == whole != ""
        assert client.completions.create(model="tiny", prompt="The weights", max_tokens=4).choices[0].text
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.address}/v1", api_key="wrong").chat.completions.create(**question)


@pytest.mark.parametrize("given", ["option", "environment"])
def test_a_key_is_needed_and_never_printed(path, given):
    options = ["--api-key", KEY] if given == "option" else []
    environment = {"LLAMA_API_KEY": KEY} if given == "environment" else {}
    with served(path, "--host", "0.0.0.0", *options, **environment) as server:
        assert "warning" not in server.printed and "need the key" in server.printed
        with pytest.raises(urllib.error.HTTPError, match="401"):
            server.get("/v1/models")
        assert server.get("/v1/models", key=KEY).status == 200
        assert server.end(signal.SIGTERM) == 0
        assert KEY[-4:] not in server.printed


def test_without_a_key_an_open_address_is_warned_of(path):
    with served(path, "--host", "0.0.0.0") as server:
        assert re.match(r"warning: --host 0\.0\.0\.0 is open to every machine", server.printed)


def test_it_ends_in_the_middle_of_an_answer(path):
    with served(path) as server:
        question = {"messages": [{"role": "user", "content": "Go on"}], "stream": True, "max_tokens": 400}
        answer = server.get("/v1/chat/completions", question)
        answer.readline()
        reader = threading.Thread(target=lambda: list(answer), daemon=True)
        reader.start()
        assert server.end(signal.SIGINT) == 0
        assert "Traceback" not in server.printed


def test_a_page_of_another_site_gets_no_permission(path):
    with served(path) as server:
        request = urllib.request.Request(server.address + "/v1/models", headers={"Origin": "http://elsewhere.example"})
        allowed = urllib.request.urlopen(request).headers.get("Access-Control-Allow-Origin", "")
        assert allowed != "*" and "elsewhere" not in allowed


def test_loopback():
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "localhost", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "192.168.1.2", "::", "example.org"]))


def refused(path, *options: str) -> str:
    done = subprocess.run(command(path, *options), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_bad_input(path, tmp_path):
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        assert f"127.0.0.1:{port}: Address already in use" in refused(path, "--port", port)
    assert "port=99999" in refused(path, "--port", "99999")
    assert "ctx-size=4096, must be 2 to 512" in refused(path, "--ctx-size", "4096", "--port", "0")
    assert "threads=0, must be 1 to 512" in refused(path, "-t", "0", "--port", "0")
    assert "no such file" in refused(tmp_path / "nothing.gguf")
    (tmp_path / "text.gguf").write_text("this is no model")
    assert "first 4 bytes are b'this', need b'GGUF'" in refused(tmp_path / "text.gguf")


def test_a_file_that_llama_cpp_cannot_load_says_why(tmp_path):
    pytest.importorskip("xllamacpp")
    keys = ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count")
    metadata = {"general.architecture": "nonsuch", "tokenizer.ggml.tokens": ["a"]}
    metadata |= {f"nonsuch.{key}": np.uint32(32) for key in keys}
    metadata["nonsuch.block_count"] = np.uint32(1)
    metadata["nonsuch.attention.layer_norm_rms_epsilon"] = np.float32(1e-5)
    x = np.zeros((2, 32), np.float32)
    specs = [TensorSpec(name, x.shape, "F32") for name in ("token_embd.weight", "blk.0.ffn_up.weight")]
    write_gguf(tmp_path / "a.gguf", metadata, specs, [x, x])
    line = refused(tmp_path / "a.gguf", "--port", "0", "--ctx-size", "16")
    assert "llama.cpp cannot load it" in line and "nonsuch" in line
