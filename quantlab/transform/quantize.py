"""GGUF file or checkpoint → quantized GGUF file, tensor by tensor, byte for byte what llama-quantize writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm.auto import tqdm
from xxhash import xxh3_128, xxh3_128_digest

from quantlab import quants
from quantlab.files.inputs import input_files
from quantlab.files.model import LazyTensor, Model
from quantlab.files.model import open as open_model
from quantlab.files.output import (
    DIGESTS,
    beside,
    check_apart,
    check_output,
    check_outputs,
    follow,
    is_digests,
    is_stream,
    open_stream,
    replacing,
)
from quantlab.quants.codebook import CODES
from quantlab.transform.job import FLOATS, Job, Options, Step, make_job
from quantlab.transform.plan import MIB, Plan, plan_of
from quantlab.transform.slabs import kernels_in_order, row_ranges
from quantlab.transform.unfinished import Sink, Unfinished

SCHEMA = 3  # of the sidecar: how the digests are made, the size of slabs included


def quantize(
    src: str | Path | Model,
    outfile: str | Path | BinaryIO | None = None,
    *,
    ftype: str | int | None = None,
    reuse: str | Path | None = None,
    histogram: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    report: Callable[[Plan | str], None] | None = None,
    **options,
) -> Path | None:
    """Quantize a model.

    Memory holds a few slabs of rows, whatever the model's size; reading, quantizing and writing overlap. The output
    appears under its name when it is whole. After an interruption the same call goes on where it stopped.

    Parameters
    ----------
    src : str, Path or Model
        A GGUF file, a checkpoint folder, or a bundled model's name.
    outfile : str, Path or object with ``.write``, optional
        Default: ``ggml-model-<FTYPE>.gguf`` beside a file, inside a folder; in the current one for a name.
    ftype : str or int, optional
        Name, alias or number of the mixture: "Q4_K_M", "Q4_K", 15. Left out with `layout_of`.
    reuse : str or Path, optional
        An older output. Tensors whose source, type and weights did not change are copied from it; its digests must
        lie beside it, in ``<reuse>.quantlab.json`` (or ``<reuse>.json``, where earlier versions put them).
    histogram : bool
        Add the shares of the codes, at most sixteen groups of them, to each tensor's line.
    dry_run : bool
        Stop after the plan: report it, an output that is in the way, and what of `reuse` has the same type and weights.
    overwrite : bool
        Whether an output that exists may be replaced.
    report : callable, optional
        Called with the `Plan`, then with one line per tensor. Default: a progress bar.
    **options
        The fields of `quantlab.transform.job.Options`: layout_of, rules, imatrix, include_weights, exclude_weights,
        tensor_types, output_tensor_type, token_embedding_type, pure, leave_output_tensor, allow_requantize, keep_split,
        override_kv, fallback, via, as_llama_cpp.

    Returns
    -------
    Path or None
        The output (its first shard); None where `outfile` is an object, and after a dry run. Beside it,
        ``<outfile>.quantlab.json`` holds the digests that a later run with `reuse` compares.

    Raises
    ------
    FileNotFoundError, FileExistsError
        If the source is not there; if the output is, and `overwrite` is false; if a file of the digests' name is
        something else.
    ValueError
        If an option is not valid, the source is damaged or has NaN or infinite weights, or may not be quantized so; if
        the output is a file that the call reads.
    OSError
        If it cannot fit in memory or on the disk, or the disk fills up (the state is kept, to go on from).

    Examples
    --------
    >>> import tempfile
    >>> from quantlab.files.bundled import model_path
    >>> quantize("tiny", Path(tempfile.mkdtemp()) / "tiny.gguf", ftype="Q4_K_M").name
    'tiny.gguf'

    Source: llama.cpp, src/llama-quant.cpp, for what the file contains and in which order.
    """
    job = make_job(src, outfile, Options(ftype=ftype, **options))
    _check_apart(job, reuse)
    old = _Reusable(Path(reuse)) if reuse is not None else None
    if dry_run:
        for line in _preview(job, old, overwrite):
            report(line) if report is not None else tqdm.write(str(line))
        return None
    _check_outputs(job, overwrite)
    plan = plan_of(job)
    plan.check()
    if report is not None:
        report(plan)
        if old is not None and old.is_outdated:
            report(f"{reuse}: its digests are of an older kind, nothing can be reused")
    path = job.outputs[0].path
    if path is None:
        _run(job, Sink(outfile, job.outputs[0]), old, histogram, report)  # pyright: ignore[reportArgumentType]
        return None
    if is_stream(path):
        with open_stream(path) as file:
            _run(job, Sink(file, job.outputs[0]), old, histogram, report)
        return path
    with Unfinished(job.outputs, identity(job)) as target:
        _run(job, target, old, histogram, report)
        sidecar = _digests_path(path)
        sidecar.unlink(missing_ok=True)
        target.rename()
    with replacing(sidecar, own=is_digests) as part:
        part.write_text(_sidecar(job, target.records), encoding="utf-8")
    return path


def _check_apart(job: Job, reuse: str | Path | None) -> None:
    """Refuse outputs that the same call reads."""
    read = [job.options.imatrix, job.options.layout_of, reuse]
    inputs = input_files([job.source, *(given for given in read if isinstance(given, str | Path))])
    for path in _paths(job):
        check_apart(path, inputs)


def _check_outputs(job: Job, overwrite: bool) -> None:
    """Refuse outputs that exist, and another file with the name of the digests."""
    paths = _paths(job)
    check_outputs(paths, overwrite=overwrite)
    if paths and not is_stream(paths[0]):
        check_output(_digests_path(paths[0]), own=is_digests)


def _paths(job: Job) -> list[Path]:
    return [output.path for output in job.outputs if output.path is not None]


def _digests_path(path: Path) -> Path:
    """Return the path of the digests of a quantized file."""
    return beside(follow(path), DIGESTS)


def _preview(job: Job, old: _Reusable | None, overwrite: bool) -> Iterator[Plan | str]:
    """Yield the plan, and notes about existing outputs and reusable tensors."""
    yield plan_of(job)
    for output in job.outputs:
        if not overwrite and output.path is not None and output.path.exists() and not is_stream(output.path):
            yield f"{output.path}: exists; the run needs overwrite=True or another name"
    if old is not None:
        same = sum(old.has_same_type(step) for step in job.steps)
        yield f"{same} of {len(job.steps)} tensors can be reused if their source is unchanged"


def _run(job: Job, target: Unfinished | Sink, old: _Reusable | None, histogram: bool, report) -> None:
    """Process all steps that `target` lacks: slabs in all threads, written in order."""
    steps = job.steps
    done = len(target.records)
    if report is not None and done:
        report(f"going on after {done} of {len(steps)} tensors")
    total = sum(step.tensor.nbytes for step in steps[done:])
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=job.ftype.name, disable=None if report is None else True)
    taken = kernels_in_order(partial(_take, histogram=histogram), _slabs(steps[done:], old), _Slab.n_weights)
    digest, codes = xxh3_128(), np.zeros(0, np.int64)
    with bar, closing(taken):
        for slab, encoded, piece, counts in taken:
            target.write(encoded)
            digest.update(piece)
            codes = counts if codes.size == 0 else codes + counts
            bar.update(slab.nbytes)
            if slab.stop == slab.tensor.nrows:
                target.finish(old.source(slab.step) if slab.is_old else digest.hexdigest())  # pyright: ignore[reportOptionalMemberAccess]
                done += 1
                if report is not None:
                    report(_tensor_line(done, len(steps), slab.step, slab.is_old, codes))
                digest, codes = xxh3_128(), np.zeros(0, np.int64)


class _Slab(NamedTuple):
    """Rows of one tensor; `tensor` is the step's own, or an older output's that is copied."""

    step: Step
    tensor: LazyTensor
    start: int
    stop: int

    @property
    def is_old(self) -> bool:
        return self.tensor is not self.step.tensor

    @property
    def nbytes(self) -> int:
        return self.step.tensor.nbytes // self.tensor.nrows * (self.stop - self.start)

    def n_weights(self) -> int:
        return self.tensor.shape[-1] * (self.stop - self.start)


def _slabs(steps: Iterable[Step], old: _Reusable | None) -> Iterator[_Slab]:
    """Yield the slabs of all tensors, from an older output if it has the same tensor."""
    for step in steps:
        tensor = old and old.find(step) or step.tensor
        for start, stop in row_ranges(tensor):
            yield _Slab(step, tensor, start, stop)


def _take(slab: _Slab, histogram: bool) -> tuple[_Slab, np.ndarray, bytes, np.ndarray]:
    """Read and encode a slab; return it with its bytes, the digest of its source, and the counts of codes."""
    rows = slab.tensor.rows(slab.start, slab.stop)
    none = np.zeros(0, np.int64)
    if slab.is_old:
        return slab, rows, b"", none
    encoded = encode(slab.step, rows, slab.start)
    counted = histogram and not slab.step.is_kept and slab.step.choice.qtype in CODES
    return slab, encoded, _digest_of(rows), quants.code_histogram(encoded, slab.step.choice.qtype) if counted else none


def encode(step: Step, rows: np.ndarray, start: int = 0) -> np.ndarray:
    """Encode rows and validate them as llama-quantize does; `start` is the first row's number."""
    from quantlab.quants.validate import check_encoded, check_stored  # numba, which a plan on paper does without

    tensor, qtype = step.tensor, step.choice.qtype
    if step.is_kept or tensor.qtype not in FLOATS:  # other floats are checked while they are encoded
        check_stored(rows.view(np.uint8), tensor.qtype, name=tensor.name, first_row=start)
    if step.is_kept:
        return rows
    if tensor.qtype not in FLOATS:
        rows = quants.dequantize(rows, tensor.qtype, (len(rows), tensor.shape[-1]))
    parts = []
    for part, weights in step.experts(start, len(rows)):
        parts.append(quants.quantize(rows[part], qtype, weights, name=tensor.name, first_row=start + part.start))
    encoded = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if qtype == "F16":  # only in a file must it not become infinite
        check_encoded(encoded, rows, qtype, name=tensor.name, first_row=start)
    return encoded


# ---- what users see


def _tensor_line(i: int, n: int, step: Step, is_old: bool, codes: np.ndarray) -> str:
    """Return one tensor's line: number, name, shape, types, sizes, reason, shares of the codes."""
    tensor, choice = step.tensor, step.choice
    shape = " × ".join(map(str, tensor.shape))
    sizes = f"{tensor.nbytes / MIB:.2f} → {step.spec.nbytes / MIB:.2f} MiB"
    line = f"[{i:4}/{n:4}] {tensor.name:<26} {shape:>16}  {tensor.qtype:>4} → {choice.qtype:<4} {sizes}"
    line += "  reused" if is_old else "" if choice.why in ("base", "kept") else f"  ({choice.why})"
    if codes.any():
        sixteen = codes.reshape(min(16, codes.size), -1).sum(axis=1)  # neighbours together
        line += "  codes: " + " ".join(f"{share:.3f}" for share in sixteen / sixteen.sum())
    return line


# ---- what later runs need to know


def _digest(weights: np.ndarray | None) -> str | None:
    return None if weights is None else hashlib.sha256(weights.tobytes()).hexdigest()


def _digest_of(rows: np.ndarray) -> bytes:
    """Return a fast digest of a slab of a tensor's source, against accidents, not against attacks."""
    return xxh3_128_digest(np.ascontiguousarray(rows).reshape(-1).view(np.uint8))


def identity(job: Job) -> str:
    """Return a digest of everything that decides the output's bytes (source files: name, size, time)."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in job.files]
    headers, weights = [output.digest for output in job.outputs], [_digest(step.weights) for step in job.steps]
    return hashlib.sha256(json.dumps([SCHEMA, stats, job.options.via, headers, weights]).encode()).hexdigest()


def _sidecar(job: Job, records: list[dict]) -> str:
    """Return the digests that a later run with `reuse` compares."""
    tensors = {
        step.tensor.name: {
            "source": record["source"],
            "from": step.tensor.qtype,
            "type": step.choice.qtype,
            "imatrix": _digest(step.weights),
        }
        for step, record in zip(job.steps, records, strict=True)
    }
    return json.dumps({"schema": SCHEMA, "header": job.outputs[0].digest, "tensors": tensors})


class _Reusable:
    """An older output with its digests."""

    def __init__(self, path: Path):
        sidecar, old = _digests_path(path), beside(path, ".json")
        sidecar = old if old.is_file() and not sidecar.is_file() else sidecar
        if not sidecar.is_file():
            raise FileNotFoundError(
                f"{sidecar}: is missing, but reusing {path.name} needs its digests. Leave reuse out."
            )
        try:
            stored = json.loads(sidecar.read_text(encoding="utf-8"))
            self._digests = stored["tensors"]
            header = stored["header"]
            if not all(isinstance(entry, dict) for entry in self._digests.values()):
                raise TypeError
            if stored["schema"] not in (2, SCHEMA):
                raise ValueError
            self.is_outdated = stored["schema"] != SCHEMA
            if self.is_outdated:  # its digests are of another kind, so no source is known to be the same
                self._digests = {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                f"{sidecar}: must hold the digests of {path.name}, schema {SCHEMA}. Quantize it again."
            ) from None
        self._model = open_model(path)
        with open(path, "rb") as file:
            start = file.read(min((t.offset for t in self._model if t.file.name == path.name), default=-1))  # pyright: ignore[reportArgumentType, reportOptionalMemberAccess]
        if header != hashlib.sha256(start).hexdigest():
            raise ValueError(f"{sidecar}: belongs to another file than {path.name}. Quantize it again.")

    def find(self, step: Step):
        """Return the old tensor if source, type and weights are the same, else None; reads the source once."""
        if not self.has_same_type(step):
            return None
        digest = xxh3_128()
        for start, stop in row_ranges(step.tensor):
            digest.update(_digest_of(step.tensor.rows(start, stop)))
        return self._model.tensor(step.tensor.name) if digest.hexdigest() == self.source(step) else None

    def has_same_type(self, step: Step) -> bool:
        """Tell whether the old tensor has the same source type, type and weights."""
        wanted = {"from": step.tensor.qtype, "type": step.choice.qtype, "imatrix": _digest(step.weights)}
        stored = self._digests.get(step.tensor.name)
        return stored is not None and all(stored.get(key) == value for key, value in wanted.items())

    def source(self, step: Step) -> str:
        """Return the digest of the source of a tensor that `find` returned."""
        return self._digests[step.tensor.name].get("source", "")
