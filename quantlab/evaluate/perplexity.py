"""Perplexity of a model, and of variants compared with their base."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from quantlab.evaluate import metrics
from quantlab.evaluate.base_file import BaseFile, CompareWithFile, WriteBase, file_bytes
from quantlab.evaluate.check import check_model
from quantlab.evaluate.engine import Choice, find
from quantlab.evaluate.forward_pass import ForwardPass
from quantlab.evaluate.logits import half_noise
from quantlab.evaluate.protocol import Protocol, Windows, cut, require_same, windows_of
from quantlab.evaluate.refined_variants import refined_variants
from quantlab.evaluate.scores import ScoreTokens
from quantlab.evaluate.variants import Variant, as_is, resolve, steps
from quantlab.files.bundled import TextLike, read_text
from quantlab.files.imatrix_file import MatrixLike, as_matrix
from quantlab.files.inputs import input_files
from quantlab.files.model import Model, ModelLike, as_model
from quantlab.files.output import check_apart, check_output, follow, is_stream, replacing
from quantlab.files.progress import announce
from quantlab.result import Result

_SHOWN = ["variant", "bpw", "ppl", "ppl_se", "ln_ratio", "ln_ratio_se", "kld_mean", "kld_se", "kld_noise"]
_SHOWN += ["dp_rms", "same_top_p"]


@dataclass(frozen=True, repr=False)
class _Measured(Result):
    """A protocol, a row of figures per variant, and the figures after each chunk.

    Attributes
    ----------
    protocol : Protocol
    rows : tuple of dict
        Bytes, bits per weight, nats and fractions under the names of DESIGN's JSON.
    running_rows : tuple of dict
        The main figures of each variant over the first chunk, the first two, and so on.
    """

    protocol: Protocol
    rows: tuple[dict, ...]
    running_rows: tuple[dict, ...]

    _look = {"index": False, "float_format": "{:.6g}".format}

    @property
    def running(self) -> pd.DataFrame:
        """The running figures after each chunk, as a table."""
        return pd.DataFrame(self.running_rows)

    def _document(self) -> dict:
        return {"protocol": self.protocol, "rows": self.rows, "running": self.running_rows}

    def _shown(self) -> pd.DataFrame:
        frame = self.to_frame()
        return frame[[column for column in _SHOWN if column in frame]]

    def _lines(self) -> list[str]:
        p = self.protocol
        where = "" if p.device == "cpu" else f", {p.device}, {p.precision}"
        return [
            f"{p.text}: {p.chunks} chunks of {p.n_ctx} tokens, protocol {p.name}, mode {p.mode}{where}, BOS {p.bos}"
        ]


@dataclass(frozen=True, repr=False)
class Perplexity(_Measured):
    """The perplexity of one model."""

    @property
    def ppl(self) -> float:
        """Perplexity."""
        return self.rows[0]["ppl"]

    @property
    def ppl_se(self) -> float:
        """Standard error of the perplexity, for independent tokens."""
        return self.rows[0]["ppl_se"]


@dataclass(frozen=True, repr=False)
class Comparison(_Measured):
    """A base model (the first row) and its variants, measured together."""

    def join(self, other: "Comparison") -> "Comparison":
        """Return the rows of two comparisons, with the base once.

        Raises
        ------
        ValueError
            If the two were measured by different protocols, or against different bases.
        """
        require_same([self.protocol, other.protocol])
        if self.rows[0] != other.rows[0]:
            raise ValueError(
                f"base={self.rows[0]['variant']} and base={other.rows[0]['variant']}, must be the same. "
                "Compare with one base."
            )
        base = other.rows[0]["variant"]
        running = tuple(row for row in other.running_rows if row["variant"] != base)
        return Comparison(self.protocol, self.rows + other.rows[1:], self.running_rows + running)


def perplexity(
    model: ModelLike,
    text: TextLike = "primer",
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    protocol: str = "llama.cpp",
    mode: str = "float",
    device: str = "auto",
    device_memory: str | int | None = None,
    memory: str | int | None = None,
    scratch: str | Path | None = None,
    kl_divergence_base: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Perplexity:
    """Measure the perplexity of a model on a text.

    Parameters
    ----------
    model : str, Path or Model
        A GGUF file, a checkpoint folder, a bundled model's name, or an opened model.
    text : str, Path or Text
        A file, a bundled text's name, or a name that `datasets` loads.
    n_ctx : int
        Tokens per window.
    chunks : int, optional
        Windows at most; default: the whole text.
    protocol : str
        `llama.cpp`: the second half of each window is scored. `full`: every token but the first of each window.
    mode : str
        `float`: in float32, or as exact. `half`: the operands of products rounded to halves, on cards; a comparison
        then says in `kld_noise` what that alone does to the KLD. `ggml-cpu`: all in ggml's own order, for
        llama-perplexity's very numbers.
    device : str
        `cpu`, `cuda`, `mps`, or `cpu-torch`: the cards' code on the CPU. `auto` is a card where the extra `gpu` and a
        card are there, else the CPU.
    device_memory : str or int, optional
        Memory of the card to stay within (default: what is free there).
    memory : str or int, optional
        Memory to stay within, such as `8GiB`; default: three quarters of the machine's.
    scratch : str or Path, optional
        Folder that keeps the hidden states after every layer, so that the same call resumes what was stopped; deleted
        when the run is done.
    kl_divergence_base : str or Path, optional
        File to write the model's predictions to, as llama-perplexity does: about 2 · n_vocab bytes per scored token.
        `kl_divergence` and llama-perplexity compare other models with it.
    overwrite : bool
        Whether that file may be replaced.
    progress : bool
        Say what the run will take, and show a progress bar.

    Returns
    -------
    Perplexity

    Raises
    ------
    FileNotFoundError
        If model or text is not there.
    FileExistsError
        If `kl_divergence_base` exists and `overwrite` is false.
    ValueError
        If the architecture is not known here, the text is too short, the memory too small, or an option out of range.
    """
    opened = as_model(model)
    variants = [as_is(opened, name_of(model, opened))]
    choice = find(mode, device, device_memory)
    windows, record = _cut(opened, text, n_ctx, chunks, protocol, choice, "none")
    run = partial(measure, variants, windows, record, choice, memory, scratch, progress)
    if kl_divergence_base is None:
        scores = run(ScoreTokens())
    else:
        _check_base_file(Path(kl_divergence_base), opened, text, record, overwrite)
        with replacing(kl_divergence_base, overwrite=overwrite) as part, open(part, "wb") as file:
            scores = run(WriteBase(file))
    row = _named(variants[0]) | metrics.perplexity_row(scores[0])
    running = ({"variant": variants[0].name} | row for row in metrics.running(scores[0], scores[0]))
    kept = ("variant", "chunk", "ppl", "ppl_se")
    return Perplexity(record, (row,), tuple({key: row[key] for key in kept} for row in running))


def kl_divergence(
    model: ModelLike,
    base_file: str | Path,
    text: TextLike | None = None,
    *,
    n_ctx: int | None = None,
    chunks: int | None = None,
    mode: str = "float",
    device: str = "auto",
    device_memory: str | int | None = None,
    memory: str | int | None = None,
    scratch: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Compare a model with the predictions in a file that `perplexity` or llama-perplexity wrote.

    The tokens come from the file. What the base gave a probability below e⁻¹⁶ is stored as if it were that, so that
    the figures differ a little from those of `compare`, and equal llama-perplexity's.

    Parameters
    ----------
    model, mode, device, device_memory, memory, scratch, progress
        As for `perplexity`.
    base_file : str or Path
        The file.
    text : optional
        As for `perplexity`: refused if the file was written on another. Default: not checked.
    n_ctx : int, optional
        Refused if the file has another. Default: the file's.
    chunks : int, optional
        Compare on the first chunks only. Default: all in the file.

    Returns
    -------
    Comparison
        The file's row first; its size in bytes is not known.

    Raises
    ------
    FileNotFoundError
        If model, file or text is not there.
    ValueError
        If the file is not whole or belongs to another vocabulary, text or `n_ctx`; and as for `perplexity`.
    """
    file, opened = BaseFile.open(base_file), as_model(model)
    variants = [as_is(opened, name_of(model, opened))]
    choice = find(mode, device, device_memory)
    windows, record = _cut_alike(file, opened, text, n_ctx, chunks, choice)
    base, scores = measure(variants, windows, record, choice, memory, scratch, progress, CompareWithFile(file))
    rows = (
        {"variant": file.path.name, "bytes": None, "bpw": float("nan")} | metrics.perplexity_row(base),
        _named(variants[0]) | metrics.comparison_row(scores, base),
    )
    running = tuple({"variant": variants[0].name} | row for row in metrics.running(scores, base))
    return Comparison(record, rows, running)


def _cut_alike(file: BaseFile, model: Model, text, n_ctx, chunks, choice: Choice) -> tuple[Windows, Protocol]:
    """Return windows and protocol of a file's tokens; refuse a file of another model or text."""
    check_model(model)
    if model.hparams.n_vocab != file.n_vocab:
        raise ValueError(
            f"{file.path}: n_vocab={file.n_vocab}, the model's is {model.hparams.n_vocab}. "
            f"Compare models with the same vocabulary."
        )
    n_chunks, own = file.tokens.shape
    if n_ctx not in (None, own):
        raise ValueError(
            f"{file.path}: n_ctx={own} must be the same as n_ctx={n_ctx}. Leave n_ctx out, or write the file again."
        )
    if chunks is not None and not 1 <= chunks <= n_chunks:
        raise ValueError(
            f"{file.path}: chunks={chunks}, must be 1 to {n_chunks}, the file's chunks. Leave chunks out for all."
        )
    tokens = file.tokens[:chunks]
    name, sha256 = file.path.name, ""
    if text is not None:
        given, record = _cut(model, text, own, len(tokens), "llama.cpp", choice, "none")
        name, sha256 = record.text, record.text_sha256
        if not np.array_equal(given.original, tokens):  # pyright: ignore[reportArgumentType]
            raise ValueError(
                f"{file.path}: was written on another text than {name}. Leave the text out, or give that one."
            )
    made = {"mode": choice.mode, "rules": "none", "text": name, "sha256": sha256, "n_tokens": tokens.size}
    windows, record = windows_of(tokens, model.vocab, name="llama.cpp", **made)
    return windows, choice.recorded(record)


def _check_base_file(path: Path, model: Model, text, record: Protocol, overwrite: bool) -> None:
    """Refuse a file that would replace an input, cannot hold the protocol, or does not fit on the disk."""
    if record.name != "llama.cpp":
        raise ValueError(
            f"{path}: protocol={record.name}, such a file holds only the protocol llama.cpp. Choose protocol=llama.cpp."
        )
    check_apart(path, input_files([model.path, text if isinstance(text, str | Path) else None]))
    check_output(path, overwrite=overwrite)
    needed = file_bytes(record.chunks, record.n_ctx, model.hparams.n_vocab)
    if not is_stream(path) and shutil.disk_usage(follow(path).parent).free < needed:
        raise OSError(f"{path}: needs {needed} bytes, the disk has less. Give fewer chunks, or choose another folder.")


def compare(
    base: ModelLike,
    variants: Sequence[Any],
    text: TextLike = "primer",
    *,
    imatrix: MatrixLike | None = None,
    calibrate_on: TextLike | Sequence[TextLike] = "sampled",
    rules: str = "current",
    n_ctx: int = 512,
    chunks: int | None = None,
    protocol: str = "llama.cpp",
    mode: str = "float",
    device: str = "auto",
    device_memory: str | int | None = None,
    memory: str | int | None = None,
    scratch: str | Path | None = None,
    progress: bool = True,
) -> Comparison:
    """Measure variants of a model together with the model, in one pass over its weights.

    Parameters
    ----------
    base : str, Path or Model
        As for `perplexity`.
    variants : sequence of str, Path or Recipe
        GGUF files, ftypes (`Q4_K_M`), recipes; a string may give a name: `NAME=SPEC`. Ftypes and recipes are quantized
        in memory, layer by layer, to the bytes that `quantize` would write. `Q4_K_M+refined` is what `refine` writes;
        it cannot resume from `scratch`.
    imatrix : str, Path or ImportanceMatrix, optional
        Importance matrix for ftypes and recipes.
    calibrate_on : str, Path or Text
        What to refine with, another text than the one to judge on.
    rules : str
        Rule set of ftypes: `current` or `2023-12`.
    text, n_ctx, chunks, protocol, mode, device, device_memory, memory, scratch, progress
        As for `perplexity`.

    Returns
    -------
    Comparison
        The base's row first.

    Raises
    ------
    FileNotFoundError, ValueError
        As for `perplexity`; and if a variant is not of the same model as the base.
    """
    if isinstance(variants, str | Path):
        variants = [variants]
    opened = as_model(base)
    matrix = as_matrix(imatrix)
    choice = find(mode, device, device_memory)
    windows, record = _cut(opened, text, n_ctx, chunks, protocol, choice, rules)
    noise = half_noise(opened, windows, choice)
    how = {"n_ctx": n_ctx, "imatrix": matrix, "rules": rules, "memory": memory, "progress": progress}
    with refined_variants(opened, variants, text, calibrate_on, scratch=scratch, **how) as given:
        found = [as_is(opened, name_of(base, opened)), *resolve(opened, given, rules=rules, imatrix=matrix)]
        scores = measure(found, windows, record, choice, memory, scratch, progress, ScoreTokens())
    rows, running = [], []
    for variant, score in zip(found, scores, strict=True):
        rows.append(_named(variant) | metrics.comparison_row(score, scores[0]) | noise)
        running += [{"variant": variant.name} | row for row in metrics.running(score, scores[0])]
    return Comparison(record, tuple(rows), tuple(running))


def name_of(model, opened: Model) -> str:
    """Return the stem of a model's file, or the name of its folder."""
    return opened.path.stem if opened.path.is_file() else opened.path.name


def _named(variant: Variant) -> dict:
    return {"variant": variant.name, "bytes": variant.nbytes, "bpw": variant.bpw}


def _cut(model: Model, text, n_ctx, chunks, protocol, choice: Choice, rules) -> tuple[Windows, Protocol]:
    """Check the options that need no text, then cut the text into windows."""
    check_model(model)
    options = {"n_ctx": n_ctx, "chunks": chunks, "name": protocol, "mode": choice.mode, "rules": rules}
    windows, record = cut(read_text(text), model.vocab, **options)
    return windows, choice.recorded(record)


def measure(
    variants: list[Variant], windows: Windows, record: Protocol, choice: Choice, memory, scratch, progress, consumer
):
    """Run the windows through all variants and return the consumer's result."""
    base = variants[0].model
    for variant in variants:
        check_model(variant.model)
    key = pass_key(variants, windows, record)
    with choice(base, windows.tokens.shape[1]) as running, ExitStack() as stack:
        budget = running.plan(variants, windows, memory, keep_states=scratch is not None)
        if scratch is None and not budget.in_memory:
            scratch = stack.enter_context(TemporaryDirectory(prefix="quantlab-", ignore_cleanup_errors=True))
        if scratch is not None:
            scratch = Path(scratch)
            _check_disk(scratch, budget.disk)
        if progress:
            announce(f"{len(variants)} × {windows.tokens.size} tokens: {budget}")
        shown: dict[str, Any] = dict(unit="tokens", unit_scale=1 / (base.hparams.n_layer + 1), disable=not progress)
        bar_format = "{desc}{percentage:3.0f}%|{bar}| {rate_fmt} [{elapsed}<{remaining}]"
        with tqdm(total=steps(variants) * windows.tokens.size, bar_format=bar_format, **shown) as bar:
            forward_pass = ForwardPass(variants, windows, running, budget, bar, scratch, key)
            return forward_pass.run(consumer)


def _check_disk(folder: Path, needed: int) -> None:
    """Refuse a folder without room for the hidden states."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    held = sum(path.stat().st_size for path in folder.glob("states-*.f32"))
    free = shutil.disk_usage(existing).free + held
    if free < needed:
        raise OSError(
            f"{folder}: {free} bytes are free, the hidden states need {needed}. Choose another scratch folder."
        )


def pass_key(variants: list[Variant], windows: Windows, record: Protocol) -> str:
    """Return what hidden states on disk belong to."""
    parts = [asdict(record), windows.tokens.tolist()]
    for variant in variants:
        stat = variant.model.path.stat()
        matrix = {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in variant.imatrix.items()}
        parts.append([str(variant.model.path), stat.st_size, stat.st_mtime_ns, variant.types, matrix])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
