"""Inputs of a report: files and their digests, commands, and samples of each file's text."""

import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm.auto import tqdm

from quantlab.evaluate.refined_variants import MARK, is_refined
from quantlab.evaluate.variants import Variant, split_label
from quantlab.files.bundled import Text, bundled_path, runs_dir
from quantlab.files.inputs import input_files
from quantlab.files.output import is_digests
from quantlab.files.progress import announce
from quantlab.transform.ftypes import FTYPES
from quantlab.transform.mixture import Recipe
from quantlab.transform.quantize import quantize

_READ_BY_PEOPLE = {".md", ".py"}  # files of a checkpoint's folder that nothing here reads


def describe(models: Sequence[Variant], specs: Sequence) -> tuple[dict, ...]:
    """Return for each variant what it is, and the share of the weights that each type has.

    Parameters
    ----------
    models : sequence of Variant
        The base first.
    specs : sequence
        What the others were given as.
    """
    found = []
    for model, spec in zip(models, [None, *specs], strict=True):
        kind = "base" if spec is None else _kind(model, models[0], spec)
        path = model.model.path if kind in ("base", "file") else None
        weights = Counter()
        for tensor in model.model:
            weights[model.types[tensor.name]] += tensor.n_weights
        row = {"variant": model.name, "kind": kind, "file": path and path.name, "bytes": model.nbytes}
        row["types"] = {qtype: n / weights.total() for qtype, n in weights.most_common()}
        metadata = model.model.metadata if path else {}
        row["imatrix"] = os.path.basename(str(metadata.get("quantize.imatrix.file", ""))) or None
        found.append(row)
    return tuple(found)


def _kind(model: Variant, base: Variant, spec) -> str:
    """Return `file`, `refined`, `recipe` or `ftype`."""
    if is_refined(spec):
        return "refined"
    if model.model is not base.model:
        return "file"
    return "recipe" if isinstance(spec, Recipe) or Path(split_label(spec)[1]).is_file() else "ftype"


# ── digests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def digests(
    models: Sequence[Variant],
    specs: Sequence,
    texts: Sequence[tuple[object, Text]],
    imatrix,
    calibrate_on,
    *,
    progress: bool = True,
) -> tuple[dict, ...]:
    """Return role, name, size and SHA-256 of each file that was read, a file that was read twice once."""
    wanted = [("base", path) for path in _files(models[0].model.path)]
    for model, spec in zip(models[1:], specs, strict=True):
        kind = _kind(model, models[0], spec)
        source = model.model.path if kind == "file" else split_label(spec)[1] if kind == "recipe" else None
        wanted += [(model.name, path) for path in _files(source)]
    wanted += [("importance matrix", path) for path in _files(imatrix)]
    if any(map(is_refined, specs)):
        wanted += [("calibration text", path) for path in _files(calibrate_on)]
    seen = {os.path.realpath(path): (role, path) for role, path in reversed(wanted)}
    files = list(seen.values())[::-1]
    total = sum(path.stat().st_size for _, path in files)
    rows = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="SHA-256", disable=not progress) as bar:
        for role, path in files:
            row = {"role": role, "name": path.name, "bytes": path.stat().st_size}
            rows.append(row | {"sha256": _sha256(path, bar)})
    for source, text in texts:
        path = source if isinstance(source, Text) else bundled_path(str(source)) or Path(source)  # pyright: ignore[reportArgumentType]
        row = {"role": f"text {text.name}", "name": path.name, "bytes": len(text.text.encode())}
        rows.append(row | {"sha256": text.sha256})
    return tuple(rows)


def _files(source) -> list[Path]:
    """Return the files that are read where a model, matrix, recipe or text is given by name."""
    if not isinstance(source, str | Path):
        return []
    files = sorted({path for path in input_files([source]) if path.is_file()})
    return [path for path in files if path.suffix not in _READ_BY_PEOPLE and not is_digests(path)]


def _sha256(path: Path, bar: tqdm) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


# ── commands ────────────────────────────────────────────────────────────────────────────────────────────────────────

# option of the command line → argument of `report`, and its default
_OPTIONS = {
    "--imatrix": ("imatrix", None),
    "--calibrate-on": ("calibrate_on", "sampled"),
    "--rules": ("rules", "current"),
    "-c": ("n_ctx", 512),
    "--chunks": ("chunks", None),
    "--protocol": ("protocol", "llama.cpp"),
    "--mode": ("mode", "float"),
    "--device": ("device", "auto"),
}


def commands(
    base, specs: Sequence, texts: Sequence[tuple[object, Text]], models: Sequence[Variant], out, **asked
) -> tuple[dict, ...]:
    """Return the command lines that make this report, and each variant that was made in memory.

    Parameters
    ----------
    base, specs, texts, models
        As for `digests`, the base as it was given.
    out : str, Path or None
    **asked
        The other arguments of `report`.
    """
    name = shlex.quote(_spelled(base, models[0].name))
    options = [f"{key} {shlex.quote(str(asked[arg]))}" for key, (arg, value) in _OPTIONS.items() if asked[arg] != value]
    given = [shlex.quote(_spelled(spec, model.name)) for spec, model in zip(specs, models[1:], strict=True)]
    named = [_text_option(source, text) for source, text in texts]
    ends = [] if asked["prompt"] is None else [f"--prompt {shlex.quote(asked['prompt'])}"]
    ends += [] if asked["n_predict"] == 48 else [f"-n {asked['n_predict']}"]
    ends += [f"-o {shlex.quote(Path(out).name)}"] if out is not None else []
    line = " ".join(["quantlab report", name, *given, *named, *options, *ends])
    found = [{"what": "this report", "command": line}]
    for model, spec in zip(models[1:], specs, strict=True):
        kind = _kind(model, models[0], spec)
        if kind != "file":
            found.append({"what": model.name, "command": _making(name, kind, model, spec, asked)})
    return tuple(found)


def _making(base: str, kind: str, model: Variant, spec, asked: dict) -> str:
    """Return the command that writes a variant to a file."""
    out = shlex.quote(f"{model.name}.gguf")
    matrix = "" if asked["imatrix"] is None else f" --imatrix {shlex.quote(_spelled(asked['imatrix'], 'imatrix'))}"
    rules = "" if asked["rules"] == "current" else f" --rules {shlex.quote(asked['rules'])}"
    raw = split_label(spec)[1]
    if kind == "refined":
        ftype = shlex.quote(raw[: -len(MARK)])
        text = shlex.quote(_spelled(asked["calibrate_on"], "text"))
        return f"quantlab refine {base} {out} {ftype} -f {text} -c {asked['n_ctx']}{matrix}{rules}"
    if kind == "recipe":
        file = shlex.quote(_spelled(raw, "recipe.txt"))
        return f"quantlab quantize {base} {out} {_nearest(model)} --tensor-type-file {file}{matrix}{rules}"
    return f"quantlab quantize {base} {out} {shlex.quote(str(raw).upper())}{matrix}{rules}"


def _text_option(source, text: Text) -> str:
    spelled = _spelled(source, text.name)
    is_own = spelled == text.name or Path(spelled).name == text.name
    return f"--text {shlex.quote(spelled if is_own else f'{text.name}={spelled}')}"


def _spelled(given, name: str) -> str:
    """Return a name or path unchanged, or the name of an object."""
    return str(given) if isinstance(given, str | Path) else name


def _nearest(model: Variant) -> str:
    """Return a ftype whose own type is the quantized one that most weights of a variant have."""
    weights = Counter({"Q8_0": 0})
    for tensor in model.model:
        weights[model.types[tensor.name]] += tensor.n_weights
    ftypes = {ftype.qtype: name for name, ftype in FTYPES.items() if ftype.is_quantized}
    return next(ftypes[qtype] for qtype, _ in weights.most_common() if qtype in ftypes)


# ── continuation ────────────────────────────────────────────────────────────────────────────────────────────────────


def continuation(
    models: Sequence[Variant],
    specs: Sequence,
    prompt: str,
    n_predict: int,
    *,
    imatrix,
    rules: str,
    progress: bool = True,
) -> dict[str, Any]:
    """Continue a prompt greedily with the base and each variant, in llama.cpp.

    Returns
    -------
    dict
        `prompt`, `n_predict` and `rows`: `variant`, `text`, `n_same` tokens before the first that differs from the
        base's, `same`: characters before it, `n_tokens`. Where llama.cpp is not there or refuses a file, `reason`.
    """
    if not prompt:
        return {"reason": "It was left out."}
    if progress:
        announce(f"{len(models)} continuations of {n_predict} tokens, by llama.cpp")
    try:
        from quantlab.run.generate import generate

        with ExitStack() as stack:
            files = [models[0].model.path, *_runnable(models, specs, stack, imatrix=imatrix, rules=rules)]
            options = {"imatrix": imatrix, "rules": rules, "allow_requantize": True}
            said = generate(files, prompt, base=models[0].model.path, n_predict=n_predict, **options)
    except (ImportError, ValueError, OSError, MemoryError) as error:
        return {"reason": f"llama.cpp wrote none: {error}"}
    rows = []
    for model, row in zip(models, said.rows, strict=True):
        same = len("".join(row.pieces[: row.n_same]))
        rows.append({"variant": model.name, "text": row.text, "n_same": row.n_same, "same": same})
        rows[-1]["n_tokens"] = len(row.tokens)
    return {"prompt": prompt, "n_predict": n_predict, "rows": rows}


def _runnable(models: Sequence[Variant], specs: Sequence, stack: ExitStack, **options) -> Iterator[Path | str]:
    """Yield a file or a ftype for each variant; a recipe is quantized into a file that lasts as long as the stack."""
    for model, spec in zip(models[1:], specs, strict=True):
        kind = _kind(model, models[0], spec)
        if kind == "file":
            yield model.model.path
        elif kind == "ftype":
            yield str(split_label(spec)[1]).upper()
        else:
            folder = Path(stack.enter_context(TemporaryDirectory(dir=runs_dir(), prefix="report-")))
            types = Recipe({t.name: model.types[t.name] for t in model.model if len(t.shape) > 1}).tensor_types()
            quantize(
                models[0].model, folder / "recipe.gguf", ftype=_nearest(model), tensor_types=types,
                allow_requantize=True, report=lambda line: None, **options,
            )  # fmt: skip
            yield folder / "recipe.gguf"
