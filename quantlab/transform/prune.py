"""Pruning of layers: new names of the remaining tensors, and new metadata."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["layers_of", "pruned_metadata", "pruned_names"]

_LAYER = re.compile(r"^blk\.(\d+)\.")


def layers_of(text: str) -> tuple[int, ...]:
    """Read the numbers of ``--prune-layers``.

    Raises
    ------
    ValueError
        If it holds something else than numbers with commas between them.

    Examples
    --------
    >>> layers_of("1,3")
    (1, 3)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise ValueError(f"prune_layers={text}, must be layer numbers separated by commas. Give for example 1,3.")
    return tuple(map(int, parts))


def pruned_names(names: Iterable[str], n_layer: int, layers: Sequence[int]) -> dict[str, str]:
    """Return the new name of every remaining tensor; the remaining layers are numbered from 0.

    `n_layer` counts the layers of the whole model, `layers` are the ones that are left out.

    Raises
    ------
    ValueError
        If a number is not a layer's, or no layer stays.

    Examples
    --------
    >>> pruned_names(["output.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight"], 2, [0])
    {'output.weight': 'output.weight', 'blk.1.attn_q.weight': 'blk.0.attn_q.weight'}

    Source: `remap_layer` in llama.cpp, src/llama-quant.cpp.
    """
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int | np.integer) or not 0 <= layer < n_layer:
            raise ValueError(f"prune_layers={layer}, must be 0 to {n_layer - 1}. Choose a layer of the model.")
    stay = sorted(set(range(n_layer)) - set(layers))
    if not stay:
        raise ValueError(
            f"prune_layers={','.join(map(str, layers))}, must leave at least one of {n_layer} layers. Leave out fewer."
        )
    number = {layer: i for i, layer in enumerate(stay)}
    found = {}
    for name in names:
        match = _LAYER.match(name)
        if match is None:
            found[name] = name
        elif int(match[1]) in number:
            found[name] = f"blk.{number[int(match[1])]}.{name[match.end() :]}"
    return found


def pruned_metadata(metadata: Mapping[str, Any], n_layer: int, layers: Sequence[int]) -> dict[str, Any]:
    """Return the changed metadata: the new number of layers.

    Raises
    ------
    ValueError
        If the metadata holds a value per layer: llama-quantize keeps such a list whole, and llama.cpp refuses the file.
    """
    arch = metadata.get("general.architecture")
    for key, value in metadata.items():
        if key.startswith(f"{arch}.") and np.ndim(value) == 1 and len(value) == n_layer:
            raise ValueError(f"{key}: has a value per layer, which pruning does not support. Leave prune_layers out.")
    return {f"{arch}.block_count": np.uint32(n_layer - len(set(layers)))}
