"""A conversation with a model: its history and its options here, the terminal in `talk`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass

from quantlab.run.llama_cpp import Engine

HELP = "/clear deletes the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


@dataclass(frozen=True)
class Sampling:
    """Options for choosing the next token, with llama.cpp's names and defaults.

    Attributes
    ----------
    temp : float
        Temperature; 0 always takes the likeliest token.
    top_k : int
        Only from so many of the likeliest; 0 from all.
    top_p, min_p : float
        Only from the likeliest that together have this probability; from those with this share of the likeliest's.
    repeat_penalty : float
        Above 1, what was said lately becomes less likely.
    seed : int
        Same seed, same answer; -1 takes a random one.
    n_predict : int
        Tokens at most; -1 for no limit but the context.

    Raises
    ------
    ValueError
        If a number is out of range.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int = -1
    n_predict: int = -1

    def __post_init__(self):
        for name in ("temp", "top_p", "min_p", "repeat_penalty"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}, must be a number of at least 0. Choose another value.")
        if self.repeat_penalty == 0:
            raise ValueError("repeat_penalty=0, must be above 0. 1 changes nothing.")
        for name, most in (("top_k", 2**31 - 1), ("seed", 2**32 - 1), ("n_predict", 2**31 - 1)):
            if not -1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}, must be -1 to {most}. Choose another value.")

    def request(self) -> dict:
        """Return the options as fields of a request."""
        fields = asdict(self)
        return {"temperature": fields.pop("temp"), **fields}


class Conversation:
    """The history of a chat, and the model that answers.

    Parameters
    ----------
    engine : Engine
        A loaded model; it applies the model's own chat template.
    system : str
        System prompt; "" for none.
    sampling : Sampling, optional

    Attributes
    ----------
    messages : list of dict
        `role` and `content` of each, the system prompt first.
    n_tokens, seconds : int, float
        Of the last answer.
    """

    def __init__(self, engine: Engine, system: str = "", sampling: Sampling | None = None):
        self.engine, self.system, self.sampling = engine, system, sampling or Sampling()
        self.clear()

    def clear(self) -> None:
        """Delete the history, except the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self.n_tokens, self.seconds = 0, 0.0

    @property
    def speed(self) -> float:
        """Tokens per second of the last answer after its first token (0: fewer than two tokens)."""
        return (self.n_tokens - 1) / self.seconds if self.n_tokens > 1 and self.seconds > 0 else 0.0

    def ask(self, text: str) -> Generator[str]:
        """Ask, and yield the answer piece by piece; a stopped answer stays in the history.

        Raises
        ------
        ValueError
            If the conversation no longer fits in the context; the question is then forgotten.
        """
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        self.n_tokens, self.seconds, first = 0, 0.0, None
        chunks = self.engine.chat({"messages": self.messages, **self.sampling.request()})
        try:
            for chunk in chunks:
                piece = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
                if not piece:
                    continue
                now = time.perf_counter()
                first = now if first is None else first
                self.n_tokens, self.seconds = self.n_tokens + 1, now - first
                pieces.append(piece)
                yield piece
        finally:
            chunks.close()
            if pieces:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def talk(
    conversation: Conversation, read: Callable[[str], str] = input, write: Callable[[str], object] = _write
) -> None:
    """Talk in the terminal until the end of the input or /exit.

    `read` asks for a line, and raises EOFError at the end of the input. `write` writes a text as it is.
    """
    write(f"{HELP}\n")
    while True:
        try:
            text = read("\n> ").strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write(f"\n{HELP}\n")
            continue
        if text == "/exit":
            return
        if text == "/clear":
            conversation.clear()
            write("Forgotten.\n")
        elif text.startswith("/"):
            write(f"{HELP}\n")
        elif text:
            _answer(conversation, text, write)


def _answer(conversation: Conversation, text: str, write: Callable[[str], object]) -> None:
    """Write one answer, and its speed."""
    answer, end = conversation.ask(text), ""
    try:
        for piece in answer:
            write(piece)
    except KeyboardInterrupt:
        end = ", stopped"
    except ValueError as error:
        write(f"{error} Use /clear to start again, or give a larger --ctx-size.\n")
        return
    finally:
        answer.close()
    write(f"\n[{conversation.n_tokens} tokens, {conversation.speed:.1f} per second{end}]\n")
