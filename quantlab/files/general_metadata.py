"""The `general.*` keys of a checkpoint: names from its folder and model card, sampling defaults, licence.

Model card and generation_config.json are written by hand. What cannot be read of them is left out with a warning: no
weight depends on it.

Source: `gguf.Metadata` and `conversion/base.py` of llama.cpp.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter, Metadata, size_label

from quantlab.files.hub import repository_of
from quantlab.files.model import LazyTensor
from quantlab.files.recognize import reason
from quantlab.files.weights import read_json

__all__ = ["general_metadata"]

MAX_CARD = 1 << 18  # bytes of a model card's front matter
_SCALARS = {
    GGUFValueType.UINT32: np.uint32,
    GGUFValueType.INT32: np.int32,
    GGUFValueType.FLOAT32: np.float32,
    GGUFValueType.UINT64: np.uint64,
    GGUFValueType.BOOL: bool,
    GGUFValueType.STRING: str,
}


def general_metadata(folder: Path, arch: str, tensors: Sequence[LazyTensor], name: str | None = None) -> dict[str, Any]:
    """Return the `general.*` keys.

    Parameters
    ----------
    folder, arch
        The checkpoint's; in the hub's cache, the repository's name stands for it.
    tensors : sequence of LazyTensor
        What the file will hold, for its size class.
    name : str, optional
        `general.name`. Default: that of the model card, or one made from the folder's name.

    Warns
    -----
    UserWarning
        If README.md or generation_config.json cannot be read.
    """
    folder = folder.resolve()
    card, sampling = folder / "README.md", folder / "generation_config.json"
    of_card, of_sampling = _read(card, _front_matter), _read(sampling, read_json)
    collect = partial(_collect, folder, arch, tensors, name)
    for parts, bad in (((of_card, of_sampling), []), (({}, of_sampling), [card]), ((of_card, {}), [sampling])):
        try:
            metadata, failed = collect(*parts), bad
            break
        except Exception:  # values of kinds that the library or a GGUF file does not take
            continue
    else:
        metadata, failed = collect({}, {}), [card, sampling]
    for path in failed:
        _leave_out(path, "it holds values that no GGUF file can hold")
    return metadata


def _read(path: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read(path)
    except Exception as error:  # YAML alone may fail in a dozen ways
        _leave_out(path, reason(error).removeprefix(f"{path}: ").rstrip("."), stacklevel=6)
        return {}


def _leave_out(path: Path, why: str, stacklevel: int = 5) -> None:
    """Warn the caller of `open` or `convert` about metadata that is left out."""
    warnings.warn(f"{path}: left out, {why}. The weights do not depend on it.", stacklevel=stacklevel)


def _collect(
    folder: Path,
    arch: str,
    tensors: Sequence[LazyTensor],
    name: str | None,
    card: Mapping[str, Any],
    sampling: Mapping[str, Any],
) -> dict[str, Any]:
    n_weights = sum(tensor.n_weights for tensor in tensors)
    repository = repository_of(folder)
    named = folder.with_name(repository.rpartition("/")[2]) if repository else folder
    found = Metadata.apply_metadata_heuristic(
        Metadata(), dict(card), read_json(folder / "config.json"), named, n_weights
    )
    for field in fields(found):
        key = field.name.removeprefix("sampling_")
        if key != field.name:
            setattr(found, field.name, sampling.get("temperature" if key == "temp" else key))
    if found.sampling_penalty_repeat is None:
        found.sampling_penalty_repeat = sampling.get("repetition_penalty")
    found.name = name or found.name or named.name
    found.size_label = found.size_label or size_label(n_weights, *_shares(tensors))
    writer = GGUFWriter(path=None, arch=arch)
    writer.add_type("model")
    found.set_gguf_meta_model(writer)
    return {key: _typed(value.value, value.type) for key, value in writer.kv_data[0].items()}


def _shares(tensors: Sequence[LazyTensor]) -> tuple[int, int, int]:
    """Return the number of weights shared by all tokens, the weights per expert, and the number of experts."""
    stacks = [tensor for tensor in tensors if "_exps." in tensor.name and len(tensor.shape) > 2]
    shared = sum(tensor.n_weights for tensor in tensors) - sum(tensor.n_weights for tensor in stacks)
    each = sum(tensor.n_weights // tensor.shape[0] for tensor in stacks)
    return shared, each, sum(tensor.shape[0] for tensor in stacks) // max(1, len(stacks))


def _front_matter(path: Path) -> dict[str, Any]:
    """Read a model card's front matter, unless it is too long or refers to its own parts."""
    if not path.is_file():
        return {}
    with open(path, "rb") as file:
        lines = file.read(MAX_CARD).split(b"\n")
    if lines[0].strip() != b"---":
        return {}
    if path.stat().st_size > MAX_CARD and b"---" not in map(bytes.strip, lines[1:]):
        raise ValueError(f"its front matter is longer than {MAX_CARD} bytes")
    text = b"\n".join(lines)
    anchors, aliases = (
        set(re.findall(rb"(?m)(?:^|[\s\[,{:-])" + sign + rb"([^\s,\]}]+)", text)) for sign in (b"&", rb"\*")
    )
    if anchors & aliases:
        raise ValueError("its front matter refers to its own parts")
    return Metadata.load_model_card(path.parent)


def _typed(value: Any, value_type: GGUFValueType) -> Any:
    if value_type == GGUFValueType.ARRAY:
        return [str(item) for item in value]
    if isinstance(value, list | dict):
        raise TypeError(value)
    return _SCALARS[value_type](value)
