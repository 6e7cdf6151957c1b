"""Better bits in the same file: codes and scales chosen with the layer's inputs.

    ordinary file ─ layer after layer: second moments of the inputs, better codes and scales ─ the same file, refined

Types, sizes and the decoder are those of the ordinary file. What was done stands in its metadata.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numba.core.registry import cpu_target
from tqdm.auto import tqdm

import quantlab
from quantlab import arch
from quantlab.evaluate import budget
from quantlab.evaluate.check import check_model
from quantlab.evaluate.engine import Choice, Engine, find
from quantlab.evaluate.engine.cpu import CpuEngine, peak
from quantlab.evaluate.protocol import cut
from quantlab.evaluate.refinement import AT_ONCE, Refinement, can_refine, damping_for, fewest_tokens
from quantlab.evaluate.variants import Variant, check_recipe
from quantlab.files.bundled import TextLike, read_text
from quantlab.files.imatrix_file import MatrixLike, as_matrix
from quantlab.files.inputs import input_files
from quantlab.files.model import Model, ModelLike, as_model
from quantlab.files.model import open as open_model
from quantlab.files.output import DIGESTS, beside, check_outputs, follow, is_stream, replacing
from quantlab.files.progress import announce
from quantlab.quants.block_numbers import GRIDS
from quantlab.transform.job import Options, make_job
from quantlab.transform.mixture import Recipe, choose_types, find_ftype
from quantlab.transform.plan import tensor_bytes
from quantlab.transform.quantize import quantize
from quantlab.transform.refined import PREFIX

SHARE_OF_PEAK = 0.5  # of the speed of one large product that the pass reaches
SEARCH = 16000  # operations at that speed in the time of two searches of a grid's points, for each weight


@dataclass(frozen=True)
class Settings:
    """Settings of refining, recorded in the file's metadata.

    Attributes
    ----------
    texts : tuple of str
        Names of the calibration texts.
    texts_sha256 : str
        Digest of the tokens of all chunks.
    n_ctx, chunks : int
        Tokens of a chunk, chunks of all texts.
    sweeps : int
        How often codes and scales are gone through after the feedback.
    damping : float
        Share of each diagonal element of H that is added to it.
    cpu : str
        Kind of CPU: the same call gives the same bytes on any number of threads of this kind.
    device : str
        What computes the products; with the version of torch, where that does.
    precision : str
        How the products with weights are computed.
    """

    texts: tuple[str, ...]
    texts_sha256: str
    n_ctx: int
    chunks: int
    sweeps: int
    damping: float
    cpu: str
    device: str
    precision: str

    def overrides(self) -> list[str]:
        """Return the metadata that declares a refined file, as `--override-kv` takes it."""
        values = {
            "version": f"str:{quantlab.__version__}",
            "text": f"str:{','.join(self.texts)[:100]}",
            "tokens_sha256": f"str:{self.texts_sha256}",
            "n_ctx": f"int:{self.n_ctx}",
            "chunks": f"int:{self.chunks}",
            "sweeps": f"int:{self.sweeps}",
            "damping": f"float:{self.damping}",
            "cpu": f"str:{self.cpu}",
            "device": f"str:{self.device}",
            "precision": f"str:{self.precision}",
        }
        return [f"{PREFIX}{key}={value}" for key, value in values.items()]


def refine(
    model: ModelLike,
    outfile: str | Path | None = None,
    *,
    ftype: str | int,
    text: TextLike | Sequence[TextLike] = "sampled",
    n_ctx: int = 512,
    chunks: int | None = 64,
    sweeps: int = 2,
    damping: float | str = "auto",
    imatrix: MatrixLike | None = None,
    recipe: Recipe | str | Path | None = None,
    tensor_types: Sequence[tuple[str, str]] = (),
    rules: str = "current",
    allow_requantize: bool = False,
    scratch: str | Path | None = None,
    device: str = "cpu",
    device_memory: str | int | None = None,
    memory: str | int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Quantize a model with codes and scales chosen with the layer's inputs: better bits in the same file.

    Types, sizes and decoder are those of the ordinary file of this ftype with an importance matrix. Tensors that
    cannot be refined (embeddings, and types other than Q2_K … Q6_K, Q4_0 … Q5_1 and IQ2_XXS … IQ4_XS) get their
    ordinary bytes. Each expert is refined with its own tokens; with fewer of them than half its inputs it gets ordinary
    bytes.

    Parameters
    ----------
    model : str, Path or Model
        A GGUF file, a checkpoint folder, a bundled model's name, or an opened model; F16, BF16 or F32.
    outfile : str or Path, optional
        Default: ``ggml-model-<FTYPE>-refined.gguf`` beside a file, inside a folder.
    ftype : str or int
        Name, alias or number of the mixture.
    text : str, Path, Text or sequence of them
        What to calibrate on; a mixture of texts serves more uses.
    n_ctx : int
        Tokens per chunk.
    chunks : int or None
        Chunks of all texts together at most, as many of each; None takes the whole texts. More text is better, most
        of all for wide layers.
    sweeps : int
        How often codes and scales are gone through after the feedback.
    damping : float or "auto"
        Share of each diagonal element of the second moments that is added to it (auto: by the number of
        tokens for each input of the widest layer).
    imatrix : str, Path or ImportanceMatrix, optional
        For the tensors that are not refined.
    recipe : str, Path or Recipe, optional
        Types of tensors by name; others follow `ftype`.
    tensor_types : sequence of (regex, type)
        More types by name, as for `quantize`.
    rules : str
        Rule set of the mixture.
    allow_requantize : bool
        Whether tensors that are quantized already may get another type.
    scratch : str or Path, optional
        Folder that keeps finished layers, so that the same call resumes what was stopped; deleted when the run is done
        (default: a stopped run starts again).
    device : str
        What computes the two streams, the second moments and all large products: `cpu`, `cuda`, `mps`, `cpu-torch`, or
        `auto`, a usable card where the extra `gpu` is installed. Searches for codes and scales stay on the CPU.
        Experts and heads of latent attention get ordinary bytes with a card, so `auto` takes the CPU for such models.
    device_memory : str or int, optional
        Memory of the card to stay within (default: what is free).
    memory : str or int, optional
        Memory to stay within, such as `8GiB` (default: three quarters of the machine's).
    overwrite : bool
        Whether an output that exists may be replaced.
    progress : bool
        Say what the run takes, and show a progress bar.

    Returns
    -------
    Path
        The output.

    Raises
    ------
    FileNotFoundError, FileExistsError
        If model or text is not there; if the output is, and `overwrite` is false.
    ValueError
        If the architecture is not known here, an option is out of range, the text is too short for the model's width,
        no tensor can be refined, the memory is too small, or inputs of a layer are not finite.
    ImportError, MemoryError, OSError
        If the device lacks its package, or memory for a layer; if it is not there, or the disk is full.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tiny.gguf"
    >>> refine("tiny", path, ftype="Q2_K", chunks=2, sweeps=1, progress=False).name
    'tiny.gguf'
    """
    opened = as_model(model)
    check_model(opened)
    if sweeps < 0:
        raise ValueError(f"sweeps={sweeps}, must be 0 or more. Give 2, the default.")
    tokens, names = calibration_tokens(opened, text, n_ctx, chunks)
    damping, choice = _damping(opened, tokens, damping), _choice(opened, device, device_memory)
    where = cpu_kind(), choice.described, choice.precision
    settings = Settings(names, digest_of(tokens), n_ctx, len(tokens), sweeps, damping, *where)
    types = _types(opened, ftype, rules, recipe, tensor_types, as_matrix(imatrix))
    options = {"ftype": ftype, "rules": rules, "imatrix": imatrix, "tensor_types": types}
    options |= {"allow_requantize": allow_requantize, "override_kv": settings.overrides()}
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    path = Path(outfile) if outfile is not None else folder / f"ggml-model-{find_ftype(ftype).name}-refined.gguf"
    read = opened.path, imatrix, recipe, *(text if isinstance(text, list | tuple) else [text])
    paths_read = [item for item in read if isinstance(item, str | Path)]
    check_outputs([path], input_files(paths_read), overwrite=overwrite)
    variant = _variant(opened, path, Options(**options))
    with ExitStack() as stack:
        engine = stack.enter_context(choice(opened, n_ctx))
        plan = check_plan(variant, tokens, sweeps, engine, memory)
        if progress:
            announce(f"refining over {tokens.size} tokens{plan}{ordinary(variant, plan.refines)}")
        bar = stack.enter_context(tqdm(total=opened.hparams.n_layer, unit="layer", disable=not progress))
        with _workspace(path, scratch) as (draft, states):
            how = {"sweeps": sweeps, "damping": damping, "bar": bar, "scratch": states, "key": _key(variant, settings)}
            refinement = _begin(draft, variant, tokens, engine, **how)
            if refinement.is_new:
                quantize(opened, draft, overwrite=True, report=lambda _: None, **options)
            first = max(0, refinement.states.layer)
            with _patching(draft) as write:
                refinement.run(write)
            if progress and refinement.few:
                announce(_too_few(refinement.few, first))
            with replacing(path, overwrite=overwrite) as part:
                _deliver(draft, part, is_stream(path))
            refinement.forget()
    return path


def _choice(model: Model, device: str, device_memory: str | int | None) -> Choice:
    """Choose the engine: for models with stacks of matrices, which cards do not refine, `auto` means the CPU."""
    has_stacks = any(len(tensor.shape) > 2 for tensor in model)
    return find("float", "cpu" if device == "auto" and has_stacks else device, device_memory)


def _begin(draft: Path, variant: Variant, tokens: np.ndarray, engine: Engine, **how) -> Refinement:
    """Return the pass, resumed from the last run unless that run was finished."""
    make = Refinement if isinstance(engine, CpuEngine) else _card().CardRefinement
    refinement = make(variant, tokens, engine, **how)
    if refinement.is_new or draft.exists():
        return refinement
    refinement.forget()
    return make(variant, tokens, engine, **how)


def _card() -> ModuleType:
    """Return the module of the pass on a card, which imports torch."""
    return import_module("quantlab.evaluate.engine.card.refinement")


def _deliver(draft: Path, path: Path, is_stream: bool) -> None:
    """Move the draft to the output's path, or write it into a device or pipe."""
    if not is_stream:
        shutil.move(draft, path)
        return
    with draft.open("rb") as whole, path.open("wb") as out:
        shutil.copyfileobj(whole, out, 1 << 20)


@contextmanager
def _workspace(path: Path, scratch: str | Path | None) -> Iterator[tuple[Path, Path | None]]:
    """Yield a path for the draft of the file `path`, and the folder of kept hidden states.

    What is in `scratch` stays if the block fails.
    """
    if scratch is None:
        beside_it = None if is_stream(path) else follow(path).parent
        with TemporaryDirectory(prefix=".refine-", dir=beside_it) as folder:
            yield Path(folder) / "draft.gguf", None
        return
    folder = Path(scratch)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / "draft.gguf"
    yield draft, folder / "states"
    beside(draft, DIGESTS).unlink()
    draft.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _damping(model: Model, tokens: np.ndarray, given: float | str) -> float:
    """Return the damping that is given, or that these tokens need."""
    try:
        damping = auto_damping(model, tokens) if given == "auto" else float(given)
    except ValueError:
        damping = float("nan")
    if not 0 < damping <= 10:
        raise ValueError(f"damping={given}, must be above 0 and at most 10. Give auto.")
    return damping


def auto_damping(model: Model, tokens: np.ndarray) -> float:
    """Return the damping for these tokens: more if each input has few tokens."""
    return damping_for(tokens.size, _widest(model))


def _widest(model: Model) -> int:
    """Return the largest number of inputs of a layer's matrix."""
    return max(tensor.shape[-1] for tensor in model if tensor.name.startswith("blk."))


def digest_of(tokens: np.ndarray) -> str:
    """Return the digest of calibration tokens."""
    return hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()


def cpu_kind() -> str:
    """Return numba's CPU type, on which the last bits of sums depend."""
    return cpu_target.target_context.codegen().magic_tuple()[1]  # pyright: ignore[reportAttributeAccessIssue]


def calibration_tokens(model: Model, text, n_ctx: int, chunks: int | None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return equally many chunks of all texts [shape=(n_chunks, n_ctx), dtype=int32], and the texts' names."""
    texts = [read_text(item) for item in (text if isinstance(text, list | tuple) else [text])]
    if chunks is not None and chunks < len(texts):
        raise ValueError(f"chunks={chunks}, must be at least one for each of {len(texts)} texts. Give more chunks.")
    share = None if chunks is None else chunks // len(texts)
    found = [
        cut(item, model.vocab, n_ctx=n_ctx, chunks=share, name="llama.cpp", mode="float", rules="current")[0].tokens
        for item in texts
    ]
    tokens = np.concatenate(found)
    widest = _widest(model)
    if tokens.size < widest:
        raise ValueError(
            f"text: {tokens.size} tokens are fewer than the {widest} inputs of the widest layer. "
            f"Give at least {-(-widest // n_ctx)} chunks of {n_ctx}; ten times as many tokens as inputs are better."
        )
    return tokens, tuple(item.name for item in texts)


def _types(model: Model, ftype, rules: str, recipe, given: Sequence[tuple[str, str]], matrix) -> list[tuple[str, str]]:
    """Return types by name that give the file the types of an ordinary file with an importance matrix."""
    if recipe is not None:
        recipe = Recipe.load(recipe) if isinstance(recipe, str | Path) else Recipe(dict(recipe.types))
        check_recipe(recipe, model, "recipe")
        given = [*recipe.tensor_types(), *given]
    if matrix is not None:
        return list(given)
    source = {tensor.name: tensor.qtype for tensor in model}
    options = {"rules": rules, "source": source, "tensor_types": given}
    with_matrix, without = (
        choose_types(model.hparams, model.shapes, ftype, imatrix=known, **options) for known in (True, False)
    )
    other = {name: choice.qtype for name, choice in with_matrix.items() if choice.qtype != without[name].qtype}
    return [*Recipe(other).tensor_types(), *given]


def _variant(model: Model, path: Path, options: Options) -> Variant:
    """Return the ordinary file's variant of the model.

    Raises
    ------
    ValueError
        If it cannot be made, or nothing in it can be refined.
    """
    job = make_job(model, path, options)
    if job.refusals:
        raise ValueError(job.refusals[0])
    types = {step.tensor.name: step.choice.qtype for step in job.steps}
    weights = {step.tensor.name: step.weights for step in job.steps if step.weights is not None}
    variant = Variant(f"{job.ftype.name}+refined", model, types, weights)
    if not any(can_refine(variant, name) for name in types):
        raise ValueError(f"ftype={job.ftype.name}: no tensor of {model.path} can be refined. Choose a smaller type.")
    return variant


def ordinary(variant: Variant, refines: Callable[[Variant, str], bool] = can_refine) -> str:
    """Describe matrices with ordinary bytes, embeddings excluded (empty text: none)."""
    others = [t for t in variant.model if len(t.shape) > 1 and t.name != "token_embd.weight"]
    left = [t.name for t in others if variant.types[t.name] != t.qtype and not refines(variant, t.name)]
    return f"; {len(left)} matrices get ordinary bytes: {', '.join(left[:2])}{', …' * (len(left) > 2)}" if left else ""


def _too_few(count: int, first: int) -> str:
    """Describe matrices of experts that too few tokens have reached, in layers from `first` on."""
    since = f" from layer {first} on" if first else ""
    return (
        f"{count} experts' matrices{since} get ordinary bytes: fewer tokens reached them than half of their "
        "inputs. Give more text."
    )


def _key(variant: Variant, settings: "Settings") -> str:
    """Return the identity of hidden states in a scratch folder."""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in variant.model.files]
    weights = {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in variant.imatrix.items()}
    return hashlib.sha256(json.dumps([stats, variant.types, weights, asdict(settings)]).encode()).hexdigest()


class Plan(NamedTuple):
    """The needs of a pass: bytes of memory, seconds, what is refined, and on a card its name and its bytes."""

    memory: int
    seconds: float
    refines: Callable[[Variant, str], bool] = can_refine
    device: str = ""
    device_memory: int = 0

    def __str__(self) -> str:
        on_card = f" and {self.device_memory / 2**30:.2f} GiB on the card" if self.device_memory else ""
        where = f" on {self.device}" if self.device else ""
        return f"{where}: {self.memory / 2**30:.2f} GiB{on_card}, about {self.seconds / 60:.1f} minutes"


def check_plan(variant: Variant, tokens: np.ndarray, sweeps: int, engine: Engine, memory, *, more: int = 0) -> Plan:
    """Return the memory and the time that the pass needs; `more` are bytes that others take meanwhile.

    Raises
    ------
    ValueError
        If it does not fit into `memory`, or layers use keys of others or embeddings of their own.
    """
    h = variant.model.hparams
    if h.n_state > h.n_embd:
        raise ValueError(
            f"{variant.model.path}: n_kv_shared={h.n_kv_shared}, n_embd_layer={h.n_embd_layer}, must be 0 to be "
            f"refined. Quantize without refining."
        )
    layers = [_layer_cost(variant, index, tokens.size, sweeps) for index in range(h.n_layer)]
    operations = sum(operations for _, operations in layers)
    if isinstance(engine, CpuEngine):
        needed = budget.PROCESS + max(needed for needed, _ in layers) + more
        plan = Plan(needed, operations / (SHARE_OF_PEAK * peak(engine.workers)))
    else:
        plan = Plan(*_card().needs(engine, variant, tokens, sweeps, operations))
    allowed = budget.allowed_bytes(memory)
    if plan.memory > allowed:
        raise ValueError(
            f"memory={memory or allowed}, must be at least {plan.memory / 2**30:.2f} GiB for {len(tokens)} chunks. "
            "Give more memory, or fewer chunks."
        )
    return plan


def _layer_cost(variant: Variant, index: int, n_tokens: int, sweeps: int) -> tuple[int, float]:
    """Return bytes of memory and operations that one layer takes."""
    model, h = variant.model, variant.model.hparams.at(index)
    does = arch.known(h.arch).layer_at(model.hparams, index)
    tensors = [tensor for tensor in model if tensor.name.startswith(f"blk.{index}.")]
    shapes = {tensor.name: (1, *tensor.shape)[-2:] for tensor in tensors}  # of a stack, one matrix
    products = {f: [shapes[f"blk.{index}.{name}.weight"] for name in names] for f, names in does.products.items()}
    mixing = sum(rows for rows, _ in products["attn_qkv"]) + products["attn_output"][0][1]
    widest = max(n for _, n in shapes.values())
    inner = 0 if h.n_ff <= mixing else h.n_ff
    experts = [name for field in ("experts_in", "experts_down") for name in does.products.get(field, ())]
    routed = h.n_embd + h.n_expert + h.n_expert_used * products["experts_down"][0][1] if experts else 0
    attention = n_tokens * (mixing + 7 * h.n_embd + routed) + 3 * h.n_embd**2
    down = n_tokens * (mixing + 4 * h.n_embd + inner + 2 * routed) + 2 * widest**2
    original = n_tokens * (6 * h.n_embd + routed) + sum(rows * n for rows, n in shapes.values())
    chosen = 10 * AT_ONCE * widest + n_tokens * 3 * AT_ONCE  # rows that are refined together
    stacks = [tensor for tensor in tensors if len(tensor.shape) > 2]  # as they are stored, and quantized
    stored = sum(t.nbytes + tensor_bytes(t.shape, variant.types[t.name]) for t in stacks)
    operations = 0.0
    for tensor in tensors:
        rows, n = shapes[tensor.name]
        routed_here = tensor.name.removeprefix(f"blk.{index}.").removesuffix(".weight") in experts
        seen = n_tokens * h.n_expert_used // h.n_expert if routed_here else n_tokens  # by each matrix on average
        each = 4 * seen * rows * n
        if can_refine(variant, tensor.name) and (not routed_here or seen >= fewest_tokens(n)):
            searched = GRIDS[variant.types[tensor.name]].points.weights > 1
            each += 2 * seen * n * n + ((2 * sweeps + 10) * n + (1 + sweeps) * SEARCH * searched) * rows * n
        operations += tensor.n_weights // (rows * n) * each
    return stored + 4 * max(original, chosen + max(attention, down)), operations


@contextmanager
def _patching(path: Path) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Yield a function that replaces a tensor's data in a GGUF file and syncs it to disk."""
    places = {tensor.name: (tensor.offset, tensor.nbytes) for tensor in open_model(path)}
    with path.open("r+b") as file:

        def write(name: str, data: np.ndarray) -> None:
            offset, nbytes = places[name]
            if data.nbytes != nbytes:
                raise ValueError(f"{name}: {data.nbytes} bytes, must be {nbytes} as in the file. Give whole rows.")
            file.seek(offset)  # pyright: ignore[reportArgumentType]
            file.write(data.tobytes())
            file.flush()
            os.fsync(file.fileno())

        yield write
