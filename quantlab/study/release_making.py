"""The steps of a release, each of which notes what it has finished."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import quantlab
from quantlab.evaluate.check import check_model
from quantlab.evaluate.imatrix import imatrix as collect
from quantlab.evaluate.refine import refine
from quantlab.evaluate.refined_variants import is_refined
from quantlab.files.bundled import bundled_path, read_text
from quantlab.files.hub import find_checkpoint, repository_of
from quantlab.files.imatrix_file import ImportanceMatrix, as_matrix, read_imatrix
from quantlab.files.inputs import input_files
from quantlab.files.model import Model
from quantlab.files.model import open as open_model
from quantlab.files.progress import announce
from quantlab.study import release_plan
from quantlab.study.changes import kind_of
from quantlab.study.model_card import Quantized, card, modelfile, modelfile_name
from quantlab.study.release_folder import SUMS, Folder
from quantlab.study.release_plan import Item
from quantlab.transform.job import Job
from quantlab.transform.layout import layout_lines
from quantlab.transform.one_pass import quantize_together
from quantlab.transform.plan import bits_per_weight
from quantlab.transform.rules import is_quantizable
from quantlab.transform.split import split

COLLECT = "collect"  # an importance matrix on the spot
CARD, PAGE, FIGURES = "README.md", "report.html", "report.json"
MAX_LICENSE = 1 << 20  # bytes of a licence that is copied


class Making:
    """One release on its way."""

    def __init__(self, given, out: Path, name: str | None, how: Mapping, cut: Mapping, progress: bool):
        is_file = Path(given).suffix.lower() == ".gguf" or bundled_path(str(given))
        path = Path(given) if is_file else find_checkpoint(given)
        self.given, self.out, self.how, self.cut, self.progress = str(given), out, dict(how), dict(cut), progress
        self.model: Model = open_model(given if bundled_path(str(given)) else path)
        self.repository = repository_of(self.model.path.absolute()) if self.model.is_checkpoint else None
        self.name = release_plan.release_name(self.model, name)
        self.prompt: str | None = None
        self.about: Any = None  # what the card says of the model
        self.calibration: Any = None  # a Text where something is collected or refined
        self.said: dict[str, str | None] = {}  # options for the card

    # ---- before anything is written

    def plan(self, ftypes, imatrix, text, texts, rules: str, allow_requantize: bool, max_size) -> None:
        """Find out what there will be, and refuse what cannot be made."""
        self.max_size, self.rules = max_size, rules
        self.calibration, self.texts, self.windows = None, release_plan.read_texts(texts), None
        self.matrix_given = None if isinstance(imatrix, str) and imatrix == COLLECT else as_matrix(imatrix)
        self.collects = isinstance(imatrix, str) and imatrix == COLLECT
        self.specs = specs = [ftypes] if isinstance(ftypes, str | Path) else list(ftypes)
        if self.collects or any(map(is_refined, map(str, specs))):
            self.calibration = read_text(text)
            twins = [name for name, (_, item) in self.texts.items() if item.text == self.calibration.text]
            if twins:
                raise ValueError(f"texts: {twins[0]} is what is calibrated on, must be another text. Name another.")
        if self.collects:
            check_model(self.model)
            self.windows = release_plan.calibration_windows(self.model, self.calibration, **self.cut)
            expected = release_plan.expected_matrix(self.model, self.calibration, self.windows)
        else:
            expected = self.matrix_given
        self.items = release_plan.items_of(self.model, specs, expected, rules, allow_requantize)
        if self.texts or any(item.is_refined for item in self.items):
            check_model(self.model)
        self.jobs = self._jobs(expected)
        for job in self.jobs:
            if job.refusals:
                raise ValueError(job.refusals[0])

    def _jobs(self, matrix: ImportanceMatrix | None) -> list[Job]:
        named = () if matrix is None else (f"quantize.imatrix.file=str:{self.matrix_name}",)
        items = [replace(item, options=replace(item.options, override_kv=named)) for item in self.items]
        return [item.job(self.model, self.out, self.name, matrix, self.max_size) for item in items]

    def refine_chunks(self) -> int:
        """Return how many chunks of the calibration text files are refined with."""
        given = self.cut["chunks"]
        return release_plan.REFINE_CHUNKS if given is None else min(given, release_plan.REFINE_CHUNKS)

    @property
    def matrix_name(self) -> str:
        """Name of the importance matrix's file."""
        return f"{self.name}.imatrix.gguf"

    @property
    def has_matrix(self) -> bool:
        """Tell whether files are quantized with an importance matrix."""
        return self.collects or self.matrix_given is not None

    def files_of(self, job: Job) -> tuple[str, ...]:
        """Return the names of the files that a job writes."""
        return tuple(output.path.name for output in job.outputs)  # pyright: ignore[reportOptionalMemberAccess]

    def layout_name(self, item: Item) -> str:
        """Return the name of the list of an item's types."""
        return f"layouts/{self.name}-{item.label}.txt"

    def names(self) -> dict[str, str]:
        """Return the names of all files of the release, and what each is."""
        found = {}
        for item, job in zip(self.items, self.jobs, strict=True):
            found |= dict.fromkeys(self.files_of(job), f"the model, {item.label}")
        if self.has_matrix:
            found[self.matrix_name] = "the importance matrix"
        for item in self.items:
            found[self.layout_name(item)] = f"the types of {item.label}, a --tensor-type-file"
            found[f"Modelfile-{item.label}"] = f"{item.label} for Ollama"
        found |= {path.name: "the model's licence" for path in self.licenses()}
        found |= {PAGE: "figures, tests and digests", FIGURES: "the same for programs"} if self.texts else {}
        return found | {CARD: "this card", SUMS: "digests of all files, for sha256sum -c"}

    def licenses(self) -> list[Path]:
        """Return the licences beside a checkpoint."""
        folder = self.model.path
        found = sorted(folder.glob("LICENSE*")) if self.model.is_checkpoint and folder.is_dir() else []
        kept = (path for path in found if path.is_file() and path.stat().st_size <= MAX_LICENSE)
        return [path for path in kept if release_plan.file_name(path.name) == path.name]

    def check_inputs(self, given: Sequence) -> None:
        """Refuse a folder that the call reads from, and a release into the checkpoint itself."""
        read = input_files([self.model.path, *(item for item in given if isinstance(item, str | Path))])
        inside = [path for path in read if path.resolve().is_relative_to(self.out.resolve())]
        if inside:
            raise ValueError(f"{self.out}: holds {inside[0].name}, which the call reads. Name another folder.")

    def identity(self) -> str:
        """Return a digest of everything that the bytes depend on."""
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in self.model.files]
        items = [(i.label, i.ftype, i.options.tensor_types, i.is_refined) for i in self.items]
        matrix = None if self.matrix_given is None else _digest_of(self.matrix_given)
        texts = [(name, text.sha256) for name, (_, text) in self.texts.items()]
        calibration = self.calibration and (self.calibration.name, self.calibration.sha256)
        said = [quantlab.__version__, files, items, matrix, self.collects, calibration, texts, self.cut]
        said += [
            self.how["mode"],
            self.how["device"],
            self.rules,
            self.max_size,
            self.name,
            vars(self.about),
            self.prompt,
        ]
        return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()

    def check_room(self, folder: Folder) -> None:
        """Refuse a disk on which the quantized files do not fit."""
        missing = [
            (item, job) for item, job in zip(self.items, self.jobs, strict=True) if not self._is_done(folder, job)
        ]
        needed = sum(job.nbytes * (2 if item.is_refined and len(job.outputs) > 1 else 1) for item, job in missing)
        free = shutil.disk_usage(self.out if self.out.is_dir() else self.out.parent).free
        if needed > free + folder.unfinished_bytes():
            raise OSError(
                f"{self.out}: needs {needed} bytes, the disk has {free} free. Free some space or name another."
            )

    def preview(self) -> tuple[list[dict], dict[str, float]]:
        """Return the files, with the sizes of the quantized ones, and an estimate of the time by step."""
        pairs = list(zip(self.items, self.jobs, strict=True))
        given = {"calibration": self.windows, "text": self.calibration, "texts": self.texts}
        given |= {"refine_chunks": self.refine_chunks()}
        seconds = release_plan.seconds(self.model, pairs, **given, cut=self.cut, how=self.how)
        sizes = {output.path.name: output.nbytes for job in self.jobs for output in job.outputs}  # pyright: ignore[reportOptionalMemberAccess]
        names = self.names().items()
        return [{"file": n, "what": what, "bytes": sizes.get(n), "sha256": None} for n, what in names], seconds

    # ---- the steps

    def run(self, folder: Folder) -> None:
        """Take all steps that are not done yet."""
        matrix = self._matrix(folder)
        self.jobs = self._jobs(matrix)
        self._quantize(folder)
        for item, job in zip(self.items, self.jobs, strict=True):
            if item.is_refined and not self._is_done(folder, job):
                self._refine(folder, item, job, matrix)
        models = [self._quantized(item, job, folder) for item, job in zip(self.items, self.jobs, strict=True)]
        for item, model, job in zip(self.items, models, self.jobs, strict=True):
            folder.write(self.layout_name(item), "\n".join(layout_lines(self._layout(job))) + "\n")
            folder.write(modelfile_name(model), modelfile(model, self.model))
        for path in self.licenses():
            folder.write(path.name, path.read_bytes())
        rows = self._report(folder, models) if self.texts else ()
        extras = {n: w for n, w in self.names().items() if not n.endswith(".gguf") or n == self.matrix_name}
        said = {"matrix": self._matrix_said(matrix), "made": self._made(), "command": self.command()}
        folder.write(CARD, card(self.about, models, rows=rows, extras=extras, **said))
        folder.close()

    def _is_done(self, folder: Folder, job: Job) -> bool:
        return all(name in folder for name in self.files_of(job))

    def _matrix(self, folder: Folder) -> ImportanceMatrix | None:
        """Return the matrix, from its file."""
        if not self.has_matrix:
            return None
        path = self.out / self.matrix_name
        if self.matrix_name not in folder:
            matrix = self.matrix_given
            if self.collects:
                matrix = collect(self.model, self.calibration, progress=self.progress, **self.cut, **self.how)
            matrix.save(path, overwrite=True)  # pyright: ignore[reportOptionalMemberAccess]
            folder.finish(self.matrix_name)
        return read_imatrix(path)

    def _quantize(self, folder: Folder) -> None:
        """Make all plain files that are missing, in one pass."""
        plain = [job for item, job in zip(self.items, self.jobs, strict=True) if not item.is_refined]
        missing = [job for job in plain if not self._is_done(folder, job)]
        if missing:
            if self.progress:
                announce(f"{len(missing)} files in one pass over {self.model.path.name}")
            quantize_together(missing, progress=self.progress)
            folder.finish(*(name for job in missing for name in self.files_of(job)))

    def _refine(self, folder: Folder, item: Item, job: Job, matrix: ImportanceMatrix | None) -> None:
        """Make one refined file, in shards where they are asked for."""
        whole = self.out / f"{self.name}-{item.label}.gguf"
        work = folder.work(item.label)
        is_split = len(job.outputs) > 1
        target = work / whole.name if is_split else whole
        refine(
            self.model, target, ftype=item.ftype, text=self.calibration, n_ctx=self.cut["n_ctx"], imatrix=matrix,
            tensor_types=item.options.tensor_types, rules=self.rules, memory=self.how["memory"],
            scratch=work / "state", overwrite=True, progress=self.progress, chunks=self.refine_chunks(),
            allow_requantize=item.options.allow_requantize,
        )  # fmt: skip
        if is_split:
            split(target, whole, max_size=self.max_size, overwrite=True)
        folder.finish(*self.files_of(job))
        shutil.rmtree(work)

    def _quantized(self, item: Item, job: Job, folder: Folder) -> Quantized:
        """Describe a finished model."""
        types = Counter(step.choice.qtype for step in job.steps)
        data = sum(step.spec.nbytes for step in job.steps)
        if item.recipe is not None:
            how = f"types of the recipe {release_plan.file_name(item.recipe.name)}."
        else:
            how = f"types of llama.cpp's mixture {item.ftype} (rules {self.rules})."
        how += _more_bits(job)
        if item.is_refined:
            text = release_plan.file_name(self.calibration.name)
            how += f" Codes and scales were chosen with the layers' inputs on {text}."
        files = self.files_of(job)
        size = sum(folder.files[name]["bytes"] for name in files)
        return Quantized(item.label, files, size, 8 * data / self.model.n_weights, types, how)

    def _layout(self, job: Job) -> dict[str, str]:
        arch = self.model.hparams.arch
        steps = [step for step in job.steps if is_quantizable(step.tensor.name, step.tensor.shape, arch)]
        return {step.tensor.name: step.choice.qtype for step in steps}

    def _report(self, folder: Folder, models: Sequence[Quantized]) -> Sequence[Mapping]:
        """Return the rows of the report, which is made if it is missing."""
        from quantlab.study.report import Report, report

        if PAGE in folder and FIGURES in folder:
            return Report.load(self.out / FIGURES).rows
        variants = [f"{model.label}={self.out / model.files[0]}" for model in models]
        texts = {name: source for name, (source, _) in self.texts.items()}
        given = {"rules": self.rules, "prompt": self.prompt, "scratch": folder.work("report")}
        found = report(self.model, variants, texts, progress=self.progress, **given, **self.cut, **self.how)  # pyright: ignore[reportArgumentType]
        found = replace(found, commands=({"what": "these files and this report", "command": self.command()},))
        found.save(self.out / PAGE, overwrite=True)
        folder.finish(PAGE, FIGURES)
        return found.rows

    # ---- what is said

    def command(self) -> str:
        """Return the command that makes the release again, without folders of this machine."""
        is_name = bundled_path(self.given) is not None or not Path(self.given).exists()
        model = self.about.base_model or (self.given if is_name else Path(self.given).name)
        words = ["quantlab", "release", model, "--out", f"{self.name}-GGUF"]
        words += ["--ftypes", ",".join(_basename(spec) for spec in self.specs)]
        if not self.collects:
            words += ["--imatrix", self.matrix_name if self.has_matrix else "none"]
        if self.calibration is not None and self.calibration.name != "sampled":
            words += ["-f", self.calibration.name]
        for name, (source, _) in self.texts.items():
            file = _basename(source) if isinstance(source, str | Path) else name
            words += ["--text", file if file == name else f"{name}={file}"]
        words += [] if self.texts else ["--text", "none"]
        words += [] if self.cut["n_ctx"] == 512 else ["-c", str(self.cut["n_ctx"])]
        words += [] if self.cut["chunks"] is None else ["--chunks", str(self.cut["chunks"])]
        words += [] if self.rules == "current" else ["--rules", self.rules]
        words += [] if self.max_size is None else ["--split-max-size", str(self.max_size)]
        words += [word for key, value in self.said.items() if value is not None for word in (key, str(value))]
        return shlex.join(words)

    def _matrix_said(self, matrix: ImportanceMatrix | None) -> str:
        if matrix is None:
            return ""
        names = ", ".join(release_plan.file_name(Path(name).name) for name in matrix.datasets) or "an unnamed text"
        return (
            f"The importance matrix weights the error of each column by its inputs, over {matrix.chunk_count} chunks "
            f"of {names}: columns with large inputs matter most."
        )

    def _made(self) -> str:
        plain = sum(not item.is_refined for item in self.items)
        parts = [f"Files from one pass over the model's weights: {plain}."] if plain else []
        if plain < len(self.items):
            parts.append(f"Refined files, each from a pass of its own: {len(self.items) - plain}.")
        check = f"quantlab verify FILE --source MODEL{f' --imatrix {self.matrix_name}' if self.has_matrix else ''}"
        return f"{' '.join(parts)} `{check}` checks any of them."


def _more_bits(job: Job) -> str:
    """Say which kinds of tensors have more bits than the type of most weights."""
    matrices = [step for step in job.steps if len(step.tensor.shape) > 1]
    weights = Counter()
    for step in matrices:
        weights[step.choice.qtype] += step.tensor.n_weights
    base = weights.most_common(1)[0][0]
    above = [step for step in matrices if bits_per_weight(step.choice.qtype) > bits_per_weight(base)]
    kinds = dict.fromkeys(kind_of(step.tensor.name) for step in above)
    return f" More bits than {base} go to {', '.join(kinds)}, where errors cost more." if kinds else ""


def _basename(given) -> str:
    """Return what was given, a path without its folders."""
    label, eq, spec = str(given).rpartition("=")
    return f"{label}{eq}{Path(spec).name}"


def _digest_of(matrix: ImportanceMatrix) -> str:
    digest = hashlib.sha256(repr((matrix.chunk_count, matrix.chunk_size, matrix.datasets)).encode())
    for name in sorted(matrix.sums):
        digest.update(name.encode() + matrix.sums[name].tobytes() + matrix.counts[name].tobytes())
    return digest.hexdigest()
