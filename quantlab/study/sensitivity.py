"""Sensitivity: the damage of each tensor at each type, measured one at a time or predicted from a sample."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from threadpoolctl import ThreadpoolController

from quantlab.evaluate.refined_alone import refined_alone
from quantlab.files.arguments import check_whole
from quantlab.files.bundled import TextLike
from quantlab.files.imatrix_file import MatrixLike
from quantlab.files.model import ModelLike
from quantlab.files.output import is_report, replacing
from quantlab.quants.ggml_types import CANDIDATES
from quantlab.result import Result
from quantlab.study import proxy
from quantlab.study.changes import Change, plan_changes
from quantlab.study.damage_cache import json_digest
from quantlab.study.measurement import Study, open_study
from quantlab.transform.mixture import Recipe, find_qtype

_SHOWN = ["group", "qtype", "bytes", "delta_kld", "delta_kld_se", "ln_ratio", "ln_ratio_se", "error", "measured"]

# what a result is read by, beside its rows
_NEEDED = {"model", "model_sha256", "imatrix", "around", "text", "chunks", "n_ctx"}


def _is_row(row: Mapping) -> bool:
    """Tell whether a row from a file is a complete row of a sensitivity."""
    numbers = isinstance(row["bytes"], int) and isinstance(row["delta_kld"], float | None)
    return numbers and bool(row["types"].keys()) and {"group", "layer", "kind", "qtype", "n_weights"} <= row.keys()


@dataclass(frozen=True, repr=False)
class Sensitivity(Result):
    """The damage of each change of a model, one change at a time.

    Attributes
    ----------
    protocol : dict
        What was measured and how, with the digests of model, text, tokens, matrix and starting point.
    start : dict
        `kld_mean` and `kld_se` of the starting point itself: 0 where that is the base.
    rows : tuple of dict
        One per group and type: `group`, `layer`, `kind`, `qtype`, `tensors`, `types`, `n_weights`, `bytes`, `kld_mean`,
        `kld_se`, `ln_ratio`, `ln_ratio_se` (the whole model against the base, nats per token), `delta_kld`,
        `delta_kld_se` (what the change adds to the starting point), `error` (the proxy), `measured`.
    calibration : dict or None
        How well the proxy ranks and predicts, where it was asked to.
    """

    protocol: dict
    start: dict
    rows: tuple[dict, ...]
    calibration: dict | None = None

    _look = {"index": False, "float_format": "{:.4g}".format}

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a table, without the lists of tensors."""
        return super().to_frame().drop(columns=["tensors", "types"])

    def _document(self) -> dict:
        return {name: getattr(self, name) for name in ("protocol", "start", "calibration", "rows")}

    def predict(self, types: Mapping[str, str]) -> float:
        """Predict the divergence of a model with several changes: the start's plus each change's.

        Parameters
        ----------
        types : Mapping[str, str]
            Tensor → type; tensors of no group are taken to stay as they are.

        Raises
        ------
        ValueError
            If a group was not measured at these types.
        """
        at = {row["group"]: row["delta_kld"] for row in self.rows if row["types"].items() <= types.items()}
        for row in self.rows:
            if row["group"] not in at:
                asked = sorted({types.get(name, "none") for name in row["tensors"]})
                raise ValueError(f"{row['group']}: types={','.join(asked)}, must be measured types. Measure them.")
        return self.start["kld_mean"] + sum(at.values())

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write `to_json` to a file.

        Raises
        ------
        FileExistsError
            If the file exists, is not a report, and `overwrite` is false.
        """
        with replacing(path, overwrite=overwrite, own=is_report) as part:
            part.write_text(self.to_json() + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Sensitivity":
        """Read a sensitivity that `save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it holds something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = tuple(found["rows"])
            whole = found["schema"] == 1 and rows and all(map(_is_row, rows))
            is_known = found["protocol"].keys() >= _NEEDED and isinstance(found["start"]["kld_mean"], float)
            if not (whole and is_known):
                raise KeyError("schema")
            return cls(found["protocol"], found["start"], rows, found["calibration"])
        except FileNotFoundError:
            raise FileNotFoundError(f"{path}: no such file. Run quantlab sensitivity first.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: is not a sensitivity. Run quantlab sensitivity first.") from None

    def _lines(self) -> list[str]:
        p = self.protocol
        around = "the base" if p["around"] is None else f"{p['around']}, KLD {self.start['kld_mean']:.6g}"
        noise = f", KLD of halves alone {p['kld_noise']:.2g}" if "kld_noise" in p else ""
        on = f" on {p['text']}: {p['chunks']} chunks of {p['n_ctx']} tokens" if p["text"] else ": weights alone"
        lines = [f"{p['model']}{on}, changes of {around}{noise}"]
        return lines + ([f"left out: {' '.join(p['left_out'])}"] if p.get("left_out") else [])

    def __str__(self) -> str:
        described = [proxy.describe(self.calibration)] if self.calibration else []
        return "\n".join([super().__str__(), *described])

    def _shown(self) -> pd.DataFrame:
        return self.to_frame()[_SHOWN]


def sensitivity(
    model: ModelLike,
    text: TextLike = "sampled",
    *,
    types: Sequence[str] = CANDIDATES,
    exclude: Sequence[str] = (),
    groups: str | Mapping[str, Sequence[str]] | None = None,
    imatrix: MatrixLike | None = None,
    around: Recipe | str | Path | None = None,
    refined: bool = False,
    rules: str = "current",
    sample: int | None = None,
    n_ctx: int = 512,
    chunks: int | None = None,
    protocol: str = "llama.cpp",
    mode: str = "float",
    device: str = "auto",
    device_memory: str | int | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    executor: Executor | None = None,
    cache: str | Path | bool = True,
    progress: bool = True,
) -> Sensitivity:
    """Measure the damage of each tensor, or group of tensors, at each type, with all else unchanged.

    Parameters
    ----------
    model : str, Path or Model
        A GGUF file, a checkpoint folder, a bundled model's name, or an opened model.
    text : str, Path or Text
        What to calibrate on. Judge on another text.
    types : sequence of str
        Candidate types (default: every type with blocks). Where a tensor's rows do not fit a type's blocks, it gets
        what llama-quantize would give it. Tensors without an entry in `imatrix` get no type that needs one. Of the
        default types, a group is not measured at those whose weights err clearly more than two others would, each
        for a part of the group, in the same bytes: they would not be chosen.
    exclude : sequence of str
        Types that no tensor may get, such as those that llama.cpp runs slowly on the machine in question.
    groups : str, mapping or None
        None: each tensor by itself. `layer`: all tensors of a layer at once. `kind`: all `ffn_down` at once, all
        `attn_v`, …. `model`: everything at once. A mapping gives tensor names by group.
    imatrix : str, Path or ImportanceMatrix, optional
        Importance matrix: it weights the quantization, and the proxy's errors.
    around : str, Path or Recipe, optional
        A ftype or recipe that is the starting point of each change, instead of the base.
    refined : bool
        Change to refined bytes, each tensor refined alone with 64 chunks of `text`: for a recipe to refine with.
    rules : str
        Rule set of a ftype.
    sample : int, optional
        Measure this number of layers of each kind, spread from first to last, and predict the others by the proxy.
        It takes single tensors, around the base.
    n_ctx, chunks, protocol, mode, device, device_memory, memory
        As for `quantlab.perplexity`.
    threads : int, optional
        Threads of each task; default: numba's number, with an executor 1.
    executor : concurrent.futures.Executor, optional
        Does the tasks, `dask.distributed.Client(…).get_executor()` for one; it needs to see the model's file.
    cache : str, Path or bool
        Folder that keeps what was measured, so that the same call goes on where it was stopped; True takes the user's
        cache folder, False keeps nothing.
    progress : bool
        Show a progress bar.

    Raises
    ------
    FileNotFoundError
        If model, text or matrix is not there.
    ValueError
        If a type, group, option or the architecture is not known, the text is too short, the memory too small, or the
        matrix of another model.
    OSError
        If workers were lost and the executor cannot replace them, or the cache cannot be written.
    """
    study = open_study(
        model, text, around=around, imatrix=imatrix, rules=rules, n_ctx=n_ctx, chunks=chunks, protocol=protocol,
        mode=mode, device=device, device_memory=device_memory, memory=memory, cache=cache,
        threads=1 if executor is not None and threads is None else threads,
    )  # fmt: skip
    base = study.base
    changes = plan_changes(base, types, groups, exclude=exclude, weighted=study.start.imatrix)
    check_whole(sample=sample)
    if sample is not None and (sample < 1 or groups is not None or around is not None):
        raise ValueError(
            f"sample={sample}, must be at least 1, and groups=None, around=None. Leave sample out to measure all."
        )
    with ThreadpoolController().limit(limits=1, user_api="blas"), ExitStack() as stack:
        if refined:
            bytes_ = stack.enter_context(
                refined_alone(base, text, study.start.imatrix, n_ctx=n_ctx, memory=memory, progress=progress)
            )
            study = replace(study, refined=bytes_)
        looked = {}
        if tuple(types) == CANDIDATES:
            changes, looked = study.worth_measuring(changes, executor, progress)
        wanted = changes if sample is None else proxy.sample(changes, base.hparams.n_layer, sample)
        damages = study.measure(wanted, executor, progress)
        errors = study.errors(changes, executor, progress, known=looked)
    rows = [_row(study, change, damages.get(id(change)), errors) for change in changes]
    rows, calibration = (rows, None) if sample is None else proxy.calibrated(rows, base.hparams.n_layer)
    first = next(iter(damages.values()))
    said = {
        "around": None if around is None else study.start.name,
        "around_sha256": None if around is None else json_digest(study.start.types),
        "arithmetic": sorted({damage_["arithmetic"] for damage_ in damages.values()}),
    }
    document = study.document() | said | _choice(types, changes, exclude, groups)
    figures = {"kld_mean": first["start_kld_mean"], "kld_se": first["start_kld_se"]}
    return Sensitivity(document, figures, tuple(rows), calibration)


def weight_errors(
    model,
    *,
    types: Sequence[str] = CANDIDATES,
    exclude: Sequence[str] = (),
    groups: str | Mapping[str, Sequence[str]] | None = None,
    imatrix=None,
    threads: int | None = None,
    executor: Executor | None = None,
    cache: str | Path | bool = True,
    progress: bool = True,
) -> Sensitivity:
    """Compute the weighted error of each tensor's weights at each type, and measure no damage.

    Parameters and errors are those of `quantlab.sensitivity`.

    Returns
    -------
    Sensitivity
        For `quantlab.recipe(…, criterion="error")`: each `error` is known, and no `delta_kld`.
    """
    study = open_study(model, None, imatrix=imatrix, threads=threads, cache=cache)
    changes = plan_changes(study.base, types, groups, exclude=exclude, weighted=study.start.imatrix)
    with ThreadpoolController().limit(limits=1, user_api="blas"):
        errors = study.errors(changes, executor, progress)
    rows = tuple(_row(study, change, None, errors) for change in changes)
    said = {"around": None, "around_sha256": None, "arithmetic": []} | _choice(types, changes, exclude, groups)
    return Sensitivity(study.document() | said, {"kld_mean": 0.0, "kld_se": 0.0}, rows)


def _choice(candidates: Sequence[str], changes: Sequence[Change], exclude: Sequence[str], groups) -> dict:
    """Return the statements of a result about groups and types, with candidates that no group has."""
    taken = {qtype for change in changes for qtype in (change.qtype, *change.types.values())}
    unused = [qtype for qtype in map(find_qtype, candidates) if qtype not in taken]
    excluded = {find_qtype(qtype, "exclude") for qtype in exclude}
    return {
        "groups": groups if groups is None or isinstance(groups, str) else "given",
        "excluded": [qtype for qtype in unused if qtype in excluded],
        "left_out": [qtype for qtype in unused if qtype not in excluded],
    }


def _row(study: Study, change: Change, damage: dict | None, errors: Mapping[tuple[str, str], float]) -> dict:
    """Everything known of a change."""
    tensors = [study.base.tensor(name) for name in change.types]
    row = {
        "group": change.group,
        "layer": change.layer,
        "kind": change.kind,
        "qtype": change.qtype,
        "tensors": list(change.types),
        "types": change.types,
        "n_weights": sum(tensor.n_weights for tensor in tensors),
        "bytes": study.bytes_of(change),
    }
    figures = ("kld_mean", "kld_se", "ln_ratio", "ln_ratio_se", "delta_kld", "delta_kld_se")
    row |= {figure: None if damage is None else damage[figure] for figure in figures}
    return row | {"error": sum(errors[pair] for pair in change.types.items()), "measured": damage is not None}
