"""Gemma 4 (text): norms around everything, heads of two sizes, values that are keys; dense, or with experts."""

from dataclasses import replace
from math import sqrt

from quantlab.arch.llama import EMBEDDING, matrix, norm, router
from quantlab.arch.record import Architecture, Layer, Role, Tensor

_NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OF_EXPERTS = {
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
}


def _named(name: str, shape: str, role: Role, source: str, only: str = "", *, optional: bool = False) -> Tensor:
    return Tensor(
        f"blk.{{}}.{name}", shape, role, (f"model.layers.{{}}.{source}",), only=only, optional=optional
    )  # fmt: skip


def _experts(name: str, shape: str, source: str) -> Tensor:
    source = f"model.layers.{{}}.experts.{source}"
    return Tensor(
        f"blk.{{}}.{name}.weight", shape, "experts", only="n_expert", forms=((source,), (f"{source}.weight",))
    )


_LAYER = Layer(
    q_norm="attn_q_norm",
    k_norm="attn_k_norm",
    v_norm=True,
    attn_post_norm="post_attention_norm",
    ffn_post_norm="post_ffw_norm",
    activation="gelu",
    layer_scale="layer_output_scale",
)
_TOKENS = replace(_LAYER, layer_gate=("inp_gate",), layer_out=("proj",), layer_post_norm="post_norm")
_ROUTED = replace(
    _LAYER,
    router=("ffn_gate_inp",),
    router_scale="ffn_gate_inp.scale",
    experts_in=("ffn_gate_up_exps",),
    experts_down=("ffn_down_exps",),
    sums_to_one=True,
    experts_norm="pre_ffw_norm_2",
    shared_post_norm="post_ffw_norm_1",
    experts_post_norm="post_ffw_norm_2",
    expert_scales="ffn_down_exps.scale",
)

ARCH = Architecture(
    name="gemma4",
    classes=("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"),
    tensors=(
        Tensor("rope_freqs.weight", "n_pairs", "rope", optional=True),
        EMBEDDING,
        Tensor(
            "per_layer_token_embd.weight",
            "n_vocab n_embd_layers",
            "embedding",
            ("model.embed_tokens_per_layer.weight",),
            only="n_embd_layer",
        ),
        *(norm(name, "n_embd", theirs) for name, theirs in _NORMS.items()),
        _named("layer_output_scale.weight", "one", "norm", "layer_scalar", optional=True),
        *(replace(norm(name, "n_embd", theirs), only="n_expert") for name, theirs in _OF_EXPERTS.items()),
        replace(matrix("attn_k", "n_kv n_embd", "self_attn.k_proj"), optional=True),
        matrix("attn_output", "n_embd n_q", "self_attn.o_proj"),
        matrix("attn_q", "n_q n_embd", "self_attn.q_proj"),
        replace(matrix("attn_v", "n_kv n_embd", "self_attn.v_proj", only="!v_is_k"), optional=True),
        replace(norm("attn_k_norm", "head_dim", "self_attn.k_norm"), optional=True),
        norm("attn_q_norm", "head_dim", "self_attn.q_norm"),
        matrix("ffn_down", "n_embd n_ff", "mlp.down_proj"),
        matrix("ffn_gate", "n_ff n_embd", "mlp.gate_proj"),
        matrix("ffn_up", "n_ff n_embd", "mlp.up_proj"),
        _named("ffn_gate_inp.scale", "n_embd", "bias", "router.scale", "n_expert"),
        _named("ffn_down_exps.scale", "n_expert", "bias", "router.per_expert_scale", "n_expert"),
        router("router.proj"),
        _experts("ffn_gate_up_exps", "n_expert n_ff_exp_twice n_embd", "gate_up_proj"),
        _experts("ffn_down_exps", "n_expert n_embd n_ff_exp", "down_proj"),
        _named("inp_gate.weight", "n_embd_layer n_embd", "matrix", "per_layer_input_gate.weight", "n_embd_layer"),
        _named("proj.weight", "n_embd n_embd_layer", "matrix", "per_layer_projection.weight", "n_embd_layer"),
        _named("post_norm.weight", "n_embd", "norm", "post_per_layer_input_norm.weight", "n_embd_layer"),
        Tensor(
            "per_layer_model_proj.weight",
            "n_embd_layers n_embd",
            "other",
            ("model.per_layer_model_projection.weight",),
            only="n_embd_layer",
        ),
        Tensor(
            "per_layer_proj_norm.weight",
            "n_embd_layer",
            "norm",
            ("model.per_layer_projection_norm.weight",),
            only="n_embd_layer",
        ),
        Tensor("output_norm.weight", "n_embd", "norm", ("model.norm.weight",)),
        Tensor("output.weight", "n_vocab n_embd", "output", ("lm_head.weight",), optional=True),
    ),
    layer=_LAYER,
    kinds=(
        ("n_expert", _ROUTED),
        ("kv_shared", replace(_TOKENS, attn_qkv=("attn_q",), k_norm="", v_norm=False)),
        ("n_embd_layer", _TOKENS),
    ),
    defaults=dict.fromkeys(
        ("gemma4", "gemma4_text"),
        {
            "vocab_size": 262144,
            "max_position_embeddings": 131072,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 512,
            "hidden_size_per_layer_input": 256,
            "num_kv_shared_layers": 0,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
            },
        },
    ),
    sizes={"n_ff_exp": "moe_intermediate_size", "n_embd_layer": "hidden_size_per_layer_input"}
    | {"n_kv_shared": "num_kv_shared_layers"},
    metadata={
        "final_logit_softcapping": "logit_softcap",
        "attention.sliding_window": "window_size",
        "attention.shared_kv_layers": "n_kv_shared",
        "embedding_length_per_layer_input": "n_embd_layer",
        "attention.sliding_window_pattern": "windowed",
        "attention.key_length_swa": "head_dim_window",
        "attention.value_length_swa": "head_dim_window",
        "expert_feed_forward_length": "n_ff_exp",
        "rope.dimension_count": "n_rot",
        "rope.dimension_count_swa": "n_rot_window",
    },
    vocab="gemma4",
    window_period=6,
    window_rope=1e4,
    derive=lambda hparams: {"embd_scale": sqrt(hparams.n_embd), "attn_scale": 1.0},
)
