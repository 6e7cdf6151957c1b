"""Words that measure and study: perplexity, compare, table, imatrix, refine, notebook."""

# pyright: reportInvalidTypeForm=false

from pathlib import Path
from typing import Annotated

import typer

import quantlab.cli.options as cli


@cli.app.command()
def perplexity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    text: Annotated[
        str | None,
        typer.Option(
            "-f",
            "--file",
            metavar="TEXT",
            help="primer, sampled, wikitext-2-raw or a text file (default: primer, or the base file's text).",
        ),
    ] = None,
    n_ctx: Annotated[
        int | None, typer.Option("-c", "--ctx-size", help="Tokens per chunk, 0: the model's own (default: 512).")
    ] = None,
    chunks: cli.Chunks = None,
    protocol: cli.ProtocolName = "llama.cpp",
    mode: cli.Mode = "float",
    device: cli.Device = "auto",
    device_memory: cli.DeviceMemory = None,
    memory: cli.Memory = None,
    scratch: cli.Scratch = None,
    kl_divergence_base: Annotated[
        Path | None,
        typer.Option(
            "--kl-divergence-base",
            metavar="FILE",
            callback=cli.written(pick=lambda values, all_values: [] if all_values["kl_divergence"] else values),
            help="File for the predictions: written, or read with --kl-divergence.",
        ),
    ] = None,
    kl_divergence: Annotated[
        bool, typer.Option("--kl-divergence", help="Compare with the predictions in the --kl-divergence-base FILE.")
    ] = False,
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Measure the perplexity of a model on a text.

    With --kl-divergence, compare the model with a base's predictions.
    """
    from quantlab.evaluate import perplexity as measure

    options = {"mode": mode, "device": device, "device_memory": device_memory, "memory": memory}
    options |= {"chunks": chunks, "scratch": scratch, "n_ctx": cli.context_size(model, n_ctx)}
    if kl_divergence:
        if kl_divergence_base is None or protocol != "llama.cpp":
            raise typer.BadParameter(
                "needs --kl-divergence-base FILE and --protocol llama.cpp", param_hint="--kl-divergence"
            )
        result = measure.kl_divergence(model, kl_divergence_base, text, **options)
    else:
        options |= {"protocol": protocol, "kl_divergence_base": kl_divergence_base, "overwrite": overwrite}
        options["n_ctx"] = 512 if options["n_ctx"] is None else options["n_ctx"]
        result = measure.perplexity(model, text or "primer", **options)
    cli.report(result, json, overwrite, None if kl_divergence else kl_divergence_base)


@cli.app.command()
def compare(
    base: Annotated[str, typer.Argument(metavar="BASE", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    variants: Annotated[
        list[str], typer.Argument(metavar="[NAME=]VARIANT…", help="Ftypes (Q4_K_M, Q4_K_M+refined), files or recipes.")
    ],
    text: cli.TextName = "primer",
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix for ftypes and recipes.")] = None,
    calibrate_on: cli.CalibrateOn = "sampled",
    rules: cli.Rules = "current",
    n_ctx: cli.ContextSize = 512,
    chunks: cli.Chunks = None,
    protocol: cli.ProtocolName = "llama.cpp",
    mode: cli.Mode = "float",
    device: cli.Device = "auto",
    device_memory: cli.DeviceMemory = None,
    memory: cli.Memory = None,
    scratch: cli.Scratch = None,
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Compare variants with their base: perplexity, KL divergence.

    A variant is a ftype, which is made in memory, a file or a recipe.
    """
    from quantlab.evaluate.perplexity import compare

    options = {"mode": mode, "device": device, "device_memory": device_memory, "memory": memory}
    options |= {"protocol": protocol, "scratch": scratch, "n_ctx": cli.context_size(base, n_ctx), "chunks": chunks}
    options |= {"imatrix": imatrix, "rules": rules, "calibrate_on": calibrate_on}
    cli.report(compare(base, variants, text, **options), json, overwrite)


@cli.app.command()
def table(
    model: Annotated[str, typer.Argument(metavar="MODEL|SHAPE", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    text: Annotated[
        str, typer.Option("-f", "--file", metavar="TEXT", help="primer, sampled or a text file.")
    ] = "primer",
    ftypes: Annotated[str, typer.Option("--ftypes", metavar="A,B,…", help="Rows of the table (default: all).")] = "",
    today: Annotated[
        bool, typer.Option("--today", help="Add the I-quants, with an importance matrix from the text sampled.")
    ] = False,
    calibrate_on: cli.CalibrateOn = "sampled",
    rules: cli.Rules = "current",
    n_ctx: cli.ContextSize = 512,
    chunks: cli.Chunks = None,
    mode: cli.Mode = "float",
    device: cli.Device = "auto",
    device_memory: cli.DeviceMemory = None,
    memory: cli.Memory = None,
    scratch: cli.Scratch = None,
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Print the size and the perplexity of every ftype.

    With --scratch, a stopped run resumes; the rows of --today start again.
    """
    from quantlab.study import tables

    names = [name for name in ftypes.split(",") if name]
    where = {"mode": mode, "device": device, "device_memory": device_memory, "memory": memory}
    options = {"calibrate_on": calibrate_on, "rules": rules, "n_ctx": cli.context_size(model, n_ctx), "chunks": chunks}
    result = tables.size_ppl(model, text, ftypes=names, scratch=scratch, **where, **options)
    if today:
        from quantlab.study.today import with_today

        try:
            result = with_today(result, model, text, calibrate_on=calibrate_on, **where)
        finally:  # what was measured already is shown whatever happens
            cli.report(result, json, overwrite)
    else:
        cli.report(result, json, overwrite)


@cli.app.command()
def imatrix(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="tiny, smollm2, a GGUF file or a checkpoint.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("-f", "--file", metavar="TEXT", help="Calibration text (default: sampled).")
    ] = None,
    outfile: Annotated[
        Path | None,
        typer.Option("-o", "--output-file", callback=cli.written(), help="Output file (default: imatrix.gguf)."),
    ] = None,
    in_file: Annotated[
        list[Path] | None, typer.Option("--in-file", help="Importance matrix to add (repeatable).")
    ] = None,
    n_ctx: cli.ContextSize = 512,
    chunks: cli.Chunks = None,
    process_output: Annotated[bool, typer.Option("--process-output", help="Collect for output.weight also.")] = False,
    legacy: Annotated[bool, typer.Option("--legacy", help="Write the older format, .dat.")] = False,
    show_statistics: Annotated[
        bool, typer.Option("--show-statistics", help="Print a table of statistics of every tensor's inputs.")
    ] = False,
    mode: cli.Mode = "float",
    device: cli.Device = "auto",
    device_memory: cli.DeviceMemory = None,
    memory: cli.Memory = None,
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Collect an importance matrix on a text.

    Without MODEL, add up or describe the matrices of --in-file.
    """
    from quantlab.evaluate.imatrix import imatrix
    from quantlab.files.imatrix_file import merge, read_imatrix
    from quantlab.files.inputs import input_files
    from quantlab.files.output import check_outputs, replacing

    if model is None and text is not None:
        raise typer.BadParameter("a text needs a MODEL", param_hint="-f")
    if model is None and not in_file:
        raise typer.BadParameter("give a model, or importance matrices with --in-file", param_hint="MODEL")
    files = in_file or []
    if model is None and show_statistics and outfile is None:
        matrix = read_imatrix(files[0]) if len(files) == 1 else merge(map(read_imatrix, files), chunk_size=n_ctx)
        cli.report(matrix, json, overwrite)
        return
    outfile = outfile or Path("imatrix.gguf")
    others = [Path(json)] if json not in (None, "-") else []
    check_outputs([outfile, *others], input_files([model, text, *files]), overwrite=True)
    with replacing(outfile, overwrite=overwrite) as part:
        if model is None:
            matrix = merge(map(read_imatrix, files), chunk_size=n_ctx)
        else:
            options = {"process_output": process_output, "in_files": files}
            options |= {"mode": mode, "device": device, "device_memory": device_memory, "memory": memory}
            matrix = imatrix(model, text or "sampled", n_ctx=cli.context_size(model, n_ctx), chunks=chunks, **options)  # pyright: ignore[reportArgumentType]
        matrix.save(part, legacy=legacy, overwrite=True)
    typer.echo(str(outfile), err=cli.prints_to(json, outfile))
    if show_statistics or json:
        cli.report(matrix, json, overwrite, outfile)


Refined = Annotated[
    list[str],
    typer.Argument(
        metavar="MODEL [OUT] FTYPE",
        callback=cli.written(pick=lambda files, _: files[1:2] if len(files) == 3 else []),
        help="GGUF file or checkpoint, output, mixture.",
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option("-f", "--file", metavar="TEXT", help="Calibrate on this text (default: sampled); repeatable."),
]
RefineChunks = Annotated[
    int, typer.Option("--chunks", metavar="N", help="Stop after N chunks of all texts, -1 for the whole texts.")
]
Sweeps = Annotated[int, typer.Option("--sweeps", help="Number of sweeps over codes and scales.")]
Damping = Annotated[
    str, typer.Option("--damping", metavar="auto|X", help="Share of the diagonal to add to the second moments.")
]
OtherMatrix = Annotated[
    Path | None,
    typer.Option(
        "--imatrix", help="Importance matrix for tensors that cannot be refined. I-quants below IQ3_S need one."
    ),
]
Requantize = Annotated[bool, typer.Option("--allow-requantize", help="Allow tensors that are already quantized.")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE", help="Types by tensor, from quantlab recipe.")
]
Judge = Annotated[
    str | None, typer.Option("--judge", metavar="TEXT|none", help="Text for the comparison (default: primer).")
]


@cli.app.command()
def refine(
    files: Refined,
    text: Texts = None,
    n_ctx: cli.ContextSize = 512,
    chunks: RefineChunks = 64,
    sweeps: Sweeps = 2,
    damping: Damping = "auto",
    imatrix: OtherMatrix = None,
    recipe: RecipeFile = None,
    tensor_type: cli.pairs("--tensor-type", "Type of tensors by name; the first match counts.") = None,
    judge: Judge = None,
    rules: cli.Rules = "current",
    allow_requantize: Requantize = False,
    device: cli.Device = "auto",
    device_memory: cli.DeviceMemory = None,
    memory: cli.Memory = None,
    scratch: cli.Scratch = None,
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Quantize with the same types and size, but less damage.

    Codes and scales are fitted to the layer's inputs, at Q2_K to Q6_K, Q4_0 to Q5_1 and IQ2_XXS to IQ4_XS. With
    --scratch, a stopped run resumes. Prints the KL divergence of ordinary and refined bytes on a held-out text.
    """
    from quantlab.evaluate.refine import refine
    from quantlab.files.bundled import read_text
    from quantlab.files.output import is_stream
    from quantlab.study.front import judge_refined
    from quantlab.transform.inspect import inspect
    from quantlab.transform.mixture import parse_tensor_type

    if not 2 <= len(files) <= 3:
        raise typer.BadParameter(
            "give MODEL FTYPE (for example tiny Q4_K_M), or MODEL OUT FTYPE", param_hint="MODEL [OUT] FTYPE"
        )
    texts = text or ["sampled"]
    judge = judge or ("none" if "primer" in texts else "primer")
    if judge in texts:
        raise typer.BadParameter("is a calibration text, choose another or none", param_hint="--judge")
    if judge != "none":
        read_text(judge)  # a missing text is said before anything is refined
    n_ctx = cli.context_size(files[0], n_ctx)  # pyright: ignore[reportAssignmentType]
    where = {"device": device, "device_memory": device_memory, "memory": memory}
    path = refine(
        files[0], files[1] if len(files) == 3 else None, ftype=files[-1], text=texts, n_ctx=n_ctx,
        chunks=None if chunks == -1 else chunks,
        sweeps=sweeps, damping=damping, imatrix=imatrix, recipe=recipe, rules=rules, scratch=scratch,
        allow_requantize=allow_requantize, **where,
        tensor_types=[parse_tensor_type(item) for item in tensor_type or ()], overwrite=overwrite,
    )  # fmt: skip
    typer.echo(str(path), err=cli.prints_to(json, path))
    if is_stream(path):  # it cannot be read again
        return
    if judge == "none":
        cli.report(inspect(path), json, overwrite, path)
        return
    judged = judge_refined(path, files[0], judge, imatrix=imatrix, rules=rules, n_ctx=n_ctx, **where)
    cli.report(judged, json, overwrite, path)
    if not judged.helped:
        typer.echo(
            f"quantlab: on {judge} the refined bytes do no less damage. Calibrate on more or other text.", err=True
        )


@cli.app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def notebook(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The notebook's name, without .ipynb.")],
    picture: Annotated[
        str | None,
        typer.Option(
            "--picture", metavar="FILE", callback=cli.written("is_picture"), help="Write the first figure as PNG."
        ),
    ] = None,
    parameters_file: Annotated[
        Path | None,
        typer.Option("-f", "--parameters_file", metavar="FILE.yaml", help="Parameters, as in notebooks/params/."),
    ] = None,
    overwrite: cli.Overwrite = False,
) -> None:
    """Run a notebook, with parameters as -p KEY VALUE.

    The notebook's second cell lists the keys. Each run has its own folder in data/runs/, outside a checkout in
    ./quantlab-runs/: named after the notebook, the keys and values, and a digest of all of them. -p out FOLDER names
    another. A finished run is repeated only with --overwrite; one that failed or was stopped is repeated in its place.
    """
    from quantlab.files.inputs import input_files
    from quantlab.files.output import check_outputs
    from quantlab.lab import notebooks

    flags, keys, values = ctx.args[::3], ctx.args[1::3], ctx.args[2::3]
    if len(ctx.args) % 3 or any(flag != "-p" for flag in flags):
        raise typer.BadParameter("give parameters as -p KEY VALUE", param_hint="-p")
    given = notebooks.read_parameters(parameters_file) if parameters_file else {}
    given |= dict(zip(keys, values, strict=True))
    if picture:
        check_outputs([Path(picture)], input_files(given.values()), overwrite=True)
    typer.echo(f"Running {name}. The first run on a machine also compiles kernels, 1 to 3 minutes.", err=True)
    folder = notebooks.run(name, given, overwrite=overwrite)
    table = folder / f"{name}.txt"
    if table.is_file():
        typer.echo(f"\n{table.read_text(encoding='utf-8').strip()}\n", err=cli.prints_to(picture))
    files = ", ".join(sorted(path.name for path in folder.iterdir()))
    typer.echo(f"Written to {folder}: {files}", err=cli.prints_to(picture))
    if picture:
        notebooks.picture(name, folder, picture, overwrite=overwrite)
