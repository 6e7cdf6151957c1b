"""The command line: `quantlab WORD …`, each word a few lines over one public function.

A word imports what it needs inside its body, so that `quantlab --help` starts at once. It checks nothing itself: the
public function raises a built-in exception with a whole sentence, and `main` prints that sentence as one line and exits
with 1. The words stand in the order of a day's work: files, measure, publish, recipes, run.
"""

import codecs
import gc
import os
import sys
import warnings
from typing import Annotated

import typer

import quantlab
from quantlab.cli import files, measure, publish, recipes, run  # noqa: F401 (each registers its words)
from quantlab.cli.options import app, as_options


def _line(error: BaseException) -> str:
    """Return the line to print for an error."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(as_options(text).split())


# signs in the program's output -> what stands for them where the encoding does not have them
_PLAIN = dict(zip("█▁·≈Δ→×±…–≤↔", "#,_,.,~,d,->,x,+-,...,-,<=,<->".split(","), strict=True))


def _plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    """Spell what an encoding cannot hold: signs in ASCII, bytes of file names as they are, the rest as \\N escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    if all("\udc80" <= char <= "\udcff" for char in text):
        return os.fsencode(text), error.end
    spelled = (_PLAIN.get(char) or char.encode("ascii", "backslashreplace").decode() for char in text)
    return "".join(spelled), error.end


def main() -> None:
    """Run the command line: exit status 0, 1 with one line for an error, 2 for wrong usage, 130 when interrupted."""
    codecs.register_error("plainly", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # else the last line of a long run could fail for a sign in it
            stream.reconfigure(errors="plainly")  # pyright: ignore[reportAttributeAccessIssue]
    warnings.showwarning = lambda message, *_: typer.echo(f"quantlab: {as_options(str(message))}", err=True)
    gc.set_threshold(7000)  # above Python's own: to look again and again at all that was imported takes 0.1 s
    try:
        app()
    except SystemExit as left:
        if left.code == 130:  # how typer passes a KeyboardInterrupt on, without a word
            typer.echo("quantlab: interrupted", err=True)
        raise
    except (ValueError, OSError, ImportError, MemoryError) as error:
        typer.echo(f"quantlab: {_line(error)}", err=True)
        sys.exit(1)
    finally:
        gc.freeze()  # and to look through it once more before leaving, 0.2 s


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantlab {quantlab.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Convert, quantize and measure GGUF models."""
