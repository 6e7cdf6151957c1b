"""Checkpoints (Hugging Face and Meta folders, single files), opened as the GGUF model they convert to.

Names, order and row order of the tensors are those of llama.cpp's converter: in a Hugging Face checkpoint the rows of
q and k are permuted back, because GGUF's rotary positions turn neighbouring pairs. Meta's weights have that order.

Source: `convert_hf_to_gguf.py` and `conversion/` of llama.cpp; `convert.py` of December 2023 for Meta's parts.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from quantlab.arch import complete
from quantlab.arch.record import FLOAT_ROLES
from quantlab.files.byte_range import PLAIN_DTYPES, StoredTensor
from quantlab.files.changes import Joined, Source, change
from quantlab.files.checkpoint_metadata import (
    Config,
    check_computed,
    early_metadata,
    hparams_metadata,
    read_config,
    rope_factors,
)
from quantlab.files.fp8 import without_scales
from quantlab.files.general_metadata import general_metadata
from quantlab.files.model import WEIGHTS, LazyTensor, Model
from quantlab.files.stacks import STACK_CHANGES, Mxfp4, Stacked, stack_change
from quantlab.files.tensor_names import plain_names, text_names
from quantlab.files.tokenizer_files import vocab_metadata
from quantlab.files.weights import index_weights, meta_parts, read_json, read_weights
from quantlab.quants.ggml_types import block_size

__all__ = ["OUTTYPES", "RangeLoss", "open_checkpoint"]

OUTTYPES = {"auto": None, "f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}


# parts of layers that guess several tokens at once → their names as a layer's
_GUESSING = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head.norm",
}


@dataclass
class RangeLoss:
    """Numbers of values that became infinite or zero in F16, by tensor, counted while rows are read."""

    overflowed: dict[str, int] = field(default_factory=dict)
    vanished: dict[str, int] = field(default_factory=dict)


def open_checkpoint(
    path: str | Path,
    outtype: str = "auto",
    *,
    loss: RangeLoss | None = None,
    as_llama_cpp: bool = False,
    model_name: str | None = None,
    mtp: bool = False,
) -> Model:
    """Open a checkpoint lazily as the GGUF model that it converts to.

    Parameters
    ----------
    path : str or Path
        A Hugging Face folder, a folder of Meta's, or one file of weights with its configuration beside it.
    outtype, as_llama_cpp, model_name, mtp
        As for `quantlab.convert`.
    loss : RangeLoss, optional
        Filled while tensors are read.

    Returns
    -------
    Model
        Rows come converted to the tensor's `qtype`; reading a value that is not finite raises ValueError.

    Raises
    ------
    FileNotFoundError
        If weights, configuration or tokenizer are missing.
    ValueError
        If a file is damaged, the architecture is not known, or shapes, configuration and tokenizer do not fit together.

    Warns
    -----
    UserWarning
        If the output layer is tied to the embedding and another one is stored, or as `vocab_metadata` does.
    """
    path = Path(path)
    if outtype not in OUTTYPES:
        raise ValueError(f"outtype={outtype!r}, must be one of {' '.join(OUTTYPES)}. Convert first, then quantize.")
    folder = path if path.is_dir() else path.parent
    config = read_config(folder)
    if not as_llama_cpp:
        check_computed(folder, config)
    stored = _read_sources(path, config)
    if mtp:
        stored, config = _with_guessing(folder, stored, config)
    config = _with_sizes(folder, config, stored)
    sources = dict(_gguf_sources(folder, stored, config))
    roles = _check_shapes(folder, sources, config)
    _speak_of_the_head(folder, sources)
    qtype = OUTTYPES[outtype] or _own_type(sources)
    tensors = [
        _lazy(name, source, "F32" if roles[name] in FLOAT_ROLES else qtype, loss) for name, source in sources.items()
    ]
    factors = [
        LazyTensor(name, values.shape, "F32", lambda start, stop, values=values: values[None, :][start:stop])
        for name, values in rope_factors(config).items()
    ]
    tensors = factors + tensors
    metadata = {"general.architecture": config.arch} | early_metadata(config)
    metadata |= general_metadata(folder, config.arch, tensors, model_name) | hparams_metadata(config, qtype)
    metadata |= vocab_metadata(folder, config, as_llama_cpp=as_llama_cpp)
    _check_texts(folder, metadata)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in WEIGHTS)
    return Model(path, metadata, tensors, files, is_checkpoint=True)


def _check_texts(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Refuse texts that cannot be stored: JSON can hold half a surrogate pair."""
    for key, value in metadata.items():
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        try:
            "".join(texts).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{folder}: {key} holds half a surrogate pair. Download the tokenizer again.") from None


def _read_sources(path: Path, config: Config) -> dict[str, Source]:
    """Index the weights and join the parts of Meta's checkpoints."""
    if path.is_file():
        return plain_names(path, read_weights(path))
    parts = meta_parts(path) if config.is_meta else []
    if not parts:
        names, table = plain_names(path, index_weights(path)), read_json(path / "config.json")
        names = text_names(path, names) if "text_config" in table else names
        return without_scales(path, names, table.get("quantization_config"))
    n_vocab = sum(part["output.weight"].shape[0] for part in parts) if "output.weight" in parts[0] else 0
    return {name: _join(path, name, [part[name] for part in parts], n_vocab) for name in parts[0]}


def _join(folder: Path, name: str, parts: list[StoredTensor], n_vocab: int) -> Source:
    """Join the parts of a tensor: wo, w2 and Llama 1 and 2's embedding by columns, the others by rows."""
    first = parts[0]
    if len(parts) == 1 or len(first.shape) == 1:
        return first
    if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
        shapes = [part.shape for part in parts]
        raise ValueError(
            f"{folder}: {name}: the parts have shapes {shapes}, must be equal. Download the checkpoint again."
        )
    whole_rows = name == "tok_embeddings.weight" and first.shape[0] == n_vocab
    along_row = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
    return Joined(tuple(parts), 1 if along_row or whole_rows else 0)


def _with_sizes(folder: Path, config: Config, stored: Mapping[str, Source]) -> Config:
    """Fill in the sizes that Meta's configuration does not give from the weights."""
    if not config.is_meta:
        return config
    for name in ("output.weight", "layers.0.feed_forward.w1.weight"):
        if name not in stored:
            raise ValueError(f"{folder}: {name}: missing from the weights. Download the whole checkpoint.")
    n_vocab, n_ff = (stored[name].shape[0] for name in ("output.weight", "layers.0.feed_forward.w1.weight"))
    return replace(config, n_vocab=n_vocab, n_ff=n_ff)


def _with_guessing(folder: Path, stored: Mapping[str, Source], config: Config) -> tuple[dict[str, Source], Config]:
    """Name the layers that guess several tokens at once as layers after the others, and count them."""
    found, numbers = {}, set()
    for name, source in stored.items():
        start = next((start for start in _left_out(config) if name.startswith(start)), None)
        kind, _, rest = name[len(start) :].partition(".") if start else ("", "", "")
        if kind == "layers" and rest.partition(".")[0].isdecimal():
            number, _, rest = rest.partition(".")
            numbers.add(int(number))
            name = f"model.layers.{config.n_layer + int(number)}.{rest}"
        elif kind in _GUESSING:
            name = f"model.layers.{config.n_layer}.{_GUESSING[kind]}.{rest}"
        found[name] = source
    knows = "nextn_predict_layers" in config.record.metadata
    if not knows or not numbers or numbers != set(range(len(numbers))):
        raise ValueError(f"{folder}: mtp=True, no layers here guess several tokens at once. Leave mtp out.")
    return found, replace(config, n_layer_nextn=len(numbers))


def _left_out(config: Config) -> tuple[str, ...]:
    """Return the starts of the names of tensors of layers that guess several tokens at once."""
    return tuple(start.format(config.n_layer) for start in config.record.left_out)


def _gguf_sources(folder: Path, stored: Mapping[str, Source], config: Config) -> Iterator[tuple[str, Source]]:
    """Give tensors their GGUF names and row order."""
    names = config.record.checkpoint_names(complete(config))
    yield from _packed(folder, stored, names)
    waiting: dict[str, dict[str, dict[int, Source]]] = {}  # layer → GGUF name → expert → its matrix
    if left := [name for name in stored if name.startswith(_left_out(config))]:
        again = " mtp=True (--mtp) writes them." if "nextn_predict_layers" in config.record.metadata else ""
        warnings.warn(
            f"{folder}: {len(left)} tensors of multi-token prediction layers are left out, as llama.cpp's "
            f"converter does with --no-mtp.{again}",
            stacklevel=4,
        )
    for name, source in stored.items():
        if name.endswith(config.record.skipped) or name in left:
            continue
        if name not in names:
            raise ValueError(
                f"{folder}: {name}: no tensor of a {config.arch} model with {config.n_layer} layers has this name. "
                f"Check num_hidden_layers and architectures in its configuration."
            )
        for gguf_name, how in names[name]:
            if how[:1] == ("stack",):
                layer = waiting.setdefault(gguf_name.rpartition(".ffn")[0], {})
                layer.setdefault(gguf_name, {})[int(how[1])] = source
                yield from _stacked(folder, layer, config)
            elif how[:1] != ("mxfp4",):
                is_stack = bool(how) and how[0] in STACK_CHANGES
                where = f"{folder}: {name}"
                yield gguf_name, (stack_change if is_stack else change)(source, how, config, where)
    n_expert = _most_experts(config)
    for layer in waiting.values():
        for gguf_name, parts in layer.items():
            if missing := set(range(n_expert)) - parts.keys():
                number = min(missing)
                raise ValueError(f"{folder}: {gguf_name}: expert {number} is missing. Download the whole checkpoint.")


def _most_experts(config: Config) -> int:
    """Return the largest number of experts in a layer."""
    return max(config.n_expert) if isinstance(config.n_expert, tuple) else config.n_expert


def _stacked(folder: Path, layer: dict[str, dict[int, Source]], config: Config) -> Iterator[tuple[str, Source]]:
    """Stack a layer's experts once the last one is known, and empty `layer`."""
    kinds = [tensor.name.rpartition("{}")[2] for tensor in config.record.tensors if tensor.change == ("stack",)]
    n_expert = _most_experts(config)
    if len(layer) < len(kinds) or any(len(parts) < n_expert for parts in layer.values()):
        return
    for name in sorted(layer, key=lambda name: next(i for i, kind in enumerate(kinds) if name.endswith(kind))):
        parts = [layer[name][e] for e in range(n_expert)]
        if any((part.shape, part.dtype) != (parts[0].shape, parts[0].dtype) for part in parts):
            raise ValueError(
                f"{folder}: {name}: experts must have the same shape and type. Download the checkpoint again."
            )
        yield name, Stacked(parts[0], tuple(parts))
    layer.clear()


def _packed(folder: Path, stored: Mapping[str, Source], names: Mapping[str, list]) -> Iterator[tuple[str, Source]]:
    """Yield the tensors stored as MXFP4 (blocks and scales), which a converter writes first."""
    for name, source in stored.items():
        for gguf_name, how in names.get(name, ()):
            if how[:1] == ("mxfp4",):
                scales = stored.get(name.removesuffix("_blocks") + "_scales")
                shapes = source.shape[:-1], source.shape[-1:], source.dtype
                if scales is None or shapes != (scales.shape, (16,), scales.dtype) or scales.dtype != "U8":
                    raise ValueError(
                        f"{folder}: {name}: must come with its scales, one byte for 16. Download it again."
                    )
                yield gguf_name, Mxfp4(source, scales, *map(int, how[1:]))


def _check_shapes(folder: Path, sources: Mapping[str, Source], config: Config) -> dict[str, str]:
    """Check that every tensor exists with the shape that the configuration gives; return their roles."""
    roles = {}
    for name, tensor, shape in config.record.expand(complete(config)):
        if name not in sources:
            if tensor.optional:
                continue
            raise ValueError(f"{folder}: {name}: missing from the weights. Download the whole checkpoint.")
        if sources[name].shape != shape:
            raise ValueError(
                f"{folder}: {name}: shape={sources[name].shape}, the configuration gives {shape}. "
                f"Weights and configuration belong to different models."
            )
        roles[name] = tensor.role
    return roles


def _speak_of_the_head(folder: Path, sources: Mapping[str, Source]) -> None:
    """Warn if llama.cpp and transformers use different output matrices; compare a few rows."""
    is_tied = read_json(folder / "config.json").get("tie_word_embeddings")
    head, embedding = sources.get("output.weight"), sources.get("token_embd.weight")
    if is_tied is True and head is not None:
        last = head.shape[0]
        places = [(0, min(4, last)), (last // 2, min(last // 2 + 4, last)), (max(last - 4, 0), last)]
        if not all(np.array_equal(head.rows(*place), embedding.rows(*place)) for place in places):  # pyright: ignore[reportOptionalMemberAccess]
            warnings.warn(
                f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from the embedding. It is kept, as "
                "llama.cpp's converter does; transformers uses the embedding.",
                stacklevel=4,
            )
    if is_tied is False and head is None:
        warnings.warn(
            f"{folder}: tie_word_embeddings is false, but lm_head.weight is missing. llama.cpp uses the embedding.",
            stacklevel=4,
        )


def _own_type(sources: Mapping[str, Source]) -> str:
    """Return the type of the first 16-bit matrix (default: F32)."""
    for source in sources.values():
        if len(source.shape) > 1 and source.dtype in ("BF16", "F16"):
            return source.dtype
    return "F32"


def _lazy(name: str, source: Source, qtype: str, loss: RangeLoss | None) -> LazyTensor:
    shape, qtype = source.shape, "MXFP4" if source.dtype == "MXFP4" else qtype
    if shape[-1] % block_size(qtype):
        qtype = "F16"  # a row that Q8_0's blocks do not divide
    return LazyTensor(name, shape, qtype, partial(_read_as, source, name, qtype, loss))


def _read_as(source: Source, name: str, qtype: str, loss: RangeLoss | None, start: int, stop: int) -> np.ndarray:
    """Read rows, check that they are finite and convert them to `qtype`."""
    rows = source.rows(start, stop)
    if source.dtype == "MXFP4":
        return rows
    are_halves = source.dtype in ("F16", "BF16")  # which are checked while they are decoded
    if not are_halves or qtype in (source.dtype, "F32"):
        _check_finite(rows, name, start)
    if qtype == source.dtype:
        return rows
    if qtype == "F32":
        return _widen(rows)
    from quantlab import quants  # numba; a checkpoint that keeps its type does without

    try:
        data = quants.quantize(rows if are_halves else _widen(rows), qtype, name=name, first_row=start)
    except ValueError:
        _check_finite(rows, name, start)  # says where in the tensor, not in these rows
        raise
    if qtype == "F16" and loss is not None:
        _count_loss(rows, data.view(np.uint16), name, loss)
    return data.view(PLAIN_DTYPES.get(qtype, np.uint8))


def _widen(rows: np.ndarray) -> np.ndarray:
    """Convert to float32; shift the bits of bfloat16, which is faster than a cast."""
    if rows.dtype == ml_dtypes.bfloat16:
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32, copy=False)


def _check_finite(rows: np.ndarray, name: str, start: int) -> None:
    """Refuse NaN, infinity and values that float32 rounds to infinity, by comparing the bits without sign."""
    bits, ceiling = {
        "bfloat16": (np.uint16, 0x7F80),
        "float16": (np.uint16, 0x7C00),
        "float32": (np.uint32, 0x7F800000),
        "float64": (np.uint64, 0x47EFFFFFF0000000),  # the first that float32 rounds to infinity
    }.get(rows.dtype.name, (None, None))
    if bits is None:
        raise ValueError(
            f"{name}: dtype={rows.dtype.name}, must be floating-point weights. Use an unquantized checkpoint."
        )
    if not rows.size:
        return
    magnitude = rows.view(bits) & bits(np.iinfo(bits).max >> 1)
    if magnitude.max() >= ceiling:
        row, column = np.unravel_index(np.argmax(magnitude >= ceiling), rows.shape)
        value = rows[row, column]
        rule = "fit in float32" if np.isfinite(value) else "be finite"
        raise ValueError(
            f"{name}: value {value} at row {start + row}, column {column}; every weight must {rule}. "
            f"The checkpoint is broken; download it again or repair it."
        )


def _count_loss(rows: np.ndarray, halves: np.ndarray, name: str, loss: RangeLoss) -> None:
    """Count the values that became infinite or zero; `halves` holds the float16 bits."""
    bits, overflowed, vanished = halves & 0x7FFF, 0, 0
    if bits.max() == 0x7C00:  # seldom, and faster to find out than to count
        overflowed = int(np.count_nonzero(bits == 0x7C00))
    if bits.min() == 0:
        vanished = int(np.count_nonzero(bits == 0)) - int(np.count_nonzero(_widen(rows) == 0))
    if overflowed:
        loss.overflowed[name] = loss.overflowed.get(name, 0) + overflowed
    if vanished:
        loss.vanished[name] = loss.vanished.get(name, 0) + vanished
