"""Qwen3, dense: norms of the heads of q and k, and a head size of its own."""

from quantlab.arch.llama import EMBEDDING, ENDS, FEED_FORWARD, bias, norm
from quantlab.arch.qwen2 import ATTENTION
from quantlab.arch.record import Architecture, Layer

HEAD_NORMS = (
    norm("attn_k_norm", "head_dim", "self_attn.k_norm"),
    norm("attn_q_norm", "head_dim", "self_attn.q_norm"),
)
BIASES = (
    bias("attn_k", "n_kv", "self_attn.k_proj", optional=True),
    bias("attn_output", "n_embd", "self_attn.o_proj", optional=True),
    bias("attn_q", "n_q", "self_attn.q_proj", optional=True),
    bias("attn_v", "n_kv", "self_attn.v_proj", optional=True),
)

ARCH = Architecture(
    name="qwen3",
    classes=("Qwen3ForCausalLM", "Qwen3Model"),
    tensors=(
        EMBEDDING,
        *FEED_FORWARD,
        *ATTENTION,
        *HEAD_NORMS,
        *BIASES,
        *ENDS,
    ),
    layer=Layer(q_norm="attn_q_norm", k_norm="attn_k_norm"),
    defaults={"qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128}},
)
