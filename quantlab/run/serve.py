"""llama.cpp's own server: a chat page, and an API for OpenAI's clients."""

from __future__ import annotations

import ipaddress
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from quantlab.run.llama_cpp import Engine, Options


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    model: str | Path, options: Options, *, report: Callable[[str], object], warn: Callable[[str], object]
) -> None:
    """Serve a model until Ctrl-C or SIGTERM, which end the process with status 0.

    The web page is always served. `report` and `warn` take a line each and write it at once: where it listens, and what
    is risky about it. Neither holds the key.

    Raises
    ------
    ImportError, FileNotFoundError, ValueError, OSError
        As `Engine`.
    """
    if not is_loopback(options.host) and not options.api_key:
        warn(
            f"warning: --host {options.host} is open to every machine that can reach it, without an --api-key: "
            "anyone there can use this model. Give --api-key."
        )
    with killable():
        engine = Engine(model, replace(options, ui=True))
    with ended() as end:
        report(f"{engine.path.name} is served at {engine.address}: web page, and API at {engine.address}/v1")
        if options.api_key:
            report("Requests need the key that --api-key gave.")
        report("Ctrl-C ends it.")
        end.wait()
    os._exit(0)  # closing the engine would wait for ever for an answer that is still being written


@contextmanager
def killable() -> Iterator[None]:
    """Let Ctrl-C end the process while llama.cpp loads a model, which handles no signal itself."""
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def ended() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set."""
    end = threading.Event()
    before = {number: signal.signal(number, lambda *_: end.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
