"""A report on quantized files that can be published: one HTML page, and the same figures as JSON."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from quantlab.evaluate.check import check_model
from quantlab.evaluate.engine import Choice, find
from quantlab.evaluate.logits import NOISE_TOKENS, activation_noise, half_noise
from quantlab.evaluate.perplexity import name_of
from quantlab.evaluate.protocol import Protocol, Windows
from quantlab.evaluate.refined_variants import refined_variants
from quantlab.evaluate.texts import TextCut, cut_text, measure_texts
from quantlab.evaluate.variants import Variant, as_is, resolve, split_label
from quantlab.files.bundled import Text, TextLike, read_text
from quantlab.files.conversations import is_chat
from quantlab.files.imatrix_file import MatrixLike, as_matrix
from quantlab.files.inputs import input_files
from quantlab.files.model import ModelLike, as_model
from quantlab.files.output import check_outputs, is_stream, replacing
from quantlab.result import Result
from quantlab.study import report_inputs, report_page
from quantlab.study.report_figures import Measured, on_front

LARGE, LARGE_CHUNKS = 10**8, 16  # weights from which on that many chunks of each text are measured, as `table` has it
_SHOWN = ["text", "variant", "bytes", "bpw", "ppl", "ppl_se", "kld_mean", "kld_se", "kld_p99", "kld_floor"]
_SHOWN += ["same_top_p", "on_front"]


@dataclass(frozen=True, repr=False)
class Report(Result):
    """The measurements of a base model and its variants.

    Attributes
    ----------
    protocol : dict
        `base`, `mode`, `device`, `precision`, `rules`, `n_ctx`, `versions`, `floor_tokens`; and `texts`, a `Protocol`
        for each.
    rows : tuple of dict
        For each text and variant, the base first: size, perplexity, divergence and agreement under the names of
        `quantlab.compare`; `n_scored` tokens; `kld_floor`, what rounding the activations alone does; `on_front`,
        whether no other variant is smaller and diverges less on this text.
    confidence : tuple of dict
        For each text and variant the divergence in bins of the base's top probability.
    pairs : tuple of dict
        For each text any two variants, with a paired test.
    continuation : dict
        `prompt`, `n_predict` and `rows`, the greedy continuations; or the `reason` why there are none.
    files : tuple of dict
        What each variant is, and the types in it.
    inputs : tuple of dict
        `role`, `name`, `bytes` and `sha256` of each file that was read.
    commands : tuple of dict
        `what` each `command` does.
    """

    protocol: dict[str, Any]
    rows: tuple[dict, ...]
    confidence: tuple[dict, ...]
    pairs: tuple[dict, ...]
    continuation: dict[str, Any]
    files: tuple[dict, ...]
    inputs: tuple[dict, ...]
    commands: tuple[dict, ...]

    _look = {"index": False, "float_format": "{:.5g}".format}
    _indent = 1

    def __iter__(self):
        """Yield the rows, so that `pd.DataFrame(report)` is their table."""
        return iter(self.rows)

    def _document(self) -> dict[str, Any]:
        return vars(self)

    def _shown(self) -> pd.DataFrame:
        return self.to_frame()[_SHOWN]

    def _lines(self) -> list[str]:
        texts = ", ".join(f"{p['text']} ({p['chunks']} × {p['n_ctx']} tokens)" for p in self.protocol["texts"])
        return [f"{self.protocol['base']}, measured on {texts}, mode {self.protocol['mode']}"]

    def to_html(self) -> str:
        """Return the page: all in one, nothing is loaded from elsewhere."""
        return report_page.page(json.loads(self.to_json()))

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the page to `path`, and JSON beside it under the same name with the suffix `.json`.

        Into a device or a pipe goes the page alone.

        Raises
        ------
        FileExistsError
            If one of them exists and `overwrite` is false.
        """
        texts = dict(zip(outputs(path), (self.to_html(), self.to_json() + "\n"), strict=False))
        with ExitStack() as stack:
            for output, text in texts.items():
                part = stack.enter_context(replacing(output, overwrite=overwrite))
                part.write_text(text, encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read the JSON of a report.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is something else.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            fields = {name: document[name] for name in cls.__dataclass_fields__}
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path}: is not the JSON of a report. Write one with quantlab report.") from None
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})  # pyright: ignore[reportArgumentType]


def outputs(path: str | Path) -> list[Path]:
    """Return what is written where a page is named: the page, and its JSON unless it goes into a device or a pipe."""
    path = Path(path)
    return [path] if is_stream(path) else [path, json_path(path)]


def json_path(path: Path) -> Path:
    """Return where the JSON of a page stands: `report.json` beside `report.html`.

    Examples
    --------
    >>> json_path(Path("a/report.html")).name, json_path(Path("v1.2")).name
    ('report.json', 'v1.2.json')
    """
    return path.with_suffix(".json") if path.suffix in (".html", ".htm") else path.with_name(path.name + ".json")


def read_reports(paths: Sequence[str | Path], what: str = "rows") -> pd.DataFrame:
    """Read the JSON of several reports as one table.

    Parameters
    ----------
    paths : sequence of str or Path
    what : str
        `rows`, `confidence`, `pairs`, `files` or `inputs`.

    Returns
    -------
    pd.DataFrame
        The rows of each report, and `model` in front: its base. A base of a name that an earlier report has too is
        told apart by the name of its file.

    Raises
    ------
    FileNotFoundError
        If there is no such file, or no path at all.
    ValueError
        If a file is not the JSON of a report, or `what` is none of these.
    """
    if what not in ("rows", "confidence", "pairs", "files", "inputs"):
        raise ValueError(f"what={what}, must be one of rows, confidence, pairs, files, inputs.")
    if not paths:
        raise FileNotFoundError("read_reports: paths=[], must be at least one. Write reports with quantlab report.")
    found: dict[str, pd.DataFrame] = {}
    for path in paths:
        report = Report.load(path)
        name = report.protocol["base"]
        name = f"{name} ({Path(path).stem})" if name in found else name
        found[name] = pd.DataFrame(getattr(report, what)).assign(model=name)
    table = pd.concat(found.values(), ignore_index=True)
    return table[["model", *(column for column in table if column != "model")]]


def report(
    base: ModelLike,
    variants: Sequence[Any],
    texts: TextLike | Sequence[TextLike] | Mapping[str, TextLike] = "primer",
    *,
    out: str | Path | None = None,
    imatrix: MatrixLike | None = None,
    calibrate_on: TextLike | Sequence[TextLike] = "sampled",
    rules: str = "current",
    n_ctx: int = 512,
    chunks: int | None = None,
    protocol: str = "llama.cpp",
    prompt: str | None = None,
    n_predict: int = 48,
    mode: str = "float",
    device: str = "auto",
    device_memory: str | int | None = None,
    memory: str | int | None = None,
    scratch: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """Measure variants of a model on several texts, and write a report that can be published.

    Parameters
    ----------
    base, variants
        As for `quantlab.compare`.
    texts : str, Path or Text, a sequence of them, or a mapping
        What to measure on. A mapping gives names, and so does a string `NAME=FILE`. A file of chat turns (`.json`,
        `.jsonl`) is rendered by the model's chat template, and the assistant's answers alone are scored.
    out : str or Path, optional
        Page to write; JSON goes beside it (`report.html`, `report.json`). Default: nothing is written.
    prompt : str, optional
        What llama.cpp continues greedily with each file (default: the beginning of the first text; empty: this is left
        out). It needs the extra `run`.
    n_predict : int
        Tokens of each continuation.
    chunks : int, optional
        Windows of each text, or conversations, at most; -1 takes all (default: all, 16 of a model of 1e8 weights).
    scratch : str or Path, optional
        Folder that keeps what is needed to resume a stopped run.
    overwrite : bool
        Whether page and JSON may be replaced.
    imatrix, calibrate_on, rules, n_ctx, protocol, mode, device, device_memory, memory, progress
        As for `quantlab.compare`.

    Returns
    -------
    Report

    Raises
    ------
    FileNotFoundError, FileExistsError, ValueError, OSError
        As for `quantlab.compare`; and if two texts have one name, or a text of chat turns cannot be rendered.
    ImportError
        If a text of chat turns needs jinja2, which is not installed.

    Examples
    --------
    >>> found = report("tiny", ["Q4_K_M"], n_ctx=64, chunks=2, prompt="", progress=False)
    >>> [row["variant"] for row in found]
    ['tiny', 'Q4_K_M']
    """
    variants = [variants] if isinstance(variants, str | Path) else list(variants)
    if not variants:
        raise ValueError("variants=[], must be at least one. Give files, ftypes or recipes.")
    named = _read(texts)
    if out is not None:
        read = [base, imatrix, *variants, *(source for source, _ in named)]
        files = input_files(item for item in read if isinstance(item, str | Path))
        check_outputs(outputs(out), files, overwrite=overwrite)
    opened, matrix = as_model(base), as_matrix(imatrix)
    choice = find(mode, device, device_memory)
    check_model(opened)
    most = LARGE_CHUNKS if chunks is None and opened.n_weights >= LARGE else None if chunks == -1 else chunks
    options = {"n_ctx": n_ctx, "chunks": most, "protocol": protocol, "rules": rules}
    cuts = [cut_text(text, opened, choice, is_chat=is_chat(source), **options) for source, text in named]
    how = {"memory": memory, "scratch": scratch, "progress": progress}
    refining = {"n_ctx": n_ctx, "imatrix": matrix, "rules": rules, **how}
    with refined_variants(opened, variants, [text for _, text in named], calibrate_on, **refining) as given:
        models = [as_is(opened, name_of(base, opened)), *resolve(opened, given, rules=rules, imatrix=matrix)]
        results, kept = measure_texts(models, cuts, choice, **how)
        beginning, makes = cuts[0].beginning if prompt is None else prompt, {"imatrix": matrix, "rules": rules}
        said = report_inputs.continuation(models, given, beginning, n_predict, progress=progress, **makes)
        files = report_inputs.describe(models, variants)
        figures = _figures(models, cuts, results, choice, n_ctx)
    asked = {"imatrix": imatrix, "calibrate_on": calibrate_on, "rules": rules, "n_ctx": n_ctx, "chunks": chunks}
    asked |= {"protocol": protocol, "mode": mode, "device": device, "prompt": prompt, "n_predict": n_predict}
    found = Report(
        **figures,
        continuation=said,
        files=files,
        inputs=report_inputs.digests(models, variants, named, imatrix, calibrate_on, progress=progress),
        commands=report_inputs.commands(base, variants, named, models, out, **asked),
    )
    if out is not None:
        found.save(out, overwrite=overwrite)
    for path in kept:
        path.unlink(missing_ok=True)
    return found


# ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(texts) -> list[tuple[object, Text]]:
    """Return what each text was given as, and the text under its name."""
    if isinstance(texts, Mapping):
        pairs = list(texts.items())
    else:
        pairs = [split_label(text) for text in ([texts] if isinstance(texts, str | Path | Text) else texts)]
    if not pairs:
        raise ValueError("texts=[], must be at least one. Give a file, or primer.")
    found = []
    for name, source in pairs:
        text = read_text(source)
        found.append((source, text if name is None else replace(text, name=str(name))))
    names = [text.name for _, text in found]
    if twins := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"texts: two are called {twins[0]}, names must differ. Give one as NAME=FILE.")
    return [(source, text) for source, text in found]


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _figures(models: list[Variant], cuts: list[TextCut], results, choice: Choice, n_ctx: int) -> dict[str, Any]:
    """Return protocol, rows, bins of confidence and pairs."""
    names, base, first = tuple(model.name for model in models), models[0].model, cuts[0].tokens[:NOISE_TOKENS]
    pairs = zip(cuts, results, strict=True)
    measured = [Measured(cut.name, names, tuple(scores), mask) for cut, (scores, mask) in pairs]
    floors = activation_noise(base, models, first)
    noise = half_noise(base, Windows(first[None], first[None], 0), choice)
    return {
        "protocol": _protocol(names[0], [cut.protocol for cut in cuts], n_ctx, len(first)),
        "rows": tuple(row | noise for part in measured for row in _rows(models, part, floors)),
        "confidence": tuple(row for part in measured for row in part.confidence()),
        "pairs": tuple(row for part in measured for row in part.pairs()),
    }


def _protocol(base: str, texts: list[Protocol], n_ctx: int, floor_tokens: int) -> dict[str, Any]:
    """Return what all rows have in common, and the record of each text."""
    first = texts[0]
    shared = {name: getattr(first, name) for name in ("mode", "rules", "device", "precision", "tokenizer")}
    versions = {"python": platform.python_version()}
    for text in texts:
        versions |= text.versions
    shared |= {"n_ctx": n_ctx, "versions": versions, "floor_tokens": floor_tokens, "machine": platform.machine()}
    return {"base": base} | shared | {"texts": [asdict(text) for text in texts]}


def _rows(models: list[Variant], measured: Measured, floors: list[float]) -> list[dict]:
    """Return the figures of each variant on one text, with its size."""
    rows, sizes = measured.rows(), [model.nbytes for model in models]
    front = [False, *on_front(sizes[1:], [row["kld_mean"] for row in rows[1:]])]
    found = []
    for row, model, floor, is_on_front in zip(rows, models, floors, front, strict=True):
        own = {"text": row.pop("text"), "variant": row.pop("variant"), "bytes": model.nbytes, "bpw": model.bpw}
        found.append(own | row | {"kld_floor": floor, "on_front": is_on_front})
    return found
