"""The plan of a release, made before any work: files, types, sizes, time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from quantlab import arch
from quantlab.evaluate.engine import find
from quantlab.evaluate.protocol import Windows
from quantlab.evaluate.protocol import cut as cut_windows
from quantlab.evaluate.refine import calibration_tokens, check_plan
from quantlab.evaluate.refined_variants import MARK, is_refined
from quantlab.evaluate.texts import TextCut, cut_text
from quantlab.evaluate.variants import Variant, as_is, resolve, split_label
from quantlab.files.bundled import Text, read_text
from quantlab.files.conversations import is_chat
from quantlab.files.hub import repository_of
from quantlab.files.imatrix_file import ImportanceMatrix
from quantlab.files.model import Model
from quantlab.study.menu import ftype_types, model_bytes
from quantlab.transform.job import Job, Options, make_job, n_experts
from quantlab.transform.mixture import FTYPES, Recipe, find_ftype
from quantlab.transform.one_pass import in_shards
from quantlab.transform.plan import plan_of
from quantlab.transform.rules import is_quantizable

REFINE_CHUNKS, REFINE_SWEEPS = 64, 2  # as `quantlab.refine` has them
LONGEST = 80  # characters of a name


@dataclass(frozen=True)
class Item:
    """One of the files that a release is about."""

    label: str  # what tells it from the others, such as `Q4_K_M`
    ftype: str  # the mixture, of a recipe the one of the nearest size
    options: Options  # how it is quantized; the importance matrix comes later
    recipe: Path | None  # the file of the types that were asked for
    is_refined: bool

    def job(self, model: Model, folder: Path, name: str, matrix: ImportanceMatrix | None, max_size) -> Job:
        """Return what its files will hold."""
        options = replace(self.options, imatrix=matrix)
        job = make_job(model, folder / f"{name}-{self.label}.gguf", options)
        return job if max_size is None else in_shards(job, max_size)


def release_name(model: Model, given: str | None) -> str:
    """Return what the files' names begin with: letters, digits, dots, dashes and underscores."""
    own = str(model.metadata.get("general.name") or "")
    repository = repository_of(model.path.absolute()) if model.is_checkpoint else None
    return file_name(given or (repository or "").rpartition("/")[2] or own or model.path.stem)


def file_name(text: str) -> str:
    """Return a text as a part of a file's name that leads to no other folder.

    Examples
    --------
    >>> file_name("../../Llama 3 (8B)"), file_name("...")
    ('Llama-3-8B', 'model')
    """
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", text)[:LONGEST].strip("-.")
    return plain or "model"


def items_of(
    model: Model, specs: Sequence, matrix: ImportanceMatrix | None, rules: str, allow_requantize: bool
) -> tuple[Item, ...]:
    """Resolve the names of variants to variants.

    Raises
    ------
    ValueError
        If there is none, a spec is neither a ftype nor a recipe, or two files would have one name.
    """
    specs = [specs] if isinstance(specs, str | Path) else list(specs)
    if not specs:
        raise ValueError("ftypes=[], must name one at least. Give ftypes such as Q4_K_M, or recipes.")
    found = [_item(model, spec, matrix, rules, allow_requantize) for spec in specs]
    labels = [item.label.lower() for item in found]
    if twins := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"ftypes: two files would be called {twins[0]}, names must differ. Give one as NAME=SPEC.")
    return tuple(found)


def _item(model: Model, spec, matrix: ImportanceMatrix | None, rules: str, allow_requantize: bool) -> Item:
    label, spec = split_label(str(spec))
    refined = is_refined(spec)
    spec = spec[: -len(MARK)] if refined else spec
    options = Options(rules=rules, allow_requantize=allow_requantize)
    recipe = Path(spec) if Path(spec).is_file() and Path(spec).suffix.lower() != ".gguf" else None
    if recipe is None:
        ftype = find_ftype(spec).name
        own = ftype
    else:
        (variant,) = resolve(model, [spec], rules=rules, imatrix=matrix)
        ftype, own = _nearest_ftype(model, variant, rules, matrix is not None), recipe.stem
        wanted = {t.name for t in model if is_quantizable(t.name, t.shape, model.hparams.arch)}
        types = {name: qtype for name, qtype in variant.types.items() if name in wanted}
        options = replace(options, tensor_types=tuple(Recipe(types).tensor_types()))
    label = file_name(label or (f"{own}-refined" if refined else own))
    return Item(label, ftype, replace(options, ftype=ftype), recipe, refined)


def _nearest_ftype(model: Model, variant: Variant, rules: str, imatrix: bool) -> str:
    """The quantized ftype whose size is nearest to a recipe's, as `quantlab recipe` names it."""
    names = [f.name for f in FTYPES.values() if f.is_quantized and rules in f.rules]
    sizes = {name: model_bytes(model, ftype_types(model, name, rules, imatrix)) for name in names}
    return min(names, key=lambda name: abs(sizes[name] - variant.nbytes))


# ── the importance matrix before it is there ────────────────────────────────────────────────────────────────────────


def expected_matrix(model: Model, text: Text, windows: Windows) -> ImportanceMatrix:
    """Return a matrix with the names, shapes and counts that collecting will give, all columns alike."""
    record, hparams = arch.known(model.hparams.arch), model.hparams
    sums, counts = {}, {}
    for index in range(hparams.n_layer):
        for names in record.layer_at(hparams, index).products.values():
            for name in (f"blk.{index}.{name}.weight" for name in names):
                if name in model:
                    shape = model.tensor(name).shape
                    sums[name] = np.ones((n_experts(shape), shape[-1]), np.float32)
                    counts[name] = np.ones(n_experts(shape), np.float32)
    n_chunks, n_ctx = windows.tokens.shape
    return ImportanceMatrix(sums, counts, n_chunks, n_ctx, (text.name,))


def calibration_windows(model: Model, text: Text, n_ctx: int, chunks: int | None) -> Windows:
    """Return the chunks of the calibration text as `quantlab.imatrix` takes them."""
    options = {"n_ctx": n_ctx, "chunks": chunks, "name": "llama.cpp", "mode": "float", "rules": "current"}
    windows, _ = cut_windows(text, model.vocab, **options)
    return Windows(windows.tokens, windows.tokens, 0)


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def seconds(
    model: Model,
    pairs: Sequence[tuple[Item, Job]],
    *,
    calibration: Windows | None,
    text,
    refine_chunks: int,
    texts: Mapping[str, tuple[object, Text]],
    cut: Mapping,
    how: Mapping,
) -> dict[str, float]:
    """Estimate how long each step of a release takes, in seconds.

    The matrix is collected on `calibration`; files are refined with `refine_chunks` of `text`; the report measures on
    `texts`, as `read_texts` returns them. `cut` holds n_ctx and chunks; `how` mode, device, device_memory and memory.
    """
    n_ctx, memory = cut["n_ctx"], how["memory"]
    choice, found = find(how["mode"], how["device"], how["device_memory"]), {}
    if calibration is not None:
        with choice(model, n_ctx) as engine:
            variants = [as_is(model)]
            plan = engine.plan(variants, calibration, memory, keep_states=False, observed=True)
            found["importance matrix"] = plan.seconds
    plans = [plan_of(replace(job, outputs=tuple(replace(o, path=None) for o in job.outputs))) for _, job in pairs]
    found["quantizing"] = sum(plan.seconds for (item, _), plan in zip(pairs, plans, strict=True) if not item.is_refined)
    variants = [_variant(model, item, job) for item, job in pairs]
    refined = [variant for variant, (item, _) in zip(variants, pairs, strict=True) if item.is_refined]
    if refined:
        from quantlab.evaluate.engine.cpu import CpuEngine

        tokens, _ = calibration_tokens(model, text, n_ctx, refine_chunks)
        with CpuEngine(model, n_ctx) as engine:
            found["refining"] = sum(check_plan(v, tokens, REFINE_SWEEPS, engine, memory)[1] for v in refined)
    if texts:
        found["report"] = 0.0
        for source, item in texts.values():
            options = {**cut, "protocol": "llama.cpp", "rules": "current"}
            windows = _windows(cut_text(item, model, choice, is_chat=is_chat(source), **options))
            with choice(model, windows.tokens.shape[1]) as engine:
                found["report"] += engine.plan([as_is(model), *variants], windows, memory, keep_states=False).seconds
    return found


def _windows(text: TextCut) -> Windows:
    """The evaluated part of a text."""
    if text.windows is not None:
        return text.windows
    tokens, _ = text.turns.windows(max(4, text.protocol.n_ctx))  # pyright: ignore[reportOptionalMemberAccess]
    return Windows(tokens, tokens[:, 1:].copy(), 0)


def _variant(model: Model, item: Item, job: Job) -> Variant:
    types = {step.tensor.name: step.choice.qtype for step in job.steps}
    weights = {step.tensor.name: step.weights for step in job.steps if step.weights is not None}
    return Variant(item.label, model, types, weights)


def read_texts(texts) -> dict[str, tuple[object, Text]]:
    """Return what a report measures on, by name: what it was given as, and the text.

    Raises
    ------
    ValueError
        If two texts have one name.
    """
    if texts is None:
        return {}
    pairs = list(texts.items()) if hasattr(texts, "items") else None
    if pairs is None:
        pairs = [split_label(text) for text in ([texts] if isinstance(texts, str | Path) else texts)]
    found: dict[str, tuple[object, Text]] = {}
    for name, source in pairs:
        text = read_text(source)
        if (name or text.name) in found:
            raise ValueError(f"texts: two are called {name or text.name}, names must differ. Give one as NAME=FILE.")
        found[name or text.name] = source, text
    return found
