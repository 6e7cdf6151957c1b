"""Words that read and write files: fetch, convert, sizes, inspect, diff, verify, split, merge, quantize."""

# pyright: reportInvalidTypeForm=false
# typer reads annotations that are made by calls, such as `_flag(…)`; checkers of types allow only names there

from pathlib import Path
from typing import Annotated

import typer

import quantlab.cli.options as cli


@cli.app.command()
def fetch(name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the model: smollm2.")]) -> None:
    """Download a model, check its SHA-256 and print its path."""
    from quantlab.files.bundled import fetch

    typer.echo(str(fetch(name)))


@cli.app.command()
def convert(
    src: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint's folder or file of weights, or org/model on the hub.")
    ],
    outfile: Annotated[
        Path | None,
        typer.Option(
            "--outfile", callback=cli.written(), help="Default: ggml-model-<TYPE>.gguf in the checkpoint's folder."
        ),
    ] = None,
    outtype: Annotated[
        str,
        typer.Option(
            "--outtype", metavar="auto|f32|f16|bf16|q8_0", help="Type of the weights, auto for the checkpoint's own."
        ),
    ] = "auto",
    as_llama_cpp: cli.AsLlamaCpp = False,
    model_name: Annotated[
        str | None,
        typer.Option(
            "--model-name", metavar="NAME", help="Name in the metadata (default: the model card's or folder's)."
        ),
    ] = None,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Write layers that guess several tokens at once (Qwen3.5, Qwen3-Next).")
    ] = False,
    overwrite: cli.Overwrite = False,
) -> None:
    """Convert a checkpoint to GGUF.

    Reads safetensors, .bin, .pth and .pt of Llama, Mistral, Qwen, Gemma, Phi, GLM, gpt-oss and others.
    """
    from quantlab.transform.convert import convert

    options = {"outtype": outtype, "as_llama_cpp": as_llama_cpp, "model_name": model_name, "mtp": mtp}
    path = convert(src, outfile, overwrite=overwrite, **options)
    typer.echo(str(path), err=cli.prints_to(outfile))


@cli.app.command()
def sizes(
    shape: Annotated[
        str, typer.Argument(metavar="SHAPE|FILE", help="A bundled shape (yi-34b), a GGUF file or a checkpoint.")
    ],
    rules: cli.Rules = "current",
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Print the exact size of every ftype, without any weights."""
    from quantlab.transform.plan import sizes

    cli.report(sizes(shape, rules=rules), json, overwrite)


@cli.app.command()
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    layout: Annotated[bool, typer.Option("--layout", help="Print the types as a --tensor-type-file.")] = False,
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Print metadata, tensors, types and mixture of a model."""
    from quantlab.files.model import open
    from quantlab.transform import layout as layouts
    from quantlab.transform.inspect import inspect

    if layout:
        typer.echo("\n".join(layouts.layout_lines(layouts.layout(open(file)))))
        return
    cli.report(inspect(file), json, overwrite)


@cli.app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A GGUF file or a checkpoint.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The file or checkpoint to compare with.")],
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Print the differences from A to B.

    Compares metadata, types, shapes, order, bytes and values. Exit status: 0 where nothing differs, 1 where something
    does.
    """
    from quantlab.transform.diff import diff

    result = diff(a, b)
    cli.report(result, json, overwrite)
    raise typer.Exit(0 if result.is_same else 1)


@cli.app.command()
def verify(
    quant: Annotated[str, typer.Argument(metavar="QUANT", help="The quantized GGUF file.")],
    source: Annotated[str, typer.Option("--source", metavar="BASE", help="The GGUF file or checkpoint behind QUANT.")],
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="The importance matrix used for QUANT.")] = None,
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Check that QUANT comes from BASE.

    Quantizes BASE again in memory. Verdicts: identical; same type, rules and matrix, another compiler's rounding;
    refined, as the file says of itself; other, with what does not fit. Exit status: 1 for the last, 0 for the others.
    """
    from quantlab.transform.verify import verify

    result = verify(quant, source, imatrix=imatrix)
    cli.report(result, json, overwrite)
    raise typer.Exit(0 if result.is_genuine else 1)


@cli.app.command()
def split(
    src: Annotated[str, typer.Argument(metavar="IN", help="A whole GGUF file.")],
    outfile: Annotated[
        str | None, typer.Argument(metavar="[OUT]", help="Beginning of the shards' names (default: IN's name).")
    ] = None,
    max_tensors: Annotated[
        int | None, typer.Option("--split-max-tensors", metavar="N", help="Most tensors in a shard (default: 128).")
    ] = None,
    max_size: Annotated[
        str | None, typer.Option("--split-max-size", metavar="N(M|G)", help="Most megabytes or gigabytes in a shard.")
    ] = None,
    no_tensor_first_split: Annotated[
        bool, typer.Option("--no-tensor-first-split", help="Put only metadata into the first shard.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the shards without writing them.")] = False,
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Split a GGUF file into shards, as llama-gguf-split does.

    The shards are called OUT-00001-of-0000N.gguf.
    """
    from quantlab.transform.split import split

    limits = {"max_tensors": max_tensors, "max_size": max_size, "no_tensor_first_split": no_tensor_first_split}
    cli.report(split(src, outfile, **limits, dry_run=dry_run, overwrite=overwrite), json, overwrite)


@cli.app.command()
def merge(
    src: Annotated[str, typer.Argument(metavar="SHARD", help="Any of the shards.")],
    outfile: Annotated[
        str | None,
        typer.Argument(metavar="[OUT]", callback=cli.written(), help="Default: the shards' name without numbers."),
    ] = None,
    overwrite: cli.Overwrite = False,
) -> None:
    """Merge the shards of a GGUF file into one file."""
    from quantlab.transform.split import merge

    typer.echo(str(merge(src, outfile, overwrite=overwrite)), err=cli.prints_to(outfile))


def _strings(name: str, metavar: str, text: str):
    """Return an option that may be given several times."""
    return Annotated[list[str] | None, typer.Option(name, metavar=metavar, help=text)]


def _flag(name: str, text: str):
    return Annotated[bool, typer.Option(name, help=text)]


def _parts(files: list[str], with_ftype: bool = True) -> tuple[str, str | None, str | None, int | None]:
    """Return IN, OUT, FTYPE and THREADS of IN [OUT] FTYPE [THREADS], parsed as in llama-quantize.

    With --layout-of there is no FTYPE.
    """
    has_out = len(files) > 1 and not with_ftype
    has_out |= len(files) > 2 and not (_is_ftype(files[1]) and files[2].isdecimal())
    names, threads = files[: 1 + has_out + with_ftype], files[1 + has_out + with_ftype :]
    if len(names) < 1 + has_out + with_ftype or len(threads) > 1 or not all(map(str.isdecimal, threads)):
        raise typer.BadParameter(
            "give IN FTYPE (for example tiny Q4_K_M), IN OUT FTYPE, or IN OUT --layout-of FILE; THREADS may follow",
            param_hint="IN [OUT] FTYPE [THREADS]",
        )
    if has_out and with_ftype and _is_ftype(names[1]):
        raise typer.BadParameter(f"give one ftype, or ./{names[1]} for a file of that name", param_hint="OUT")
    ftype = names[-1] if with_ftype else None
    return names[0], names[1] if has_out else None, ftype, int(threads[0]) if threads else None


def _is_ftype(text: str) -> bool:
    from quantlab.transform.mixture import find_ftype

    try:
        return bool(find_ftype(text))
    except ValueError:
        return False


def _outfile(files: list[str], options: dict) -> list[str]:
    """Return OUT if it is given."""
    out = _parts(files, with_ftype=not options["layout_of"])[1]
    return [] if out is None else [out]


Quantized = Annotated[
    list[str],
    typer.Argument(
        metavar="IN [OUT] FTYPE [THREADS]",
        callback=cli.written(also=[(".quantlab.json", "is_digests")], pick=_outfile),
        help="GGUF file or checkpoint, output, mixture, number of threads (default: all cores).",
    ),
]
LayoutOf = Annotated[
    str | None, typer.Option("--layout-of", metavar="FILE", help="Give each tensor its type in this GGUF file.")
]
PruneLayers = Annotated[
    str | None, typer.Option("--prune-layers", metavar="L0,L1,…", help="Leave out these layers, numbered from 0.")
]
Reuse = Annotated[Path | None, typer.Option(metavar="OLD", help="Copy unchanged tensors from an older output.")]


@cli.app.command()
def quantize(
    files: Quantized,
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix in either format.")] = None,
    include_weights: _strings("--include-weights", "NAME", "Use the matrix only for names that contain this.") = None,
    exclude_weights: _strings("--exclude-weights", "NAME", "Do not use it for names that contain this.") = None,
    tensor_type: _strings("--tensor-type", "REGEX=TYPE", "Type of tensors by name; the first match counts.") = None,
    tensor_type_file: _strings("--tensor-type-file", "FILE", "Types by tensor, separated by white space.") = None,
    output_tensor_type: Annotated[str | None, typer.Option(metavar="TYPE", help="Type of output.weight.")] = None,
    token_embedding_type: Annotated[str | None, typer.Option(metavar="TYPE", help="Type of token_embd.weight.")] = None,
    layout_of: LayoutOf = None,
    pure: _flag("--pure", "Give all tensors the base type.") = False,
    leave_output_tensor: _flag("--leave-output-tensor", "Keep output.weight unchanged.") = False,
    allow_requantize: _flag("--allow-requantize", "Allow tensors that are already quantized.") = False,
    keep_split: _flag("--keep-split", "Write the same shards as the input has.") = False,
    prune_layers: PruneLayers = None,
    override_kv: _strings("--override-kv", "KEY=TYPE:VALUE", "Metadata to set: int, float, bool or str.") = None,
    no_fallback: _flag("--no-fallback", "Refuse tensors whose rows do not fit the blocks.") = False,
    via: Annotated[str | None, typer.Option(metavar="f16", help="Round a checkpoint's weights to F16 first.")] = None,
    reuse: Reuse = None,
    histogram: _flag("--histogram", "Show how often each code is used, per tensor.") = False,
    dry_run: _flag("--dry-run", "Print the plan and write nothing.") = False,
    as_llama_cpp: cli.AsLlamaCpp = False,
    rules: cli.Rules = "current",
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Quantize a GGUF file or a checkpoint.

    An interrupted run resumes where it stopped. Writes OUT and, for a later --reuse, OUT.quantlab.json with digests of
    all tensors. While it runs, the unfinished output is OUT.part and OUT.part.json. With --json, also the plan: totals,
    and the type of every tensor.
    """
    from quantlab.transform.mixture import parse_tensor_type, read_tensor_types
    from quantlab.transform.plan import Plan
    from quantlab.transform.prune import layers_of
    from quantlab.transform.quantize import quantize

    src, outfile, ftype, threads = _parts(files, with_ftype=not layout_of)
    if threads:
        import numba

        from quantlab.quants.compiled import config

        numba.set_num_threads(min(threads, config.NUMBA_NUM_THREADS))
    options = {
        "ftype": ftype, "layout_of": layout_of, "rules": rules, "imatrix": imatrix,
        "include_weights": include_weights or (), "exclude_weights": exclude_weights or (), "pure": pure,
        "output_tensor_type": output_tensor_type, "token_embedding_type": token_embedding_type, "via": via,
        "leave_output_tensor": leave_output_tensor, "allow_requantize": allow_requantize, "keep_split": keep_split,
        "override_kv": override_kv or (), "fallback": not no_fallback, "as_llama_cpp": as_llama_cpp,
        "prune_layers": layers_of(prune_layers) if prune_layers else (),
    }  # fmt: skip
    options["tensor_types"] = [parse_tensor_type(text) for text in tensor_type or ()]
    options["tensor_types"] += [pair for path in tensor_type_file or () for pair in read_tensor_types(path)]

    def say(item):
        if isinstance(item, Plan) and (dry_run or json):
            typer.echo(item.to_frame().to_string(index=False), err=cli.prints_to(json, outfile))
            cli.report(item, json, overwrite, outfile)
        else:
            typer.echo(cli.as_options(str(item)), err=cli.prints_to(json, outfile))

    options |= {"reuse": reuse, "histogram": histogram, "dry_run": dry_run, "overwrite": overwrite}
    path = quantize(src, outfile, report=say, **options)
    if path is not None and path.is_file():
        say(f"{path}: {path.stat().st_size / 2**20:.2f} MiB")
