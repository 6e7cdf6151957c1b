"""Qwen3-Next: Qwen3.5's layers with experts, the projections of its delta nets stored head of k by head of k."""

from dataclasses import replace

from quantlab.arch.llama import EMBEDDING
from quantlab.arch.qwen3moe import EXPERTS
from quantlab.arch.qwen35 import ATTENTION, ENDS, METADATA, NEXTN, NORMS, SIZES, USUAL, of_delta_net
from quantlab.arch.qwen35moe import ARCH as QWEN35MOE
from quantlab.arch.qwen35moe import SHARED
from quantlab.arch.record import Architecture

_DELTA_NET = (
    of_delta_net("attn_qkv.weight", "conv_width n_embd", "in_proj_qkvz.weight", "matrix", "part", "qkv"),
    of_delta_net("attn_gate.weight", "ssm_inner n_embd", "in_proj_qkvz.weight", "matrix", "part", "z"),
    of_delta_net("ssm_ba.weight", "ssm_heads_twice n_embd", "in_proj_ba.weight"),
    of_delta_net("ssm_conv1d.weight", "conv_width ssm_conv", "conv1d.weight", "state", "squeeze", ""),
    of_delta_net("ssm_a", "ssm_heads", "A_log", "state", "decay", ""),
    of_delta_net("ssm_dt.bias", "ssm_heads", "dt_bias", "bias"),
    of_delta_net("ssm_norm.weight", "ssm_value", "norm.weight", "norm"),
    of_delta_net("ssm_out.weight", "n_embd ssm_inner", "out_proj.weight"),
)
_RECURRENT = replace(dict(QWEN35MOE.kinds)["recurrent"], attn_qkv=("attn_qkv", "attn_gate", "ssm_ba"), in_groups=True)

ARCH = Architecture(
    name="qwen3next",
    classes=("Qwen3NextForCausalLM",),
    tensors=(EMBEDDING, *NORMS, *_DELTA_NET, *ATTENTION, *EXPERTS, *SHARED, *NEXTN, *ENDS),
    layer=QWEN35MOE.layer,
    kinds=(("recurrent", _RECURRENT),),
    defaults={
        "qwen3_next": USUAL
        | {
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "norm_topk_prob": True,
        }
    },
    sizes=SIZES | {"n_ff_exp": "moe_intermediate_size", "n_ff_shexp": "shared_expert_intermediate_size"},
    metadata={"expert_feed_forward_length": "n_ff_exp", "expert_shared_feed_forward_length": "n_ff_shexp"}
    | {key: field for key, field in METADATA.items() if key != "rope.dimension_sections"},
    left_out=("mtp.", "model.mtp."),
)
