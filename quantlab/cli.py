"""The command line: `quantlab WORD …`, each word a few lines over one public function.

A word imports what it needs inside its body, so that `quantlab --help` starts at once. It checks nothing itself: the
public function raises a built-in exception with a whole sentence, and `main` prints that sentence as one line and exits
with 1.
"""

import errno
import os
import sys
import warnings
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
    warnings.showwarning = lambda message, *_: typer.echo(f"quantlab: {message}", err=True)
    try:
        app()
    except SystemExit as left:
        if left.code == 130:  # how typer passes a KeyboardInterrupt on, without a word
            typer.echo("quantlab: interrupted", err=True)
        raise
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
def fetch(name: Annotated[str, typer.Argument(metavar="NAME", help="What to fetch: smollm2.")]) -> None:
    """Fetch a model that is not bundled into the cache folder, checked by SHA-256, and print its path."""
    from quantlab.files.bundled import fetch

    typer.echo(str(fetch(name)))


@app.command()
def convert(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint's folder or file of weights, or org/model on the hub.")
    ],
    outfile: Annotated[
        Path | None, typer.Option("--outfile", help="Default: ggml-model-<TYPE>.gguf in the checkpoint's folder.")
    ] = None,
    outtype: Annotated[
        str, typer.Option("--outtype", metavar="auto|f32|f16|bf16|q8_0", help="auto keeps the checkpoint's own type.")
    ] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint to GGUF: safetensors, .bin, .pth, .pt; Llama 1-3, Mistral, Yi, SmolLM, Qwen 2 and 3."""
    from quantlab.transform.convert import convert

    typer.echo(str(convert(src, outfile, outtype=outtype, overwrite=overwrite)))


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
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    json: JsonPath = None,
) -> None:
    """Print what is in a model: metadata, tensors, types, sizes, and the mixture where it is a known one."""
    from quantlab.transform.inspect import inspect

    report(inspect(file), json)


def _strings(name: str, metavar: str, text: str):
    """An option that may be given several times."""
    return Annotated[list[str] | None, typer.Option(name, metavar=metavar, help=text)]


def _flag(name: str, text: str):
    return Annotated[bool, typer.Option(name, help=text)]


@app.command()
def quantize(
    files: Annotated[
        list[str], typer.Argument(metavar="IN [OUT] FTYPE", help="GGUF file or checkpoint; output; mixture.")
    ],
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix, of either format.")] = None,
    include_weights: _strings("--include-weights", "NAME", "Use the matrix only where the name contains this.") = None,
    exclude_weights: _strings("--exclude-weights", "NAME", "Do not use it where the name contains this.") = None,
    tensor_type: _strings("--tensor-type", "REGEX=TYPE", "Type of the tensors so named; the first that fits.") = None,
    tensor_type_file: _strings("--tensor-type-file", "FILE", "More of these, between white space.") = None,
    output_tensor_type: Annotated[str | None, typer.Option(help="Type of output.weight.")] = None,
    token_embedding_type: Annotated[str | None, typer.Option(help="Type of token_embd.weight.")] = None,
    pure: _flag("--pure", "The base type for all tensors.") = False,
    leave_output_tensor: _flag("--leave-output-tensor", "Keep output.weight as it is.") = False,
    allow_requantize: _flag("--allow-requantize", "Quantize what is quantized already.") = False,
    keep_split: _flag("--keep-split", "Write the same shards as the input has.") = False,
    override_kv: _strings("--override-kv", "KEY=TYPE:VALUE", "Metadata to set: int, float, bool or str.") = None,
    no_fallback: _flag("--no-fallback", "Refuse where rows do not fit the type's blocks.") = False,
    via: Annotated[str | None, typer.Option(metavar="f16", help="Round a checkpoint to F16 first.")] = None,
    reuse: Annotated[
        Path | None, typer.Option(metavar="OLD", help="Copy what did not change from an older output.")
    ] = None,
    histogram: _flag("--histogram", "Show how often each code is used, per tensor.") = False,
    dry_run: _flag("--dry-run", "Stop after the plan; write nothing.") = False,
    rules: Rules = "current",
    overwrite: Overwrite = False,
    json: JsonPath = None,
) -> None:
    """Quantize a GGUF file or a checkpoint; a run that was interrupted goes on where it stopped.

    With --json, the plan: totals, and the type of every tensor.
    """
    from quantlab.transform.mixture import parse_tensor_type, read_tensor_types
    from quantlab.transform.plan import Plan, plan
    from quantlab.transform.quantize import quantize

    if not 2 <= len(files) <= 3:
        raise typer.BadParameter("give IN FTYPE, or IN OUT FTYPE", param_hint="IN [OUT] FTYPE")
    src, outfile, ftype = files[0], files[1] if len(files) == 3 else None, files[-1]
    options = {
        "ftype": ftype, "rules": rules, "imatrix": imatrix, "include_weights": include_weights or (),
        "exclude_weights": exclude_weights or (), "output_tensor_type": output_tensor_type,
        "token_embedding_type": token_embedding_type, "pure": pure, "leave_output_tensor": leave_output_tensor,
        "allow_requantize": allow_requantize, "keep_split": keep_split, "override_kv": override_kv or (),
        "fallback": not no_fallback, "via": via,
    }  # fmt: skip
    options["tensor_types"] = [parse_tensor_type(text) for text in tensor_type or ()]
    options["tensor_types"] += [pair for path in tensor_type_file or () for pair in read_tensor_types(path)]

    def say(item):
        if isinstance(item, Plan) and (dry_run or json):
            typer.echo(item.to_frame().to_string(index=False), err=json == "-")
            report(item, json)
        else:
            typer.echo(item, err=json == "-")

    if dry_run:
        say(plan(src, outfile, **options))
    else:
        quantize(src, outfile, reuse=reuse, histogram=histogram, overwrite=overwrite, report=say, **options)


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


@app.command()
def fit(
    model: Annotated[str, typer.Argument(metavar="MODEL|SHAPE", help="tiny, yi-34b, a GGUF file or a checkpoint.")],
    ftype: Annotated[str | None, typer.Option("--ftype", metavar="FTYPE", help="Only this mixture.")] = None,
    vram: Annotated[str, typer.Option(metavar="24GiB", help="Memory of the graphics card.")] = "0",
    ram: Annotated[str | None, typer.Option(metavar="32GiB", help="Memory of the machine; this one's.")] = None,
    n_ctx: Annotated[int | None, typer.Option("-c", "--ctx-size", help="Tokens of context; 4096.")] = None,
    n_gpu_layers: Annotated[
        int | None, typer.Option("-ngl", "--n-gpu-layers", help="Layers on the card; the most that fit.")
    ] = None,
    cache_type_k: Annotated[str, typer.Option("-ctk", "--cache-type-k", help="Type of the K cache.")] = "f16",
    cache_type_v: Annotated[str, typer.Option("-ctv", "--cache-type-v", help="Type of the V cache.")] = "f16",
    n_ubatch: Annotated[int, typer.Option("-ub", "--ubatch-size", help="Tokens that are computed at once.")] = 512,
    flash_attn: Annotated[
        bool, typer.Option("--flash-attn/--no-flash-attn", help="Attention without stored scores.")
    ] = True,
    rules: Rules = "current",
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the parts as bars.")] = None,
    json: JsonPath = None,
) -> None:
    """Print what a model takes to run, and how many layers and how long a context fit."""
    from quantlab.run.fit import fit

    options = {"ftype": ftype, "vram": vram, "ram": ram, "n_ctx": n_ctx, "n_gpu_layers": n_gpu_layers, "rules": rules}
    options |= {"cache_type_k": cache_type_k, "cache_type_v": cache_type_v, "n_ubatch": n_ubatch}
    result = fit(model, flash_attn=flash_attn, **options)
    report(result, json)
    if plot is not None:
        from quantlab.study import plots

        plots.save(plots.memory(result.to_frame(), vram=result.vram, ram=result.ram, title=result.model), plot)


RunContext = Annotated[int | None, typer.Option("-c", "--ctx-size", help="Tokens of context; 2048.")]
GpuLayers = Annotated[
    int | None, typer.Option("-ngl", "--n-gpu-layers", help="Layers on the graphics card; what llama.cpp finds.")
]
Threads = Annotated[int | None, typer.Option("-t", "--threads", help="Threads; what llama.cpp finds.")]


@app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    system: Annotated[str, typer.Option("-sys", "--system-prompt", help="What the model is told first.")] = "",
    n_ctx: RunContext = None,
    n_gpu_layers: GpuLayers = None,
    threads: Threads = None,
    temp: Annotated[float, typer.Option("--temp", help="Temperature; 0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", help="Only from so many of the likeliest; 0 from all.")] = 40,
    top_p: Annotated[float, typer.Option("--top-p", help="Only from the likeliest of this probability.")] = 0.95,
    min_p: Annotated[float, typer.Option("--min-p", help="Only from this share of the likeliest's.")] = 0.05,
    repeat_penalty: Annotated[float, typer.Option("--repeat-penalty", help="Above 1, repeats are rarer.")] = 1.0,
    seed: Annotated[int, typer.Option("-s", "--seed", help="-1 takes a random one.")] = -1,
    n_predict: Annotated[int, typer.Option("-n", "--predict", "--n-predict", help="Tokens per answer at most.")] = -1,
) -> None:
    """Talk to a model in the terminal; Ctrl-C stops an answer, Ctrl-D leaves."""
    from quantlab.run.chat import Conversation, Sampling, talk
    from quantlab.run.llama_cpp import Engine, Options
    from quantlab.run.serve import killable

    sampling = Sampling(temp, top_k, top_p, min_p, repeat_penalty, seed, n_predict)
    with killable():
        engine = Engine(model, Options(n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, n_threads=threads))
    with engine:
        talk(Conversation(engine, system, sampling))


@app.command()
def serve(
    model: Annotated[str, typer.Option("-m", "--model", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    n_ctx: RunContext = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on; 0 takes a free one.")] = 8080,
    n_gpu_layers: GpuLayers = None,
    threads: Threads = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="LLAMA_API_KEY", help="Requests must give this key.")
    ] = None,
) -> None:
    """Serve a model: llama.cpp's web page, and an API for OpenAI's clients."""
    from quantlab.run.llama_cpp import Options
    from quantlab.run.serve import serve

    options = Options(n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, n_threads=threads, host=host, port=port, api_key=api_key)
    serve(model, options, report=typer.echo, warn=lambda line: typer.echo(line, err=True))


if __name__ == "__main__":
    main()
