"""Ministral 3: a Llama with YaRN, whose queries grow beyond the context length of the first training."""

from dataclasses import replace

from quantlab.arch.llama import ARCH as LLAMA

ARCH = replace(
    LLAMA,
    name="mistral3",
    classes=("Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"),
    defaults={
        "ministral3": {
            "max_position_embeddings": 262144,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale_all_dim": 1.0,
                "mscale": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        "mistral": {"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "head_dim": 0},
    },
    metadata=dict(LLAMA.metadata)
    | {"rope.scaling.yarn_log_multiplier": "yarn_log_mul", "attention.temperature_scale": "attn_temp_scale"},
    yarn=("beta_fast", "beta_slow", "log_mul"),
)
