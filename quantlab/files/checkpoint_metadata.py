"""A checkpoint's configuration as GGUF metadata, with the keys, types and order of llama.cpp's converter.

Source: `conversion/base.py` and `conversion/llama.py` of llama.cpp; the defaults of transformers' configurations.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import LlamaFileType

from quantlab.arch import MAX_LAYERS, Architecture, Hparams, architectures, complete, find, find_class
from quantlab.files.checkpoint_kinds import check_no_adapter, check_not_packed, packed_by
from quantlab.files.checkpoint_layers import (
    number,
    of_latent_attention,
    recurrent,
    rope_of_windows,
    sizes_of_windows,
    windows,
)
from quantlab.files.recognize import short
from quantlab.files.weights import read_json

__all__ = ["Config", "check_computed", "early_metadata", "hparams_metadata", "read_config", "rope_factors"]

DEFAULT_BASE = 10000.0  # rope_theta of transformers
_ACTIVATIONS = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu_pytorch_tanh", "gelu_new"),
}  # of a record's layers → their names in transformers
# fields that only some architectures have → their names in transformers
_FIELDS = {
    "attn_scale": "attention_multiplier",
    "embd_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "attn_softcap": "attn_logit_softcapping",
    "logit_softcap": "final_logit_softcapping",
    "expert_scale": "routed_scaling_factor",
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERTS_USED = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts")
_EVEN_ZERO = ("declared_window", "n_kv_shared", "n_embd_layer", "n_dense", "n_expert_shared")  # are written
_NEEDED = ("scoring_func", "topk_method", "mscale")  # without them, llama.cpp computes something else
_FILE_TYPES = {"F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16}
_FILE_TYPES |= {"BF16": LlamaFileType.MOSTLY_BF16, "Q8_0": LlamaFileType.MOSTLY_Q8_0}
_YARN = ("extrapolation_factor", "attention_factor", "attn_factor", "beta_fast", "beta_slow")  # may be left out


@dataclass(frozen=True, kw_only=True)
class Config(Hparams):
    """The hyper-parameters of a checkpoint; `rope` is the scaling under transformers' names."""

    is_meta: bool
    writes_head_dim: bool
    rope_sections: list[int] | None = None  # of positions in pictures
    says_kinds: bool = False  # which layers are recurrent, one by one
    declared_window: int = 0  # that llama.cpp does not compute
    packed: str = ""
    rope: dict[str, Any]

    @property
    def record(self) -> Architecture:
        """The record of the architecture."""
        return find(self.arch)  # pyright: ignore[reportReturnType]

    @property
    def orig_ctx(self) -> int:
        """Context length before rotary positions were extended."""
        return self.rope.get("original_max_position_embeddings", self.n_ctx)

    @property
    def yarn_log_mul(self) -> float | None:
        """The part of YaRN's magnitude that the configuration removes."""
        return self.rope.get("mscale_all_dim")

    @property
    def yarn_log_mul_tenth(self) -> float | None:
        """The same, as files of DeepSeek have it."""
        return None if self.yarn_log_mul is None else 0.1 * self.yarn_log_mul


def read_config(folder: Path) -> Config:
    """Read `config.json` (Hugging Face) or `params.json` (Meta) of a checkpoint's folder.

    Raises
    ------
    FileNotFoundError
        If there is neither.
    ValueError
        If the architecture is not known, or a number is missing or out of range.
    """
    check_no_adapter(folder, read_json(folder / "adapter_config.json"))
    if (folder / "config.json").is_file():
        return _hugging_face(folder / "config.json")
    if (folder / "params.json").is_file():
        return _meta(folder)
    raise FileNotFoundError(f"{folder}: holds neither config.json nor params.json. Give a checkpoint's folder.")


def _tables(path: Path) -> tuple[Architecture, dict[str, Any], str]:
    """Return a configuration's architecture, the text model's settings with defaults, and the packer."""
    whole = read_json(path)
    classes = whole.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    record = find_class(name) if isinstance(name, str) else None
    if record is None:
        raise ValueError(
            f"{path}: architectures={short(classes)}, must be a class of {', '.join(architectures())}. Convert it with "
            "llama.cpp's convert_hf_to_gguf.py; quantize, inspect and compare work with its file."
        )
    packed = packed_by((), whole) or ""
    if packed not in record.packed:
        check_not_packed(path, (), whole)
    text = whole.get("text_config")
    table = whole | text if isinstance(text, dict) else whole
    model_type = table.get("model_type")
    if isinstance(text, dict) and model_type not in record.defaults:
        known = ", ".join(record.defaults)
        raise ValueError(
            f"{path}: model_type={short(model_type)} of the text model, must be one of {known}. "
            f"Use llama.cpp's converter."
        )
    defaults = dict(record.defaults.get(model_type, {}) if isinstance(model_type, str) else {})
    if table.get("rope_scaling"):  # the older name
        defaults.pop("rope_parameters", None)
    return record, {**defaults, **{key: value for key, value in table.items() if value is not None}}, packed


def _heads(path: Path, table: dict[str, Any], rope: dict[str, Any]) -> dict[str, int]:
    """Return the sizes of a layer's heads; `rope` gives the share of them that is rotated."""
    n_embd, n_head = number(path, table, "hidden_size"), number(path, table, "num_attention_heads")
    head_dim = table.get("head_dim") or None
    if n_embd % n_head and not head_dim:
        raise ValueError(
            f"{path}: hidden_size={n_embd} must be a multiple of num_attention_heads={n_head}. Check config.json."
        )
    head_dim = number(path, {"head_dim": head_dim}, "head_dim", n_embd // n_head)
    key = "partial_rotary_factor"
    share = number(path, {key: _rope_table(path, rope).get(key) or table.get(key, 1)}, key, whole=False, most=1)
    n_head_kv = number(path, table, "num_key_value_heads", n_head)
    n_rot = int(head_dim * share)
    return {"n_embd": n_embd, "n_head": n_head, "n_head_kv": n_head_kv, "head_dim": head_dim, "n_rot": n_rot}


def _hugging_face(path: Path) -> Config:
    record, table, packed = _tables(path)
    n_ctx, n_layer = (number(path, table, key) for key in ("max_position_embeddings", "num_hidden_layers"))
    whole_rope = rope_of_windows(path, table, record)
    needs_n_ff = "intermediate_size" in table or "n_ff_exp" not in record.sizes
    fields = {name for name in record.metadata.values() if table.get(_FIELDS.get(name, ""))}
    window = windows(path, table, record, n_layer)
    sizes = _heads(path, table, whole_rope[0]) | {"n_ff": number(path, table, "intermediate_size") if needs_n_ff else 0}
    is_two_sizes = "head_dim_window" in record.metadata.values()
    if is_two_sizes:
        sizes = sizes_of_windows(path, table, window, sizes)  # pyright: ignore[reportArgumentType]
    if "n_lora_kv" in record.sizes:
        sizes = of_latent_attention(path, table, sizes)
    config = Config(
        arch=record.name,
        is_meta=False,
        n_vocab=number(path, table, "vocab_size"),
        n_ctx=n_ctx,
        n_layer=number(path, table, "num_hidden_layers", most=MAX_LAYERS),
        **sizes,
        declared_window=table.get("sliding_window", 0),
        tied_embeddings=table.get("tie_word_embeddings") is True,
        writes_head_dim="head_dim" in table,
        packed=packed,
        rms_eps=number(path, table, "rms_norm_eps", 1e-6, whole=False),
        window=window,  # pyright: ignore[reportArgumentType]
        **{name: number(path, table, _FIELDS[name], whole=False) for name in fields},
        **_experts(path, table),
        **{
            field: number(path, table, key)
            for field, key in record.sizes.items()
            if table.get(key) is not None and (table[key] != 0 or field not in _EVEN_ZERO)
        },
        **_rope(path, *whole_rope, n_ctx, is_two_sizes),
    )
    if config.ssm_heads:
        config = replace(config, **recurrent(path, table, config))
    return replace(config, attn_temp_scale=config.rope.get("llama_4_scaling_beta") or 0.0)


def _experts(path: Path, table: dict[str, Any]) -> dict[str, int]:
    """Return the numbers of experts and of experts per token (empty: not a mixture of experts)."""
    found = {}
    for field, names in (("n_expert", _EXPERTS), ("n_expert_used", _EXPERTS_USED)):
        key = next((key for key in names if table.get(key) is not None), None)
        if key:
            found[field] = number(path, table, key)
    if found.get("n_expert_used", 0) > found.get("n_expert", 0):
        raise ValueError(
            f"{path}: num_experts_per_tok={found['n_expert_used']}, must be at most {found.get('n_expert', 0)}, the "
            f"number of experts. Use the config.json that came with this checkpoint."
        )
    return found


def _rope(path: Path, table: dict[str, Any], base_window: float, n_ctx: int, is_two_sizes: bool) -> dict[str, Any]:
    """Read rotary positions from old (`rope_scaling`, `rope_theta`) and new (`rope_parameters`) keys."""
    rope = _rope_table(path, table)
    kind = rope["rope_type"]
    kinds = ("proportional",) if is_two_sizes else ("default", "linear", "yarn", "llama3", "dynamic", "su", "longrope")
    if kind not in kinds:
        raise ValueError(
            f"{path}: rope_type={short(kind)}, must be {', '.join(kinds[:3])}{' or llama3' * (len(kinds) > 1)}. "
            "Use llama.cpp's converter."
        )
    if kind == "proportional":
        rope["partial_rotary_factor"] = number(path, rope, "partial_rotary_factor", 1.0, whole=False, most=1)
    if kind in ("yarn", "llama3", "su", "longrope"):
        rope.setdefault("original_max_position_embeddings", table.get("original_max_position_embeddings") or n_ctx)
    numbers = {"linear": ["factor"], "yarn": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor"]}
    for key in numbers.get(kind, []):
        number(path, rope, key, whole=False)
    if kind in ("yarn", "llama3", "su", "longrope"):
        number(path, rope, "original_max_position_embeddings")
    for key in _YARN if kind == "yarn" else ():
        if rope.get(key) is not None:
            number(path, rope, key, whole=False)
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        raise ValueError(
            f"{path}: low_freq_factor={low}, high_freq_factor={high}, the second must be larger. "
            f"Use the config.json that came with this checkpoint."
        )
    base = number(path, rope, "rope_theta", table.get("rope_theta") or DEFAULT_BASE, whole=False)
    return {"rope_base": base, "rope_base_window": base_window, "rope": rope}


def _rope_table(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    """Return the table of rotary positions; as in transformers, `rope_scaling` has precedence."""
    given = {}
    for key in ("rope_parameters", "rope_scaling"):
        rope = _of_one_layer_type(path, key, table.get(key) or {}, table.get("layer_types"))
        if rope:
            given[key] = rope | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
    scaling, parameters = given.get("rope_scaling"), given.get("rope_parameters")
    if scaling is None or parameters is None:
        return scaling or parameters or {"rope_type": "default"}
    base = scaling.get("rope_theta") or table.get("rope_theta") or DEFAULT_BASE
    same = [{key: value for key, value in rope.items() if key not in ("type", "rope_theta")} for rope in given.values()]
    if (parameters.get("rope_theta") or base) != base or parameters["rope_type"] != "default" and same[0] != same[1]:
        raise ValueError(
            f"{path}: rope_parameters={short(parameters, 200)} and rope_scaling={short(scaling, 200)} differ. "
            f"transformers uses the second with rope_theta={short(base)}. Keep only one of them, with its rope_theta."
        )
    return scaling | {"rope_theta": base}


def _of_one_layer_type(path: Path, key: str, rope: Any, layer_types: Any) -> dict[str, Any]:
    """Return the rotary table that all layer types of a configuration share."""
    if not isinstance(rope, dict):
        raise ValueError(
            f"{path}: {key}={short(rope)}, must be a table. Use the config.json that came with this checkpoint."
        )
    names = [name for name, value in rope.items() if isinstance(value, dict)]
    if not names:
        return rope
    used = {name for name in layer_types if isinstance(name, str)} if isinstance(layer_types, list) else set()
    tables = [rope.get(name) for name in sorted(used or names)]
    if not all(isinstance(value, dict) and value == tables[0] for value in tables):
        raise ValueError(
            f"{path}: {key}={short(rope, 200)}, must be the same for all layers of this architecture. "
            f"Use llama.cpp's converter."
        )
    return {name: value for name, value in rope.items() if name not in names} | tables[0]  # pyright: ignore[reportOperatorIssue]


def check_computed(folder: Path, config: Config) -> None:
    """Refuse settings that llama.cpp ignores for every model of an architecture.

    Raises
    ------
    ValueError
        If config.json asks for another activation, other layers without positions or experts, other weights of experts,
        or another scale of attention.
    """
    path, record = folder / "config.json", config.record
    table = read_json(path)
    table |= table["text_config"] if isinstance(table.get("text_config"), dict) else {}
    names = _ACTIVATIONS.get(record.layer.activation, ())
    key = "hidden_activation" if table.get("hidden_activation") else "hidden_act"
    wanted: list[tuple[str, tuple]] = [(key, names)] if names else []
    wanted.append(("use_bidirectional_attention", ("vision",)))
    if record.layer.router and not config.n_lora_kv:
        wanted += [("norm_topk_prob", (record.layer.sums_to_one,)), ("decoder_sparse_step", (1,))]
        wanted.append(("mlp_only_layers", ([],)))
    if config.n_lora_kv:
        wanted += _rules_of_latent_attention(config, table)
        table |= {"mscale": config.rope.get("mscale")}
    if step := record.unrotated_period:
        wanted.append(("no_rope_layers", ([int((i + 1) % step > 0) for i in range(config.n_layer)],)))
    if "query_pre_attn_scalar" in table:
        wanted.append(("query_pre_attn_scalar", (round(complete(config).score_scale ** -2),)))
    kind = table.get("model_type")
    usual = record.defaults.get(kind, {}) if isinstance(kind, str) else {}
    for key, allowed in wanted:
        given = table.get(key, usual.get(key))
        if (given is not None or key in _NEEDED) and given not in allowed:
            raise ValueError(
                f"{path}: {key}={short(given)}, must be {allowed[0]}, as llama.cpp computes every {record.name} "
                "model. The converted file would give wrong results; as_llama_cpp=True writes it anyway."
            )


def _rules_of_latent_attention(config: Config, table: dict[str, Any]) -> list[tuple[str, tuple]]:
    """Return what llama.cpp reads of a configuration of latent attention, or takes for granted."""
    is_newer = table.get("model_type") == "deepseek_v3"
    rules: list[tuple[str, tuple]] = [("rope_interleave", (True,)), ("moe_layer_freq", (1,))]
    rules.append(("scoring_func", ("sigmoid",) if is_newer else ("softmax", None)))
    if config.expert_groups > 1:
        rules.append(("topk_method", ("noaux_tc",) + (None,) * is_newer))
    if config.rope["rope_type"] == "yarn":
        rules.append(("mscale", (config.rope.get("mscale_all_dim") or 1.0,)))
    return rules


def _meta(folder: Path) -> Config:
    """Read Meta's `params.json`; n_vocab and n_ff stay 0 and follow from the weights."""
    path = folder / "params.json"
    table = read_json(path)
    n_embd, n_head = number(path, table, "dim"), number(path, table, "n_heads")
    eps = number(path, table, "norm_eps", 1e-5, whole=False)
    base = number(path, table, "rope_theta", 10000.0, whole=False)
    rope: dict[str, Any] = {"rope_type": "default"}
    if table.get("use_scaled_rope"):
        rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    # the context length is in no file: code models (base 1e6), Llama 3 (5e5), Llama 2 (1e-5), the first LLaMA
    n_ctx = 16384 if base == 1e6 else 8192 if base == 5e5 else 4096 if eps == 1e-5 else 2048
    return Config(
        arch="llama",
        is_meta=True,
        n_vocab=0,
        n_ctx=n_ctx,
        n_embd=n_embd,
        n_ff=0,
        n_layer=number(path, table, "n_layers", most=MAX_LAYERS),
        n_head=n_head,
        n_head_kv=number(path, table, "n_kv_heads", n_head),
        head_dim=n_embd // n_head,
        writes_head_dim=True,
        rms_eps=eps,
        rope_base=base,
        rope=rope,
    )


def rope_factors(config: Config) -> dict[str, np.ndarray]:
    """Return the divisors of rotary frequencies as tensors by name: Llama 3's, or Phi's for long contexts.

    Returns
    -------
    dict of np.ndarray [shape=(n_rot // 2,), dtype=float32]

    Raises
    ------
    ValueError
        If there are not as many as pairs of dimensions.
    """
    names = {tensor.name for tensor in config.record.tensors}
    if config.rope["rope_type"] == "proportional":  # the last dimensions are not turned
        turned = int(config.n_rot * config.rope["partial_rotary_factor"] / 2)
        return {"rope_freqs.weight": np.where(np.arange(config.n_pairs) < turned, 1, 1e30).astype(np.float32)}
    if "rope_freqs.weight" in names and config.rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(config)}
    if "rope_factors_long.weight" not in names or not config.rope.get("long_factor"):
        return {}
    found = {}
    for kind in ("long", "short"):
        factors = config.rope.get(f"{kind}_factor")
        numbers = isinstance(factors, list) and all(type(x) in (int, float) and 0 < x < 1e9 for x in factors)
        if not numbers or len(factors) != config.n_pairs:  # pyright: ignore[reportArgumentType]
            raise ValueError(
                f"{kind}_factor={short(factors)}, must be {config.n_pairs} positive numbers. "
                f"Use the config.json that came with this checkpoint."
            )
        found[f"rope_factors_{kind}.weight"] = np.array(factors, np.float32)
    return found


def early_metadata(config: Config) -> dict[str, Any]:
    """Return the keys that the converter writes first: the magnitude that belongs to `long_factor`."""
    if not any("long" in name for name in rope_factors(config)):
        return {}
    scale = config.n_ctx / config.orig_ctx
    factor = math.sqrt(1 + math.log(scale) / math.log(config.orig_ctx)) if scale > 1 else 1.0
    return {f"{config.arch}.rope.scaling.attn_factor": np.float32(factor)}


def _llama3_factors(config: Config) -> np.ndarray:
    """Return Llama 3's divisors of the rotary frequencies [shape=(head_dim // 2,), dtype=float32]."""
    factor = config.rope.get("factor", 8.0)
    low, high = config.rope.get("low_freq_factor", 1.0), config.rope.get("high_freq_factor", 4.0)
    n_ctx = config.rope["original_max_position_embeddings"]
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.float64(np.float32(config.rope_base)) ** exponents.astype(np.float64)  # rounded once, on every CPU
    # float32 step by step, as the converter computes it: to divide a number by a tensor, torch multiplies by 1 / tensor
    wavelengths = np.float32(1) / (np.float32(1) / powers.astype(np.float32)) * np.float32(2 * np.pi)
    with np.errstate(all="ignore"):  # what overflows lies outside and is not taken
        smooth = (np.float32(1) / wavelengths * np.float32(n_ctx) - np.float32(low)) / np.float32(high - low)
        between = np.float32(1) / ((np.float32(1) - smooth) / np.float32(factor) + smooth)
    factors = np.where(wavelengths > n_ctx / low, np.float32(factor), between)
    return np.where(wavelengths < n_ctx / high, np.float32(1), factors).astype(np.float32)


def hparams_metadata(config: Config, qtype: str) -> dict[str, Any]:
    """Return the `ARCH.*` keys, the file type and the quantization version."""
    keys: dict[str, Any] = {
        "block_count": np.uint32(config.n_layer_all),
        "context_length": np.uint32(config.n_ctx),
        "embedding_length": np.uint32(config.n_embd),
        **({"feed_forward_length": _counts(config.n_ff)} if config.n_ff else {}),
        "attention.head_count": np.uint32(config.n_head),
        "attention.head_count_kv": _counts(config.n_head_kv),
    }
    keys |= _scaling_metadata(config.rope)
    if config.rope.get("mrope_section") and config.rope_sections:
        keys["rope.dimension_sections"] = np.array(config.rope_sections, np.int32)
    keys["rope.freq_base"] = np.float32(config.rope_base)
    if config.rope_base_window:
        keys["rope.freq_base_swa"] = np.float32(config.rope_base_window)
    keys["attention.layer_norm_rms_epsilon"] = np.float32(config.rms_eps)
    if config.n_expert:
        keys |= {"expert_count": np.uint32(config.n_expert), "expert_used_count": np.uint32(config.n_expert_used)}
    if config.writes_head_dim:
        keys["attention.key_length"] = keys["attention.value_length"] = np.uint32(config.head_dim)
    is_mxfp4 = config.packed == "MXFP4" and qtype != "Q8_0"
    keys["file_type"] = np.uint32(LlamaFileType.MOSTLY_MXFP4_MOE if is_mxfp4 else _FILE_TYPES[qtype])
    for key, name in config.record.metadata.items():
        value = getattr(config, name)
        is_said = {"windowed": bool(config.window), "recurrent_layers": config.says_kinds}.get(name, True)
        if value and is_said or name in _EVEN_ZERO:
            kind = np.int32 if type(value) is list and type(value[0]) is int else None
            simple = {float: np.float32, int: np.uint32, bool: bool}
            keys[key] = simple.get(type(value), lambda v, k=kind: np.array(v, k))(value)
    if config.record.order:
        keys = {key: keys[key] for key in config.record.order if key in keys}
    metadata = {"general.file_type" if key == "file_type" else f"{config.arch}.{key}": keys[key] for key in keys}
    return metadata | {"general.quantization_version": np.uint32(2)}


def _counts(value: int | tuple[int, ...]) -> Any:
    """Return a number of all layers, or one for each."""
    return np.array(value, np.int32) if isinstance(value, tuple) else np.uint32(value)


def _scaling_metadata(rope: dict[str, Any]) -> dict[str, Any]:
    kind = rope["rope_type"]
    if kind in ("su", "longrope"):
        return {"rope.scaling.type": "longrope"}
    if kind not in ("linear", "yarn"):
        return {}
    keys: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": np.float32(rope["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = np.uint32(rope["original_max_position_embeddings"])
        optional = {
            "yarn_ext_factor": rope.get("extrapolation_factor"),
            "yarn_attn_factor": rope.get("attention_factor", rope.get("attn_factor")),
            "yarn_beta_fast": rope.get("beta_fast"),
            "yarn_beta_slow": rope.get("beta_slow"),
        }
        keys |= {f"rope.scaling.{key}": np.float32(value) for key, value in optional.items() if value is not None}
    return keys
