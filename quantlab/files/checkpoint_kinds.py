"""Unsupported checkpoints, named by kind: adapters, packed weights, weights that were not gathered."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from quantlab.files.fp8 import is_fp8
from quantlab.files.recognize import short

__all__ = ["check_no_adapter", "check_not_packed", "empty_tensors", "packed_by"]

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "mxfp4": "MXFP4", "hqq": "HQQ"}
# ends of names that only one quantizer gives; the first that fits
_NAMES = {
    ".g_idx": "GPTQ",
    ".qweight": "AWQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".scales": "MLX",
}


def check_no_adapter(folder: Path, table: Mapping[str, Any] | None = None) -> None:
    """Refuse the folder of an adapter; `table` is its adapter_config.json.

    Raises
    ------
    ValueError
        Naming the model that the adapter belongs to.
    """
    found = [name for name in _ADAPTER_FILES if (folder / name).is_file()]
    if not found:
        return
    kind, base = (table or {}).get("peft_type"), (table or {}).get("base_model_name_or_path")
    kind = "a LoRA adapter" if kind == "LORA" else "an adapter"
    of = f" of {short(base)}" if isinstance(base, str) and base else ""
    raise ValueError(
        f"{folder}: {found[0]} says that this is {kind}{of}, not a model. Merge it into its base first "
        "(merge_and_unload of peft), or remove the adapter's files to convert the model in the same folder."
    )


def check_not_packed(path: Path, names: Iterable[str], table: Mapping[str, Any] | None = None) -> None:
    """Refuse weights that another quantizer packed, told by the tensors' names or the configuration, `table`.

    Raises
    ------
    ValueError
        Naming the quantizer.
    """
    method = packed_by(names, table or {})
    if method is not None:
        raise ValueError(
            f"{path}: is a {method} checkpoint, its weights are quantized already. "
            "Use the unquantized checkpoint that it was made from."
        )


def packed_by(names: Iterable[str], table: Mapping[str, Any]) -> str | None:
    """Name the quantizer that packed a checkpoint's weights (None: they are plain).

    Examples
    --------
    >>> packed_by([], {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    'bitsandbytes'
    >>> packed_by(["model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.up_proj.g_idx"], {})
    'GPTQ'
    """
    for key in ("quantization_config", "quantization"):
        given = table.get(key)
        if not given or isinstance(given, Mapping) and is_fp8(given):  # whose scales are applied
            continue
        method = given.get("quant_method") if isinstance(given, Mapping) else None
        if isinstance(method, str) and method.isprintable():
            return _METHODS.get(method.lower(), method[:40])
        is_mlx = isinstance(given, Mapping) and {"group_size", "bits"} <= given.keys()
        if is_mlx or key == "quantization_config":
            return "MLX" if is_mlx else "quantized"
    names = list(names)
    return next((method for end, method in _NAMES.items() if any(name.endswith(end) for name in names)), None)


def empty_tensors(what: str) -> str:
    """Explain why tensors have no values, as the end of an error text."""
    return (
        f"{what} without any values: the weights were partitioned when they were saved (DeepSpeed ZeRO-3, FSDP). "
        "Gather the parameters and save the model again."
    )
