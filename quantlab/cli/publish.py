"""The words that prove and publish: report."""

from pathlib import Path
from typing import Annotated

import typer

from quantlab.cli.options import (
    CalibrateOn,
    Chunks,
    ContextSize,
    Device,
    DeviceMemory,
    Memory,
    Mode,
    Overwrite,
    ProtocolName,
    Rules,
    Scratch,
    app,
    prints_to,
    written,
)


def _page_and_json(values: list[str], _) -> list[str]:
    from quantlab.study.report import outputs

    return [str(path) for value in values for path in outputs(value)]


@app.command()
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
            "-o", "--output-file", callback=written(pick=_page_and_json), help="Page; its figures go into a .json."
        ),
    ] = Path("report.html"),
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix for ftypes and recipes.")] = None,
    calibrate_on: CalibrateOn = "sampled",
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p", "--prompt", help="Let each file continue this; '' for nothing (default: the first text's beginning)."
        ),
    ] = None,
    n_predict: Annotated[int, typer.Option("-n", "--predict", "--n-predict", help="Tokens of a continuation.")] = 48,
    rules: Rules = "current",
    n_ctx: ContextSize = 512,
    chunks: Chunks = None,
    protocol: ProtocolName = "llama.cpp",
    mode: Mode = "float",
    device: Device = "auto",
    device_memory: DeviceMemory = None,
    memory: Memory = None,
    scratch: Scratch = None,
    overwrite: Overwrite = False,
) -> None:
    """Measure variants on several texts, and write a page that can be published: figures, tests, plot, digests."""
    from quantlab.files.model import open as open_model
    from quantlab.study.report import outputs, report

    options = {"mode": mode, "device": device, "device_memory": device_memory, "memory": memory}
    options |= {"protocol": protocol, "scratch": scratch, "chunks": chunks, "imatrix": imatrix, "rules": rules}
    options |= {"calibrate_on": calibrate_on, "prompt": prompt, "n_predict": n_predict, "overwrite": overwrite}
    options["n_ctx"] = n_ctx or open_model(base).hparams.n_ctx
    result = report(base, variants, text or ["primer"], out=outfile, **options)
    typer.echo("\n".join(map(str, [result, *outputs(outfile)])), err=prints_to(outfile))
