"""Small random checkpoints of Gemma 4; `golden/write_experts.py` has other programs read them."""

import json
from pathlib import Path

import checkpoints
import numpy as np

N_EMBD, N_FF, N_EXPERT, N_FF_EXP, N_HEAD, N_HEAD_KV, N_VOCAB, N_LAYER = 64, 96, 5, 32, 4, 2, 640, 4
HEAD_DIM, GLOBAL_DIM, GLOBAL_KV, WINDOW, PER_LAYER = 32, 64, 1, 48, 16
# name → more of the configuration
FAMILIES = {
    "gemma4": {"attention_k_eq_v": True, "num_global_key_value_heads": GLOBAL_KV},
    "gemma4-moe": {
        "attention_k_eq_v": True,
        "num_global_key_value_heads": GLOBAL_KV,
        "enable_moe_block": True,
        "num_experts": N_EXPERT,
        "top_k_experts": 2,
        "moe_intermediate_size": N_FF_EXP,
    },
    "gemma4-e": {
        "hidden_size_per_layer_input": PER_LAYER,
        "vocab_size_per_layer_input": N_VOCAB,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
}
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
WRITTEN = ("F32-1", "F16-1", "BF16-1", "BF16-3")  # types of weights, and files


def _layer(name: str, index: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's tensors by their names in a checkpoint."""
    more, is_full = FAMILIES[name], KINDS[index] == "full_attention"
    dim, n_kv, n_ff = HEAD_DIM, N_HEAD_KV, N_FF
    if is_full:
        dim, n_kv = GLOBAL_DIM, more.get("num_global_key_value_heads", N_HEAD_KV)
    shares = index >= N_LAYER - more.get("num_kv_shared_layers", 0)
    if shares and more.get("use_double_wide_mlp"):
        n_ff *= 2
    found = dict.fromkeys(("input", "post_attention", "pre_feedforward", "post_feedforward"), (N_EMBD,))
    found = {f"{part}_layernorm.weight": shape for part, shape in found.items()} | {"layer_scalar": (1,)}
    matrices = {"self_attn.q_proj": (N_HEAD * dim, N_EMBD), "self_attn.o_proj": (N_EMBD, N_HEAD * dim)}
    matrices["self_attn.q_norm"] = (dim,)
    if not shares:
        matrices |= {"self_attn.k_proj": (n_kv * dim, N_EMBD), "self_attn.k_norm": (dim,)}
        if not (is_full and more.get("attention_k_eq_v")):
            matrices["self_attn.v_proj"] = (n_kv * dim, N_EMBD)
    matrices |= {"mlp.gate_proj": (n_ff, N_EMBD), "mlp.up_proj": (n_ff, N_EMBD), "mlp.down_proj": (N_EMBD, n_ff)}
    if name == "gemma4-moe":
        parts = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")
        matrices |= dict.fromkeys(parts, (N_EMBD,)) | {"router.proj": (N_EXPERT, N_EMBD)}
        found |= {"router.scale": (N_EMBD,), "router.per_expert_scale": (N_EXPERT,)}
        found["experts.gate_up_proj"] = (N_EXPERT, 2 * N_FF_EXP, N_EMBD)
        found["experts.down_proj"] = (N_EXPERT, N_EMBD, N_FF_EXP)
    if name == "gemma4-e":
        matrices |= {"per_layer_input_gate": (PER_LAYER, N_EMBD), "per_layer_projection": (N_EMBD, PER_LAYER)}
        matrices["post_per_layer_input_norm"] = (N_EMBD,)
    return found | {f"{part}.weight": shape for part, shape in matrices.items()}


def weights(name: str) -> dict[str, np.ndarray]:
    """Return random weights by their names in checkpoints, float32."""
    shapes = {f"model.layers.{i}.{part}": s for i in range(N_LAYER) for part, s in _layer(name, i).items()}
    shapes |= {"model.embed_tokens.weight": (N_VOCAB, N_EMBD), "model.norm.weight": (N_EMBD,)}
    if name == "gemma4-e":
        shapes["model.embed_tokens_per_layer.weight"] = (N_VOCAB, N_LAYER * PER_LAYER)
        shapes["model.per_layer_model_projection.weight"] = (N_LAYER * PER_LAYER, N_EMBD)
        shapes["model.per_layer_projection_norm.weight"] = (PER_LAYER,)
    rng, found = np.random.default_rng([1, *name.encode()]), {}
    for key, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        is_scale = "norm" in key or "scal" in key
        found[key] = 1 + 0.2 * values if is_scale else (0.5 if "router" in key else 0.15) * values
    return found


def write_model(folder: Path, name: str, dtype: str = "F32", n_shards: int = 1) -> Path:
    """Write the checkpoint of a family and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "hidden_size": N_EMBD,
        "intermediate_size": N_FF,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_HEAD_KV,
        "head_dim": HEAD_DIM,
        "global_head_dim": GLOBAL_DIM,
        "layer_types": KINDS,
        "sliding_window": WINDOW,
        "vocab_size": N_VOCAB,
        "max_position_embeddings": 4096,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
        **FAMILIES[name],
    }
    (folder / "config.json").write_text(json.dumps(config))
    checkpoints.write_tokenizer(folder, "spm_json")
    given = {key: value.astype(checkpoints.DTYPES[dtype]) for key, value in weights(name).items()}
    checkpoints.write_weights(folder, given, n_shards, "safetensors")
    return folder
