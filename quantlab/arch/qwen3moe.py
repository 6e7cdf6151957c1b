"""Qwen3 with experts in every layer, and no expert that all tokens see."""

from dataclasses import replace

from quantlab.arch.llama import EMBEDDING, ENDS, ROUTED, experts, norm, router
from quantlab.arch.qwen2 import ATTENTION
from quantlab.arch.qwen3 import BIASES, HEAD_NORMS
from quantlab.arch.record import Architecture

_BOTH, _DOWN = (f"model.layers.{{}}.mlp.experts.{name}_proj" for name in ("gate_up", "down"))  # of all experts
EXPERTS = (
    experts("ffn_down_exps", "n_expert n_embd n_ff_exp", "mlp.experts.{}.down_proj", ((_DOWN,),)),
    experts("ffn_gate_exps", "n_expert n_ff_exp n_embd", "mlp.experts.{}.gate_proj", ((_BOTH, "half", "0"),)),
    experts("ffn_up_exps", "n_expert n_ff_exp n_embd", "mlp.experts.{}.up_proj", ((_BOTH, "half", "1"),)),
    router("mlp.gate"),
)

ARCH = Architecture(
    name="qwen3moe",
    classes=("Qwen3MoeForCausalLM",),
    tensors=(
        EMBEDDING,
        norm("attn_norm", "n_embd", "input_layernorm"),
        *EXPERTS,
        norm("ffn_norm", "n_embd", "post_attention_layernorm"),
        *ATTENTION,
        *HEAD_NORMS,
        *BIASES,
        *ENDS,
    ),
    layer=replace(ROUTED, q_norm="attn_q_norm", k_norm="attn_k_norm"),
    defaults={"qwen3_moe": {"max_position_embeddings": 32768, "num_key_value_heads": 4, "norm_topk_prob": False}},
    sizes={"n_ff_exp": "moe_intermediate_size"},
    metadata={"expert_feed_forward_length": "n_ff_exp"},
)
