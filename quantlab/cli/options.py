"""What the words share: the application, the options that several have, and how a result is reported."""

import errno
import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="quantlab",
    help="Convert, quantize and measure GGUF models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _check_json(path: str | None) -> str | None:
    """Refuse a --json path that could not be written, before any long work begins."""
    if path in (None, "-"):
        return path
    if Path(path).is_dir():
        raise IsADirectoryError(errno.EISDIR, "--json needs a file or -, this is a folder", path)
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, "--json: no such folder", str(folder))
    if not os.access(folder, os.W_OK):
        raise PermissionError(errno.EACCES, "--json: the folder cannot be written", str(folder))
    return path


JsonPath = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        callback=_check_json,
        help="Write the result as JSON too; - gives JSON alone on standard output, the table on standard error.",
    ),
]
Rules = Annotated[
    str, typer.Option("--rules", metavar="current|2023-12", help="llama.cpp's mixture rules of that time.")
]
AsLlamaCpp = Annotated[
    bool,
    typer.Option(
        "--as-llama-cpp", help="Write a vocabulary as llama.cpp's converter does where it gives texts other ids."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]


def report(result, json: str | None = None) -> None:
    """Print a result's table, `str(result)`, and write `result.to_json()` where `--json` says."""
    if json is None:
        typer.echo(str(result))
    elif json == "-":
        typer.echo(str(result), err=True)
        typer.echo(result.to_json())
    else:
        from quantlab.files.output import replacing

        typer.echo(str(result))
        with replacing(json, overwrite=True) as path:
            path.write_text(result.to_json() + "\n", encoding="utf-8")
