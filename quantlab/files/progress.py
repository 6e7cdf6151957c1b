"""What long work says before it starts, above its bar."""

import sys
from functools import cache

from tqdm.auto import tqdm

__all__ = ["announce", "announce_compilation"]


def announce(line: str) -> None:
    """Print a line above the bars: on stderr, but on stdout in a notebook, where stderr is shown in red."""
    from tqdm.notebook import tqdm_notebook  # brings ipywidgets along

    tqdm.write(line, file=sys.stdout if issubclass(tqdm, tqdm_notebook) else sys.stderr)


@cache
def announce_compilation() -> None:
    """Let the first compilation of a kernel in this process be announced: it takes long, and nothing else shows."""
    from numba.core import event  # only where kernels are used

    class Announcement(event.Listener):
        is_said = False

        def on_start(self, event) -> None:
            kept = type(getattr(event.data["dispatcher"], "_cache", None)).__name__ != "NullCache"
            if kept and not self.is_said:  # functions without a cache are compiled in every process, in a moment
                self.is_said = True
                announce("compiling kernels for this machine: 20 to 90 s; later runs load them")

        def on_end(self, event) -> None:
            """Say nothing at the end."""

    event.register("numba:compile", Announcement())
