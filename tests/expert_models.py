"""Small random checkpoints with experts; `golden/write_experts.py` has other programs read them."""

import json
from pathlib import Path

import checkpoints
import numpy as np

N_EMBD, N_FF, N_EXPERT, N_HEAD, N_HEAD_KV, N_VOCAB = 64, 96, 5, 4, 2, 640
N_FF_EXP, HEAD_DIM, N_LAYER = 32, 32, 3
# name → class, model_type, more of the configuration
FAMILIES = {
    "qwen3moe": (
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {"num_experts": N_EXPERT, "moe_intermediate_size": N_FF_EXP, "norm_topk_prob": True, "head_dim": HEAD_DIM},
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "mixtral",
        {"num_local_experts": N_EXPERT, "intermediate_size": N_FF_EXP, "head_dim": HEAD_DIM, "sliding_window": None},
    ),
    "gpt-oss": (
        "GptOssForCausalLM",
        "gpt_oss",
        {
            "num_local_experts": N_EXPERT,
            "intermediate_size": N_FF_EXP,
            "head_dim": HEAD_DIM,
            "sliding_window": 48,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
}
WRITTEN = ("F32-1", "F16-1", "BF16-1", "BF16-3")  # types of weights, and files


def _experts(name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's router and experts by their names in a checkpoint."""
    if name == "gpt-oss":
        both = {"gate_up_proj": (N_EXPERT, N_EMBD, 2 * N_FF_EXP), "gate_up_proj_bias": (N_EXPERT, 2 * N_FF_EXP)}
        down = {"down_proj": (N_EXPERT, N_FF_EXP, N_EMBD), "down_proj_bias": (N_EXPERT, N_EMBD)}
        found = {f"mlp.experts.{part}": shape for part, shape in (both | down).items()}
        return found | {"mlp.router.weight": (N_EXPERT, N_EMBD), "mlp.router.bias": (N_EXPERT,)}
    of, parts = ("mlp", ("gate_proj", "down_proj", "up_proj"))
    if name == "mixtral":
        of, parts = "block_sparse_moe", ("w1", "w2", "w3")
    found = {f"{of}.gate.weight": (N_EXPERT, N_EMBD)}
    for expert in range(N_EXPERT):
        for i, part in enumerate(parts):
            shape = (N_EMBD, N_FF_EXP) if i == 1 else (N_FF_EXP, N_EMBD)
            found[f"{of}.experts.{expert}.{part}.weight"] = shape
    return found


def weights(name: str) -> dict[str, np.ndarray]:
    """Return random weights by their names in checkpoints, float32."""
    n_q, n_kv = N_HEAD * HEAD_DIM, N_HEAD_KV * HEAD_DIM
    attention = {"q": (n_q, N_EMBD), "k": (n_kv, N_EMBD), "v": (n_kv, N_EMBD), "o": (N_EMBD, n_q)}
    layer = {f"self_attn.{part}_proj.weight": shape for part, shape in attention.items()}
    layer |= dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (N_EMBD,))
    if name == "qwen3moe":
        layer |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (HEAD_DIM,))
    if name == "gpt-oss":
        layer |= {f"self_attn.{part}_proj.bias": shape[:1] for part, shape in attention.items()}
        layer["self_attn.sinks"] = (N_HEAD,)
    layer |= _experts(name)
    shapes = {f"model.layers.{i}.{part}": shape for i in range(N_LAYER) for part, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (N_VOCAB, N_EMBD), "lm_head.weight": (N_VOCAB, N_EMBD)}
    shapes["model.norm.weight"] = (N_EMBD,)
    rng, found = np.random.default_rng([1, *name.encode()]), {}
    for key, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        is_router = "router.w" in key or "gate.w" in key
        found[key] = 1 + 0.2 * values if "norm" in key else (0.5 if is_router else 0.15) * values
    return found


def write_model(folder: Path, name: str, dtype: str = "F32", n_shards: int = 1) -> Path:
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
        "num_experts_per_tok": 2,
        "vocab_size": N_VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    checkpoints.write_tokenizer(folder, "bpe_smollm")
    given = {key: value.astype(checkpoints.DTYPES[dtype]) for key, value in weights(name).items()}
    checkpoints.write_weights(folder, given, n_shards, "safetensors")
    return folder


def pack_experts(folder: Path) -> dict[str, np.ndarray]:
    """Turn the experts of a gpt-oss checkpoint in float32 into MXFP4; return what they mean, by tensor name."""
    rng, meant, stored = np.random.default_rng(2), {}, {}
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    values = np.concatenate([values, -values])
    for key, given in weights("gpt-oss").items():
        if not key.endswith(("gate_up_proj", "down_proj")):
            stored[key] = given
            continue
        n, n_in, n_out = given.shape
        codes = rng.integers(0, 16, (n, n_out, n_in // 32, 32), np.uint8)
        scales = rng.integers(120, 126, (n, n_out, n_in // 32), np.uint8)
        stored[f"{key}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        stored[f"{key}_scales"] = scales
        floats = values[codes] * np.exp2(scales[..., None].astype(np.float32) - 127)
        meant[key] = floats.reshape(n, n_out, n_in)
    checkpoints.write_safetensors(folder / "model.safetensors", dict(sorted(stored.items())))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return meant
