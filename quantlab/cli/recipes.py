"""The words that choose types: sensitivity, recipe."""

# pyright: reportInvalidTypeForm=false

from pathlib import Path
from typing import Annotated, Any

import typer

import quantlab.cli.options as cli

Types = Annotated[
    str | None,
    typer.Option("--types", metavar="A,B,…", help="Candidate types (default: all that can be on the front)."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="A,B,…", help="Types that no tensor may get; repeatable."),
]
Refined = Annotated[bool, typer.Option("--refined", help="Measure with refined bytes, for recipes of refine.")]


@cli.app.command()
def sensitivity(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    text: cli.TextName = "sampled",
    types: Types = None,
    exclude: Exclude = None,
    groups: Annotated[
        str | None,
        typer.Option("--groups", metavar="layer|kind", help="Quantize a layer or kind at once (default: one tensor)."),
    ] = None,
    imatrix: Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix.")] = None,
    around: Annotated[
        str | None, typer.Option("--around", metavar="FTYPE|RECIPE", help="Start of each change (default: the base).")
    ] = None,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="N", help="Measure N layers only, predict the rest.")
    ] = None,
    refined: Refined = False,
    rules: cli.Rules = "current",
    n_ctx: cli.ContextSize = 512,
    chunks: cli.Chunks = None,
    mode: cli.Mode = "float",
    device: cli.Device = "auto",
    device_memory: cli.DeviceMemory = None,
    memory: cli.Memory = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="FOLDER", help="Folder of measurements (default: the user's cache)."),
    ] = None,
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Measure the damage of each tensor at each type.

    An interrupted run resumes.
    """
    from quantlab.quants.ggml_types import CANDIDATES
    from quantlab.study.sensitivity import sensitivity

    options = {"groups": groups, "imatrix": imatrix, "around": around, "sample": sample, "rules": rules}
    options |= {"types": cli.names_in(types) or CANDIDATES, "exclude": cli.names_in(exclude), "refined": refined}
    options |= {"n_ctx": cli.context_size(model, n_ctx), "chunks": chunks, "cache": cache or True}
    options |= {"mode": mode, "device": device, "device_memory": device_memory, "memory": memory}
    cli.report(sensitivity(model, text, **options), json, overwrite)


Size = Annotated[str | None, typer.Option("--target-size", metavar="3MiB", help="Limit: bytes of tensor data.")]
Bpw = Annotated[float | None, typer.Option("--target-bpw", help="Limit: bits per weight.")]
Like = Annotated[str | None, typer.Option("--like", metavar="FTYPE", help="Limit: the size of this ftype.")]
Criterion = Annotated[
    str,
    typer.Option(
        "--criterion", metavar="kld|error", help="What is least: measured divergence, or weighted error of the weights."
    ),
]
SensitivityFile = Annotated[
    Path | None, typer.Option("--sensitivity", metavar="FILE", help="Result of sensitivity (default: measure).")
]
Sample = Annotated[
    int | None, typer.Option("--sample", metavar="N", help="Measure N layers of each kind, predict the others.")
]
Exchanges = Annotated[
    int | None,
    typer.Option(
        "--exchanges", metavar="N", help="Measure N exchanges of types between tensors, keep what helps (default: 48)."
    ),
]
Minutes = Annotated[
    float | None, typer.Option("--minutes", metavar="M", help="Begin no more exchanges after M minutes of them.")
]
Text = Annotated[
    str | None, typer.Option("-f", "--file", metavar="TEXT", help="Calibrate on this text (default: sampled).")
]
Matrix = Annotated[Path | None, typer.Option("--imatrix", help="Importance matrix for recipe and ftypes.")]
CalibrationContext = Annotated[
    int | None,
    typer.Option("-c", "--ctx-size", help="Tokens per chunk of it, 0: the model's own (default: 512)."),
]
CalibrationChunks = Annotated[
    int | None, typer.Option("--chunks", help="Calibrate on N chunks, -1 for the whole text (default: 8).")
]
Judge = Annotated[
    str | None,
    typer.Option(
        "--judge", metavar="TEXT|none", help="Text to measure the recipe on, not that of -f (default: primer)."
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "-o", "--output-file", callback=cli.written(also=[(".json", "is_report")]),
        help="Write a --tensor-type-file, and its origin into <FILE>.json.",
    ),
]  # fmt: skip
Gguf = Annotated[
    Path | None,
    typer.Option(
        "--quantize", metavar="OUT", callback=cli.written(also=[(".quantlab.json", "is_digests")]),
        help="Write the quantized GGUF file also.",
    ),
]  # fmt: skip


@cli.app.command()
def recipe(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="tiny, smollm2, a GGUF file or a checkpoint.")],
    target_size: Size = None,
    target_bpw: Bpw = None,
    like: Like = None,
    keep: cli.pairs("--keep", "Type of tensors by name.") = None,
    min_type: cli.pairs("--min-type", "Narrowest type of tensors by name.") = None,
    max_type: cli.pairs("--max-type", "Widest type of tensors by name.") = None,
    exclude: Exclude = None,
    criterion: Criterion = "kld",
    refined: Refined = False,
    sensitivity: SensitivityFile = None,
    types: Types = None,
    sample: Sample = None,
    exchanges: Exchanges = None,
    minutes: Minutes = None,
    text: Text = None,
    imatrix: Matrix = None,
    n_ctx: CalibrationContext = None,
    chunks: CalibrationChunks = None,
    judge: Judge = None,
    outfile: Out = Path("recipe.txt"),
    gguf: Gguf = None,
    rules: cli.Rules = "current",
    mode: cli.Mode = "float",
    device: cli.Device = "auto",
    device_memory: cli.DeviceMemory = None,
    memory: cli.Memory = None,
    overwrite: cli.Overwrite = False,
    json: cli.JsonPath = None,
) -> None:
    """Choose the type of every tensor under a size limit.

    The limit is --like, --target-size or --target-bpw; the choice does the least damage that was measured.
    """
    from quantlab.files.model import open as open_model
    from quantlab.study import front
    from quantlab.study.exchange import EXCHANGES, exchange
    from quantlab.study.recipe import recipe, size_limit
    from quantlab.transform.mixture import parse_tensor_type
    from quantlab.transform.quantize import quantize

    where = {"device": device, "device_memory": device_memory, "memory": memory}
    base, sizes = open_model(model), _one_limit(target_size=target_size, target_bpw=target_bpw, like=like)
    size_limit(base, **sizes, rules=rules, imatrix=imatrix is not None)  # refused before anything is measured
    asked = {"keep": keep, "min_type": min_type, "max_type": max_type}
    asked = {key: list(map(parse_tensor_type, given or ())) for key, given in asked.items()}
    asked |= {"exclude": cli.names_in(exclude), "criterion": criterion, "imatrix": imatrix, "rules": rules}
    given = {"types": cli.names_in(types) or None, "sample": sample, "chunks": chunks, "n_ctx": n_ctx}
    given |= {"refined": refined or None}
    judge = _check_recipe(given | {"text": text}, sensitivity, criterion, exchanges, minutes, gguf, judge)
    found = sensitivity or _measured(base, text, given | {"n_ctx": cli.context_size(model, n_ctx)}, asked, where, mode)
    best = recipe(found, base, **sizes, **asked)  # pyright: ignore[reportArgumentType]
    if criterion == "kld" and exchanges != 0:
        count = EXCHANGES if exchanges is None else exchanges
        best = exchange(best, found, base, text, exchanges=count, minutes=minutes, imatrix=imatrix, **where)
    best.save(outfile, overwrite=overwrite)
    if gguf is not None:
        options = {"tensor_types": best.tensor_types(), "imatrix": imatrix, "rules": rules, "overwrite": overwrite}
        quantize(base, gguf, ftype=best.ftype, allow_requantize=best.requantizes(base), **options)
    call = best.command(outfile, imatrix=imatrix, text=text, requantize=best.requantizes(base))
    typer.echo("\n".join(map(str, [best] * (judge != "none") + [call])), err=cli.prints_to(json, outfile, gguf))
    where |= {"mode": mode, "imatrix": imatrix, "calibrate_on": text}
    cli.report(best if judge == "none" else front.judge(best, base, judge, **where), json, overwrite, outfile, gguf)


def _one_limit(**limits: Any) -> dict[str, Any]:
    """Return the limits of a size, of which one must be given."""
    if sum(limit is not None for limit in limits.values()) != 1:
        hint = "--target-size, --target-bpw or --like"
        raise typer.BadParameter("give one, for example --like Q4_K_M", param_hint=hint)
    return limits


def _other_text(judge: str | None, text: str | None, sensitivity: Path | None, criterion: str) -> str:
    """Return the text to judge on, by default the primer unless it is the calibration text; errors need none."""
    from quantlab.files.bundled import read_text
    from quantlab.study.sensitivity import Sensitivity

    calibration = text or (Sensitivity.load(sensitivity).protocol["text"] if sensitivity else "sampled")
    calibration = None if criterion == "error" else calibration
    if judge is not None and judge == calibration:
        raise typer.BadParameter("is the calibration text, choose another or none", param_hint="--judge")
    if judge is not None and judge != "none":
        read_text(judge)  # a missing text is said before anything is measured
    return judge or ("none" if calibration == "primer" else "primer")


def _check_recipe(given: dict[str, Any], sensitivity, criterion: str, exchanges, minutes, gguf, judge) -> str:
    """Refuse options that would do nothing; return the text to judge on."""
    used = {"text"} if exchanges != 0 else set()
    if sensitivity is not None and any(value is not None for key, value in given.items() if key not in used):
        raise typer.BadParameter(
            "holds damages. Leave out --types, --sample, --refined, -c and --chunks. -f is for exchanges alone",
            param_hint="--sensitivity",
        )
    if minutes is not None and exchanges == 0:
        raise typer.BadParameter("is a limit for exchanges", param_hint="--minutes")
    if criterion == "error" and (minutes or exchanges or any(given[key] for key in given if key != "types")):
        raise typer.BadParameter(
            "error measures nothing. Leave out -f, -c, --chunks, --sample, --refined, --exchanges and --minutes",
            param_hint="--criterion",
        )
    if given["refined"] and gguf is not None:
        raise typer.BadParameter("writes ordinary bytes; use quantlab refine with --recipe", param_hint="--quantize")
    return _other_text(judge, given["text"], sensitivity, criterion)


def _measured(base, text: str | None, given: dict[str, Any], asked: dict[str, Any], where: dict[str, Any], mode: str):
    """Measure what a recipe is chosen from."""
    from quantlab.quants.ggml_types import CANDIDATES
    from quantlab.study.sensitivity import sensitivity, weight_errors

    options = {"types": CANDIDATES, "chunks": 8} | {key: value for key, value in given.items() if value is not None}
    options["chunks"] = None if options["chunks"] == -1 else options["chunks"]
    options |= {"exclude": asked["exclude"], "imatrix": asked["imatrix"]}
    if asked["criterion"] == "error":
        return weight_errors(base, **{key: options[key] for key in ("types", "exclude", "imatrix")})
    return sensitivity(base, text or "sampled", mode=mode, **options, **where)
