"""Phi-3 and Phi-4: one matrix for q, k and v, one for gate and up; two tables of factors for long contexts."""

from quantlab.arch.llama import EMBEDDING, ENDS, matrix, norm
from quantlab.arch.record import Architecture, Layer, Tensor

ARCH = Architecture(
    name="phi3",
    classes=("Phi3ForCausalLM",),
    tensors=(
        Tensor("rope_factors_long.weight", "n_pairs", "rope", optional=True),
        Tensor("rope_factors_short.weight", "n_pairs", "rope", optional=True),
        EMBEDDING,
        norm("attn_norm", "n_embd", "input_layernorm"),
        matrix("ffn_down", "n_embd n_ff", "mlp.down_proj"),
        matrix("ffn_up", "n_ff_twice n_embd", "mlp.gate_up_proj"),
        norm("ffn_norm", "n_embd", "post_attention_layernorm"),
        matrix("attn_output", "n_embd n_q", "self_attn.o_proj"),
        matrix("attn_qkv", "n_qkv n_embd", "self_attn.qkv_proj"),
        *ENDS,
    ),
    layer=Layer(attn_qkv=("attn_qkv",), ffn_in=("ffn_up",)),
    defaults={
        "phi3": {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    },
    metadata={
        "rope.scaling.original_context_length": "orig_ctx",
        "rope.dimension_count": "n_rot",
        "attention.sliding_window": "declared_window",
    },
    order=(
        *("context_length", "rope.scaling.original_context_length", "embedding_length", "feed_forward_length"),
        *("block_count", "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
        *("rope.dimension_count", "rope.freq_base", "file_type", "attention.sliding_window"),
    ),
)
