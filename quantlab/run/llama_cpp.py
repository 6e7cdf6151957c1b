"""llama.cpp in this process, through the package xllamacpp: load a model once, ask it many times.

llama.cpp's server always comes with it: an HTTP server on a port of the loopback address. Unless it is wanted (`serve`)
it is closed to everybody else by a random key and shows no web page.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import secrets
import socket
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.files import bundled
from quantlab.files.bundled import how_to_install, runs_dir
from quantlab.files.model import open as open_model
from quantlab.transform.convert import convert

LOOPBACK = "127.0.0.1"
USUAL = 2048  # tokens of context when none are asked for
MAX_THREADS = 512  # of ggml; llama.cpp aborts this process with more, and with none
MAX_INT = 2**31 - 1
# a chat template for models that have none: each answer continues the text so far
CONTINUED = (
    r"{% for message in messages %}{% if message.role == 'user' and not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ message.content }}{% endfor %}"
)


@dataclass(frozen=True)
class Options:
    """Options of llama.cpp for running a model, under llama.cpp's names."""

    # tokens of context; 0 is the model's own, None is 2048, or the model's own if that is shorter
    n_ctx: int | None = None
    # layers on the graphics card, the output layer first; None or -1 leaves the choice to llama.cpp
    n_gpu_layers: int | None = None
    n_threads: int | None = None  # None or -1 leaves the choice to llama.cpp
    # host, port: where the HTTP server listens; port 0 is any free one
    host: str = LOOPBACK
    port: int = 0
    api_key: str | None = None  # who asks must give it
    ui: bool = False  # whether the web page is served


class Engine:
    """A loaded model.

    Parameters
    ----------
    model : str or Path
        A GGUF file, a bundled or fetched model's name, or a checkpoint, which is converted first.
    options : Options, optional

    Raises
    ------
    ImportError
        If xllamacpp is not installed.
    FileNotFoundError
        If there is no such model.
    ValueError
        If an option is out of range, the file is damaged, llama.cpp cannot load it, or the context is longer than the
        model's.
    OSError
        If the port cannot be had.

    Examples
    --------
    >>> with Engine("tiny", Options(n_ctx=256, n_threads=1)) as engine:  # doctest: +SKIP
    ...     engine.complete({"prompt": "The weights", "n_predict": 8})["choices"][0]["text"]
    """

    def __init__(self, model: str | Path, options: Options | None = None):
        options, xllamacpp = options or Options(), _xllamacpp()
        _check_whole("threads", options.n_threads, MAX_THREADS)
        _check_whole("n-gpu-layers", options.n_gpu_layers, MAX_INT, least=0)
        self.path = as_gguf(model)
        self.n_ctx = _context(self.path, options.n_ctx)
        _check_port(options.host, options.port)
        _check_card(xllamacpp, options.n_gpu_layers)
        params = _params(xllamacpp, self.path, self.n_ctx, options)
        with _captured_stderr() as log:
            try:
                self._server: Any = xllamacpp.Server(params)
            except RuntimeError:
                raise ValueError(
                    f"{self.path}: llama.cpp cannot load it: {_reason(log)}. Check the file with quantlab verify."
                ) from None
        self.complete({"prompt": "", "n_predict": 1})  # a server that is closed before it runs would wait for ever

    @property
    def address(self) -> str:
        """Address of the HTTP server: http://host:port."""
        return self._server.listening_address

    def complete(self, request: dict) -> dict:
        """Continue a prompt with a request to /v1/completions, and return the complete answer.

        Raises
        ------
        ValueError
            If llama.cpp refuses the request: a prompt longer than the context, say.
        """
        return self._checked(self._server.handle_completions(request))

    def chat(self, request: dict) -> Generator[dict]:
        """Answer messages with a request to /v1/chat/completions, chunk by chunk; close the iterator to stop.

        Raises
        ------
        ValueError
            If llama.cpp refuses the request.
        """
        chunks: queue.SimpleQueue = queue.SimpleQueue()
        stopped = threading.Event()

        def take(chunk: dict) -> bool:
            chunks.put(chunk)
            return stopped.is_set()

        def work() -> None:
            try:
                self._server.handle_chat_completions({**request, "stream": True}, take)
            except Exception as error:
                chunks.put(error)
            finally:
                chunks.put(None)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (chunk := chunks.get()) is not None:
                if isinstance(chunk, Exception):
                    raise ValueError(f"{self.path.name}: {chunk}") from None
                yield self._checked(chunk)
        finally:
            stopped.set()
            worker.join()

    def _checked(self, answer: dict) -> dict:
        if "error" in answer:
            raise ValueError(f"{self.path.name}: {answer['error']['message']}.")
        return answer

    def close(self) -> None:
        """Stop the server and free the model's memory."""
        with _captured_stderr():
            self._server = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error) -> None:
        self.close()


def as_gguf(model: str | Path) -> Path:
    """Return the path of a model's GGUF file; convert a checkpoint into the runs folder, once.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such model, or its file is damaged.
    """
    path = bundled.model_path(model)
    source = open_model(path)
    if not source.is_checkpoint:
        return source.path
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]  # folders of one name hold many models
    target = runs_dir() / "run" / f"{path.stem if path.is_file() else path.name}-{digest}.gguf"
    newest = max(file.stat().st_mtime for file in ([path] if path.is_file() else path.iterdir()))
    if not target.is_file() or target.stat().st_mtime < newest:
        target.parent.mkdir(parents=True, exist_ok=True)
        convert(source.path, target, overwrite=True)
    return target


def _xllamacpp():
    try:
        import xllamacpp
    except ImportError:
        raise ImportError(f"xllamacpp, which runs llama.cpp, is not installed. Run: {how_to_install('run')}") from None
    return xllamacpp


def _context(path: Path, n_ctx: int | None) -> int:
    model = open_model(path)
    most, n_layer = model.hparams.n_ctx, model.hparams.n_layer
    if not any(name.startswith(f"blk.{n_layer - 1}.") for name in model.names):  # llama.cpp may abort this process
        raise ValueError(
            f"{path}: block_count={n_layer}, layer {n_layer - 1} is missing. Convert the checkpoint again."
        )
    n_ctx = min(USUAL, most) if n_ctx is None else n_ctx or most
    if not 2 <= n_ctx <= most:  # with 1, llama.cpp aborts this process
        raise ValueError(
            f"{path.name}: ctx-size={n_ctx}, must be 2 to {most}, the context of its training. Choose another context."
        )
    return n_ctx


def _check_whole(name: str, value: int | None, most: int, least: int = 1) -> None:
    """Refuse numbers with which llama.cpp would abort this process (-1: its default)."""
    if value not in (None, -1) and not least <= value <= most:
        raise ValueError(
            f"{name}={value}, must be {least} to {most}. Leave it out, or give -1, for llama.cpp's default."
        )


def _check_card(xllamacpp, n_gpu_layers: int | None) -> None:
    """Warn if layers are requested on a card that this build of llama.cpp cannot use."""
    if n_gpu_layers not in (None, -1, 0) and not any(
        "GPU" in device["type"].name for device in xllamacpp.get_device_info()
    ):
        warnings.warn(
            f"n-gpu-layers={n_gpu_layers}, but this xllamacpp finds no graphics card: all layers run on the CPU. "
            "The package on PyPI is for CPUs; those for CUDA, ROCm and Vulkan come from xllamacpp's own index.",
            stacklevel=3,
        )


def _check_port(host: str, port: int) -> None:
    """Check that llama.cpp can listen on a port."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port={port}, must be 0 to 65535. Give 0 for any free port.")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise OSError(f"{host}:{port}: {error.strerror}. Choose another port or host.") from None


def _params(xllamacpp, path: Path, n_ctx: int, options: Options):
    """Return llama.cpp's parameters, as its command line would set them."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = n_ctx
    params.fit_params = options.n_gpu_layers in (None, -1)
    params.n_gpu_layers = -1 if options.n_gpu_layers is None else options.n_gpu_layers
    if options.n_threads not in (None, -1):
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.n_threads
    params.hostnames, params.port = [options.host], options.port
    params.api_keys = [options.api_key] if options.api_key else [] if options.ui else [secrets.token_hex()]
    params.ui, params.model_alias = options.ui, {path.stem}
    params.cors_origins = "localhost"  # pages of other sites get no answer from a browser on this machine
    if _only_continues(path):
        params.chat_template = CONTINUED
    params.warmup = False
    params.verbosity = 1  # errors; the log would show the end of the key
    return params


def _only_continues(path: Path) -> bool:
    """Tell whether a model lacks a chat template, and also the ChatML tokens of llama.cpp's default."""
    metadata = open_model(path).metadata
    return "tokenizer.chat_template" not in metadata and "<|im_start|>" not in metadata["tokenizer.ggml.tokens"]


@contextmanager
def _captured_stderr():
    """Capture standard error of C code; yield a function that returns the text."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(2)

        def read() -> str:
            file.seek(0)
            return file.read().decode("utf-8", "replace")

        os.dup2(file.fileno(), 2)
        try:
            yield read
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _reason(log: Callable[[], str]) -> str:
    """Return the first error of llama.cpp's log, without time and place, once its thread has written it."""
    waited = time.monotonic()
    while "exiting due to" not in log() and time.monotonic() - waited < 1:
        time.sleep(0.01)
    lines = [line.partition(" E ")[2] for line in log().splitlines() if " E " in line]
    return re.sub(r"^\w+: (error \w+ model: )?", "", lines[0]).strip().rstrip(".") if lines else "it gives no reason"
