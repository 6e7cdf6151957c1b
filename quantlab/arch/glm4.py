"""GLM-4 (0414): norms before and after each half of a layer, half of each head rotated, one matrix for gate and up."""

from quantlab.arch.llama import EMBEDDING, ENDS, bias, matrix, norm
from quantlab.arch.qwen2 import ATTENTION
from quantlab.arch.record import Architecture, Layer

ARCH = Architecture(
    name="glm4",
    classes=("Glm4ForCausalLM",),
    tensors=(
        EMBEDDING,
        norm("attn_norm", "n_embd", "input_layernorm"),
        matrix("ffn_down", "n_embd n_ff", "mlp.down_proj"),
        matrix("ffn_up", "n_ff_twice n_embd", "mlp.gate_up_proj"),
        norm("ffn_norm", "n_embd", "post_attention_layernorm"),
        norm("post_ffw_norm", "n_embd", "post_mlp_layernorm"),
        norm("post_attention_norm", "n_embd", "post_self_attn_layernorm"),
        *ATTENTION,
        bias("attn_k", "n_kv", "self_attn.k_proj", optional=True),
        bias("attn_q", "n_q", "self_attn.q_proj", optional=True),
        bias("attn_v", "n_kv", "self_attn.v_proj", optional=True),
        *ENDS,
    ),
    layer=Layer(attn_post_norm="post_attention_norm", ffn_in=("ffn_up",), ffn_post_norm="post_ffw_norm", rope="pairs"),
    defaults={
        "glm4": {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "partial_rotary_factor": 0.5,
            "rms_norm_eps": 0.00000015625,
        }
    },
    metadata={"rope.dimension_count": "n_rot"},
    special={"eos": "<|endoftext|>", "eot": "<|user|>", "unk": "<|endoftext|>", "bos": "<|endoftext|>"},
)
