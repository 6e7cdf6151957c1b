"""Words that run a model: fit, chat, serve."""

from pathlib import Path
from typing import Annotated

import typer

import quantlab.cli.options as cli


@cli.app.command()
def fit(
    model: Annotated[str, typer.Argument(metavar="MODEL|SHAPE", help="tiny, yi-34b, a GGUF file or a checkpoint.")],
    ftype: Annotated[str | None, typer.Option("--ftype", metavar="FTYPE", help="Show only this mixture.")] = None,
    vram: Annotated[str, typer.Option(metavar="24GiB", help="Memory of the graphics card.")] = "0",
    ram: Annotated[str | None, typer.Option(metavar="32GiB", help="RAM (default: this machine's).")] = None,
    n_ctx: Annotated[
        int | None, typer.Option("-c", "--ctx-size", help="Tokens of context, 0 for the model's own (default: 4096).")
    ] = None,
    n_gpu_layers: Annotated[
        int | None, typer.Option("-ngl", "--n-gpu-layers", help="Layers on the card (default: as many as fit).")
    ] = None,
    cache_type_k: Annotated[
        str, typer.Option("-ctk", "--cache-type-k", metavar="TYPE", help="Type of the K cache.")
    ] = "f16",
    cache_type_v: Annotated[
        str, typer.Option("-ctv", "--cache-type-v", metavar="TYPE", help="Type of the V cache.")
    ] = "f16",
    n_ubatch: Annotated[int, typer.Option("-ub", "--ubatch-size", help="Tokens that are computed together.")] = 512,
    flash_attn: Annotated[
        bool, typer.Option("--flash-attn/--no-flash-attn", help="Use attention that stores no scores.")
    ] = True,
    rules: cli.Rules = "current",
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", callback=cli.written("is_picture"), help="Draw the memory as bars."),
    ] = None,
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Print the memory that a model needs, and what fits.

    What fits are layers on the card and tokens of context.
    """
    from quantlab.run.fit import fit

    options = {"ftype": ftype, "vram": vram, "ram": ram, "n_ctx": n_ctx, "n_gpu_layers": n_gpu_layers, "rules": rules}
    options |= {"cache_type_k": cache_type_k, "cache_type_v": cache_type_v, "n_ubatch": n_ubatch}
    result = fit(model, flash_attn=flash_attn, **options)
    cli.report(result, json, overwrite, plot)
    if plot is not None:
        from quantlab.study import plots

        ax = plots.memory(result.to_frame(), vram=result.vram, ram=result.ram, title=result.model)
        plots.save(ax, plot, overwrite=overwrite)


RunContext = Annotated[
    int | None, typer.Option("-c", "--ctx-size", help="Tokens of context, 0 for the model's own (default: 2048).")
]
GpuLayers = Annotated[
    int | None, typer.Option("-ngl", "--n-gpu-layers", help="Layers on the card (default: llama.cpp's choice).")
]
Threads = Annotated[int | None, typer.Option("-t", "--threads", help="Threads (default: llama.cpp's choice).")]


@cli.app.command()
def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    system: Annotated[str, typer.Option("-sys", "--system-prompt", help="Instruction before the conversation.")] = "",
    n_ctx: RunContext = None,
    n_gpu_layers: GpuLayers = None,
    threads: Threads = None,
    temp: Annotated[float, typer.Option("--temp", help="Temperature, 0 for always the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", help="Choose among the K likeliest tokens, 0 for all.")] = 40,
    top_p: Annotated[float, typer.Option("--top-p", help="Likeliest tokens of this total probability.")] = 0.95,
    min_p: Annotated[float, typer.Option("--min-p", help="Tokens of this share of the largest probability.")] = 0.05,
    repeat_penalty: Annotated[float, typer.Option("--repeat-penalty", help="Above 1, repetitions are rarer.")] = 1.0,
    seed: Annotated[int, typer.Option("-s", "--seed", help="Seed of the random numbers, -1 for a random seed.")] = -1,
    n_predict: Annotated[
        int, typer.Option("-n", "--predict", "--n-predict", help="Stop an answer after N tokens, -1: never.")
    ] = -1,
) -> None:
    """Chat with a model in the terminal.

    Ctrl-C stops an answer, Ctrl-D exits.
    """
    from quantlab.run.chat import Conversation, Sampling, talk
    from quantlab.run.llama_cpp import Engine, Options
    from quantlab.run.serve import killable

    sampling = Sampling(temp, top_k, top_p, min_p, repeat_penalty, seed, n_predict)
    with killable():
        engine = Engine(model, Options(n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, n_threads=threads))
    with engine:
        talk(Conversation(engine, system, sampling))


@cli.app.command()
def serve(
    model: Annotated[
        str, typer.Option("-m", "--model", metavar="MODEL", help="tiny, smollm2, a GGUF file or a checkpoint.")
    ],
    n_ctx: RunContext = None,
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on, 0 for any free port.")] = 8080,
    n_gpu_layers: GpuLayers = None,
    threads: Threads = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", envvar="LLAMA_API_KEY", help="Key that requests must give."),
    ] = None,
) -> None:
    """Serve a model with llama.cpp's web page and OpenAI's API.

    OpenAI's clients can use it, at http://HOST:PORT/v1.
    """
    from quantlab.run.llama_cpp import Options
    from quantlab.run.serve import serve

    options = Options(n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, n_threads=threads, host=host, port=port, api_key=api_key)
    serve(model, options, report=typer.echo, warn=lambda line: typer.echo(line, err=True))
