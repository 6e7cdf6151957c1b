"""Progress texts of long work, shown above its bar."""

import sys
from functools import cache

from tqdm.auto import tqdm

__all__ = ["announce", "announce_compilation"]


def announce(line: str) -> None:
    """Print a line above the bars, on stderr (in a notebook: on stdout, since stderr is red there)."""
    from tqdm.notebook import tqdm_notebook  # brings ipywidgets along

    tqdm.write(line, file=sys.stdout if issubclass(tqdm, tqdm_notebook) else sys.stderr)


@cache
def announce_compilation() -> None:
    """Announce the first compilation of a kernel in this process, which takes a minute."""
    from numba.core import event  # only where kernels are used

    class Announcement(event.Listener):
        is_said = False

        def on_start(self, event) -> None:
            kept = type(getattr(event.data["dispatcher"], "_cache", None)).__name__ != "NullCache"
            if kept and not self.is_said:  # functions without a cache are compiled in every process, in a moment
                self.is_said = True
                announce("compiling kernels for this machine: 20 to 90 s; later runs load them")

        def on_end(self, event) -> None:
            """Ignore the end of a compilation."""

    event.register("numba:compile", Announcement())
