"""How much damage each tensor does at each type: measured one change at a time, or predicted from a sample of them."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from threadpoolctl import ThreadpoolController
from tqdm.auto import tqdm

import quantlab
from quantlab.evaluate import protocol as protocols
from quantlab.evaluate.check import check_model
from quantlab.evaluate.engine import Choice, find
from quantlab.evaluate.logits import half_noise
from quantlab.evaluate.refined_alone import RefinedAlone, refined_alone
from quantlab.evaluate.variants import Variant, as_is, resolve
from quantlab.files.arguments import check_whole
from quantlab.files.bundled import cache_dir, read_text
from quantlab.files.imatrix_file import as_matrix
from quantlab.files.model import Model, as_model
from quantlab.files.output import is_report, replacing
from quantlab.quants.ggml_types import CANDIDATES
from quantlab.result import Result
from quantlab.study import damage, proxy
from quantlab.study.changes import Change, plan_changes
from quantlab.study.damage_cache import DamageCache, json_digest, matrix_digests, model_digest
from quantlab.transform.plan import tensor_bytes

_SHOWN = ["group", "qtype", "bytes", "delta_kld", "delta_kld_se", "ln_ratio", "ln_ratio_se", "error", "measured"]

# what a result is read by, beside its rows
_NEEDED = {"model", "model_sha256", "imatrix", "around", "text", "chunks", "n_ctx"}


def _is_row(row: Mapping) -> bool:
    """Whether a row that was read can be chosen from."""
    numbers = isinstance(row["bytes"], int) and isinstance(row["delta_kld"], float | None)
    return numbers and bool(row["types"].keys()) and {"group", "layer", "kind", "qtype", "n_weights"} <= row.keys()


@dataclass(frozen=True, repr=False)
class Sensitivity(Result):
    """What each change of a model costs, one change at a time.

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
        """Predict the divergence of a model with several changes: that of the start and what each adds.

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
                raise ValueError(
                    f"{row['group']}: types={','.join(asked)}, must be among those measured. Measure them."
                )
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
        """Read what `save` wrote.

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
            raise FileNotFoundError(f"{path}: no such file. Write one with `save` or the word sensitivity.") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path}: is not a sensitivity. Write one with `save` or the word sensitivity.") from None

    def _lines(self) -> list[str]:
        p = self.protocol
        around = "the base" if p["around"] is None else f"{p['around']}, KLD {self.start['kld_mean']:.6g}"
        noise = f", KLD of halves alone {p['kld_noise']:.2g}" if "kld_noise" in p else ""
        return [f"{p['model']} on {p['text']}: {p['chunks']} chunks of {p['n_ctx']} tokens, changes of {around}{noise}"]

    def __str__(self) -> str:
        described = [proxy.describe(self.calibration)] if self.calibration else []
        return "\n".join([super().__str__(), *described])

    def _shown(self) -> pd.DataFrame:
        return self.to_frame()[_SHOWN]


def sensitivity(
    model,
    text="sampled",
    *,
    types: Sequence[str] = CANDIDATES,
    groups: str | Mapping[str, Sequence[str]] | None = None,
    imatrix=None,
    around=None,
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
    """Measure what each tensor, or group of tensors, costs at each type, everything else as it is.

    Parameters
    ----------
    model : str, Path or Model
        A GGUF file, a checkpoint folder, a bundled model's name, or an opened model.
    text : str, Path or Text
        What to calibrate on. Judge on another text.
    types : sequence of str
        Candidate types. Where a tensor's rows do not fit a type's blocks, it gets what llama-quantize would give it.
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
        Measure only so many layers of each kind, spread from first to last, and predict the others by the proxy.
        Only of single tensors, around the base.
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

    Returns
    -------
    Sensitivity

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
    base = as_model(model)
    check_model(base)
    choice = find(mode, device, device_memory)
    start = _start(base, around, rules, as_matrix(imatrix))
    changes = plan_changes(base, types, groups)
    check_whole(sample=sample)
    if sample is not None and (sample < 1 or groups is not None or around is not None):
        raise ValueError(
            f"sample={sample}, must be at least 1, and groups=None, around=None. Leave it out to measure all."
        )
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}, must be at least 1. Leave it out to take numba's number.")
    windows, record = protocols.cut(
        read_text(text), base.vocab, n_ctx=n_ctx, chunks=chunks, name=protocol, mode=mode, rules=rules
    )
    record = choice.recorded(record)
    folder = cache_dir() / "damages" if cache is True else Path(cache) if cache else None
    if executor is not None and threads is None:
        threads = 1
    study = _Study(base, start, windows, record, choice, memory, threads, folder, model_digest(base))
    wanted = changes if sample is None else proxy.sample(changes, base.hparams.n_layer, sample)
    with ThreadpoolController().limit(limits=1, user_api="blas"), ExitStack() as stack:
        if refined:
            bytes_ = stack.enter_context(refined_alone(base, text, n_ctx=n_ctx, memory=memory, progress=progress))
            study = replace(study, refined=bytes_)
        damages = study.measure(wanted, executor, progress)
        errors = study.errors(changes, executor, progress)
    return study.result(changes, damages, errors, around, groups, sample)


def _start(base: Model, around, rules: str, matrix) -> Variant:
    """The starting point, with the matrix by tensor."""
    if matrix is not None and not matrix.entries.keys() & base.shapes.keys():
        raise ValueError(
            f"imatrix: has no entry for any tensor of {base.path}, must be of this model. Collect it anew."
        )
    if around is None:
        return Variant("base", base, as_is(base).types, {} if matrix is None else matrix.entries)
    start = resolve(base, [around], rules=rules, imatrix=matrix)[0]
    if start.model is not base:
        raise ValueError(f"around={around}, must be a ftype or a recipe. Save the types of the file as a recipe.")
    return start


@dataclass(frozen=True)
class _Study:
    """What all measurements of one call share."""

    base: Model
    start: Variant
    windows: protocols.Windows
    record: protocols.Protocol
    choice: Choice
    memory: str | int | None
    threads: int | None
    folder: Path | None
    digest: str
    refined: RefinedAlone | None = None

    def measure(self, changes: Sequence[Change], executor: Executor | None, progress: bool) -> dict[int, dict]:
        """Damage by id of the change, from the cache where it is known."""
        cache, keys = DamageCache(self.folder), [self._key(change) for change in changes]
        found = [cache.get(key) for key in keys]
        missing = [i for i, damage_ in enumerate(found) if damage_ is None]
        if missing:
            cache.prepare()
        if missing and self.refined is not None:
            self.refined.make([self.start.types, *(changes[i].types for i in missing)])
        n_layer = self.base.hparams.n_layer
        firsts = [changes[i].first_layer(n_layer) for i in missing]
        bundles = [[missing[j] for j in bundle] for bundle in damage.cut(n_layer, firsts)]
        tasks = [self._bundle([changes[i] for i in bundle], [keys[i] for i in bundle]) for bundle in bundles]
        work = [damage.work_of(task) for task in tasks]
        shown = dict(
            desc=f"{len(missing)} changes", unit="tokens", unit_scale=1 / (n_layer + 1), disable=not (progress and work)
        )
        bar_format = "{desc}: {percentage:3.0f}%|{bar}| {rate_fmt} [{elapsed}<{remaining}]"
        with tqdm(total=sum(work), bar_format=bar_format, **shown) as bar:
            for bundle, results in zip(bundles, damage.run(tasks, work, executor, bar), strict=True):
                for i, result in zip(bundle, results, strict=True):
                    found[i] = result
                    if executor is not None:  # whose workers may have a disk of their own
                        cache.put(keys[i], result)
        return {id(change): result for change, result in zip(changes, found, strict=True)}

    def _bundle(self, changes: Sequence[Change], keys: Sequence[dict]) -> damage.Bundle:
        return damage.Bundle(
            model=self.base.path.absolute(),
            windows=self.windows,
            choice=self.choice,
            memory=self.memory,
            start=self.start.types,
            imatrix=dict(self.start.imatrix),
            refined=self.refined and self.refined.folder,
            changes=tuple(change.types for change in changes),
            keys=tuple(keys),
            cache=self.folder and self.folder.absolute(),
            threads=self.threads,
        )

    def _key(self, change: Change) -> dict:
        """Everything that a damage depends on."""
        types = self.start.types | change.types
        altered = {name: qtype for name, qtype in types.items() if qtype != self.base.tensor(name).qtype}
        record = asdict(self.record) | {"text": None, "rules": None}
        used = {name: w for name, w in self.start.imatrix.items() if name in altered}
        start = json_digest(self.start.types)
        how = {} if self.refined is None else {"refined": self.refined.digest}
        return how | {
            "what": "damage, arithmetic", "quantlab": quantlab.__version__, "model": self.digest, "protocol": record,
            "start": start, "change": change.types, "imatrix": json_digest(matrix_digests(used)),
        }  # fmt: skip

    def errors(self, changes: Sequence[Change], executor: Executor | None, progress: bool) -> dict[tuple, float]:
        """The proxy by tensor and type, from the cache where it is known."""
        cache, found, tasks = DamageCache(self.folder), {}, []
        wanted = dict.fromkeys(pair for change in changes for pair in change.types.items())
        for name in dict.fromkeys(name for name, _ in wanted):
            weights = self.start.imatrix.get(name)
            matrix = None if weights is None else matrix_digests({name: weights})[name]
            keys = {
                qtype: {"what": "error", "quantlab": quantlab.__version__, "model": self.digest}
                | {"tensor": name, "qtype": qtype, "imatrix": matrix}
                for tensor, qtype in wanted
                if tensor == name
            }
            found |= {(name, qtype): cache.get(key) for qtype, key in keys.items()}
            keys = {qtype: key for qtype, key in keys.items() if found[name, qtype] is None}
            if keys:
                tasks.append(proxy.ErrorTask(self.base.path.absolute(), name, keys, weights, self.folder, self.threads))
        work = [self.base.tensor(task.name).n_weights * len(task.keys) for task in tasks]
        with tqdm(
            total=sum(work), desc="errors", unit="weights", unit_scale=True, disable=not (progress and work)
        ) as bar:
            for task, results in zip(tasks, damage.run(tasks, work, executor, bar), strict=True):
                for (qtype, key), result in zip(task.keys.items(), results, strict=True):
                    found[task.name, qtype] = result
                    if executor is not None:
                        cache.put(key, result)
        return {pair: result["error"] for pair, result in found.items()}

    def result(self, changes, damages: dict[int, dict], errors: dict[tuple, float], around, groups, sample):
        """Put everything known of each change in a row; predict what was not measured."""
        rows = [self._row(change, damages.get(id(change)), errors) for change in changes]
        calibration = None
        if sample is not None:
            rows, calibration = proxy.calibrated(rows, self.base.hparams.n_layer)
        start = next(iter(damages.values()))
        document = (
            asdict(self.record)
            | half_noise(self.base, self.windows, self.choice)
            | {
                "model": self.base.path.stem if self.base.path.is_file() else self.base.path.name,
                "model_sha256": self.digest,
                "imatrix": json_digest(matrix_digests(self.start.imatrix)) if self.start.imatrix else None,
                "around": None if around is None else self.start.name,
                "around_sha256": None if around is None else json_digest(self.start.types),
                "arithmetic": sorted({damage_["arithmetic"] for damage_ in damages.values()}),
                "groups": groups if groups is None or isinstance(groups, str) else "given",
                "refined": self.refined and self.refined.digest,
            }
        )
        figures = {"kld_mean": start["start_kld_mean"], "kld_se": start["start_kld_se"]}
        return Sensitivity(document, figures, tuple(rows), calibration)

    def _row(self, change: Change, damage_: dict | None, errors: dict[tuple, float]) -> dict:
        tensors = [self.base.tensor(name) for name in change.types]
        row = {
            "group": change.group,
            "layer": change.layer,
            "kind": change.kind,
            "qtype": change.qtype,
            "tensors": list(change.types),
            "types": change.types,
            "n_weights": sum(tensor.n_weights for tensor in tensors),
            "bytes": sum(tensor_bytes(tensor.shape, change.types[tensor.name]) for tensor in tensors),
        }
        figures = ("kld_mean", "kld_se", "ln_ratio", "ln_ratio_se", "delta_kld", "delta_kld_se")
        row |= {figure: None if damage_ is None else damage_[figure] for figure in figures}
        return row | {
            "error": sum(errors[pair] for pair in change.types.items()),
            "measured": damage_ is not None,
        }
