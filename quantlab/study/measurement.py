"""Measurement of changes, with the state that one call shares: model, start, text, engine, cache."""

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import quantlab
from quantlab.evaluate import protocol as protocols
from quantlab.evaluate.check import check_model
from quantlab.evaluate.engine import Choice, find
from quantlab.evaluate.logits import half_noise
from quantlab.evaluate.refined_alone import RefinedAlone
from quantlab.evaluate.variants import Variant, as_is, resolve
from quantlab.files.bundled import cache_dir, read_text
from quantlab.files.imatrix_file import as_matrix
from quantlab.files.model import Model, as_model
from quantlab.study import damage, proxy
from quantlab.study.changes import Change, worth_measuring
from quantlab.study.damage_cache import DamageCache, json_digest, matrix_digests, model_digest
from quantlab.transform.plan import tensor_bytes
from quantlab.transform.refined import has_refined_bytes


def open_study(
    model,
    text,
    *,
    around=None,
    imatrix=None,
    rules: str = "current",
    n_ctx: int = 512,
    chunks: int | None = None,
    protocol: str = "llama.cpp",
    mode: str = "float",
    device: str = "auto",
    device_memory: str | int | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    cache: str | Path | bool = True,
) -> "Study":
    """Put together what measurements need; parameters and errors as for `quantlab.sensitivity`.

    Without a `text` the study knows the errors of weights alone.
    """
    base = as_model(model)
    start = _start(base, around, rules, as_matrix(imatrix))
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}, must be at least 1. Leave it out for numba's number.")
    folder = cache_dir() / "damages" if cache is True else Path(cache) if cache else None
    windows, record, choice = None, None, None
    if text is not None:
        check_model(base)
        choice = find(mode, device, device_memory)
        how = {"n_ctx": n_ctx, "chunks": chunks, "name": protocol, "mode": mode, "rules": rules}
        windows, record = protocols.cut(read_text(text), base.vocab, **how)
        record = choice.recorded(record)
    return Study(base, start, windows, record, choice, memory, threads, folder, model_digest(base))


def _start(base: Model, around, rules: str, matrix) -> Variant:
    """Return the starting point, with the matrix by tensor."""
    if matrix is not None and not matrix.entries.keys() & base.shapes.keys():
        raise ValueError(
            f"imatrix: has no entry for any tensor of {base.path}, must be of this model. Collect it again."
        )
    if around is None:
        return Variant("base", base, as_is(base).types, {} if matrix is None else matrix.entries)
    start = resolve(base, [around], rules=rules, imatrix=matrix)[0]
    if start.model is not base:
        raise ValueError(f"around={around}, must be a ftype or a recipe. Save the types of the file as a recipe.")
    return start


@dataclass(frozen=True)
class Study:
    """The shared state of one call's measurements."""

    base: Model
    start: Variant
    # None without a text
    windows: protocols.Windows | None
    record: protocols.Protocol | None
    choice: Choice | None
    memory: str | int | None
    threads: int | None
    folder: Path | None
    digest: str
    refined: RefinedAlone | None = None

    def measure(self, changes: Sequence[Change], executor: Executor | None, progress: bool) -> dict[int, dict]:
        """Return the damage by the change's id, from the cache if known."""
        cache, keys = DamageCache(self.folder), [self._key(change) for change in changes]
        found: list[Any] = [cache.get(key) for key in keys]
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
        shown: dict[str, Any] = dict(
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
            windows=self.windows,  # pyright: ignore[reportArgumentType]
            choice=self.choice,  # pyright: ignore[reportArgumentType]
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
        """Return everything that a damage depends on."""
        types = self.start.types | change.types
        altered = {name: qtype for name, qtype in types.items() if qtype != self.base.tensor(name).qtype}
        record = asdict(self.record) | {"text": None, "rules": None}  # pyright: ignore[reportArgumentType]
        used = {name: w for name, w in self.start.imatrix.items() if name in altered}
        start = json_digest(self.start.types)
        how = {} if self.refined is None else {"refined": self.refined.digest}
        return how | {
            "what": "damage, arithmetic", "quantlab": quantlab.__version__, "model": self.digest, "protocol": record,
            "start": start, "change": change.types, "imatrix": json_digest(matrix_digests(used)),
        }  # fmt: skip

    def worth_measuring(self, changes, executor, progress: bool) -> tuple[list[Change], dict[tuple, float]]:
        """Leave out what a look at some rows tells to be useless; give the errors that are of whole tensors too."""
        seen = self.errors(changes, executor, progress, most=proxy.LOOK)

        def cost(change: Change) -> tuple[int, float]:
            return self.bytes_of(change), sum(seen[pair] for pair in change.types.items())

        def is_refined(change: Change) -> bool:
            return any(has_refined_bytes(self.base.tensor(name), qtype) for name, qtype in change.types.items())

        def can_beat(a: Change, b: Change) -> bool:  # refined bytes do less damage than their ordinary ones tell
            return self.refined is None or is_refined(a) or not is_refined(b)

        whole = {pair: error for pair, error in seen.items() if self.base.tensor(pair[0]).n_weights <= proxy.LOOK}
        return worth_measuring(changes, cost, can_beat), whole

    def errors(self, changes, executor, progress: bool, *, most: int | None = None, known=None) -> dict[tuple, float]:
        """Return the proxy by tensor and type, of up to `most` weights, from `known` or the cache if known."""
        cache, found, tasks = DamageCache(self.folder), {}, []
        wanted = dict.fromkeys(pair for change in changes for pair in change.types.items())
        for name in dict.fromkeys(name for name, _ in wanted):
            weights = self.start.imatrix.get(name)
            matrix = None if weights is None else matrix_digests({name: weights})[name]
            n_weights = self.base.tensor(name).n_weights
            part = {} if most is None or n_weights <= most else {"most": most}
            keys = {
                qtype: {"what": "error", "quantlab": quantlab.__version__, "model": self.digest}
                | {"tensor": name, "qtype": qtype, "imatrix": matrix} | part
                for tensor, qtype in wanted
                if tensor == name
            }  # fmt: skip
            for qtype, key in keys.items():
                error = (known or {}).get((name, qtype))
                found[name, qtype] = cache.get(key) if error is None else {"error": error}
            keys = {qtype: key for qtype, key in keys.items() if found[name, qtype] is None}
            if keys:
                how = (weights, self.folder, self.threads, part.get("most"))
                tasks.append(proxy.ErrorTask(self.base.path.absolute(), name, keys, *how))
        work = [min(self.base.tensor(t.name).n_weights, t.most or 1 << 62) * len(t.keys) for t in tasks]
        with tqdm(
            total=sum(work), desc="errors", unit="weights", unit_scale=True, disable=not (progress and work)
        ) as bar:
            for task, results in zip(tasks, damage.run(tasks, work, executor, bar), strict=True):
                for (qtype, key), result in zip(task.keys.items(), results, strict=True):
                    found[task.name, qtype] = result
                    if executor is not None:
                        cache.put(key, result)
        return {pair: result["error"] for pair, result in found.items()}

    def bytes_of(self, change: Change) -> int:
        """Return what the changed tensors take."""
        return sum(tensor_bytes(self.base.tensor(name).shape, qtype) for name, qtype in change.types.items())

    def document(self) -> dict:
        """Return what every result says of the study."""
        record = {"text": None, "chunks": 0, "n_ctx": 0} if self.record is None else asdict(self.record)
        noise = {} if self.record is None else half_noise(self.base, self.windows, self.choice)  # pyright: ignore[reportArgumentType]
        return record | noise | {
            "model": self.base.path.stem if self.base.path.is_file() else self.base.path.name,
            "model_sha256": self.digest,
            "imatrix": json_digest(matrix_digests(self.start.imatrix)) if self.start.imatrix else None,
            "refined": self.refined and self.refined.digest,
        }  # fmt: skip
