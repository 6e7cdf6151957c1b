"""OLMo 2 and OLMo 3: norms after each half of a layer alone, and of whole rows of q and k."""

from quantlab.arch.gemma3 import NORMS
from quantlab.arch.llama import EMBEDDING, ENDS, matrix, norm
from quantlab.arch.qwen2 import ATTENTION
from quantlab.arch.record import Architecture, Layer

AFTER = ("post_attention_norm", "post_ffw_norm")

ARCH = Architecture(
    name="olmo2",
    classes=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
    tensors=(
        EMBEDDING,
        *ATTENTION,
        norm("attn_k_norm", "n_kv", "self_attn.k_norm"),
        norm("attn_q_norm", "n_q", "self_attn.q_norm"),
        *(norm(name, "n_embd", NORMS[name]) for name in AFTER),
        matrix("ffn_down", "n_embd n_ff", "mlp.down_proj"),
        matrix("ffn_gate", "n_ff n_embd", "mlp.gate_proj"),
        matrix("ffn_up", "n_ff n_embd", "mlp.up_proj"),
        *ENDS,
    ),
    layer=Layer(
        attn_norm="",
        q_norm="attn_q_norm",
        k_norm="attn_k_norm",
        attn_post_norm="post_attention_norm",
        ffn_norm="",
        ffn_post_norm="post_ffw_norm",
    ),
    defaults={
        "olmo2": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        "olmo3": {
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "rope_local_base_freq": 5e5,
            "sliding_window": 4096,
        },
    },
    metadata={"attention.sliding_window": "window_size", "attention.sliding_window_pattern": "windowed"},
    window_period=4,
    window_rope=0.0,
)
