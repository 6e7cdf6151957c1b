"""Qwen2 and Qwen2.5: a Llama with biases of q, k and v, and rotary positions over the halves of a head."""

from quantlab.arch.llama import EMBEDDING, ENDS, FEED_FORWARD, bias, matrix
from quantlab.arch.record import Architecture

ATTENTION = (
    matrix("attn_k", "n_kv n_embd", "self_attn.k_proj", "attention.wk"),
    matrix("attn_output", "n_embd n_q", "self_attn.o_proj", "attention.wo"),
    matrix("attn_q", "n_q n_embd", "self_attn.q_proj", "attention.wq"),
    matrix("attn_v", "n_kv n_embd", "self_attn.v_proj", "attention.wv"),
)

ARCH = Architecture(
    name="qwen2",
    classes=("Qwen2ForCausalLM", "Qwen2Model"),
    tensors=(
        EMBEDDING,
        *FEED_FORWARD,
        *ATTENTION,
        bias("attn_k", "n_kv", "self_attn.k_proj"),
        bias("attn_q", "n_q", "self_attn.q_proj"),
        bias("attn_v", "n_kv", "self_attn.v_proj"),
        *ENDS,
    ),
    defaults={"qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32}},
)
