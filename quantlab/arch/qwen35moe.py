"""Qwen3.5 with experts, one of which every token sees through a gate: gated delta nets and gated attention."""

from dataclasses import replace

from quantlab.arch.llama import EMBEDDING, ROUTED, matrix
from quantlab.arch.qwen3moe import EXPERTS
from quantlab.arch.qwen35 import ATTENTION, DELTA_NET, ENDS, GATED, METADATA, NEXTN, NORMS, SIZES, USUAL, recurrent
from quantlab.arch.record import Architecture, Tensor

SHARED = (
    matrix("ffn_down_shexp", "n_embd n_ff_shexp", "mlp.shared_expert.down_proj"),
    matrix("ffn_gate_shexp", "n_ff_shexp n_embd", "mlp.shared_expert.gate_proj"),
    matrix("ffn_up_shexp", "n_ff_shexp n_embd", "mlp.shared_expert.up_proj"),
    Tensor(
        "blk.{}.ffn_gate_inp_shexp.weight", "one n_embd", "router", ("model.layers.{}.mlp.shared_expert_gate.weight",)
    ),
)
_LAYER = replace(
    GATED,
    router=ROUTED.router,
    experts_in=ROUTED.experts_in,
    experts_down=ROUTED.experts_down,
    sums_to_one=True,
    shared_gate=("ffn_gate_inp_shexp",),
    ffn_in=("ffn_gate_shexp", "ffn_up_shexp"),
    ffn_down=("ffn_down_shexp",),
)

ARCH = Architecture(
    name="qwen35moe",
    classes=("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
    tensors=(EMBEDDING, *NORMS, *DELTA_NET, *ATTENTION, *EXPERTS, *SHARED, *NEXTN, *ENDS),
    layer=_LAYER,
    kinds=(("recurrent", recurrent(_LAYER)),),
    defaults=dict.fromkeys(
        ("qwen3_5_moe", "qwen3_5_moe_text"),
        USUAL | {"num_key_value_heads": 2, "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512},
    ),
    sizes=SIZES | {"n_ff_exp": "moe_intermediate_size", "n_ff_shexp": "shared_expert_intermediate_size"},
    metadata={"expert_feed_forward_length": "n_ff_exp", "expert_shared_feed_forward_length": "n_ff_shexp"} | METADATA,
    left_out=("mtp.", "model.mtp."),
)
