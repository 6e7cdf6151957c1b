"""Small random checkpoints with delta nets; `golden/write_experts.py` has other programs read them."""

import json
from pathlib import Path

import checkpoints
import numpy as np

N_EMBD, N_FF, N_EXPERT, N_HEAD, N_HEAD_KV, N_VOCAB = 64, 96, 5, 4, 2, 640
N_FF_EXP, N_FF_SHEXP, HEAD_DIM, N_LAYER = 32, 48, 32, 4
N_KEY, N_VALUE, STATE, CONV = 2, 4, 16, 4  # heads of k and of v, their size, tokens of the convolution
_EXPERTS = {
    "num_experts": N_EXPERT,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": N_FF_EXP,
    "shared_expert_intermediate_size": N_FF_SHEXP,
}
# name → class, model_type, more of the configuration
FAMILIES = {
    "qwen35": ("Qwen3_5ForCausalLM", "qwen3_5_text", {}),
    "qwen35moe": ("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", _EXPERTS),
    "qwen3next": ("Qwen3NextForCausalLM", "qwen3_next", _EXPERTS | {"partial_rotary_factor": 0.5}),
}
KINDS = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
WRITTEN = ("F32-1", "F16-1", "BF16-1", "BF16-3", "BF16-1-mtp")  # types of weights, files, layers that guess ahead


def _mixer(name: str, kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes of attention or of a delta net by their names in a checkpoint."""
    keys, values = N_KEY * STATE, N_VALUE * STATE
    if kind == "full_attention":
        q, kv = N_HEAD * HEAD_DIM, N_HEAD_KV * HEAD_DIM
        shapes = {"q_proj": (2 * q, N_EMBD), "k_proj": (kv, N_EMBD), "v_proj": (kv, N_EMBD), "o_proj": (N_EMBD, q)}
        shapes |= {"q_norm": (HEAD_DIM,), "k_norm": (HEAD_DIM,)}
        return {f"self_attn.{part}.weight": shape for part, shape in shapes.items()}
    if name == "qwen3next":
        shapes = {"in_proj_qkvz": (2 * keys + 2 * values, N_EMBD), "in_proj_ba": (2 * N_VALUE, N_EMBD)}
    else:
        shapes = {"in_proj_qkv": (2 * keys + values, N_EMBD), "in_proj_z": (values, N_EMBD)}
        shapes |= {"in_proj_a": (N_VALUE, N_EMBD), "in_proj_b": (N_VALUE, N_EMBD)}
    shapes |= {"conv1d": (2 * keys + values, 1, CONV), "norm": (STATE,), "out_proj": (N_EMBD, values)}
    found = {f"linear_attn.{part}.weight": shape for part, shape in shapes.items()}
    return found | {"linear_attn.A_log": (N_VALUE,), "linear_attn.dt_bias": (N_VALUE,)}


def _feed_forward(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of what follows by their names in a checkpoint."""

    def gated(of: str, n_ff: int) -> dict[str, tuple[int, ...]]:
        parts = {"gate_proj": (n_ff, N_EMBD), "up_proj": (n_ff, N_EMBD), "down_proj": (N_EMBD, n_ff)}
        return {f"{of}.{part}.weight": shape for part, shape in parts.items()}

    if name == "qwen35":
        return gated("mlp", N_FF)
    found = gated("mlp.shared_expert", N_FF_SHEXP)
    found |= {"mlp.gate.weight": (N_EXPERT, N_EMBD), "mlp.shared_expert_gate.weight": (1, N_EMBD)}
    if name == "qwen35moe":
        found["mlp.experts.gate_up_proj"] = (N_EXPERT, 2 * N_FF_EXP, N_EMBD)
        return found | {"mlp.experts.down_proj": (N_EXPERT, N_EMBD, N_FF_EXP)}
    for expert in range(N_EXPERT):
        found |= gated(f"mlp.experts.{expert}", N_FF_EXP)
    return found


def _layer(name: str, kind: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors by their names in a checkpoint."""
    norms = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (N_EMBD,))
    return norms | _mixer(name, kind) | _feed_forward(name)


def weights(name: str, mtp: bool = False) -> dict[str, np.ndarray]:
    """Return random weights by their names in checkpoints, float32; with `mtp` those of a layer that guesses ahead."""
    shapes = {f"model.layers.{i}.{part}": s for i, kind in enumerate(KINDS) for part, s in _layer(name, kind).items()}
    shapes |= {"model.embed_tokens.weight": (N_VOCAB, N_EMBD), "lm_head.weight": (N_VOCAB, N_EMBD)}
    shapes["model.norm.weight"] = (N_EMBD,)
    if mtp:
        shapes |= {f"mtp.layers.0.{part}": shape for part, shape in _layer(name, "full_attention").items()}
        shapes |= {f"mtp.{part}.weight": (N_EMBD,) for part in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
        shapes["mtp.fc.weight"] = (N_EMBD, 2 * N_EMBD)
    rng, found = np.random.default_rng([2, *name.encode()]), {}
    for key, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        is_routed = "gate.w" in key
        found[key] = 0.2 * values if "norm" in key else (0.5 if is_routed or "conv1d" in key else 0.15) * values
        if "linear_attn.norm" in key:
            found[key] += 1
    return found


def write_model(folder: Path, name: str, dtype: str = "F32", n_shards: int = 1, mtp: bool = False) -> Path:
    """Write the checkpoint of a family and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    class_name, model_type, more = FAMILIES[name]
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": N_EMBD,
        "intermediate_size": N_FF,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_HEAD_KV,
        "head_dim": HEAD_DIM,
        "linear_conv_kernel_dim": CONV,
        "linear_key_head_dim": STATE,
        "linear_value_head_dim": STATE,
        "linear_num_key_heads": N_KEY,
        "linear_num_value_heads": N_VALUE,
        "full_attention_interval": 4,
        "layer_types": KINDS,
        "vocab_size": N_VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }
    if name == "qwen35" and mtp:
        config["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    checkpoints.write_tokenizer(folder, "bpe_smollm")
    given = {key: value.astype(checkpoints.DTYPES[dtype]) for key, value in weights(name, mtp).items()}
    checkpoints.write_weights(folder, given, n_shards, "safetensors")
    return folder
