"""Qwen3 with experts in every layer, and no expert that all tokens see."""

from dataclasses import replace

from quantlab.arch.llama import EMBEDDING, ENDS, bias, norm
from quantlab.arch.qwen2 import ATTENTION
from quantlab.arch.record import Architecture, Layer, Tensor


def experts(name: str, shape: str, projection: str, fused: tuple[str, ...] = (), of: str = "mlp.experts") -> Tensor:
    """Return the stacked matrices of a layer's experts, stored one by one or as one tensor."""
    single = f"model.layers.{{}}.{of}.{{}}.{projection}.weight"
    return Tensor(f"blk.{{}}.{name}.weight", shape, "experts", (single,), ("stack",), only="n_expert", forms=fused)


def router(hugging_face: str = "mlp.gate") -> Tensor:
    """Return the matrix that scores the experts."""
    names = (f"model.layers.{{}}.{hugging_face}.weight",)
    return Tensor("blk.{}.ffn_gate_inp.weight", "n_expert n_embd", "router", names, only="n_expert")


_FUSED = "model.layers.{}.mlp.experts.gate_up_proj"
EXPERTS = (
    experts("ffn_down_exps", "n_expert n_embd n_ff_exp", "down_proj", (("model.layers.{}.mlp.experts.down_proj",),)),
    experts("ffn_gate_exps", "n_expert n_ff_exp n_embd", "gate_proj", ((_FUSED, "half", "0"),)),
    experts("ffn_up_exps", "n_expert n_ff_exp n_embd", "up_proj", ((_FUSED, "half", "1"),)),
)
ROUTED = Layer(
    router=("ffn_gate_inp",),
    experts_in=("ffn_gate_exps", "ffn_up_exps"),
    experts_down=("ffn_down_exps",),
    sums_to_one=True,
    ffn_in=(),
    ffn_down=(),
)

ARCH = Architecture(
    name="qwen3moe",
    classes=(),
    tensors=(
        EMBEDDING,
        norm("attn_norm", "n_embd", "input_layernorm"),
        *EXPERTS,
        router(),
        norm("ffn_norm", "n_embd", "post_attention_layernorm"),
        *ATTENTION,
        norm("attn_k_norm", "head_dim", "self_attn.k_norm"),
        norm("attn_q_norm", "head_dim", "self_attn.q_norm"),
        bias("attn_k", "n_kv", "self_attn.k_proj", optional=True),
        bias("attn_output", "n_embd", "self_attn.o_proj", optional=True),
        bias("attn_q", "n_q", "self_attn.q_proj", optional=True),
        bias("attn_v", "n_kv", "self_attn.v_proj", optional=True),
        *ENDS,
    ),
    layer=replace(ROUTED, q_norm="attn_q_norm", k_norm="attn_k_norm"),
    defaults={"qwen3_moe": {"max_position_embeddings": 32768, "num_key_value_heads": 4, "head_dim": 128}},
    metadata={"expert_feed_forward_length": "n_ff_exp"},
)
