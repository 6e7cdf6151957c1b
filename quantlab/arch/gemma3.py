"""Gemma 3 (text): norms before and after each half of a layer, gelu, five layers with a window to one without."""

from math import sqrt
from typing import Any

from quantlab.arch.hparams import Hparams
from quantlab.arch.llama import EMBEDDING, matrix, norm
from quantlab.arch.qwen2 import ATTENTION
from quantlab.arch.record import Architecture, Layer, Tensor

ADD_ONE = ("add", "1")  # Gemma's norms are stored without the 1 that they multiply by
NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def derive(hparams: Hparams, n_layer_27b: int) -> dict[str, Any]:
    """Return Gemma's scales, for which files have no key: llama.cpp knows the 27B by its number of layers."""
    found = {"embd_scale": sqrt(hparams.n_embd)}
    if hparams.n_layer == n_layer_27b:
        found["attn_scale"] = 1 / sqrt(hparams.n_embd // hparams.n_head)
    return found


BLOCK = (
    *(norm(name, "n_embd", theirs, change=ADD_ONE) for name, theirs in NORMS.items()),
    *ATTENTION,
    matrix("ffn_down", "n_embd n_ff", "mlp.down_proj"),
    matrix("ffn_gate", "n_ff n_embd", "mlp.gate_proj"),
    matrix("ffn_up", "n_ff n_embd", "mlp.up_proj"),
)
END = Tensor("output_norm.weight", "n_embd", "norm", ("model.norm.weight",), ADD_ONE)

ARCH = Architecture(
    name="gemma3",
    classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    tensors=(
        EMBEDDING,
        *BLOCK,
        norm("attn_k_norm", "head_dim", "self_attn.k_norm", change=ADD_ONE),
        norm("attn_q_norm", "head_dim", "self_attn.q_norm", change=ADD_ONE),
        END,
        Tensor("output.weight", "n_vocab n_embd", "output", ("lm_head.weight",), optional=True),
    ),
    layer=Layer(
        q_norm="attn_q_norm",
        k_norm="attn_k_norm",
        attn_post_norm="post_attention_norm",
        ffn_post_norm="post_ffw_norm",
        activation="gelu",
        scaled_queries=True,
    ),
    defaults={
        kind: {
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        }
        for kind in ("gemma3", "gemma3_text")
    },
    metadata={"final_logit_softcapping": "logit_softcap", "attention.sliding_window": "window_size"},
    tokenizer={"add_space_prefix": False},
    window_period=6,
    window_rope=1e4,
    derive=lambda hparams: derive(hparams, n_layer_27b=62),
)
