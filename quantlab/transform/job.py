"""Outputs of one quantization: files, metadata, tensors in order, and the type and weights of each."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from quantlab.arch import Hparams
from quantlab.files.bundled import model_path
from quantlab.files.checkpoint import open_checkpoint
from quantlab.files.gguf_file import ALIGNMENT, TensorSpec, pack_header
from quantlab.files.gguf_shards import shard_paths
from quantlab.files.hparams import read_hparams
from quantlab.files.hub import default_folder
from quantlab.files.imatrix_file import ImportanceMatrix, as_matrix
from quantlab.files.model import LazyTensor, Model, as_model, is_checkpoint
from quantlab.files.output import is_stream
from quantlab.quants.ggml_types import GGML_TYPES, WRITABLE, block_size
from quantlab.transform.expressions import compile_expression
from quantlab.transform.ftypes import ALL_FTYPES
from quantlab.transform.layout import apply_layout
from quantlab.transform.mixture import FTYPES, Choice, Ftype, choose_types, find_ftype
from quantlab.transform.prune import pruned_metadata, pruned_names
from quantlab.transform.rules import COMPARED, EMBEDDINGS, needs_imatrix, squeezed

QUANTIZATION_VERSION = 2  # of the block layouts, ggml's GGML_QNT_VERSION
GUESSED = 1024  # added to the ftype number by llama.cpp where it was counted from the tensors' types
MAX_STRING = 127  # bytes of a metadata string that comes from the command line
FLOATS = tuple(name for name in WRITABLE if GGML_TYPES[name].dtype)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of quantizing, with llama-quantize's names where it has the option.

    Attributes
    ----------
    ftype : str or int, optional
        Name, alias or number of the mixture; left out with `layout_of`.
    layout_of : str, Path or Model, optional
        A GGUF file whose types are applied, tensor by tensor by name.
    rules : str
        Rule set of the mixture, "current" or "2023-12".
    imatrix : str, Path or ImportanceMatrix, optional
        Importance matrix, in either file format.
    include_weights, exclude_weights : sequence of str
        Use only, or leave out, the matrix's entries whose names contain one of these. Not both.
    tensor_types : sequence of (regex, type)
        Types by tensor name; the first expression found in the name wins.
    output_tensor_type, token_embedding_type : str, optional
        Types of `output.weight` (also the embedding, where it is tied) and `token_embd.weight`.
    pure : bool
        Give every quantizable tensor the base type.
    leave_output_tensor : bool
        Keep `output.weight` as it is.
    allow_requantize : bool
        Quantize tensors that are quantized already.
    keep_split : bool
        Write one shard per shard of the input.
    override_kv : sequence of str
        Metadata as ``KEY=TYPE:VALUE``, TYPE one of int (written as uint32), float, bool, str.
    fallback : bool
        Whether rows that do not fit a type's blocks may get another type; if not, they are an error.
    via : str, optional
        "f16" rounds a checkpoint to F16 first, as converting to an F16 file would. Default: the source's precision.
    as_llama_cpp : bool
        Write a checkpoint's vocabulary as llama.cpp's converter does, where quantlab differs on purpose.
    prune_layers : sequence of int
        Layers that are left out; the others are numbered without gaps.
    """

    ftype: str | int | None = None
    layout_of: str | Path | Model | None = None
    rules: str = "current"
    imatrix: str | Path | ImportanceMatrix | None = None
    include_weights: Sequence[str] = ()
    exclude_weights: Sequence[str] = ()
    tensor_types: Sequence[tuple[str, str]] = ()
    output_tensor_type: str | None = None
    token_embedding_type: str | None = None
    pure: bool = False
    leave_output_tensor: bool = False
    allow_requantize: bool = False
    keep_split: bool = False
    override_kv: Sequence[str] = ()
    fallback: bool = True
    via: str | None = None
    as_llama_cpp: bool = False
    prune_layers: Sequence[int] = ()


@dataclass(frozen=True)
class Step:
    """One tensor, to be quantized or copied into the output."""

    tensor: LazyTensor
    choice: Choice
    weights: np.ndarray | None  # float32 (n_per_row,) or, of experts, (n_expert, n_per_row): the importance matrix

    @property
    def spec(self) -> TensorSpec:
        """Name, shape and type in the output, without leading dimensions of 1, as in ggml."""
        return TensorSpec(self.tensor.name, squeezed(self.tensor.shape), self.choice.qtype)

    @property
    def is_kept(self) -> bool:
        """True if the tensor is copied unchanged."""
        return self.choice.qtype == self.tensor.qtype

    def experts(self, start: int, nrows: int) -> Iterator[tuple[slice, np.ndarray | None]]:
        """Cut `nrows` rows from `start` on by expert; yield slices and each expert's weights."""
        if self.weights is None or self.weights.ndim == 1:
            yield slice(0, nrows), self.weights
            return
        per_expert = self.tensor.shape[-2]
        for expert in range(start // per_expert, -(-(start + nrows) // per_expert)):
            low, high = (bound * per_expert - start for bound in (expert, expert + 1))
            yield slice(max(low, 0), min(high, nrows)), self.weights[expert]


@dataclass(frozen=True)
class Output:
    """One file that will be written."""

    path: Path | None  # None where the output is no file on disk
    metadata: dict[str, Any]
    steps: tuple[Step, ...]

    @cached_property
    def header(self) -> bytes:
        """The bytes before the tensor data."""
        return pack_header(self.metadata, [step.spec for step in self.steps])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the header."""
        return hashlib.sha256(self.header).hexdigest()

    @property
    def alignment(self) -> int:
        """The alignment of the tensors, in bytes."""
        return int(self.metadata.get("general.alignment", ALIGNMENT))

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(-(-step.spec.nbytes // self.alignment) * self.alignment for step in self.steps)


@dataclass(frozen=True)
class Job:
    """All decisions of a quantization, made before the first weight is read."""

    source: Path
    files: tuple[Path, ...]  # those that hold the source's weights
    ftype: Ftype
    options: Options
    outputs: tuple[Output, ...]  # one, or one per shard
    refusals: tuple[str, ...]  # why it cannot be done; empty where it can
    notes: tuple[str, ...]  # what a user should know

    @property
    def steps(self) -> list[Step]:
        """The tensors of all outputs, in the order of processing."""
        return [step for output in self.outputs for step in output.steps]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(output.nbytes for output in self.outputs)


def make_job(src: str | Path | Model, outfile: str | Path | BinaryIO | None, options: Options) -> Job:
    """Decide everything that a quantization will write.

    Raises
    ------
    FileNotFoundError, ValueError
        If the source cannot be opened, or an option has no meaning for it.
    """
    model = _open(src, options)
    ftype, other = _ftype_or_layout(options)
    shards = _shards(model, options.keep_split)
    overrides = dict(parse_override(text) for text in options.override_kv)
    if "general.alignment" in overrides:
        raise ValueError(
            "override: key=general.alignment, must keep its value, as tensors' offsets depend on it. Leave it out."
        )
    matrix, matrix_keys = matrix_of(options)
    hparams = read_hparams(model.metadata | overrides, model.names, source=str(model.path))
    tensors, pruned_keys = {tensor.name: tensor for tensor in model}, {}
    if options.prune_layers:
        pruned_keys = pruned_metadata(model.metadata, hparams.n_layer_all, options.prune_layers)
        names = pruned_names(tensors, hparams.n_layer_all, options.prune_layers)
        tensors = {name: replace(tensors[old], name=name) for old, name in names.items()}
        shards = [[names[old] for old in shard if old in names] for shard in shards]
        matrix = {names[old]: weights for old, weights in matrix.items() if old in names}
    shapes = {name: tensors[name].shape for names in shards for name in names}
    _check_experts(hparams, shapes, model.path)
    if other is None:
        types = {name: tensor.qtype for name, tensor in tensors.items()}
        given = {"rules": options.rules, "imatrix": bool(matrix), "source": types, "keep_order": options.keep_split}
        given |= {name: getattr(options, name) for name in _TYPE_OPTIONS}
        choices, misfits = choose_types(hparams, shapes, ftype.name, **given), []
    else:
        choices, misfits = apply_layout(model, other)
    steps = {n: Step(tensors[n], choice, weights_of(tensors[n], choice, matrix)) for n, choice in choices.items()}
    number = _present_ftype(model) if ftype.number is None else ftype.number
    metadata = metadata_of(model.metadata, number, overrides, matrix_keys, pruned_keys)
    outputs = _outputs(_paths(model, outfile, ftype, options.keep_split, len(shards)), shards, steps, metadata)
    refusals = (*misfits, *_refusals(steps.values(), ftype, options))
    return Job(model.path, model.files, ftype, options, outputs, refusals, tuple(_notes(model, steps, options, matrix)))


def _notes(
    model: Model, steps: Mapping[str, Step], options: Options, matrix: Mapping[str, np.ndarray]
) -> Iterator[str]:
    """Yield notes for the user, one sentence per kind."""
    if not options.via and model.is_checkpoint and any(tensor.qtype in ("BF16", "F32") for tensor in model):
        yield "weights keep the checkpoint's precision; via=f16 rounds them as a conversion to F16 would"
    idle = [text for text, _ in options.tensor_types if not any(map(compile_expression(text, steps), steps))]
    if idle:
        yield f"tensor types: no tensor name matches {', '.join(idle)}"
    if options.imatrix is not None and not matrix:
        yield "include_weights and exclude_weights leave no entry of the importance matrix"
    missing = [name for name, step in steps.items() if matrix and step.weights is None and not step.is_kept]
    if missing:
        some = ", ".join(missing[:3]) + ", …" * (len(missing) > 3)
        yield f"{len(missing)} tensors have no entry in the importance matrix: {some}"
    idle_experts = sum(int((step.weights == 1).all(axis=1).sum()) for step in steps.values() if _has_experts(step))
    if idle_experts:
        yield f"{idle_experts} experts have no counts in the importance matrix: all their columns have the same weight"
    arch = model.metadata["general.architecture"]
    if arch not in COMPARED:
        yield (
            f"architecture={arch}: the rules follow tensor names. "
            f"No file of this architecture was compared with llama-quantize's."
        )


def _ftype_or_layout(options: Options) -> tuple[Ftype, Model | None]:
    """Return the requested mixture, or the model of the requested layout with its recorded ftype."""
    if (options.ftype is None) == (options.layout_of is None):
        raise ValueError(
            f"ftype={options.ftype}, layout_of={options.layout_of}, must be exactly one of them. "
            f"Give a mixture or a file."
        )
    if options.layout_of is None:
        return find_ftype(options.ftype), None  # pyright: ignore[reportArgumentType]
    asked = [name for name in _TYPE_OPTIONS if getattr(options, name)]
    asked += [name for name in ("keep_split", "prune_layers") if getattr(options, name)]
    if asked:
        raise ValueError(f"{asked[0]}: has no meaning with layout_of. Leave it out.")
    other = as_model(options.layout_of)
    number = _present_ftype(other)
    known = next((ftype.name for ftype in ALL_FTYPES.values() if ftype.number == number), other.path.stem)
    return Ftype(known, number, None), other


_TYPE_OPTIONS = ("pure", "leave_output_tensor", "output_tensor_type", "token_embedding_type", "tensor_types")


def _has_experts(step: Step) -> bool:
    """Tell whether a step has weights for each of several experts."""
    return step.weights is not None and step.weights.ndim == 2


def _refusals(steps: Iterable[Step], ftype: Ftype, options: Options) -> Iterable[str]:
    """Yield reasons for refusing these steps, one sentence per kind."""
    steps = list(steps)
    packed = [s for s in steps if not s.is_kept and s.tensor.qtype not in FLOATS]
    if packed and not options.allow_requantize:
        yield (
            f"{packed[0].tensor.name}: type={packed[0].tensor.qtype}, is quantized already ({len(packed)} tensors). "
            f"Start from F16, BF16 or F32, or pass allow_requantize=True and lose quality."
        )
    fallen = [s for s in steps if s.choice.qtype != s.choice.wanted]
    if fallen and not options.fallback:
        step = fallen[0]
        yield (
            f"{step.tensor.name}: n_per_row={step.tensor.shape[-1]} is not a multiple of the {step.choice.wanted} "
            f"block size {block_size(step.choice.wanted)} ({len(fallen)} tensors). Allow the fallback to "
            f"{step.choice.qtype}, or choose another ftype."
        )
    bare = [s for s in steps if s.weights is None and not s.is_kept]
    bare = [s for s in bare if needs_imatrix(s.tensor.name, s.choice.qtype, ftype.name)]
    if bare and bare[0].choice.qtype == "Q2_K":
        yield f"{bare[0].tensor.name}: Q2_K in a Q2_K_S file needs an importance matrix. Pass one, or choose Q2_K."
    elif bare:
        yield (
            f"{bare[0].tensor.name}: type={bare[0].choice.qtype}, needs an importance matrix ({len(bare)} tensors). "
            "Pass one (see quantlab imatrix), or choose IQ3_S or a larger ftype."
        )


# ---- tensors in, weights beside them


def _open(src: str | Path | Model, options: Options) -> Model:
    """Open the source, a checkpoint with the given options."""
    if options.via not in (None, "f16"):
        raise ValueError(f"via={options.via}, must be f16. Give f16, or leave it out.")
    if not options.via and not options.as_llama_cpp:
        return as_model(src)
    if isinstance(src, Model) or not is_checkpoint(model_path(src)):
        given = "via=f16 rounds" if options.via else "as_llama_cpp=True converts"
        raise ValueError(f"{src}: {given} a checkpoint, this is a GGUF model. Leave the option out.")
    return open_checkpoint(model_path(src), options.via or "auto", as_llama_cpp=options.as_llama_cpp)


def _shards(model: Model, keep_split: bool) -> list[list[str]]:
    """Return the tensor names of each output (without keep_split: one output) in the source's order."""
    if not keep_split:
        return [model.names]
    if model.is_checkpoint or not model.files:
        raise ValueError(f"{model.path}: keep_split applies to GGUF files. Leave keep_split out.")
    stored = sorted(model, key=lambda tensor: tensor.offset or 0)
    return [[tensor.name for tensor in stored if tensor.file == file] for file in model.files]


def matrix_of(options: Options) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return the weights of the tensors that the options select, and the metadata keys that record them."""
    if options.include_weights and options.exclude_weights:
        raise ValueError("include_weights and exclude_weights: must not both be given. Leave one out.")
    if options.imatrix is None:
        if options.include_weights or options.exclude_weights:
            raise ValueError("include_weights and exclude_weights choose entries of a matrix. Pass imatrix too.")
        return {}, {}
    is_path = not isinstance(options.imatrix, ImportanceMatrix)
    matrix = as_matrix(options.imatrix)
    matrix = matrix.keep(lambda name: not any(part in name for part in options.exclude_weights))  # pyright: ignore[reportOptionalMemberAccess]
    if options.include_weights:
        matrix = matrix.keep(lambda name: any(part in name for part in options.include_weights))
    if not matrix.sums:
        return {}, {}
    keys: dict[str, Any] = {"quantize.imatrix.file": _cut(str(options.imatrix))} if is_path else {}
    if matrix.datasets:
        keys["quantize.imatrix.dataset"] = _cut(matrix.datasets[0])
    keys["quantize.imatrix.entries_count"] = np.uint32(len(matrix.sums))
    if matrix.chunk_count > 0:
        keys["quantize.imatrix.chunks_count"] = np.uint32(matrix.chunk_count)
    return matrix.entries, keys


def weights_of(tensor: LazyTensor, choice: Choice, matrix: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Return the weights of one tensor's columns (None: it is copied, or the matrix has no entry).

    Returns
    -------
    np.ndarray [shape=(n_per_row,) or, of experts, (n_expert, n_per_row), dtype=float32] or None

    Raises
    ------
    ValueError
        If the matrix was collected on another model.
    """
    weights = matrix.get(tensor.name)
    if weights is None or choice.qtype == tensor.qtype:
        return None
    n_expert, n_per_row = n_experts(tensor.shape), tensor.shape[-1]
    if weights.size != n_expert * n_per_row:
        if tensor.name in EMBEDDINGS:
            return None
        needed = f"{n_per_row}" if n_expert == 1 else f"{n_per_row} for each of {n_expert} experts"
        raise ValueError(
            f"{tensor.name}: the importance matrix has {weights.size} columns, must have {needed}. "
            f"Collect a matrix of this model."
        )
    return weights.reshape(n_expert, n_per_row) if n_expert > 1 else weights


def n_experts(shape: tuple[int, ...]) -> int:
    """Return the number of matrices in a stack of experts (1: a plain tensor)."""
    return shape[-3] if len(shape) > 2 else 1


def _check_experts(hparams: Hparams, shapes: Mapping[str, tuple[int, ...]], source: Path) -> None:
    """Refuse stacks with another number of experts than the metadata gives."""
    for name, shape in shapes.items():
        if re.search(r"\.ffn_(gate|up|gate_up|down)_exps\.weight$", name) and n_experts(shape) != hparams.n_expert:
            raise ValueError(
                f"{source}: {name}: shape={shape}, the metadata has n_expert={hparams.n_expert}. Convert it again."
            )


# ---- metadata


def parse_override(text: str) -> tuple[str, Any]:
    """Parse one ``KEY=TYPE:VALUE`` of ``--override-kv``; an int becomes unsigned, as in llama-quantize.

    Raises
    ------
    ValueError
        If it does not read so.

    Examples
    --------
    >>> parse_override("llama.context_length=int:4096")
    ('llama.context_length', np.uint32(4096))
    """
    key, _, rest = text.partition("=")
    kind, colon, value = rest.partition(":")
    if not key or not colon or len(key) > MAX_STRING or len(value.encode()) > MAX_STRING:
        raise ValueError(
            f"override={text}, must be KEY=TYPE:VALUE, key and value of at most {MAX_STRING} bytes. Correct it."
        )
    try:
        if kind == "int":
            return key, np.uint32(abs(int(value)))
        if kind == "float":
            return key, np.float32(value)
    except ValueError:
        raise ValueError(f"override={text}, must have a number after {kind}:. Correct it.") from None
    except OverflowError:
        raise ValueError(
            f"override={text}, must be at most {2**32 - 1}, as an int is written in 32 bits. Give a smaller value."
        ) from None
    if kind == "bool" and value in ("true", "false"):
        return key, value == "true"
    if kind == "str":
        return key, value
    raise ValueError(
        f"override={text}, must have the type int, float, bool (true or false) or str before the colon. Correct it."
    )


def metadata_of(source: Mapping[str, Any], ftype: int, *more: Mapping[str, Any]) -> dict[str, Any]:
    """Return the source's keys in order, without those of shards; keys that are set move to the end."""
    version = np.uint32(QUANTIZATION_VERSION)
    metadata = {key: value for key, value in source.items() if not key.startswith("split.")}
    for keys in ({"general.quantization_version": version, "general.file_type": np.uint32(ftype)}, *more):
        metadata = {key: value for key, value in metadata.items() if key not in keys} | keys
    return metadata


def _present_ftype(model: Model) -> int:
    """Return a file's ftype number, or the number for its most common type."""
    if model.ftype is not None:
        return model.ftype
    commonest = Counter(tensor.qtype for tensor in model).most_common(1)[0][0]
    numbers = [f.number for f in FTYPES.values() if f.qtype == commonest and (f.alias or f.name == commonest)]
    return GUESSED | (numbers[0] if numbers else 0)  # pyright: ignore[reportOperatorIssue]


def _cut(text: str) -> str:
    """Return the first 127 bytes of a text, the most that an override's C string holds."""
    return text.encode("utf-8", "surrogateescape")[:MAX_STRING].decode("utf-8", "surrogateescape")


# ---- files out


def _paths(model: Model, outfile, ftype: Ftype, keep_split: bool, count: int) -> Sequence[Path | None]:
    """Return the path of each output file."""
    if hasattr(outfile, "write"):
        return [None] * count
    path = Path(outfile) if outfile is not None else default_folder(model.path) / f"ggml-model-{ftype.name}.gguf"
    if not keep_split:
        return [path]
    if is_stream(path):
        raise ValueError(f"{path}: is a device or a pipe, shards must be files. Choose another output.")
    return shard_paths(path, count)


def _outputs(paths: Sequence[Path | None], shards, steps: Mapping[str, Step], metadata: dict) -> tuple[Output, ...]:
    """Distribute the steps over the files; the first gets all metadata, the others only their number."""
    if len(paths) == 1:
        return (Output(paths[0], metadata, tuple(steps.values())),)
    outputs = []
    for i, (path, names) in enumerate(zip(paths, shards, strict=True)):
        split = {"split.no": np.uint16(i), "split.count": np.uint16(len(paths))}
        split |= {"split.tensors.count": np.int32(len(steps))}
        outputs.append(Output(path, (metadata if i == 0 else {}) | split, tuple(steps[name] for name in names)))
    return tuple(outputs)
