"""Differences between the layers of a configuration: windows, their rotation, sizes, recurrent layers."""

from pathlib import Path
from typing import Any

from quantlab.arch import Architecture
from quantlab.files.recognize import short

__all__ = ["number", "of_latent_attention", "recurrent", "rope_of_windows", "sizes_of_windows", "windows"]

MIN_NUMBER = 1e-12  # of numbers that need not be whole: far from where float32 ends


def number(
    path: Path, table: dict[str, Any], key: str, default: Any = None, *, whole: bool = True, most: int = (1 << 31) - 1
) -> Any:
    """Return a positive number of a configuration.

    Raises
    ------
    ValueError
        If it is missing, has another type or lies outside.
    """
    value = table.get(key)
    value = default if value is None else value
    least = 1 if whole else MIN_NUMBER
    if type(value) not in ((int,) if whole else (int, float)) or not least <= value <= most:
        raise ValueError(
            f"{path}: {key}={short(value)}, must be {least} to {most}. "
            f"Use the config.json that came with this checkpoint."
        )
    return value


def recurrent(path: Path, table: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return which layers are recurrent, and the columns of their values; `config` has what is known so far."""
    kinds, n_layer = table.get("layer_types"), config.n_layer
    says_kinds = isinstance(kinds, list)
    if not says_kinds:
        kinds = ["full_attention" if (i + 1) % config.attention_interval == 0 else "" for i in range(n_layer)]
    if len(kinds) != n_layer or config.ssm_heads % config.ssm_groups:
        raise ValueError(
            f"{path}: layer_types={short(kinds)}, must have one for each of {n_layer} layers; linear_num_value_heads="
            f"{config.ssm_heads}, must be a multiple of linear_num_key_heads={config.ssm_groups}."
        )
    found = tuple(int(kind != "full_attention") for kind in kinds)
    inner = config.ssm_heads * number(path, table, "linear_value_head_dim")
    given = config.rope.get("mrope_section") or [11, 11, 10]
    if not isinstance(given, list) or not all(type(size) is int for size in given):
        raise ValueError(
            f"{path}: mrope_section={short(given)}, must be whole numbers. "
            f"Use the config.json that came with this checkpoint."
        )
    sections = [*given, 0, 0, 0][:4]
    return {"recurrent": found, "ssm_inner": inner, "rope_sections": sections, "says_kinds": says_kinds}


def of_latent_attention(path: Path, table: dict[str, Any], sizes: dict[str, Any]) -> dict[str, Any]:
    """Return `sizes` with those of latent attention, and how experts are weighed.

    Source: DeepseekV2Model in `conversion/deepseek.py` of llama.cpp.
    """
    names = "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim"
    n_lora, n_rot, n_nope = (number(path, table, name) for name in names)
    scoring = table.get("scoring_func")
    if scoring not in (None, "softmax", "sigmoid"):
        raise ValueError(
            f"{path}: scoring_func={short(scoring)}, must be softmax or sigmoid. Use llama.cpp's converter."
        )
    found = {"n_head_kv": 1, "head_dim": n_lora + n_rot, "n_rot": n_rot, "head_dim_mla": n_nope + n_rot}
    found["expert_gating"] = {"softmax": 1, "sigmoid": 2}.get(scoring, 0)  # pyright: ignore[reportArgumentType, reportCallIssue]
    return sizes | found | {"expert_norm": table.get("norm_topk_prob") is True}


def windows(path: Path, table: dict[str, Any], record: Architecture, n_layer: int) -> tuple[int, ...] | int:
    """Return the window of each layer, for architectures that have windows in llama.cpp."""
    has_two_sizes = "head_dim_window" in record.metadata.values()
    if not record.window_period or not (table.get("sliding_window") or has_two_sizes):
        return 0
    size, kinds = number(path, table, "sliding_window"), table.get("layer_types")
    step = table.get("sliding_window_pattern", table.get("_sliding_window_pattern", record.window_period))
    if isinstance(kinds, list):
        given = tuple(size if kind == "sliding_attention" else 0 for kind in kinds)
    else:
        given = tuple(size if type(step) is int and step and (i + 1) % step else 0 for i in range(n_layer))
    if given and has_two_sizes:
        given = (*given[:-1], 0)  # as transformers has it
    usual = tuple(size if (i + 1) % record.window_period else 0 for i in range(n_layer))
    if len(given) != n_layer or given != usual and "windowed" not in record.metadata.values():
        raise ValueError(
            f"{path}: layer_types={short(kinds or step)}, every {record.window_period}th layer must be without a "
            f"window. "
            f"llama.cpp computes {record.name} only this way; use the config.json that came with this checkpoint."
        )
    return given


def rope_of_windows(path: Path, table: dict[str, Any], record: Architecture) -> tuple[dict[str, Any], float]:
    """Return the rotary table of layers without a window, and the rotary base of layers with one."""
    base = table.get("rope_local_base_freq")
    if record.window_rope is None:
        return table, 0.0
    for key in ("rope_parameters", "rope_scaling"):
        rope = table.get(key)
        if isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict):
            sliding = rope.get("sliding_attention")
            base = sliding.get("rope_theta", base) if isinstance(sliding, dict) else base
            table = table | {key: rope["full_attention"]}
    return table, number(path, {"rope_theta": base}, "rope_theta", whole=False) if base else 0.0


def sizes_of_windows(
    path: Path, table: dict[str, Any], window: tuple[int, ...], sizes: dict[str, Any]
) -> dict[str, Any]:
    """Return `sizes` where layers without a window have heads of their own, and the last ones wider inner parts.

    Source: Gemma4TextConfig of transformers; Gemma4Model in `conversion/gemma.py` of llama.cpp.
    """
    own = table.get("per_layer_config")
    places = [str(i) for i, size in enumerate(window) if not size]
    own = next((own[i] for i in places if isinstance(own.get(i), dict)), {}) if isinstance(own, dict) else {}
    head_dim = number(path, own | table, "global_head_dim", own.get("head_dim", 512))
    found: dict[str, Any] = {"head_dim": head_dim, "n_rot": head_dim}
    found["head_dim_window"] = found["n_rot_window"] = sizes["head_dim"]
    is_shared = table.get("attention_k_eq_v") is True
    found["v_is_k"] = tuple(int(is_shared and not size) for size in window)
    n_kv = table.get("num_global_key_value_heads") or own.get("num_key_value_heads")
    if n_kv and is_shared:
        n_kv = number(path, {"num_global_key_value_heads": n_kv}, "num_global_key_value_heads")
        found["n_head_kv"] = tuple(sizes["n_head_kv"] if size else n_kv for size in window)
    if table.get("use_double_wide_mlp") is True:
        n_shared = number(path, table, "num_kv_shared_layers") if table.get("num_kv_shared_layers") else 0
        n_ff, first = number(path, table, "intermediate_size"), len(window) - n_shared
        found["n_ff"] = tuple(n_ff if i < first else 2 * n_ff for i in range(len(window)))
    return sizes | found
