"""Qwen3.5, dense: gated delta nets, and in every fourth layer gated attention."""

from dataclasses import replace

from quantlab.arch.llama import EMBEDDING, matrix
from quantlab.arch.record import Architecture, Layer, Role, Tensor

ADD_ONE = ("add", "1")  # norms are stored without the 1 that they multiply by


def plus_one(name: str, shape: str, hugging_face: str, only: str = "") -> Tensor:
    """Return a norm of each layer that is stored without its 1."""
    names = (f"model.layers.{{}}.{hugging_face}.weight",)
    return Tensor(f"blk.{{}}.{name}.weight", shape, "norm", names, ADD_ONE, only=only)


def of_delta_net(name: str, shape: str, source: str, role: Role = "matrix", *change: str) -> Tensor:
    """Return a tensor of each recurrent layer."""
    return Tensor(
        f"blk.{{}}.{name}", shape, role, (f"model.layers.{{}}.linear_attn.{source}",), change, only="recurrent"
    )


DELTA_NET = (
    of_delta_net("attn_qkv.weight", "conv_width n_embd", "in_proj_qkv.weight", "matrix", "tile", "ssm_value"),
    of_delta_net("attn_gate.weight", "ssm_inner n_embd", "in_proj_z.weight", "matrix", "tile", "ssm_value"),
    of_delta_net("ssm_alpha.weight", "ssm_heads n_embd", "in_proj_a.weight", "matrix", "tile", "1"),
    of_delta_net("ssm_beta.weight", "ssm_heads n_embd", "in_proj_b.weight", "matrix", "tile", "1"),
    of_delta_net("ssm_conv1d.weight", "conv_width ssm_conv", "conv1d.weight", "state", "tile", "ssm_value"),
    of_delta_net("ssm_a", "ssm_heads", "A_log", "state", "tile_decay", "1"),
    of_delta_net("ssm_dt.bias", "ssm_heads", "dt_bias", "bias", "tile", "1"),
    of_delta_net("ssm_norm.weight", "ssm_value", "norm.weight", "norm"),
    of_delta_net("ssm_out.weight", "n_embd ssm_inner", "out_proj.weight", "matrix", "tile_columns", "ssm_value"),
)
ATTENTION = (
    *(
        replace(matrix(name, shape, f"self_attn.{part}_proj"), only="!recurrent")
        for name, shape, part in (
            ("attn_k", "n_kv n_embd", "k"),
            ("attn_output", "n_embd n_q", "o"),
            ("attn_q", "n_q_gate n_embd", "q"),
            ("attn_v", "n_kv n_embd", "v"),
        )
    ),
    plus_one("attn_k_norm", "head_dim", "self_attn.k_norm", "!recurrent"),
    plus_one("attn_q_norm", "head_dim", "self_attn.q_norm", "!recurrent"),
)
NORMS = (
    plus_one("attn_norm", "n_embd", "input_layernorm"),
    plus_one("post_attention_norm", "n_embd", "post_attention_layernorm"),
)
NEXTN = (  # of layers that guess several tokens at once
    Tensor(
        "blk.{}.nextn.eh_proj.weight", "n_embd n_embd_twice", "other", ("model.layers.{}.eh_proj.weight",), only="nextn"
    ),
    plus_one("nextn.enorm", "n_embd", "enorm", "nextn"),
    plus_one("nextn.hnorm", "n_embd", "hnorm", "nextn"),
    plus_one("nextn.shared_head_norm", "n_embd", "shared_head.norm", "nextn"),
)
ENDS = (
    Tensor("output_norm.weight", "n_embd", "norm", ("model.norm.weight",), ADD_ONE),
    Tensor("output.weight", "n_vocab n_embd", "output", ("lm_head.weight",), optional=True),
)
GATED = Layer(ffn_norm="post_attention_norm", q_norm="attn_q_norm", k_norm="attn_k_norm", query_width=2)


def recurrent(layer: Layer) -> Layer:
    """Return the record of a layer with a delta net in place of attention."""
    return replace(
        layer,
        q_norm="",
        k_norm="",
        query_width=1,
        attn_qkv=("attn_qkv", "attn_gate", "ssm_beta", "ssm_alpha"),
        attn_output=("ssm_out",),
        conv="ssm_conv1d",
        time_step="ssm_dt",
        decay="ssm_a",
        state_norm="ssm_norm",
    )


SIZES = {
    "ssm_conv": "linear_conv_kernel_dim",
    "ssm_state": "linear_key_head_dim",
    "ssm_groups": "linear_num_key_heads",
    "ssm_heads": "linear_num_value_heads",
    "attention_interval": "full_attention_interval",
}
METADATA = {
    "nextn_predict_layers": "n_layer_nextn",
    "ssm.conv_kernel": "ssm_conv",
    "ssm.state_size": "ssm_state",
    "ssm.group_count": "ssm_groups",
    "ssm.time_step_rank": "ssm_heads",
    "ssm.inner_size": "ssm_inner",
    "attention.recurrent_layers": "recurrent_layers",
    "full_attention_interval": "attention_interval",
    "rope.dimension_count": "n_rot",
    "rope.dimension_sections": "rope_sections",
}
USUAL = {
    "max_position_embeddings": 32768,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
}

ARCH = Architecture(
    name="qwen35",
    classes=("Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration"),
    tensors=(
        EMBEDDING,
        *NORMS,
        *DELTA_NET,
        *ATTENTION,
        matrix("ffn_down", "n_embd n_ff", "mlp.down_proj"),
        matrix("ffn_gate", "n_ff n_embd", "mlp.gate_proj"),
        matrix("ffn_up", "n_ff n_embd", "mlp.up_proj"),
        *NEXTN,
        *ENDS,
    ),
    layer=GATED,
    kinds=(("recurrent", recurrent(GATED)),),
    defaults=dict.fromkeys(("qwen3_5", "qwen3_5_text"), USUAL | {"num_key_value_heads": 4}),
    sizes=SIZES,
    metadata=METADATA,
    left_out=("mtp.", "model.mtp."),
)
