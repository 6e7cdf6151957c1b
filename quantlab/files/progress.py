"""What long work says before it starts, above its bar."""

import sys

from tqdm.auto import tqdm

__all__ = ["announce"]


def announce(line: str) -> None:
    """Print a line above the bars: on stderr, but on stdout in a notebook, where stderr is shown in red."""
    from tqdm.notebook import tqdm_notebook  # brings ipywidgets along

    tqdm.write(line, file=sys.stdout if issubclass(tqdm, tqdm_notebook) else sys.stderr)
