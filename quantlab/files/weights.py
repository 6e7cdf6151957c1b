"""Find the files that hold a checkpoint's weights and index their tensors, in the order of llama.cpp's converter."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

from quantlab.files.byte_range import StoredTensor
from quantlab.files.checkpoint_kinds import check_not_packed
from quantlab.files.recognize import reason, short
from quantlab.files.safetensors_file import read_safetensors
from quantlab.files.torch_zip import read_torch

__all__ = ["index_weights", "meta_parts", "read_json", "read_weights"]

MAX_JSON = 64 << 20  # bytes; the largest tokenizer.json has 33 MB
MAX_FILE_NAME = 255  # bytes, on most file systems
MAX_VALUES = 3_000_000  # in a JSON file; that tokenizer has 2 million


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON table (missing file: an empty table).

    Raises
    ------
    ValueError
        If the file is too large or no JSON table.
    """
    if not path.is_file():
        return {}
    if path.stat().st_size > MAX_JSON:
        raise ValueError(f"{path}: {path.stat().st_size} bytes, need at most {MAX_JSON}. Download it again.")
    raw = path.read_bytes()
    n_values = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if n_values > MAX_VALUES:
        raise ValueError(f"{path}: {n_values} values, need at most {MAX_VALUES}. Download it again.")
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({reason(error)}). Download it again.") from None
    if not isinstance(table, dict):
        raise ValueError(f"{path}: holds a {type(table).__name__}, need a JSON table. Download it again.")
    return table


def read_weights(path: Path) -> dict[str, StoredTensor]:
    """Index one file, safetensors or torch, by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start[8:9] == b"{":
        return read_safetensors(path)
    tensors = read_torch(path)
    check_not_packed(path, tensors)
    return tensors


def index_weights(folder: Path) -> dict[str, StoredTensor]:
    """Index the shards of a Hugging Face folder: safetensors, else `pytorch_model*.bin`.

    Raises
    ------
    FileNotFoundError
        If weights are missing, or a shard that the index names is missing.
    ValueError
        If index and shards disagree, or the index names anything but plain file names.
    """
    for stem, pattern in (("model.safetensors", "model*.safetensors"), ("pytorch_model.bin", "pytorch_model*.bin")):
        parts = sorted(path.name for path in folder.glob(pattern))
        index_path = folder / f"{stem}.index.json"
        if (folder / stem).is_file() and _is_left_over(folder / stem, index_path, parts):
            return read_weights(folder / stem)
        if parts or index_path.is_file():
            return _index_parts(folder, parts, index_path)
    raise FileNotFoundError(
        f"{folder}: holds no model*.safetensors, pytorch_model*.bin or consolidated.*.pth. Give a checkpoint's folder."
    )


def _is_left_over(whole: Path, index_path: Path, parts: list[str]) -> bool:
    """Tell whether a whole file is accompanied by older shards, which transformers ignores."""
    shards = [part for part in parts if re.search(r"-\d+-of-\d+\.", part)]
    try:
        named = read_json(index_path).get("weight_map", {})
        is_named = isinstance(named, dict) and whole.name in map(str, named.values())
    except ValueError:
        is_named = False  # an index that cannot be read is as good as none
    if is_named or not (shards or index_path.is_file()):
        return False
    others = [index_path.name] * index_path.is_file() + shards
    warnings.warn(
        f"{whole}: only this file is read, as transformers does; {', '.join(others[:3])}{', …' * (len(others) > 3)} "
        "in the same folder can be deleted.",
        stacklevel=4,
    )
    return True


def _index_parts(folder: Path, parts: list[str], index_path: Path) -> dict[str, StoredTensor]:
    weight_map = read_json(index_path).get("weight_map", {})
    if index_path.is_file():
        _check_weight_map(index_path, weight_map)
        parts = sorted(set(weight_map.values()))
    tensors: dict[str, StoredTensor] = {}
    for part in parts:
        if not (folder / part).is_file():
            raise FileNotFoundError(f"{folder / part}: this shard is missing. Download the whole checkpoint.")
        for name, tensor in read_weights(folder / part).items():
            if name in tensors:
                raise ValueError(
                    f"{folder / part}: {name}: another shard also contains it. Download the checkpoint again."
                )
            tensors[name] = tensor
    if weight_map and weight_map.keys() != tensors.keys():
        missing, extra = sorted(weight_map.keys() - tensors.keys()), sorted(tensors.keys() - weight_map.keys())
        what = f"{short(missing[0])}: {index_path.name} names it, but no shard contains it" if missing else ""
        what = what or f"{short(extra[0])}: a shard contains it, but {index_path.name} does not name it"
        raise ValueError(f"{folder}: {what}. Download the whole checkpoint again.")
    return tensors


def _check_weight_map(index_path: Path, weight_map: Any) -> None:
    """Refuse an index that is not a table of names, or that points outside its folder."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index_path}: weight_map={short(weight_map)}, need a table. Download it again.")
    for name, part in weight_map.items():
        is_name = isinstance(part, str) and part.isprintable() and 0 < len(part.encode()) <= MAX_FILE_NAME
        if not is_name or part in (".", "..") or re.search(r"[/\\]", part):
            raise ValueError(
                f"{index_path}: {short(name)}: file {short(part)}, need a plain file name. The index is hostile."
            )


def meta_parts(folder: Path) -> list[dict[str, StoredTensor]]:
    """Index `consolidated.NN.pth` (or a single consolidated.pth or .safetensors) of Meta's folder, part by part.

    Raises
    ------
    FileNotFoundError
        If a part is missing.
    ValueError
        If the parts do not hold the same tensors.
    """
    paths = sorted(folder.glob("consolidated*.pth")) or sorted(folder.glob("consolidated*.safetensors"))
    if len(paths) > 1:
        for number in range(len(paths)):
            if not (folder / f"consolidated.{number:02d}.pth").is_file():
                raise FileNotFoundError(
                    f"{folder / f'consolidated.{number:02d}.pth'}: this part is missing. Download it."
                )
    parts = [read_weights(path) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if part.keys() != parts[0].keys():
            name = sorted(part.keys() ^ parts[0].keys())[0]
            raise ValueError(f"{path}: {name} is not in all parts. Download the checkpoint again.")
    return parts
