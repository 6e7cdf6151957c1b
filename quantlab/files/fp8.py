"""Weights published in FP8 (one byte each), with scales for blocks, for rows or for the whole matrix.

    weight            F8_E4M3 [n_out, n_in]
    weight_scale_inv  what blocks of `weight_block_size` are multiplied by; one number without blocks
    weight_scale      the same of compressed-tensors, ModelOpt and AutoFP8

Source: `dequant_model` in `conversion/base.py` of llama.cpp.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from quantlab.files.byte_range import STORED_DTYPES
from quantlab.files.changes import Changed, Source
from quantlab.files.recognize import short

__all__ = ["is_fp8", "without_scales"]

_SCALES = {"fp8": "_scale_inv", "compressed-tensors": ".weight_scale", "modelopt": ".weight_scale"}
_UNUSED = ("activation_scale", ".input_scale", ".k_scale", ".v_scale")  # of activations, which llama.cpp rounds itself
_FLOATS = ("float-quantized", "naive-quantized")  # formats of compressed-tensors


def is_fp8(table: Mapping[str, Any]) -> bool:
    """Tell whether a quantization_config describes FP8 weights.

    Examples
    --------
    >>> is_fp8({"quant_method": "fp8", "weight_block_size": [128, 128]}), is_fp8({"quant_method": "gptq"})
    (True, False)
    """
    method, groups = table.get("quant_method"), table.get("config_groups")
    if method == "compressed-tensors":
        weights = [group.get("weights") for group in groups.values()] if isinstance(groups, dict) else []
        is_float = all(isinstance(w, dict) and w.get("type") == "float" and w.get("num_bits") == 8 for w in weights)
        return table.get("format") in _FLOATS and len(weights) == 1 and is_float
    return method == "fp8" or method == "modelopt" and table.get("quant_algo") == "FP8"


def without_scales(folder: Path, stored: Mapping[str, Source], table: Any) -> dict[str, Source]:
    """Apply the scales to the tensors and drop the scale tensors.

    `table` is quantization_config; where it describes no FP8, the tensors are returned as they are.

    Raises
    ------
    ValueError
        If a scale has no weights, does not fit them, or weights of this kind have none.
    """
    if not isinstance(table, Mapping) or not is_fp8(table):
        return dict(stored)
    end, block = _SCALES[table["quant_method"]], _block(folder, table)
    if not any(name.endswith(end) for name in stored):
        end = ".weight_scale"  # AutoFP8 calls itself fp8
    found = {name: source for name, source in stored.items() if not name.endswith((end, *_UNUSED))}
    for name in stored:
        if not name.endswith(end) or name.endswith(_UNUSED):
            continue
        weight = name.removesuffix("_scale_inv").removesuffix("_scale")
        if weight not in found:
            raise ValueError(f"{folder}: {name}: {weight} is missing. Download the whole checkpoint.")
        source, scale = found[weight], stored[name]
        fits = _fitting_shapes(source.shape, block)
        if scale.shape not in fits:
            raise ValueError(
                f"{folder}: {name}: shape={scale.shape}, must be one of {fits} for weights of {source.shape}. "
                f"Check weight_block_size in config.json."
            )
        found[weight] = _Scaled(source, scale, block)
    bare = next((name for name, source in found.items() if source.dtype.startswith("F8_")), None)
    if bare:
        raise ValueError(f"{folder}: {bare}: FP8 weights must have a scale. Download the whole checkpoint.")
    return found


def _block(folder: Path, table: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the rows and columns of a block (None: scales of rows or of whole tensors)."""
    groups = table.get("config_groups")
    given = table.get("weight_block_size")
    if isinstance(groups, dict):
        given = next(iter(groups.values()))["weights"].get("block_structure")
    if given is None:
        return None
    if not isinstance(given, list) or len(given) != 2 or not all(type(size) is int and size > 0 for size in given):
        raise ValueError(f"{folder}: weight_block_size={short(given)}, must be two whole numbers. Check config.json.")
    return given[0], given[1]


def _fitting_shapes(shape: tuple[int, ...], block: tuple[int, int] | None) -> list[tuple[int, ...]]:
    """Return the shapes that scales of a tensor may have."""
    if block is None:
        return [(1,), (shape[0],), (shape[0], 1), (1, 1)]
    return [tuple(-(-size // part) for size, part in zip(shape, block, strict=False))]


@cache
def _decoded(dtype: str) -> np.ndarray:
    """Return the numbers of all 256 bytes [dtype=float32]."""
    return np.arange(256, dtype=np.uint8).view(STORED_DTYPES[dtype]).astype(np.float32)


@dataclass(frozen=True)
class _Scaled(Changed):
    """The product of weights and scales, in float32."""

    scale: Source
    block: tuple[int, int] | None

    @property
    def dtype(self) -> str:
        return "F32"

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows `start:stop` of the tensor seen as (nrows, n_per_row)."""
        data, dtype = self.source.rows(start, stop), self.source.dtype
        values = _decoded(dtype)[data.view(np.uint8)] if dtype.startswith("F8_") else data.astype(np.float32)
        return values * self._scales(start, stop)

    def _scales(self, start: int, stop: int) -> np.ndarray:
        """Return the scales of rows `start:stop`, as they are multiplied with them."""
        if self.block is not None:
            height, width = self.block
            blocks = self.scale.rows(start // height, -(-stop // height)).astype(np.float32)
            own = blocks[np.arange(start, stop) // height - start // height]
            return np.repeat(own, width, axis=1)[:, : self.shape[-1]]
        if len(self.scale.shape) == 2 and self.scale.shape[0] > 1:
            return self.scale.rows(start, stop).astype(np.float32)
        whole = self.scale.rows(0, 1).astype(np.float32).reshape(-1)
        return whole[start:stop, None] if len(whole) > 1 else whole
