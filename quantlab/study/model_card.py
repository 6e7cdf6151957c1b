"""The texts of a release: a model card as the Hugging Face hub reads it, Ollama's Modelfiles, commands.

Names, licences and languages come from untrusted files. In the front matter they are written by a YAML library, in
Markdown every sign of theirs is escaped, and names of files hold only letters, digits, dots, dashes and underscores.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from quantlab.files.model import Model

MIB, GIB = 2**20, 2**30
OLLAMA_CONTEXT = 4096  # tokens that Ollama takes where its Modelfile says nothing
TAGS = ("gguf", "quantlab")
_HUB = re.compile(r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)/?$")
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
}


@dataclass(frozen=True)
class About:
    """A card's statements about the quantized model; empty where nothing is known."""

    name: str  # what the files' names begin with
    title: str  # the model's own name
    base_model: str = ""
    license: str = ""
    license_name: str = ""
    license_link: str = ""
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    quantized_by: str = ""

    @classmethod
    def of(
        cls, model: Model, name: str, *, repository: str | None, base_model: str | None, license: str | None,
        quantized_by: str | None,
    ) -> About:  # fmt: skip
        """Collect what the metadata says; what is given goes before it."""

        def text(key: str) -> str:
            value = model.metadata.get(f"general.{key}")
            return printable(value) if isinstance(value, str) else ""

        def texts(key: str) -> tuple[str, ...]:
            value = model.metadata.get(f"general.{key}")
            return () if value is None or isinstance(value, str | np.ndarray) else tuple(map(printable, value))

        urls = (_HUB.match(text(key)) for key in ("repo_url", "source.repo_url", "source.huggingface.repository"))
        known = next((url[1] for url in urls if url), "")
        return cls(
            name=name,
            title=text("name") or name,
            base_model=printable(base_model or repository or known),
            license=printable(license or text("license")),
            license_name="" if license else text("license.name"),
            license_link="" if license else text("license.link"),
            languages=texts("languages"),
            tags=texts("tags"),
            quantized_by=printable(quantized_by or ""),
        )


@dataclass(frozen=True)
class Quantized:
    """One quantized model of a release."""

    label: str
    files: tuple[str, ...]  # names of the file, or of its shards
    bytes: int  # of all shards
    bpw: float
    types: Counter  # ggml type → tensors
    how: str  # which types were chosen, in one sentence


def printable(text: object) -> str:
    """Return a text in one line, without what cannot be printed."""
    return "".join(char for char in " ".join(str(text).split()) if char.isprintable())


def markdown(text: str) -> str:
    r"""Escape a text for Markdown.

    Examples
    --------
    >>> markdown("<b>|[x](y)")
    '\\<b\\>\\|\\[x\\]\\(y\\)'
    """
    return re.sub(r"([\\`*_{}\[\]()<>#+!|&~$@:])", r"\\\1", text)


def front_matter(about: About, *, has_matrix: bool) -> str:
    """Return the metadata of a card, between two lines of dashes."""
    import yaml  # comes with the package gguf

    data: dict = {"base_model": about.base_model, "base_model_relation": "quantized" if about.base_model else ""}
    data |= {"license": about.license, "license_name": about.license_name, "license_link": about.license_link}
    data |= {"language": list(about.languages), "library_name": "gguf", "pipeline_tag": "text-generation"}
    tags = dict.fromkeys((*about.tags, *TAGS, *(["imatrix"] if has_matrix else [])))
    data |= {"quantized_by": about.quantized_by, "tags": list(tags)}
    kept = {key: value for key, value in data.items() if value}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)}---\n"


def card(
    about: About,
    models: Sequence[Quantized],
    *,
    rows: Sequence[Mapping],
    matrix: str,
    made: str,
    command: str,
    extras: Mapping[str, str],
) -> str:
    """Return README.md.

    `rows` are a report's: figures of each variant on each text, the base's first. `matrix` says in one sentence what
    the importance matrix was collected on (empty: none), `made` how the files were made, `command` what makes them
    again. `extras` says of the other files what they are.
    """
    base = f"[{markdown(about.base_model)}](https://huggingface.co/{about.base_model})"
    base = base if re.fullmatch(r"[\w.-]+/[\w.-]+", about.base_model) else markdown(about.base_model or about.title)
    parts = [
        front_matter(about, has_matrix=bool(matrix)),
        f"# {markdown(about.title)}, GGUF\n",
        f"Quantized files of {base}, for llama.cpp and what is built on it.\n",
        "## Files\n",
        _size_table(models),
        *_figures(models, rows),
        "## How to run them\n",
        _running(about, models),
        "## What was chosen, and why\n",
        "\n".join([f"- `{m.label}`: {m.how} In all: {_types(m.types)}." for m in models]) + "\n",
        "\n\n".join(filter(None, [matrix, made])) + "\n",
        "## What else is here\n",
        "\n".join(f"- `{name}`: {what}" for name, what in extras.items()) + "\n",
        "The same files again:\n",
        f"```\n{command}\n```",
    ]
    return "\n".join(parts) + "\n"


def _types(types: Counter) -> str:
    return ", ".join(f"{n} {qtype}" for qtype, n in types.most_common())


def _bytes(n: int) -> str:
    return f"{n / GIB:.2f} GiB" if n >= GIB else f"{n / MIB:.2f} MiB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _size_table(models: Sequence[Quantized]) -> str:
    rows = [[f"[{m.files[0]}]({m.files[0]})", _shards(m), _bytes(m.bytes), f"{m.bpw:.3f}"] for m in models]
    head = ["file", "shards", "size", "bits per weight"]
    if all(len(m.files) == 1 for m in models):
        head, rows = [head[0], *head[2:]], [[row[0], *row[2:]] for row in rows]
    return _table(head, rows)


def _shards(model: Quantized) -> str:
    return "1" if len(model.files) == 1 else f"{len(model.files)}, all needed"


def _figures(models: Sequence[Quantized], rows: Sequence[Mapping]) -> list[str]:
    """Tables of what was measured, one for each text, and the files that are the best of their size."""
    if not rows:
        return []
    parts = [
        "## What was measured\n",
        "Divergence (KLD, nats) is that of the file's predictions from the model's own.\n",
    ]
    for text in dict.fromkeys(row["text"] for row in rows):
        here = [row for row in rows if row["text"] == text]
        parts += [f"On the text {markdown(str(text))}, {here[0]['n_scored']} tokens scored:\n", _measured(here)]
        labels = {model.label for model in models}
        best = [row["variant"] for row in here if row["on_front"] and row["variant"] in labels]
        parts += [f"No other file here is smaller and diverges less than {', '.join(best)}.\n"] if best else []
    return [*parts, "Errors are standard errors. `report.html` has the tests between any two files.\n"]


def _measured(rows: Sequence[Mapping]) -> str:
    head = ["", "ppl", "KLD, mean", "KLD, 99 % of tokens below", "same top token"]
    cells = []
    for row in rows:
        kld = [f"{row['kld_mean']:.5f} ± {row['kld_se']:.5f}", f"{row['kld_p99']:.4f}", f"{row['same_top_p']:.2%}"]
        is_base = row is rows[0]
        cells.append([markdown(str(row["variant"])), f"{row['ppl']:.4f} ± {row['ppl_se']:.4f}"])
        cells[-1] += ["", "", ""] if is_base else kld
    return _table(head, cells)


def _running(about: About, models: Sequence[Quantized]) -> str:
    """Commands for each file."""
    blocks = []
    for model in models:
        first = model.files[0]
        whole = whole_name(model)
        lines = [f"llama-cli -m {first}"]
        merge = [] if len(model.files) == 1 else [f"quantlab merge {first} {whole}   # Ollama takes whole files"]
        lines += [*merge, f"ollama create {about.name.lower()}:{model.label.lower()} -f {modelfile_name(model)}"]
        lines += [f"lms import {first}"] if not merge else [f"lms import {whole}"]
        lines += [f"quantlab chat {first}"]
        blocks.append("\n".join(lines))
    text = "In the folder with the files: llama.cpp, Ollama, LM Studio, quantlab.\n\n```\n" + "\n\n".join(blocks)
    return f"{text}\n```\n\n`quantlab fit FILE --ctx-size N` says what fits in memory.\n"


def whole_name(model: Quantized) -> str:
    """Return the name of a model's file, merged where it has shards."""
    return re.sub(r"-\d{5}-of-\d{5}\.gguf$", ".gguf", model.files[0])


def modelfile_name(model: Quantized) -> str:
    """Return the name of a model's Modelfile."""
    return f"Modelfile-{model.label}"


def modelfile(model: Quantized, source: Model) -> str:
    """Return Ollama's description of a file: where it is, the context if it is short, and the model's own sampling.

    Source: docs/modelfile.md of Ollama.
    """
    lines = [f"FROM ./{whole_name(model)}"]
    if len(model.files) > 1:
        lines.insert(0, f"# Ollama takes whole files: quantlab merge {model.files[0]} {whole_name(model)}")
    if 0 < source.hparams.n_ctx < OLLAMA_CONTEXT:
        lines.append(f"PARAMETER num_ctx {source.hparams.n_ctx}")
    for key, name in _SAMPLING.items():
        value = source.metadata.get(f"general.sampling.{key}")
        if isinstance(value, np.integer | np.floating) and np.isfinite(value):
            lines.append(f"PARAMETER {name} {value:g}")
    return "\n".join(lines) + "\n"


def upload_command(about: About, folder: str, state: str) -> str:
    """Return the command that uploads a folder to the Hugging Face hub."""
    owner = about.quantized_by if re.fullmatch(r"[\w.-]+", about.quantized_by) else "YOUR-NAME"
    return f"hf upload {owner}/{about.name}-GGUF {shlex.quote(folder)} . --exclude {state}"
