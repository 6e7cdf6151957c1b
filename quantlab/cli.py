"""The command line: `quantlab WORD …`, each word a few lines over one public function.

A word imports what it needs inside its body, so that `quantlab --help` starts at once. It checks nothing itself: the
public function raises a built-in exception with a whole sentence, and `main` prints that sentence as one line and exits
with 1.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import quantlab

app = typer.Typer(
    name="quantlab",
    help="Convert, quantize and measure GGUF models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


# ── what every word shares ──────────────────────────────────────────────────────────────────────────────────────────


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


def _line(error: BaseException) -> str:
    """The one line that is printed for an error."""
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


def main() -> None:
    """Run the command line: exit status 0, 1 with one line for an error, 2 for wrong usage, 130 when interrupted."""
    try:
        app()
    except KeyboardInterrupt:
        typer.echo("quantlab: interrupted", err=True)
        sys.exit(130)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        typer.echo(f"quantlab: {_line(error)}", err=True)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quantlab {quantlab.__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Convert, quantize and measure GGUF models."""


# ── the words, in the order of a day's work ─────────────────────────────────────────────────────────────────────────


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="What to fetch: smollm2.")]) -> None:
    """Fetch a model that is not bundled into the cache folder, checked by SHA-256, and print its path."""
    from quantlab.files.bundled import fetch

    typer.echo(str(fetch(name)))


@app.command()
def sizes(
    shape: Annotated[
        str, typer.Argument(metavar="SHAPE|FILE", help="A bundled shape (yi-34b), a GGUF file or a checkpoint.")
    ],
    rules: Rules = "current",
    json: JsonPath = None,
) -> None:
    """Print the exact size of every ftype, without any weights."""
    from quantlab.transform.plan import sizes

    report(sizes(shape, rules=rules), json)


@app.command()
def table(
    model: Annotated[str, typer.Argument(metavar="MODEL|SHAPE", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    text: Annotated[
        str, typer.Option("-f", "--file", metavar="TEXT", help="primer, sampled or a text file.")
    ] = "primer",
    ftypes: Annotated[str, typer.Option("--ftypes", metavar="A,B,…", help="The rows; all of llama.cpp's table.")] = "",
    rules: Rules = "current",
    n_ctx: Annotated[int, typer.Option("-c", "--ctx-size", help="Tokens per chunk.")] = 512,
    chunks: Annotated[int | None, typer.Option("--chunks", help="Chunks at most; the whole text.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", metavar="8GiB", help="Memory to stay within.")] = None,
    json: JsonPath = None,
) -> None:
    """Print the size/ppl table: for every ftype its size and what it costs in perplexity."""
    from quantlab.study import tables

    names = [name for name in ftypes.split(",") if name]
    report(
        tables.size_ppl(model, text, ftypes=names, rules=rules, n_ctx=n_ctx, chunks=chunks, memory=memory),
        json,
    )


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def notebook(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(help="The notebook's name, without .ipynb.")],
) -> None:
    """Run a notebook: quantlab notebook NAME [-p KEY VALUE]…

    The keys are in the notebook's second cell; the results go to data/runs/, outside a checkout to ./quantlab-runs/.
    """
    from quantlab.study import notebooks

    flags, keys, values = ctx.args[::3], ctx.args[1::3], ctx.args[2::3]
    if len(ctx.args) % 3 or any(flag != "-p" for flag in flags):
        raise typer.BadParameter("parameters are given as -p KEY VALUE", param_hint="-p")
    folder = notebooks.run(name, dict(zip(keys, values, strict=True)))
    for table in sorted(folder.glob("*.txt")):
        typer.echo(table.read_text(encoding="utf-8"))
    typer.echo(f"In {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")


if __name__ == "__main__":
    main()
