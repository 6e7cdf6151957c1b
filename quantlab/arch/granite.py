"""Granite, dense: a Llama with scales for embeddings, scores, residuals and logits."""

from dataclasses import replace

from quantlab.arch.llama import ARCH as LLAMA

SCALES = {
    "attention.scale": "attn_scale",
    "embedding_scale": "embd_scale",
    "residual_scale": "residual_scale",
    "logit_scale": "logit_scale",
}

ARCH = replace(
    LLAMA,
    name="granite",
    classes=("GraniteForCausalLM",),
    defaults={
        "granite": {
            "max_position_embeddings": 2048,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        }
    },
    metadata=dict(LLAMA.metadata) | SCALES,
    derive=lambda hparams: {"logit_scale": 1 / hparams.logit_scale},  # the file says what logits are divided by
)
