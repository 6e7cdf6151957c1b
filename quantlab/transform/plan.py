"""Plans of quantizations: the bytes of every ftype, fallbacks, memory, disk and time."""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from quantlab import quants
from quantlab.arch import Hparams, complete, tensor_shapes
from quantlab.files import bundled
from quantlab.files.byte_range import PLAIN_DTYPES
from quantlab.files.checkpoint_metadata import read_config, rope_factors
from quantlab.files.machine import peak_memory, physical_memory
from quantlab.files.model import WEIGHTS, Model
from quantlab.files.model import open as open_model
from quantlab.files.output import beside, follow, is_stream
from quantlab.files.recognize import short
from quantlab.quants import block_bytes, block_size, row_bytes
from quantlab.result import Result
from quantlab.transform.job import FLOATS, Job, Options, make_job
from quantlab.transform.mixture import FTYPES, RULES, Choice, choose_types
from quantlab.transform.slabs import SLAB, weights_in_flight

if TYPE_CHECKING:
    import pandas as pd

MIB = 1024**2
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
SAMPLE = 1 << 17  # weights of the calibration


@dataclass(frozen=True)
class SizeRow:
    """One ftype's size: bytes of tensor data (without header and padding) and bits per weight."""

    ftype: str
    bytes: int
    bpw: float


@dataclass(frozen=True)
class SizeTable(Result):
    """The exact size of a model in every ftype.

    Attributes
    ----------
    model : str
        The shape's or the file's name.
    rules : str
        The rule set of the mixtures.
    n_weights : int
        Weights of all tensors, norms included.
    rows : tuple[SizeRow, ...]
        From the widest ftype to the narrowest.
    """

    model: str
    rules: str
    n_weights: int
    rows: tuple[SizeRow, ...]

    def _document(self) -> dict[str, Any]:
        protocol = {"model": self.model, "rules": self.rules, "n_weights": self.n_weights}
        return {"protocol": protocol, "rows": self.rows}

    def _lines(self) -> list[str]:
        return [f"{self.model}, {self.n_weights:,} weights, rules {self.rules}"]

    def _shown(self) -> pd.DataFrame:
        frame = self.to_frame()
        frame.insert(1, "MiB", (frame["bytes"] / MIB).map("{:.2f}".format))
        frame.insert(2, "GiB", (frame["bytes"] / 1024**3).map("{:.3f}".format))
        frame["bpw"] = frame["bpw"].map("{:.4f}".format)
        return frame


def sizes(shape_or_file: str | Path, *, rules: str = "current") -> SizeTable:
    """Compute the exact size of a model in every ftype, without any weights.

    Parameters
    ----------
    shape_or_file : str or Path
        A bundled shape's name ("llama-7b", "yi-34b", …), a bundled model's, a GGUF file or a checkpoint folder.
    rules : str
        "current" or "2023-12".

    Returns
    -------
    SizeTable
        Bytes of tensor data as llama-quantize's log adds them up. A file's table has a COPY row for the file as it is.

    Raises
    ------
    FileNotFoundError
        If there is neither a file nor a bundled shape of that name.
    ValueError
        If the rule set is not known.

    Examples
    --------
    >>> table = sizes("llama-7b", rules="2023-12").to_frame().set_index("ftype")
    >>> int(table.loc["Q4_K_M", "bytes"])
    4080263168
    """
    model, hparams, shapes, source = look_up(shape_or_file)
    n_weights = sum(math.prod(shape) for shape in shapes.values())
    rows = []
    for ftype in FTYPES.values():
        if rules in RULES and rules not in ftype.rules or (ftype.name == "COPY" and source is None):
            continue
        choices = choose_types(hparams, shapes, ftype.name, rules=rules, source=source)
        n_bytes = sum(tensor_bytes(shapes[name], choice.qtype) for name, choice in choices.items())
        rows.append(SizeRow(ftype.name, n_bytes, n_bytes * 8 / max(n_weights, 1)))
    return SizeTable(model, rules, n_weights, tuple(sorted(rows, key=lambda row: -row.bytes)))


def look_up(shape_or_file: str | Path):
    """Return a model's name, hyper-parameters, shapes and (for a file) present types."""
    name = str(shape_or_file)
    if bundled.is_shape(name):
        shape = bundled.shape(name)
        hparams = Hparams(**{key: value for key, value in shape.items() if key not in ("name", "source")})
        return shape["name"], complete(hparams), tensor_shapes(hparams), None
    if folder := _of_config_alone(Path(name)):
        config = read_config(folder)
        factors = {tensor: values.shape for tensor, values in rope_factors(config).items()}
        return folder.resolve().name, complete(config), tensor_shapes(config) | factors, None
    opened = open_model(name)
    return opened.path.name, opened.hparams, opened.shapes, {tensor.name: tensor.qtype for tensor in opened}


def _of_config_alone(path: Path) -> Path | None:
    """Return a checkpoint's folder if only its configuration is used: given itself, or without weights."""
    if path.name in ("config.json", "params.json") and path.is_file():
        return path.parent
    configured = path.is_dir() and any((path / name).is_file() for name in ("config.json", "params.json"))
    return path if configured and not any(file.suffix in (*WEIGHTS, ".gguf") for file in path.iterdir()) else None


def fallbacks(choices: Mapping[str, Choice], shapes: Mapping[str, tuple[int, ...]]) -> pd.DataFrame:
    """List the tensors whose rows do not fit the wanted type, with their fallback.

    Parameters
    ----------
    choices, shapes
        What `choose_types` returned, and was given.

    Returns
    -------
    pd.DataFrame
        One row per group: ``columns`` (row length), ``wanted``, ``qtype``, ``tensors``, ``share`` (fraction of all
        weights), ``bpw_gained`` (bits per weight that the whole model grew by). Empty where nothing fell back.
    """
    import pandas as pd

    return pd.DataFrame(_fallbacks(choices, shapes), columns=_ACCOUNT)


_ACCOUNT = ["columns", "wanted", "qtype", "tensors", "share", "bpw_gained"]


def _fallbacks(choices: Mapping[str, Choice], shapes: Mapping[str, tuple[int, ...]]) -> list[tuple]:
    total = sum(math.prod(shape) for shape in shapes.values())
    groups: dict[tuple, list[str]] = {}
    for name, choice in choices.items():
        if choice.qtype != choice.wanted:
            groups.setdefault((shapes[name][-1], choice.wanted, choice.qtype), []).append(name)
    rows = []
    for (columns, wanted, qtype), names in sorted(groups.items()):
        n_weights = sum(math.prod(shapes[name]) for name in names)
        gained = n_weights / total * (bits_per_weight(qtype) - bits_per_weight(wanted))
        rows.append((columns, wanted, qtype, len(names), n_weights / total, gained))
    return rows


def tensor_bytes(shape: tuple[int, ...], qtype: str) -> int:
    """Return the bytes of a tensor's data, without padding."""
    return math.prod(shape[:-1]) * row_bytes(qtype, shape[-1])


def bits_per_weight(qtype: str) -> float:
    """Return the bits that one weight takes in `qtype`, scales included."""
    return 8 * block_bytes(qtype) / block_size(qtype)


# ---- one quantization


@dataclass(frozen=True)
class Plan(Result):
    """The input, output and resources of one quantization.

    Attributes
    ----------
    job : Job
        Files, metadata, and every tensor with its type.
    bytes_read, bytes_written : int
        Tensor data that will be read; whole files that will be written.
    peak_memory : int
        Bytes, an estimate: what the process has now and the slabs in flight.
    memory : int
        Bytes of memory that this machine has.
    free_disk : int or None
        Bytes free where the output goes; None where it is no file.
    seconds : float
        Expected time of the kernels, from samples that each of them encoded while the plan was made.
    """

    job: Job
    bytes_read: int
    bytes_written: int
    peak_memory: int
    memory: int
    free_disk: int | None
    seconds: float

    @property
    def refusals(self) -> tuple[str, ...]:
        """Reasons why the quantization cannot run (empty: it can)."""
        refusals = list(self.job.refusals)
        path = self.job.outputs[0].path
        if self.free_disk is not None and self.bytes_written > self.free_disk:
            refusals.append(
                f"{path}: needs {self.bytes_written} bytes, the disk has {self.free_disk} free. "
                f"Free some space or choose another folder."
            )
        if self.peak_memory > self.memory:
            refusals.append(
                f"{path}: needs {self.peak_memory} bytes of memory, this machine has {self.memory}. Use a larger one."
            )
        return tuple(refusals)

    @property
    def bpw(self) -> float:
        """Bits per weight of the output's tensor data."""
        steps = self.job.steps
        return sum(step.spec.nbytes for step in steps) * 8 / sum(step.tensor.n_weights for step in steps)

    @property
    def fallbacks(self) -> pd.DataFrame:
        """The tensors whose rows do not fit the wanted type; see `fallbacks`."""
        return fallbacks(*self._choices())

    def _choices(self) -> tuple[dict[str, Choice], dict[str, tuple[int, ...]]]:
        steps = self.job.steps
        return {s.tensor.name: s.choice for s in steps}, {s.tensor.name: s.tensor.shape for s in steps}

    def check(self) -> None:
        """Raise ValueError or OSError if the quantization cannot run."""
        if self.refusals:
            raise (ValueError if self.job.refusals else OSError)(self.refusals[0])

    def to_frame(self) -> pd.DataFrame:
        """Return the tensors in the order of processing: name, shape, source, type, why, bytes before and after."""
        import pandas as pd

        pairs = [(step.tensor, step) for step in self.job.steps]
        rows = [(t.name, t.shape, t.qtype, s.choice.qtype, s.choice.why, t.nbytes, s.spec.nbytes) for t, s in pairs]
        return pd.DataFrame(rows, columns=["name", "shape", "source", "qtype", "why", "bytes_before", "bytes"])

    def _document(self) -> dict[str, Any]:
        protocol = {"source": str(self.job.source), "ftype": self.job.ftype.name, "rules": self.job.options.rules}
        for name in ("bytes_read", "bytes_written", "bpw", "peak_memory", "free_disk", "seconds", "refusals"):
            protocol[name] = getattr(self, name)
        return {"protocol": protocol | {"fallbacks": self.fallbacks}, "rows": self.to_frame()}

    def _totals(self) -> list[tuple[str, str]]:
        """Return the lines about the whole file, the title first."""
        job, steps = self.job, self.job.steps
        name = job.source.name if job.source.name.isprintable() else short(job.source.name)
        return [
            ("", f"{name} → {job.ftype.name}, rules {job.options.rules}"),
            ("tensors", f"{len(steps)}, {sum(not step.is_kept for step in steps)} of them to quantize"),
            ("read", f"{self.bytes_read / MIB:.2f} MiB"),
            ("written", f"{self.bytes_written / MIB:.2f} MiB, {self.bpw:.4f} bits per weight"),
            ("peak memory", f"about {self.peak_memory / MIB:.0f} MiB of {self.memory / MIB:.0f} MiB"),
            ("free disk", "not needed" if self.free_disk is None else f"{self.free_disk / MIB:.0f} MiB"),
            ("time", f"about {self.seconds:.0f} s"),
        ]

    def __str__(self) -> str:
        lines = [f"{what:>11} {value}" for what, value in self._totals()]
        fallen = [(*row[:4], f"{row[4]:.4f}", f"{row[5]:.4f}") for row in _fallbacks(*self._choices())]
        if fallen:
            lines.append("fallback, because the wanted type's blocks do not divide the rows:")
            lines += [" ".join(f"{cell:>10}" for cell in row) for row in [_ACCOUNT, *fallen]]
        return "\n".join([*lines, *self.job.notes, *self.refusals])

    def _repr_html_(self) -> str:
        import pandas as pd

        title, *rows = self._totals()
        totals = pd.DataFrame(rows, columns=title).to_html(index=False)
        return totals + ("" if self.fallbacks.empty else self.fallbacks.to_html(index=False))


def plan(src: str | Path | Model, outfile: str | Path | BinaryIO | None = None, **options) -> Plan:
    """Compute the input, output, memory and time of a quantization, with a short run of the kernels.

    Parameters
    ----------
    src, outfile, **options
        As for `quantlab.transform.quantize.quantize`.

    Raises
    ------
    FileNotFoundError, ValueError
        If the source cannot be opened or an option is not valid. What else speaks against it stands in `refusals`.
    """
    return plan_of(make_job(src, outfile, Options(**options)))


def plan_of(job: Job) -> Plan:
    """Compute the plan of a given job; see `plan`."""
    import numba  # only here: sizes on paper need no kernels

    steps = job.steps
    slab = max((min(step.tensor.n_weights, max(SLAB, step.tensor.shape[-1])) for step in steps), default=0)
    _seconds_per_weight("F32", "F32", False)  # kernels first: they stay in memory
    seconds = sum(n_weights * _seconds_per_weight(*kernels) for kernels, n_weights in _work(job).items())
    in_flight = min(weights_in_flight(slab, numba.get_num_threads()), 2 * sum(step.tensor.n_weights for step in steps))
    return Plan(
        job,
        sum(step.tensor.nbytes for step in steps),
        job.nbytes,
        peak_memory() + 4 * in_flight,  # bytes if all were F32
        physical_memory(),
        _free_disk([output.path for output in job.outputs if output.path is not None]),
        seconds,
    )


@cache
def _seconds_per_weight(source: str, qtype: str, is_weighted: bool) -> float:
    """Load or compile the kernels for one kind of step, then time them on a sample."""
    ones = np.ones(block_size(qtype), np.float32)
    quants.quantize(
        ones.astype(PLAIN_DTYPES[source]) if source in FLOATS else ones, qtype, ones if is_weighted else None
    )
    sample = np.random.default_rng(0).standard_normal((SAMPLE // 1024, 1024), np.float32)
    start = time.perf_counter()
    quants.quantize(sample, qtype, np.ones(1024, np.float32) if is_weighted else None)
    return (time.perf_counter() - start) / SAMPLE


def _free_disk(paths: Sequence[Path]) -> int | None:
    """Return the free bytes on the disk of `paths`, plus those of their unfinished outputs."""
    if not paths or is_stream(paths[0]):
        return None
    folder = follow(paths[0]).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{paths[0]}: folder {folder} does not exist. Create it first.")
    parts = [beside(follow(path), ".part") for path in paths]
    return shutil.disk_usage(folder).free + sum(part.stat().st_size for part in parts if part.exists())


def _work(job: Job) -> dict[tuple[str, str, bool], int]:
    """Return the number of weights per source type, target type and use of an importance matrix."""
    work: dict[tuple[str, str, bool], int] = {}
    for step in job.steps:
        if not step.is_kept:
            key = step.tensor.qtype, step.choice.qtype, step.weights is not None
            work[key] = work.get(key, 0) + step.tensor.n_weights
    return work


def parse_bytes(text: str | int, name: str = "memory") -> int:
    """Read a number of bytes such as `8GiB`, `512M` or 1000000 (units are powers of 1024).

    Raises
    ------
    ValueError
        If it is none, or so small that a unit was forgotten; the text calls it `name`.

    Examples
    --------
    >>> parse_bytes("8GiB")
    8589934592
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise ValueError(f"{name}={text}, must be a positive number of bytes. Give for example 8GiB.")
    if isinstance(text, str) and not found[2] and float(found[1]) < 1024:
        raise ValueError(f"{name}={text}, has no unit, must be at least 1024 bytes. Did you mean {found[1]}GiB?")
    return int(float(found[1]) * _UNITS[found[2].upper()])
