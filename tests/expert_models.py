"""Small random checkpoints with experts; `golden/write_experts.py` has other programs read them."""

import json
from pathlib import Path

import checkpoints
import numpy as np

N_EMBD, N_FF, N_EXPERT, N_HEAD, N_HEAD_KV, N_VOCAB = 64, 96, 5, 4, 2, 640
N_FF_EXP, HEAD_DIM, N_LAYER = 32, 32, 3
WIDE = {"n_embd": 256, "n_expert": 8, "n_ff_exp": 256, "scale": 0.08}  # whole super-blocks; as many rows as ggml tiles
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


def _experts(name: str, n_embd: int, n_expert: int, n_ff_exp: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's router and experts by their names in a checkpoint."""
    if name == "gpt-oss":
        both = {"gate_up_proj": (n_expert, n_embd, 2 * n_ff_exp), "gate_up_proj_bias": (n_expert, 2 * n_ff_exp)}
        down = {"down_proj": (n_expert, n_ff_exp, n_embd), "down_proj_bias": (n_expert, n_embd)}
        found = {f"mlp.experts.{part}": shape for part, shape in (both | down).items()}
        return found | {"mlp.router.weight": (n_expert, n_embd), "mlp.router.bias": (n_expert,)}
    of, parts = ("mlp", ("gate_proj", "down_proj", "up_proj"))
    if name == "mixtral":
        of, parts = "block_sparse_moe", ("w1", "w2", "w3")
    found = {f"{of}.gate.weight": (n_expert, n_embd)}
    for expert in range(n_expert):
        for i, part in enumerate(parts):
            shape = (n_embd, n_ff_exp) if i == 1 else (n_ff_exp, n_embd)
            found[f"{of}.experts.{expert}.{part}.weight"] = shape
    return found


def weights(
    name: str, n_embd: int = N_EMBD, n_expert: int = N_EXPERT, n_ff_exp: int = N_FF_EXP, scale: float = 0.15
) -> dict[str, np.ndarray]:
    """Return random weights by their names in checkpoints, float32."""
    n_q, n_kv = N_HEAD * HEAD_DIM, N_HEAD_KV * HEAD_DIM
    attention = {"q": (n_q, n_embd), "k": (n_kv, n_embd), "v": (n_kv, n_embd), "o": (n_embd, n_q)}
    layer = {f"self_attn.{part}_proj.weight": shape for part, shape in attention.items()}
    layer |= dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (n_embd,))
    if name == "qwen3moe":
        layer |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (HEAD_DIM,))
    if name == "gpt-oss":
        layer |= {f"self_attn.{part}_proj.bias": shape[:1] for part, shape in attention.items()}
        layer["self_attn.sinks"] = (N_HEAD,)
    layer |= _experts(name, n_embd, n_expert, n_ff_exp)
    shapes = {f"model.layers.{i}.{part}": shape for i in range(N_LAYER) for part, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (N_VOCAB, n_embd), "lm_head.weight": (N_VOCAB, n_embd)}
    shapes["model.norm.weight"] = (n_embd,)
    rng, found = np.random.default_rng([1, *name.encode()]), {}
    for key, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        is_router = "router.w" in key or "gate.w" in key
        found[key] = 1 + 0.2 * values if "norm" in key else (0.5 if is_router else scale) * values
    return found


def write_model(folder: Path, name: str, dtype: str = "F32", n_shards: int = 1, **sizes) -> Path:
    """Write the checkpoint of a family and return its folder; `sizes` such as `WIDE`."""
    folder.mkdir(parents=True, exist_ok=True)
    class_name, model_type, more = FAMILIES[name]
    theirs = {"num_experts": "n_expert", "num_local_experts": "n_expert"}
    theirs |= dict.fromkeys(("intermediate_size", "moe_intermediate_size"), "n_ff_exp")
    more = {key: sizes.get(theirs.get(key, ""), value) for key, value in more.items()}
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": sizes.get("n_embd", N_EMBD),
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
    given = {key: value.astype(checkpoints.DTYPES[dtype]) for key, value in weights(name, **sizes).items()}
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
