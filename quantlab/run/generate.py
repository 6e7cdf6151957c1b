"""One prompt continued by several bit widths, with the first token at which a quantized model differs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from quantlab.files.arguments import check_number, check_whole
from quantlab.files.bundled import bundled_path, model_path, runs_dir
from quantlab.result import Result
from quantlab.run.chat import Sampling
from quantlab.run.llama_cpp import Engine, Options, as_gguf
from quantlab.transform.mixture import find_ftype
from quantlab.transform.quantize import quantize


@dataclass(frozen=True)
class Continuation:
    """The continuation that one model wrote.

    A token may hold part of a character, which then reads `�`.
    """

    variant: str  # the ftype, or the file's stem
    bytes: int  # of its file
    tokens: tuple[int, ...]  # ids
    pieces: tuple[str, ...]  # the text of each token
    n_same: int  # tokens before the first that differs from the first model's

    @property
    def text(self) -> str:
        """The continuation."""
        return "".join(self.pieces)


@dataclass(frozen=True, repr=False)
class Generation(Result):
    """One prompt, continued by several models, of which the first is the reference.

    Attributes
    ----------
    prompt : str
    seed, temp, n_predict : int, float, int
        Sampling: temperature 0 always takes the likeliest token.
    rows : tuple[Continuation, ...]
    """

    prompt: str
    seed: int
    temp: float
    n_predict: int
    rows: tuple[Continuation, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per model: variant, bytes, n_same, text."""
        columns = ("variant", "bytes", "n_same", "text")
        return pd.DataFrame([[getattr(row, column) for column in columns] for row in self.rows], columns=columns)

    def _document(self) -> dict[str, Any]:
        protocol = {"prompt": self.prompt, "seed": self.seed, "temp": self.temp, "n_predict": self.n_predict}
        return {"protocol": protocol, "rows": [vars(row) | {"text": row.text} for row in self.rows]}

    def __str__(self) -> str:
        lines = [f"{self.prompt!r} continued; [ ] marks the first token that differs from {self.rows[0].variant}'s"]
        for row in self.rows:
            before, first, after = _split(row)
            shown = f"{before}[{first}]{after}" if first else before
            lines.append(f"{row.variant:>10} {row.n_same:4} same: {shown!r}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = []
        for row in self.rows:
            before, first, after = (escape(part) for part in _split(row))
            marked = f"<mark>{first}</mark>" if first else ""
            cells = f"<th>{escape(row.variant)}</th><td>{row.bytes / 1024**2:.1f} MiB</td><td>{row.n_same}</td>"
            text = f"<td style='text-align:left;white-space:pre-wrap'>{before}{marked}{after}</td>"
            rows.append(f"<tr>{cells}{text}</tr>")
        head = "<tr><th>variant</th><th>file</th><th>same tokens</th>"
        head += "<th style='text-align:left'>continuation</th></tr>"
        return f"<p>{escape(self.prompt)} …</p><table>{head}{''.join(rows)}</table>"


def generate(
    models: Sequence[str | Path],
    prompt: str,
    *,
    base: str | Path | None = None,
    n_predict: int = 48,
    seed: int = 1,
    temp: float = 0.0,
    n_threads: int | None = None,
    **options,
) -> Generation:
    """Continue one prompt with several models and the same seed.

    Parameters
    ----------
    models : sequence of str or Path
        GGUF files, and ftypes ("Q4_K_M"), which `base` is quantized to for as long as it takes. The first is what the
        others are compared with.
    prompt : str
        Continued as it is, without a chat template.
    base : str or Path, optional
        A GGUF file, a bundled model's name or a checkpoint; ftypes need it.
    n_predict : int
        Tokens to generate at most.
    seed : int
        Of the sampling, where `temp` is not 0.
    temp : float
        Temperature; 0 always takes the likeliest token.
    n_threads : int, optional
        Default: llama.cpp's choice.
    **options
        Of `quantlab.quantize`: rules, imatrix, …

    Raises
    ------
    ImportError
        If xllamacpp is not installed.
    FileNotFoundError
        If there is no such model.
    ValueError
        If an ftype is given without `base`, no model at all, a number is out of range, or llama.cpp cannot load a file.

    Examples
    --------
    >>> generate(["F16", "Q2_K"], "The weights of", base="tiny", n_predict=12)  # doctest: +SKIP
    """
    check_whole(n_predict=n_predict, seed=seed, n_threads=n_threads)
    check_number(temp=temp)
    models = [models] if isinstance(models, str | Path) else models
    if not models:
        raise ValueError("generate: models=[], must name at least one. Give GGUF files or ftypes.")
    Sampling(temp=temp, seed=seed, n_predict=n_predict)  # refuses numbers out of range before the first model is made
    rows: list[Continuation] = []
    for model in models:
        with tempfile.TemporaryDirectory(dir=runs_dir(), prefix="generate-") as folder:
            path, variant = _file_of(model, base, Path(folder), options)
            tokens, pieces = _continue(path, prompt, n_predict, seed, temp, n_threads)
            reference = rows[0].tokens if rows else tokens
            rows.append(Continuation(variant, path.stat().st_size, tokens, pieces, _n_same(reference, tokens)))
    return Generation(prompt, seed, temp, n_predict, tuple(rows))


def _file_of(model: str | Path, base: str | Path | None, folder: Path, options: dict) -> tuple[Path, str]:
    """Return the GGUF file of a model or ftype, and its name."""
    if isinstance(model, Path) or bundled_path(str(model)) or Path(model).exists() or str(model).endswith(".gguf"):
        path = as_gguf(model)
        return path, path.stem if Path(model).is_file() else Path(model).name
    ftype = find_ftype(model)
    if base is None:
        raise ValueError(
            f"generate: models has the ftype {ftype.name}, which needs base. Give the model to quantize as base."
        )
    path = folder / f"{ftype.name}.gguf"
    quantize(model_path(base), path, ftype=ftype.name, report=lambda line: None, **options)
    return path, ftype.name


def _continue(
    path: Path, prompt: str, n_predict: int, seed: int, temp: float, n_threads: int | None
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the token ids of the continuation and their texts."""
    request = {"prompt": prompt, "n_predict": n_predict, "seed": seed, "temperature": temp, "logprobs": 1}
    with Engine(path, Options(n_threads=n_threads)) as engine:
        answer = engine.complete(request)
    tokens = answer["choices"][0]["logprobs"]["content"]
    texts = (bytes(token["bytes"]).decode("utf-8", "replace") for token in tokens)
    return tuple(token["id"] for token in tokens), tuple(texts)


def _n_same(reference: tuple[int, ...], tokens: tuple[int, ...]) -> int:
    """Return the number of tokens before the first difference."""
    pairs = enumerate(zip(reference, tokens, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(reference), len(tokens)))


def _split(row: Continuation) -> tuple[str, str, str]:
    """Return the text before, at and after the first token that differs."""
    i = row.n_same
    return "".join(row.pieces[:i]), "".join(row.pieces[i : i + 1]), "".join(row.pieces[i + 1 :])
