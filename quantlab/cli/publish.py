"""The words that prove and publish: report, release."""

# pyright: reportInvalidTypeForm=false

from pathlib import Path
from typing import Annotated

import typer

import quantlab.cli.options as cli


def _page_and_json(values: list[str], _) -> list[str]:
    from quantlab.study.report import outputs

    return [str(path) for value in values for path in outputs(value)]


@cli.app.command()
def report(
    base: Annotated[str, typer.Argument(metavar="BASE", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    variants: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]VARIANT…", help="Files, ftypes (Q4_K_M, Q4_K_M+refined), recipes."),
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "-f",
            "--file",
            "--text",
            metavar="[NAME=]TEXT",
            help="Measure on this text, or on chat turns in JSON (default: primer); repeatable.",
        ),
    ] = None,
    outfile: Annotated[
        Path,
        typer.Option(
            "-o", "--output-file", callback=cli.written(pick=_page_and_json), help="Page; its figures go into a .json."
        ),
    ] = Path("report.html"),
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix for ftypes and recipes.")] = None,
    calibrate_on: cli.CalibrateOn = "sampled",
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p", "--prompt", help="Let each file continue this; '' for nothing (default: the first text's beginning)."
        ),
    ] = None,
    n_predict: Annotated[int, typer.Option("-n", "--predict", "--n-predict", help="Tokens of a continuation.")] = 48,
    rules: cli.Rules = "current",
    n_ctx: cli.ContextSize = 512,
    chunks: Annotated[
        int | None,
        typer.Option("--chunks", help="Stop after N chunks of each text; -1: none (default: none, large models 16)."),
    ] = None,
    protocol: cli.ProtocolName = "llama.cpp",
    mode: cli.Mode = "float",
    device: cli.Device = "auto",
    device_memory: cli.DeviceMemory = None,
    memory: cli.Memory = None,
    scratch: cli.Scratch = None,
    overwrite: cli.Overwrite = False,
) -> None:
    """Measure variants on texts, and write a page about them.

    The page holds figures, tests, a plot and digests, and can be published.
    """
    from quantlab.files.model import open as open_model
    from quantlab.study.report import outputs, report

    options = {"mode": mode, "device": device, "device_memory": device_memory, "memory": memory}
    options |= {"protocol": protocol, "scratch": scratch, "chunks": chunks, "imatrix": imatrix, "rules": rules}
    options |= {"calibrate_on": calibrate_on, "prompt": prompt, "n_predict": n_predict, "overwrite": overwrite}
    options["n_ctx"] = n_ctx or open_model(base).hparams.n_ctx
    result = report(base, variants, text or ["primer"], out=outfile, **options)
    typer.echo("\n".join(map(str, [result, *outputs(outfile)])), err=cli.prints_to(outfile))


def _card(name: str, text: str):
    """An option for the model card."""
    return Annotated[str | None, typer.Option(name, help=f"For the card: {text} (default: what the model says).")]


Specs = Annotated[
    list[str],
    typer.Option(
        "--ftypes",
        metavar="A,B,…",
        help="Mixtures, refined ones (Q4_K_M+refined), recipe files; also NAME=SPEC; repeatable.",
    ),
]
ReportTexts = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="[NAME=]TEXT|none",
        help="Measure on this text in the report (default: primer); repeatable; none: no report.",
    ),
]


@cli.app.command()
def release(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A checkpoint, org/model on the hub, a GGUF file, or tiny.")
    ],
    ftypes: Specs,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder; made if missing.")],
    imatrix: Annotated[
        str, typer.Option("--imatrix", metavar="FILE|collect|none", help="Importance matrix; collect makes one.")
    ] = "collect",
    calibration: Annotated[
        str, typer.Option("-f", "--file", metavar="TEXT", help="Calibrate on this text.")
    ] = "sampled",
    text: ReportTexts = None,
    n_ctx: cli.ContextSize = 512,
    chunks: cli.Chunks = None,
    split_max_size: Annotated[
        str | None, typer.Option("--split-max-size", metavar="N(M|G)", help="Put more than this into shards.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="What the files' names begin with.")] = None,
    base_model: _card("--base-model", "org/model on the hub") = None,
    license: _card("--license", "its licence, such as apache-2.0") = None,
    quantized_by: Annotated[str | None, typer.Option("--quantized-by", help="For the card: your name there.")] = None,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="Let each file continue this in the report; '' for nothing.")
    ] = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Allow tensors that are already quantized.")
    ] = False,
    rules: cli.Rules = "current",
    mode: cli.Mode = "float",
    device: cli.Device = "auto",
    device_memory: cli.DeviceMemory = None,
    memory: cli.Memory = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; write nothing.")] = False,
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Make a folder that can be uploaded to the hub.

    It holds files, matrix, layouts, report, model card, Modelfiles and digests. The same command resumes a stopped run.
    Nothing is uploaded; the command that does is printed.
    """
    from quantlab.files.model import open as open_model
    from quantlab.study.release import release

    options = {"mode": mode, "device": device, "device_memory": device_memory, "memory": memory, "rules": rules}
    options |= {"name": name, "base_model": base_model, "license": license, "quantized_by": quantized_by}
    options |= {"prompt": prompt, "allow_requantize": allow_requantize, "split_max_size": split_max_size}
    options |= {"chunks": chunks, "dry_run": dry_run, "overwrite": overwrite, "text": calibration}
    texts = None if text == ["none"] else text or ["primer"]
    specs = [spec for given in ftypes for spec in given.split(",") if spec]
    matrix = None if imatrix == "none" else imatrix
    n_ctx = n_ctx or open_model(model).hparams.n_ctx
    cli.report(release(model, out, ftypes=specs, imatrix=matrix, texts=texts, n_ctx=n_ctx, **options), json, overwrite)  # pyright: ignore[reportArgumentType]
