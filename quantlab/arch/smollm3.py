"""SmolLM3: a Llama in which every fourth layer has no positions."""

from dataclasses import replace

from quantlab.arch.llama import ARCH as LLAMA

ARCH = replace(
    LLAMA,
    name="smollm3",
    classes=("SmolLM3ForCausalLM",),
    tensors=tuple(tensor for tensor in LLAMA.tensors if tensor.role not in ("rope", "bias")),
    defaults={"smollm3": {"max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2e6}},
    unrotated_period=4,
)
