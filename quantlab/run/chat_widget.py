"""A small chat for notebooks: the conversation, a line for questions, buttons to stop and to clear."""

from __future__ import annotations

import threading
from html import escape
from pathlib import Path

from quantlab.files.bundled import how_to_install
from quantlab.run.chat import Conversation, Sampling
from quantlab.run.llama_cpp import Engine, Options

HEIGHT = "320px"


class ChatWidget:
    """A conversation that shows itself in a notebook.

    Parameters
    ----------
    model : str, Path or Engine
        A GGUF file, a bundled or fetched model's name, or a checkpoint; or what is loaded already.
    system, sampling
        As for `Conversation`.
    options : Options, optional

    Raises
    ------
    ImportError
        If ipywidgets or xllamacpp is not installed.
    FileNotFoundError, ValueError, OSError
        As `quantlab.run.llama_cpp.Engine`.

    Examples
    --------
    >>> ChatWidget("smollm2", sampling=Sampling(n_predict=200))  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | Path | Engine,
        system: str = "",
        sampling: Sampling | None = None,
        options: Options | None = None,
    ):
        try:
            import ipywidgets
        except ImportError:
            raise ImportError(f"ipywidgets is not installed. Run: {how_to_install('lab')}") from None
        engine = model if isinstance(model, Engine) else Engine(model, options)
        self.conversation = Conversation(engine, system, sampling)
        self._answering: threading.Thread | None = None
        self._stopped = threading.Event()
        self._shown = ipywidgets.HTML(layout={"max_height": HEIGHT, "overflow": "auto"})
        self.line = ipywidgets.Text(placeholder="Ask something", continuous_update=False, layout={"width": "70%"})
        self.send, self.stop, self.clear = (
            ipywidgets.Button(description=name, layout={"width": "auto"}) for name in ("Send", "Stop", "Clear")
        )
        self.send.on_click(lambda _: self.ask(self.line.value))
        self.stop.on_click(lambda _: self._stopped.set())
        self.clear.on_click(lambda _: self._forget())
        self.line.observe(lambda change: self.ask(change["new"]), "value")
        buttons = ipywidgets.HBox([self.line, self.send, self.stop, self.clear])
        self.box = ipywidgets.VBox([self._shown, buttons])

    def ask(self, text: str) -> None:
        """Ask in the background, unless an answer is still being written."""
        if not text.strip() or (self._answering is not None and self._answering.is_alive()):
            return
        self.line.value = ""
        self._stopped.clear()
        self._answering = threading.Thread(target=self._answer, args=(text.strip(),), daemon=True)
        self._answering.start()

    def wait(self) -> None:
        """Wait for the end of the answer."""
        if self._answering is not None:
            self._answering.join()

    def _answer(self, text: str) -> None:
        answer, so_far, note = self.conversation.ask(text), "", ""
        try:
            for piece in answer:
                so_far += piece
                self._show(so_far)
                if self._stopped.is_set():
                    note = ", stopped"
                    break
        except ValueError as error:
            self._show(note=str(error))
            return
        finally:
            answer.close()
        self._show(note=f"{self.conversation.n_tokens} tokens, {self.conversation.speed:.1f} per second{note}")

    def _forget(self) -> None:
        self._stopped.set()
        self.wait()
        self.conversation.clear()
        self._show()

    def _show(self, so_far: str = "", note: str = "") -> None:
        """Show the conversation, the current answer, and a last line."""
        said = [(message["role"], message["content"]) for message in self.conversation.messages]
        said += [("assistant", so_far)] if so_far else []
        lines = [
            f"<p style='white-space:pre-wrap;margin:4px 0'><b>{escape(role)}</b> {escape(content)}</p>"
            for role, content in said
        ]
        self._shown.value = "".join(lines) + (f"<p style='color:gray'>{escape(note)}</p>" if note else "")

    def _repr_mimebundle_(self, **options):
        return self.box._repr_mimebundle_(**options)
