"""Small random checkpoints with latent attention; `golden/write_experts.py` has other programs read them."""

import json
from pathlib import Path

import checkpoints
import ml_dtypes
import numpy as np

N_EMBD, N_FF, N_FF_EXP, N_EXPERT, N_HEAD, N_VOCAB, N_LAYER = 64, 96, 32, 8, 4, 640, 3
N_LORA_Q, N_LORA_KV, N_NOPE, N_ROT, N_VALUE = 48, 32, 32, 16, 24
BLOCK = 32  # rows and columns of a block of FP8 weights with one scale
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
# name → class, model_type, more of the configuration
FAMILIES = {
    "deepseek-v2": (
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        {
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "scoring_func": "softmax",
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "rope_scaling": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek-v3": (
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        {
            "q_lora_rank": N_LORA_Q,
            "n_shared_experts": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 1,
            "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
}
WRITTEN = ("F32-1", "F16-1", "BF16-3")  # types of weights, and files


def _gated(of: str, n_ff: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate_proj": (n_ff, N_EMBD), "up_proj": (n_ff, N_EMBD), "down_proj": (N_EMBD, n_ff)}
    return {f"{of}.{part}.weight": shape for part, shape in shapes.items()}


def _layer(name: str, index: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors by their names in a checkpoint."""
    more, n_q = FAMILIES[name][2], N_HEAD * (N_NOPE + N_ROT)
    found = {"kv_a_proj_with_mqa": (N_LORA_KV + N_ROT, N_EMBD), "o_proj": (N_EMBD, N_HEAD * N_VALUE)}
    found |= {"kv_b_proj": (N_HEAD * (N_NOPE + N_VALUE), N_LORA_KV), "kv_a_layernorm": (N_LORA_KV,)}
    if more["q_lora_rank"]:
        found |= {"q_a_proj": (N_LORA_Q, N_EMBD), "q_a_layernorm": (N_LORA_Q,), "q_b_proj": (n_q, N_LORA_Q)}
    else:
        found["q_proj"] = (n_q, N_EMBD)
    found = {f"self_attn.{part}.weight": shape for part, shape in found.items()}
    found |= dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (N_EMBD,))
    if not index:
        return found | _gated("mlp", N_FF)
    found["mlp.gate.weight"] = (N_EXPERT, N_EMBD)
    if name == "deepseek-v3":
        found["mlp.gate.e_score_correction_bias"] = (N_EXPERT,)
    for expert in range(N_EXPERT):
        found |= _gated(f"mlp.experts.{expert}", N_FF_EXP)
    return found | _gated("mlp.shared_experts", more["n_shared_experts"] * N_FF_EXP)


def weights(name: str) -> dict[str, np.ndarray]:
    """Return random weights by their names in checkpoints, float32; of V3 with a layer that guesses ahead."""
    n_layer = N_LAYER + ("num_nextn_predict_layers" in FAMILIES[name][2])
    shapes = {f"model.layers.{i}.{part}": s for i in range(n_layer) for part, s in _layer(name, i).items()}
    shapes |= {"model.embed_tokens.weight": (N_VOCAB, N_EMBD), "lm_head.weight": (N_VOCAB, N_EMBD)}
    shapes["model.norm.weight"] = (N_EMBD,)
    rng, found = np.random.default_rng([3, *name.encode()]), {}
    for key, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        is_routed = "gate.w" in key
        found[key] = 1 + 0.2 * values if "norm" in key else (0.5 if is_routed else 0.15) * values
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
        "moe_intermediate_size": N_FF_EXP,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_HEAD,
        "kv_lora_rank": N_LORA_KV,
        "qk_nope_head_dim": N_NOPE,
        "qk_rope_head_dim": N_ROT,
        "v_head_dim": N_VALUE,
        "first_k_dense_replace": 1,
        "n_routed_experts": N_EXPERT,
        "num_experts_per_tok": 3,
        "vocab_size": N_VOCAB,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    checkpoints.write_tokenizer(folder, "bpe_smollm")
    given = {key: value.astype(checkpoints.DTYPES[dtype]) for key, value in weights(name).items()}
    checkpoints.write_weights(folder, given, n_shards, "safetensors")
    return folder


def pack_fp8(folder: Path) -> None:
    """Turn the matrices of layers of a V3 checkpoint into FP8, with a scale for each block."""
    stored = {}
    for key, value in weights("deepseek-v3").items():
        if value.ndim == 1 or "layers" not in key or "gate.w" in key:
            stored[key] = value.astype(ml_dtypes.bfloat16)
            continue
        rows, columns = (-(-size // BLOCK) for size in value.shape)
        scales = np.arange(1, rows * columns + 1, dtype=np.float32).reshape(rows, columns) / (100 * rows * columns)
        stored[key] = (100 * value).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        stored[f"{key}_scale_inv"] = scales
    checkpoints.write_safetensors(folder / "model.safetensors", stored)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (folder / "config.json").write_text(json.dumps(config))
