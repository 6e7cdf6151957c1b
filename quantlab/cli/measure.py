"""The words that measure and study: perplexity, compare, table, imatrix, notebook."""

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli.options import JsonPath, Overwrite, Rules, app, report

TextName = Annotated[
    str, typer.Option("-f", "--file", metavar="TEXT", help="primer, sampled, wikitext-2-raw or a text file.")
]
ContextSize = Annotated[int, typer.Option("-c", "--ctx-size", help="Tokens per chunk.")]
Chunks = Annotated[int | None, typer.Option("--chunks", help="Chunks at most; the whole text.")]
ProtocolName = Annotated[str, typer.Option("--protocol", metavar="llama.cpp|full", help="Which tokens are scored.")]
Mode = Annotated[
    str,
    typer.Option("--mode", metavar="float|ggml-cpu", help="Activations as they are, or rounded as ggml's CPU does."),
]
Memory = Annotated[str | None, typer.Option("--memory", metavar="8GiB", help="Memory to stay within.")]
Scratch = Annotated[
    Path | None, typer.Option("--scratch", metavar="FOLDER", help="Keeps what is needed to resume a stopped run.")
]


@app.command()
def perplexity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    text: TextName = "primer",
    n_ctx: ContextSize = 512,
    chunks: Chunks = None,
    protocol: ProtocolName = "llama.cpp",
    mode: Mode = "float",
    memory: Memory = None,
    scratch: Scratch = None,
    json: JsonPath = None,
) -> None:
    """Measure the perplexity of a model on a text."""
    from quantlab.evaluate.perplexity import perplexity

    options = {"protocol": protocol, "mode": mode, "memory": memory, "scratch": scratch}
    report(perplexity(model, text, n_ctx=n_ctx, chunks=chunks, **options), json)


@app.command()
def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    variants: Annotated[
        list[str], typer.Argument(metavar="[NAME=]VARIANT…", help="Ftypes (Q4_K_M), GGUF files, recipes.")
    ],
    text: TextName = "primer",
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix for ftypes and recipes.")] = None,
    rules: Rules = "current",
    n_ctx: ContextSize = 512,
    chunks: Chunks = None,
    protocol: ProtocolName = "llama.cpp",
    mode: Mode = "float",
    memory: Memory = None,
    scratch: Scratch = None,
    json: JsonPath = None,
) -> None:
    """Measure variants of a model side by side with it: perplexity, KL divergence, agreement."""
    from quantlab.evaluate.perplexity import compare

    options = {"protocol": protocol, "mode": mode, "memory": memory, "scratch": scratch}
    report(
        compare(base, variants, text, imatrix=imatrix, rules=rules, n_ctx=n_ctx, chunks=chunks, **options),
        json,
    )


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


@app.command()
def imatrix(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="tiny, smollm2, a GGUF file or a checkpoint.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("-f", "--file", metavar="TEXT", help="What to calibrate on; sampled.")
    ] = None,
    outfile: Annotated[Path | None, typer.Option("-o", "--output-file", help="Default: imatrix.gguf.")] = None,
    in_file: Annotated[
        list[Path] | None, typer.Option("--in-file", help="A matrix to be added; repeat it for more.")
    ] = None,
    n_ctx: ContextSize = 512,
    chunks: Chunks = None,
    process_output: Annotated[
        bool, typer.Option("--process-output", help="Collect for output.weight as well.")
    ] = False,
    legacy: Annotated[bool, typer.Option("--legacy", help="Write the older format, .dat.")] = False,
    show_statistics: Annotated[
        bool, typer.Option("--show-statistics", help="Print a table of every tensor's inputs.")
    ] = False,
    mode: Mode = "float",
    memory: Memory = None,
    overwrite: Overwrite = False,
    json: JsonPath = None,
) -> None:
    """Collect an importance matrix on a text; without MODEL, add up the --in-file's, or show the statistics of one."""
    from quantlab.evaluate.imatrix import imatrix
    from quantlab.files.imatrix_file import merge, read_imatrix
    from quantlab.files.output import replacing

    if model is None and text is not None:
        raise typer.BadParameter("a text is of use only with a MODEL", param_hint="-f")
    files = in_file or []
    if model is None and show_statistics and outfile is None:
        report(read_imatrix(files[0]) if len(files) == 1 else merge(map(read_imatrix, files), chunk_size=n_ctx), json)
        return
    outfile = outfile or Path("imatrix.gguf")
    with replacing(outfile, overwrite=overwrite) as part:
        if model is None:
            matrix = merge(map(read_imatrix, files), chunk_size=n_ctx)
        else:
            options = {"process_output": process_output, "in_files": files, "mode": mode, "memory": memory}
            matrix = imatrix(model, text or "sampled", n_ctx=n_ctx, chunks=chunks, **options)
        matrix.save(part, legacy=legacy, overwrite=True)
    typer.echo(str(outfile), err=json == "-")
    if show_statistics or json:
        report(matrix, json)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def notebook(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The notebook's name, without .ipynb.")],
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE", help="Write its first figure as PNG.")
    ] = None,
) -> None:
    """Run a notebook: quantlab notebook NAME [-p KEY VALUE]…

    The keys are in the notebook's second cell; the results go to data/runs/, outside a checkout to ./quantlab-runs/.
    """
    from quantlab.study import notebooks

    flags, keys, values = ctx.args[::3], ctx.args[1::3], ctx.args[2::3]
    if len(ctx.args) % 3 or any(flag != "-p" for flag in flags):
        raise typer.BadParameter("parameters are given as -p KEY VALUE", param_hint="-p")
    folder = notebooks.run(name, dict(zip(keys, values, strict=True)))
    if picture:
        notebooks.picture(name, folder, picture)
    for table in sorted(folder.glob("*.txt")):
        typer.echo(table.read_text(encoding="utf-8"))
    typer.echo(f"In {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
