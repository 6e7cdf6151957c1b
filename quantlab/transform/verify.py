"""Verification that a quantized file comes from a model: quantize again in memory, compare blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from quantlab import quants
from quantlab.files.bundled import model_path
from quantlab.files.checkpoint import open_checkpoint
from quantlab.files.imatrix_file import ImportanceMatrix
from quantlab.files.model import LazyTensor, Model
from quantlab.files.model import open as open_model
from quantlab.files.recognize import short
from quantlab.quants.ggml_types import WEIGHTED, WRITABLE, ggml_type
from quantlab.quants.validate import first_invalid, invalid_blocks, is_valid
from quantlab.result import Result
from quantlab.transform import refined
from quantlab.transform.compare import (
    Change,
    Cut,
    Tally,
    as_floats,
    can_decode,
    cuts,
    metadata_changes,
    n_weights,
    read,
    untyped,
)
from quantlab.transform.inspect import mixtures, text_table
from quantlab.transform.job import Options, Step, matrix_of, metadata_of, weights_of
from quantlab.transform.mixture import FTYPES, RULES, Choice, choose_types
from quantlab.transform.quantize import encode
from quantlab.transform.rounding import COMPARED as ROUNDED
from quantlab.transform.rounding import allowed, is_other_rounding
from quantlab.transform.rules import squeezed
from quantlab.transform.slabs import kernels_in_order

IDENTICAL, ROUNDING, REFINED, OTHER = VERDICTS = ("identical", "rounding", "refined", "other")
MEANING = {
    IDENTICAL: "identical",
    ROUNDING: "same type, rules and matrix, another compiler's rounding",
    REFINED: "same type and rules, refined: every block is as near to its weights as refining allows",
    OTHER: "other",
}
COLUMNS = ["name", "qtype", "verdict", "imatrix", "blocks", "differing", "fused", "left", "relative"]
# keys that a quantizer sets
OWN_KEYS = re.compile(rf"general\.(file_type|quantization_version)|quantize\.imatrix\..*|{re.escape(refined.PREFIX)}.*")
CLOSE = 0.01  # of the blocks of a probe: precisions that differ in fewer are told apart by all blocks
PROBE = 1 << 16  # weights of a tensor by which one of several precisions of a source is chosen
SHOWN = 20  # tensors and keys that do not fit, on a terminal


@dataclass(frozen=True)
class Verification(Result):
    """The result of `verify`.

    Attributes
    ----------
    quant, source : Path
    verdict : str
        "identical", "rounding" (same type, rules and matrix, another compiler's rounding), "refined" (the file says so,
        and all its blocks are within what refining can do; see `transform/refined.py`) or "other".
    mixture : str
        Ftype and rule set as the tensors' types tell them.
    notes : tuple[str, ...]
        What the file was compared with: precision of the source, importance matrix, types that no ftype gives.
    misfits : tuple[str, ...]
        What does not fit; empty unless the verdict is "other".
    tensors : pd.DataFrame
        One row per tensor: `name`, `qtype`, `verdict`, `imatrix` (whether its weights were used), `blocks`, how many
        are `differing`, how many of these are `fused` (those of a compiler that fuses products with sums), how many
        `left` over without reason, and `relative`: how far the rows that differ are from ours, over the root mean
        square of their weights (1.4 for other weights altogether).
    """

    quant: Path
    source: Path
    verdict: str
    mixture: str
    notes: tuple[str, ...]
    misfits: tuple[str, ...]
    tensors: pd.DataFrame

    @property
    def is_genuine(self) -> bool:
        """True if the file comes from the source: the verdict is not "other"."""
        return self.verdict != OTHER

    def to_frame(self) -> pd.DataFrame:
        """Return the table of the tensors."""
        return self.tensors

    def _document(self) -> dict[str, Any]:
        return {"protocol": {k: v for k, v in vars(self).items() if k != "tensors"}, "rows": self.tensors}

    def _lines(self) -> list[str]:
        lines = [f"{str(self.quant)!r} from {str(self.source)!r}: {MEANING[self.verdict]}", f"mixture: {self.mixture}"]
        lines += self.notes
        more = [f"and {len(self.misfits) - SHOWN} more"] if len(self.misfits) > SHOWN else []
        return lines + [f"does not fit: {misfit}" for misfit in self.misfits[:SHOWN]] + more

    def _shown(self) -> pd.DataFrame:
        """Return tensors and blocks by type and verdict."""
        groups = self.tensors.groupby(["qtype", "verdict"], sort=False)
        sums = {key: (key, "sum") for key in ("blocks", "differing", "fused", "left")}
        return groups.agg(tensors=("name", "size"), **sums).reset_index()

    def __str__(self) -> str:
        return "\n".join([*self._lines(), "", text_table(self._shown())])


def verify(
    quant: str | Path, source: str | Path, *, imatrix: str | Path | ImportanceMatrix | None = None
) -> Verification:
    """Check that a quantized file was made from a model, by quantizing the model again in memory.

    Types are taken from the file, tensor by tensor, and the mixture they belong to is looked up. Memory holds a few
    slabs of rows; reading, quantizing and comparing overlap.

    Parameters
    ----------
    quant : str or Path
        The GGUF file in question.
    source : str or Path
        What it should come from: a GGUF file, or a checkpoint, whose weights are tried as they are and rounded to F16
        or BF16, as a conversion may have rounded them.
    imatrix : str, Path or ImportanceMatrix, optional
        The importance matrix that was used. A tensor that fits only without it is accepted, as one that was excluded,
        as long as others need it.

    Returns
    -------
    Verification
        With the verdict for the file and for each tensor, and what does not fit.

    Raises
    ------
    FileNotFoundError
        If a file is not there.
    ValueError
        If a file is damaged, the matrix belongs to another model, or the source has NaN or infinite weights.

    Examples
    --------
    >>> import tempfile
    >>> from quantlab.transform.quantize import quantize
    >>> path = quantize("tiny", Path(tempfile.mkdtemp()) / "tiny.gguf", ftype="Q4_0")
    >>> verify(path, "tiny").verdict
    'identical'
    """
    model, options = open_model(quant), Options(ftype="COPY", imatrix=imatrix)
    matrix, matrix_keys = matrix_of(options)
    bases = list(_bases(model_path(source)))
    base, rows = _nearest(model, bases, matrix)
    notes = [] if len(bases) == 1 else [f"weights of the source as {_precision(base)}"]
    notes += [f"refined: {said}"] if (said := refined.declaration(model)) else []
    mixture, misfits = _mixture(model, base)
    misfits += _metadata_misfits(model, base, matrix_keys) + _table_misfits(model, base)
    notes += _matrix_notes(model, matrix, rows)
    misfits += _matrix_misfits(matrix, rows) + [misfit for row in rows if (misfit := row.pop("misfit"))]
    worst = max((VERDICTS.index(row["verdict"]) for row in rows), default=0)
    verdict = OTHER if misfits else VERDICTS[worst]
    return Verification(
        model.path, base.path, verdict, mixture, tuple(notes), tuple(misfits), pd.DataFrame(rows, columns=COLUMNS)
    )


# ---- what the file should come from


def _bases(path: Path) -> Iterator[Model]:
    """Yield the source in every precision that a conversion may have used."""
    model = open_model(path)
    yield model
    if not model.is_checkpoint:
        return
    present = _precision(model)
    for qtype in ("F16", "BF16"):
        if qtype != present and (present, qtype) != ("F16", "BF16"):
            yield open_checkpoint(path, qtype.lower())


def _precision(model: Model) -> str:
    """Return the type of a model's first matrix."""
    return next((tensor.qtype for tensor in model if len(tensor.shape) > 1), "F32")


def _nearest(model: Model, bases: list[Model], matrix: dict[str, np.ndarray]) -> tuple[Model, list[dict]]:
    """Return the most likely base of the file, and the rows of its tensors.

    A checkpoint's precisions may differ in a handful of weights. Where the starts of a few tensors leave more than one
    base, all blocks decide.
    """
    if len(bases) > 1:
        shares = [_share_found(model, base, matrix) for base in bases]
        bases = [base for base, share in zip(bases, shares, strict=True) if share >= max(shares) - CLOSE]
    judged: list[tuple[Model, list[dict]]] = []
    for base in bases:
        try:
            judged.append((base, _judged(model, base, matrix)))
        except ValueError:  # values that this precision cannot hold; nobody converted it so
            if base is bases[-1] and not judged:
                raise
        if judged and all(row["verdict"] == IDENTICAL for row in judged[-1][1]):
            return judged[-1]
    return min(judged, key=lambda found: sum(row["left"] + row["differing"] for row in found[1]))


def _share_found(model: Model, base: Model, matrix: dict[str, np.ndarray]) -> float:
    """Return the share of blocks, at the start of a few tensors, that quantizing this base gives."""
    tally = Tally()
    wanted = [t for t in model if len(t.shape) > 1 and t.name in base and t.qtype in WRITABLE]
    for tensor in wanted[:: max(1, len(wanted) // 4)]:
        step = _step(base.tensor(tensor.name), tensor.qtype, matrix)
        if _can_encode(step) and squeezed(step.tensor.shape) == squeezed(tensor.shape):
            n = min(tensor.nrows, max(1, PROBE // tensor.shape[-1]))
            try:
                ours = encode(step, step.tensor.rows(0, n))
            except ValueError:
                return 0.0  # values that this precision cannot hold: nobody converted it so
            tally.add(ours, tensor.rows(0, n), (tensor.qtype, tensor.qtype), tensor.shape[-1])
    return 1 - tally.differing / max(tally.n_blocks, 1)


def _step(tensor: LazyTensor, qtype: str, matrix: dict[str, np.ndarray]) -> Step:
    """Return the step that gives a tensor of the source its type in the file."""
    choice = Choice(qtype, qtype, "asked")
    return Step(tensor, choice, weights_of(tensor, choice, matrix) if qtype in WEIGHTED else None)


def _can_encode(step: Step) -> bool:
    """Tell whether a step's type has an encoder, and the importance that some encoders need."""
    qtype = step.choice.qtype
    return qtype in WRITABLE and (step.weights is not None or bool(ggml_type(qtype).encoder))


# ---- what does not fit in types, metadata and tensor table


def _mixture(model: Model, base: Model) -> tuple[str, list[str]]:
    """Name the mixture of the file's types, and report a conflict with the ftype in its metadata."""
    found = mixtures(model)
    numbers: dict[int | None, str] = {ftype.number: ftype.name for ftype in FTYPES.values() if ftype.number is not None}
    given = numbers.get(model.ftype)
    if not found:
        return _like(model, base, given), []
    named = [f"{m['ftype']}, rules {m['rules']}{', with imatrix' * m['imatrix']}" for m in found]
    misfits = []
    if given not in [m["ftype"] for m in found]:
        misfits.append(
            f"metadata general.file_type: {model.ftype} ({given or 'unknown ftype'}), the types are {named[0]}"
        )
    return " · ".join(dict.fromkeys(named)), misfits


def _like(model: Model, base: Model, given: str | None) -> str:
    """Describe types without a ftype by the most similar mixture."""
    has = {tensor.name: tensor.qtype for tensor in model if tensor.name in base}
    shapes = {name: base.tensor(name).shape for name in has}
    nearest: tuple[int, str] | None = None
    for rules in RULES if given else ():
        for pure in (False, True):
            try:
                choices = choose_types(base.hparams, shapes, given, rules=rules, pure=pure)  # pyright: ignore[reportArgumentType]
            except ValueError:
                continue  # an architecture without rules, or an ftype that these rules do not have
            others = [f"{n} {has[n]}" for n, choice in choices.items() if choice.qtype != has[n]]
            name = f"{given} --pure" if pure else f"{given}, rules {rules}"
            text = f"{name}, but {', '.join(others[:3])}{', …' * (len(others) > 3)}" if others else name
            nearest = min(nearest or (len(others), text), (len(others), text), key=lambda item: item[0])
    return nearest[1] if nearest else "unknown; the file's types are used"


def _metadata_misfits(model: Model, base: Model, matrix_keys: dict[str, Any]) -> list[str]:
    """Compare the metadata with a source's (a checkpoint: also with llama.cpp's vocabulary of it)."""
    misfits = _misfits_with(model, base.metadata, matrix_keys)
    if misfits and base.is_checkpoint:
        theirs = _misfits_with(model, open_checkpoint(base.path, as_llama_cpp=True).metadata, matrix_keys)
        return min(misfits, theirs, key=len)
    return misfits


def _misfits_with(model: Model, metadata: dict[str, Any], matrix_keys: dict[str, Any]) -> list[str]:
    """Report metadata that a quantizer should have copied, and values that it cannot have set."""
    expected = metadata_of(metadata, 0)
    own = {key: value for key, value in model.metadata.items() if OWN_KEYS.fullmatch(key)}
    changes = metadata_changes(
        {key: value for key, value in expected.items() if not OWN_KEYS.fullmatch(key)},
        {key: value for key, value in model.metadata.items() if key not in own},
    )
    for key in ("quantize.imatrix.entries_count", "quantize.imatrix.chunks_count"):
        if key in own and matrix_keys and untyped(own[key]) != untyped(matrix_keys.get(key, 0)):
            changes.append(Change(key, "changed", f"{matrix_keys.get(key, 0)} in the matrix", short(untyped(own[key]))))
    version = "general.quantization_version"
    if untyped(own.get(version, expected[version])) != untyped(expected[version]):
        changes.append(Change(version, "changed", str(expected[version]), short(untyped(own[version]))))
    return [f"metadata {change}" for change in changes]


def _table_misfits(model: Model, base: Model) -> list[str]:
    """Report tensors that only one of the two has, or that differ in shape."""
    misfits = [f"{name}: is not in the source" for name in model.names if name not in base]
    misfits += [f"{name}: is missing" for name in base.names if name not in model]
    for tensor in model:
        shape = base.tensor(tensor.name).shape if tensor.name in base else tensor.shape
        if squeezed(shape) != squeezed(tensor.shape):
            misfits.append(f"{tensor.name}: shape={tensor.shape}, the source has {shape}")
    return misfits


# ---- what does not fit in the blocks


class _Case:
    """The comparison of one tensor."""

    def __init__(self, tensor: LazyTensor, step: Step, is_refined: bool):
        self.tensor, self.step, self.tally = tensor, step, Tally()
        self.distance = refined.Distance(tensor, step.tensor.qtype) if is_refined else None
        self.fused = self.good = self.left = 0
        self.signal = 0.0  # sum of the squared weights of the rows that differ
        self.first: tuple[int, int] | None = None  # row and block of the first one left over
        self.invalid = ""  # the first block that llama.cpp refuses
        self.is_bare = False  # whether the matrix turned out not to have been used

    def add(self, x: np.ndarray, theirs: np.ndarray, ours: np.ndarray | None, step: Step) -> None:
        """Compare a slab of the file with the source's rows quantized by `step` (None: invalid)."""
        if ours is None:
            self._add_invalid(theirs)
            return
        if self.distance is not None:
            self.signal += self.distance.add(x, ours, theirs)
            self.tally.add(ours, theirs, (self.tensor.qtype, self.tensor.qtype), self.tensor.shape[-1])
            return
        if step is not self.step:  # it was under way when the matrix was dropped
            ours = encode(self.step, x)
        qtype, n_per_row = self.tensor.qtype, self.tensor.shape[-1]
        if self.tally.n_blocks == 0 and self.step.weights is not None:
            ours = self._without_matrix(x, ours, theirs)
        start = self.tally.n_blocks // (n_per_row // quants.block_size(qtype))
        differing = self.tally.add(ours, theirs, (qtype, qtype), n_per_row)
        if differing is None:
            return
        rows = np.flatnonzero(differing.any(axis=1))
        bad = differing[rows]
        if not can_decode(self.step.tensor.qtype):
            floats = np.zeros((0, n_per_row), np.float32)
        else:
            floats = as_floats(x[rows], self.step.tensor.qtype, n_per_row)
        self.signal += float(np.square(floats, dtype=np.float64).sum())
        if qtype in ROUNDED and not self.step.is_kept:
            fused, good = np.zeros_like(bad), np.zeros_like(bad)
            for part, weights in self.step.experts(start, len(x)):
                own = (rows >= part.start) & (rows < part.stop)
                if own.any():
                    judged = is_other_rounding(floats[own], ours[rows[own]], theirs[rows[own]], qtype, weights)
                    fused[own], good[own] = judged
            self.fused += int((fused & bad).sum())
            self.good += int((good & bad).sum())
            bad = bad & ~fused & ~good
        self.left += int(bad.sum())
        if self.first is None and bad.any():
            row, block = np.argwhere(bad)[0]
            self.first = (start + int(rows[row]), int(block))

    def _add_invalid(self, theirs: np.ndarray) -> None:
        """Count a slab with blocks that llama.cpp refuses, without a comparison."""
        bad = invalid_blocks(theirs.view(np.uint8), self.tensor.qtype)
        start = self.tally.n_blocks // bad.shape[1]
        self.invalid = self.invalid or first_invalid(theirs.view(np.uint8), self.tensor.qtype, start)
        self.tally.n_blocks += bad.size
        self.tally.differing += int(bad.sum())
        self.tally.noise = np.nan
        self.left += int(bad.sum())

    def _without_matrix(self, x: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """Drop the matrix for this tensor if the first slab matches only without it."""
        bare = replace(self.step, weights=None)
        if np.array_equal(ours, theirs) or not _can_encode(bare):
            return ours
        ours_bare = encode(bare, x)
        n_bytes = quants.block_bytes(self.tensor.qtype)
        wrong, wrong_bare = ((a != theirs).reshape(-1, n_bytes).any(axis=1).sum() for a in (ours, ours_bare))
        if wrong_bare < wrong:
            self.step, self.is_bare = bare, True
            return ours_bare
        return ours

    def row(self, other_build: bool, farthest: float) -> dict:
        """Return the tensor's verdict.

        `other_build`: whether the file is one of a compiler that fuses. `farthest`: bound of refined blocks' distance.
        """
        tally = self.tally
        if self.distance is not None and self.distance.largest > farthest:
            self.left += 1
        excused = other_build and allowed(self.good, tally.n_blocks)
        left = self.left + (0 if excused else self.good)
        same = ROUNDING if self.distance is None else REFINED
        verdict = IDENTICAL if not tally.differing else OTHER if left else same
        row = {"name": self.tensor.name, "qtype": self.tensor.qtype, "verdict": verdict, "is_bare": self.is_bare}
        weighted = self.distance is None and self.step.weights is not None
        row |= {"imatrix": weighted, "blocks": tally.n_blocks, "differing": tally.differing}
        with np.errstate(divide="ignore", invalid="ignore"):  # infinite where the source's rows are all zero
            relative = float(np.sqrt(np.float64(tally.noise) / self.signal)) if tally.differing else 0.0
        row |= {"fused": self.fused, "left": left, "relative": relative}
        return row | {"misfit": self._misfit(left, relative) if verdict == OTHER else ""}

    def _misfit(self, left: int, relative: float) -> str:
        """Describe the wrong blocks: their place, and the distance of their rows from the source's."""
        size, of = quants.block_size(self.tensor.qtype), self.tally.n_blocks
        unit = f"{self.tensor.qtype} {'blocks' if size > 1 else 'values'}"
        if self.invalid:
            return f"{self.tensor.name}: {self.invalid}; llama.cpp refuses it"
        if self.distance is not None:
            return self.distance.misfit
        text = f"{self.tensor.name}: {left} of {of} {unit} differ from the source's"
        if self.first is None:
            text += ", though their codes fit their scales, as with another importance matrix"
        else:
            row, block = self.first
            text += f", the first in row {row}, weights {block * size}:{(block + 1) * size}"
        return f"{text} (relative distance {relative:.2g})"


def _judged(model: Model, base: Model, matrix: dict[str, np.ndarray]) -> list[dict]:
    """Return the row of every tensor with the same shape in both, and quantize slabs in all threads."""
    cases, rows = [], []
    declared = bool(refined.declaration(model))
    for tensor in model:
        if tensor.name not in base or squeezed(base.tensor(tensor.name).shape) != squeezed(tensor.shape):
            continue
        step = _step(base.tensor(tensor.name), tensor.qtype, matrix)
        if declared and refined.has_refined_bytes(step.tensor, tensor.qtype):
            weights = refined.equal_weights(tensor.qtype, tensor.shape[-1])
            cases.append(_Case(tensor, replace(step, weights=weights), True))
        elif step.is_kept or _can_encode(step):
            cases.append(_Case(tensor, step, False))
        else:
            rows.append(_unknown(tensor))
    total = sum(case.step.tensor.nbytes for case in cases)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as bar:
        pairs = cuts((case, case.step.tensor, case.tensor) for case in cases)
        for case, *slab in kernels_in_order(_requantize, pairs, n_weights):
            case.add(*slab)
            bar.update(slab[0].nbytes)
    other_build = sum(case.fused for case in cases) >= sum(case.good for case in cases)
    farthest = refined.bound([case.distance for case in cases if case.distance is not None])
    return [case.row(other_build, farthest) for case in cases] + rows


def _requantize(cut: Cut) -> tuple[_Case, np.ndarray, np.ndarray, np.ndarray | None, Step]:
    """Read the rows of a cut and quantize the source's (None: the file's rows are invalid)."""
    case, x, theirs, _ = read(cut)
    step, start = case.step, cut[3]
    if not is_valid(theirs.view(np.uint8), case.tensor.qtype):
        return case, x, theirs, None, step
    return case, x, theirs, encode(step, x, start), step


def _unknown(tensor: LazyTensor) -> dict:
    """Return the row of a tensor whose type has no encoder here."""
    row = dict.fromkeys(COLUMNS, 0) | {"name": tensor.name, "qtype": tensor.qtype, "verdict": OTHER, "relative": np.nan}
    why = "without an importance matrix" if tensor.qtype in WRITABLE else "here"
    misfit = f"{tensor.name}: {tensor.qtype} cannot be quantized {why}, so it is not verified"
    return row | {"imatrix": False, "is_bare": False, "misfit": misfit}


# ---- the matrix


def _matrix_notes(model: Model, matrix: dict[str, np.ndarray], rows: list[dict]) -> list[str]:
    """Describe the evidence of an importance matrix in bytes and metadata."""
    keys = [key for key in ("quantize.imatrix.file", "quantize.imatrix.entries_count") if key in model.metadata]
    used = [row["name"] for row in rows if row["imatrix"]]
    bare = [row["name"] for row in rows if row["is_bare"]]
    if matrix:
        text = f"importance matrix: fits  {len(used)} tensors"
        return [text + (f"; {len(bare)} fit better without it: {', '.join(bare[:3])}" if bare else "")]
    if not keys:
        return ["importance matrix: none given, none recorded"]
    recorded = short(untyped(model.metadata[keys[0]]))
    return [f"importance matrix: none given; the file records {recorded}, pass it as imatrix"]


def _matrix_misfits(matrix: dict[str, np.ndarray], rows: list[dict]) -> list[str]:
    """Report a given matrix that the file was not made with."""
    asked = [row for row in rows if row["imatrix"] or row["is_bare"]]
    if matrix and asked and all(row["is_bare"] for row in asked):
        return ["importance matrix: the file was made without this one"]
    return []
