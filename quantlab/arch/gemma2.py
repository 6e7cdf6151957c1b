"""Gemma 2: Gemma 3's layer without norms of heads, with softcaps; every second layer has a window."""

from quantlab.arch.gemma3 import BLOCK, END, derive
from quantlab.arch.llama import EMBEDDING
from quantlab.arch.record import Architecture, Layer

ARCH = Architecture(
    name="gemma2",
    classes=("Gemma2ForCausalLM",),
    tensors=(EMBEDDING, *BLOCK, END),
    layer=Layer(
        attn_post_norm="post_attention_norm", ffn_post_norm="post_ffw_norm", activation="gelu", scaled_queries=True
    ),
    defaults={
        "gemma2": {
            "max_position_embeddings": 8192,
            "head_dim": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        }
    },
    metadata={
        "attn_logit_softcapping": "attn_softcap",
        "final_logit_softcapping": "logit_softcap",
        "attention.sliding_window": "window_size",
    },
    order=(
        *("context_length", "embedding_length", "block_count", "feed_forward_length"),
        *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
        *("attention.key_length", "attention.value_length", "file_type"),
        *("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"),
    ),
    skipped=(*Architecture.skipped, "lm_head.weight"),
    tokenizer={"add_space_prefix": False},
    window_period=2,
    window=4096,
    derive=lambda hparams: derive(hparams, n_layer_27b=46),
)
