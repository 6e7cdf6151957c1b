"""Small random checkpoints of dense families; `golden/write_dense.py` has other programs read them."""

import json
from pathlib import Path

import checkpoints
import ml_dtypes
import numpy as np

from quantlab.arch import Hparams, find

N_EMBD, N_FF, N_HEAD, N_HEAD_KV, N_VOCAB = 64, 96, 4, 2, 640
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0}
WINDOWS = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
# name → architecture, class, model_type, tokenizer, layers, more of the configuration
FAMILIES = {
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        "spm",
        3,
        {"head_dim": 32, "sliding_window": 48, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "gemma3",
        "Gemma3ForCausalLM",
        "gemma3_text",
        "spm",
        7,
        {"head_dim": 32, "sliding_window": 48, "query_pre_attn_scalar": 32, "rope_parameters": WINDOWS},
    ),
    "glm4": ("glm4", "Glm4ForCausalLM", "glm4", "bpe_smollm", 2, {"head_dim": 32, "attention_bias": True}),
    "granite": (
        "granite",
        "GraniteForCausalLM",
        "granite",
        "bpe_smollm",
        2,
        {
            "attention_multiplier": 0.5,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "mistral3": (
        "mistral3",
        "Ministral3ForCausalLM",
        "ministral3",
        "bpe_llama3",
        2,
        {
            "head_dim": 32,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        },
    ),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", "olmo2", "bpe_smollm", 2, {"rope_theta": 5e5}),
    "olmo3": (
        "olmo2",
        "Olmo3ForCausalLM",
        "olmo3",
        "bpe_smollm",
        5,
        {
            "sliding_window": 48,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "layer_types": ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("phi3", "Phi3ForCausalLM", "phi3", "spm", 2, {"pad_token_id": 0, "sliding_window": None}),
    "phi4": (
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        "bpe_smollm",
        2,
        {
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 4096,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
                "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            },
        },
    ),
    "smollm3": (
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        "bpe_smollm",
        5,
        {"tie_word_embeddings": True, "no_rope_layers": [1, 1, 1, 0, 1], "rope_parameters": {"rope_theta": 5e6}},
    ),
}
WRITTEN = ("F32-1", "F16-1", "BF16-1", "BF16-3")  # types of weights, and files


def weights(name: str) -> dict[str, np.ndarray]:
    """Return random weights by their names in checkpoints, float32."""
    arch, _, _, _, n_layer, more = FAMILIES[name]
    hparams = Hparams(
        arch=arch,
        n_layer=n_layer,
        n_embd=N_EMBD,
        n_ff=N_FF,
        n_head=N_HEAD,
        n_head_kv=N_HEAD_KV,
        n_vocab=N_VOCAB,
        head_dim=more.get("head_dim"),
    )
    tied = more.get("tie_word_embeddings") or arch in ("gemma2", "gemma3")
    rng, found = np.random.default_rng([1, *name.encode()]), {}
    for gguf, tensor, shape in find(arch).expand(hparams):
        is_left_out = tensor.role == "output" and tied or tensor.role == "bias" and not more.get("attention_bias")
        if not tensor.checkpoint or is_left_out:
            continue
        values = rng.standard_normal(shape, np.float32)
        center = 0 if tensor.change else 1  # Gemma's norms lack the 1
        number = gguf.split(".")[1] if tensor.is_layered else ""
        is_norm = tensor.role == "norm"
        found[tensor.checkpoint[0].format(number)] = center + 0.2 * values if is_norm else 0.15 * values
    return found


def write_model(folder: Path, name: str, dtype: str = "F32", n_shards: int = 1) -> Path:
    """Write the checkpoint of a family and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _, class_name, model_type, tokenizer, n_layer, more = FAMILIES[name]
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": N_EMBD,
        "intermediate_size": N_FF,
        "num_hidden_layers": n_layer,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_HEAD_KV,
        "vocab_size": N_VOCAB,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    checkpoints.write_tokenizer(folder, tokenizer)
    if name == "phi4":  # by this class its converter knows a vocabulary of bytes
        table = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(table | {"tokenizer_class": "GPT2Tokenizer"}))
    if name == "glm4":  # its converter asks for a token of this name
        for file in folder.glob("tokenizer*.json"):
            file.write_text(file.read_text().replace("<repo_name>", "<|user|>"))
    given = {key: value.astype(checkpoints.DTYPES[dtype]) for key, value in weights(name).items()}
    checkpoints.write_weights(folder, given, n_shards, "safetensors")
    return folder


# name → quantization_config, and the shape of the scales of a matrix
FP8 = {
    "blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 40]},
        lambda rows, columns: (-(-rows // 24), -(-columns // 40)),
    ),
    "whole": (
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
        lambda rows, columns: (),
    ),
    "rows": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {
                "group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}, "targets": ["Linear"]}
            },
        },
        lambda rows, columns: (rows, 1),
    ),
}


def write_fp8(folder: Path, name: str) -> Path:
    """Write a small Llama whose matrices are FP8, with scales of one kind, and return its folder."""
    checkpoints.write_checkpoint(folder, "llama1", dtype="BF16")
    table, scale_shape = FP8[name]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": table}))
    rng, found = np.random.default_rng(3), {}
    for key, value in checkpoints.tensors("llama1").items():
        if "_proj" not in key:
            found[key] = value.astype(ml_dtypes.bfloat16)
            continue
        scale = rng.uniform(0.01, 0.02, scale_shape(*value.shape)).astype(np.float32)
        found[key] = (100 * value).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
        if name == "rows":
            found[f"{key}_scale"] = scale.astype(ml_dtypes.bfloat16)
        else:
            found[f"{key}_scale_inv"] = scale
        if name == "whole":
            found[key.replace("weight", "activation_scale")] = np.float32(1.5)[...]
    checkpoints.write_weights(folder, found, 1, "safetensors")
    return folder
