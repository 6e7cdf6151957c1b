"""Shared parts of the words: the application, common options, checks of outputs, reports."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

_TAKES = {"<int>": "N", "<float>": "X", "<path>": "FILE", "<list[Path]>": "FILE", "<str>": "TEXT"}
# modules of the words, in the order of a day's work, and their titles in `quantlab --help`
_TITLES = {
    "files": "Read and write files",
    "measure": "Measure",
    "recipes": "Choose bits",
    "publish": "Publish",
    "run": "Run a model",
}


@dataclass(frozen=True)
class Written:
    """The rule of an option that names an output."""

    # function of `quantlab.files.output` that recognizes files that may be replaced without --overwrite
    own: str | None = None
    also: Sequence[tuple[str, str]] = ()  # files that are written beside it
    # takes the values of the option and all values of the word, returns those that are outputs
    pick: Callable[[list[str], dict], list[str]] = lambda values, _: values


def written(own: str | None = None, also: Sequence[tuple[str, str]] = (), pick: Callable = Written.pick) -> Callable:
    """Mark an option as the name of an output: `typer.Option(…, callback=written())`."""

    def unchanged(value):
        return value

    unchanged.written = Written(own, also, pick)
    return unchanged


class Word(TyperCommand):
    """A word that accepts its model as -m, and checks its outputs before it begins."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self._model() is not None:
            first = str(self._model()).split()[0].strip("[]")
            self.epilog = f"-m MODEL, --model MODEL: the same as {first}, as in llama.cpp's programs."

    def collect_usage_pieces(self, ctx: typer.Context) -> list[str]:
        return ["[OPTIONS]", *(name for name, _ in self._arguments())]

    def format_options(self, ctx: typer.Context, formatter) -> None:
        """Write the arguments by the names that the usage gives them, then the options."""
        options = [param for param in self.get_params(ctx) if param.param_type_name == "option"]
        records = [record for param in options if (record := param.get_help_record(ctx))]
        for title, rows in (("Arguments", self._arguments()), ("Options", [(takes(n), h) for n, h in records])):
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def _arguments(self) -> list[tuple[str, str]]:
        params: list[Any] = self.params
        return [(param.metavar, param.help) for param in params if param.param_type_name == "argument"]

    def _model(self) -> str | None:
        """Return the metavar of the word's first argument, if it is a model (None: it is a name)."""
        if any("-m" in param.opts for param in self.params):
            return None
        first = next((param for param in self.params if not param.opts[0].startswith("-")), None)
        return None if first is None or first.metavar == "NAME" else first.metavar

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        if self._model() is not None:
            args = _model_first(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: typer.Context) -> Any:
        rules = {param.name: getattr(param.callback, "written", None) for param in self.params}
        if any(rules.values()):
            _check(ctx, rules)
            from quantlab.files.progress import announce_compilation

            announce_compilation()
        return super().invoke(ctx)


def takes(text: str) -> str:
    """Replace the type of an option's value by what stands for it: `--chunks <int>` becomes `--chunks N`."""
    return re.sub(r"<[\w\[\]]+>", lambda found: _TAKES[found[0]], text)


class _Group(TyperGroup):
    """The list of the words, under a title for each room."""

    def format_commands(self, ctx: typer.Context, formatter) -> None:
        words = [word for word in self.commands.values() if not word.hidden]
        limit = formatter.width - 6 - max(len(str(word.name)) for word in words)
        for module, title in _TITLES.items():
            here = [word for word in words if word.callback.__module__.endswith(f".{module}")]
            if here:
                with formatter.section(title):
                    formatter.write_dl([(f"{word.name:11}", word.get_short_help_str(limit)) for word in here])


def _model_first(args: list[str]) -> list[str]:
    """Move the value of -m or --model before the other arguments."""
    for i, text in enumerate(args):
        if text in ("-m", "--model") and i + 1 < len(args):
            return [args[i + 1], *args[:i], *args[i + 2 :]]
        if text.startswith("--model="):
            return [text.removeprefix("--model="), *args[:i], *args[i + 1 :]]
        if text == "--":
            break
    return args


def _check(ctx: typer.Context, rules: dict[str, Written | None]) -> None:
    """Check the outputs against all other arguments that name files, the inputs."""
    from quantlab.files.inputs import input_files
    from quantlab.files.output import check_output, check_outputs

    outputs, others = [], list(ctx.args)
    for name, value in ctx.params.items():
        values = value if isinstance(value, list | tuple) else [value]
        texts = [str(text) for text in values if text not in (None, "-")]
        rule = rules[name]
        named = rule.pick(texts, ctx.params) if rule else []
        outputs += [pair for text in named for pair in _files(Path(text), rule)] if rule else []
        others += texts if not named else [text for text in texts if text not in named]
    check_outputs([path for path, _ in outputs], input_files(others), overwrite=True)
    for path, own in outputs:
        check_output(path, overwrite=ctx.params.get("overwrite", False), own=own)


def _files(path: Path, rule: Written) -> Iterator[tuple[Path, Callable | None]]:
    """Yield the files written for an option's `path`, and the test for files that may be replaced."""
    from quantlab.files import output

    yield path, getattr(output, rule.own) if rule.own else None
    if not output.is_stream(path):
        for suffix, own in rule.also:
            yield output.beside(path, suffix), getattr(output, own)


class _Words(typer.Typer):
    """A Typer application whose commands are `Word`s, listed under titles."""

    def command(self, *args, **options):
        return super().command(*args, **{"cls": Word} | options)


app = _Words(
    name="quantlab",
    cls=_Group,
    context_settings={"max_content_width": 100},
    help="Convert, quantize and measure GGUF models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

JsonPath = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        callback=written("is_report"),
        help="Write the result as JSON also; with -, JSON goes to standard output and the table to standard error.",
    ),
]
Rules = Annotated[str, typer.Option("--rules", metavar="current|2023-12", help="Version of llama.cpp's mixture rules.")]
AsLlamaCpp = Annotated[
    bool,
    typer.Option(
        "--as-llama-cpp", help="Write the vocabulary of llama.cpp's converter, even if it gives texts wrong ids."
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace existing outputs (older reports are always replaced).")
]

TextName = Annotated[
    str, typer.Option("-f", "--file", metavar="TEXT", help="primer, sampled, wikitext-2-raw or a text file.")
]
ContextSize = Annotated[int, typer.Option("-c", "--ctx-size", help="Tokens per chunk, 0 for the model's own context.")]
Chunks = Annotated[
    int | None,
    typer.Option(
        "--chunks",
        callback=lambda value: None if value == -1 else value,
        help="Stop after N chunks, -1 for all (default: whole text).",
    ),
]
ProtocolName = Annotated[str, typer.Option("--protocol", metavar="llama.cpp|full", help="Rule for the scored tokens.")]
Mode = Annotated[
    str,
    typer.Option(
        "--mode", metavar="float|half|ggml-cpu", help="Arithmetic: float32, halves on a card, or ggml's CPU code."
    ),
]
Memory = Annotated[
    str | None, typer.Option("--memory", metavar="8GiB", help="Limit of RAM (default: 3/4 of the machine's).")
]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda|mps|cpu-torch",
        help="Device: auto is a usable card if the extra gpu is installed, else the CPU.",
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option("--device-memory", metavar="22GiB", help="Limit of the card's memory (default: free memory)."),
]
CalibrateOn = Annotated[
    str, typer.Option("--calibrate-on", metavar="TEXT", help="Calibration text for variants marked +refined.")
]
Scratch = Annotated[
    Path | None, typer.Option("--scratch", metavar="FOLDER", help="Folder of hidden states, for resuming.")
]


def pairs(name: str, text: str) -> Any:
    """Return a repeatable option REGEX=TYPE."""
    return Annotated[list[str] | None, typer.Option(name, metavar="REGEX=TYPE", help=text)]


def names_in(texts: str | Sequence[str] | None) -> list[str]:
    """Return the names in texts such as `A,B`."""
    texts = [texts] if isinstance(texts, str) else texts or []
    return [name for text in texts for name in text.split(",") if name]


def context_size(model: str, n_ctx: int | None) -> int | None:
    """Return the requested tokens per chunk (0: the model's own context)."""
    from quantlab.files.bundled import is_shape
    from quantlab.files.model import open as open_model

    return open_model(model).hparams.n_ctx if n_ctx == 0 and not is_shape(model) else n_ctx


def as_options(text: str) -> str:
    """Spell a message's arguments for the command line: overwrite=True becomes --overwrite."""
    text = re.sub(r"\b([a-z]\w*)=True\b", lambda found: "--" + found[1].replace("_", "-"), text)
    text = re.sub(r"\b(outfile=FILE|device=cpu)\b", lambda found: "--" + found[1].replace("=", " "), text)
    return text.replace("smaller n_ctx", "smaller --ctx-size")


def prints_to(*outputs: str | Path | None) -> bool:
    """Tell whether an output is standard output, which must then carry nothing else."""
    from quantlab.files.output import descriptor

    return any(path == "-" or descriptor(path) == 1 for path in outputs if path is not None)


def report(result, json: str | None = None, overwrite: bool = False, *outputs: str | Path | None) -> None:
    """Write `result.to_json()` to `--json`, and print `str(result)` even if writing fails."""
    try:
        if json is not None:
            _write_json(result.to_json() + "\n", json, overwrite)
    finally:
        typer.echo(str(result), err=prints_to(json, *outputs))


def _write_json(text: str, path: str, overwrite: bool) -> None:
    from quantlab.files.output import is_report, replacing

    if path == "-":
        typer.echo(text, nl=False)
        return
    with replacing(path, overwrite=overwrite, own=is_report) as part:
        part.write_text(text, encoding="utf-8")
