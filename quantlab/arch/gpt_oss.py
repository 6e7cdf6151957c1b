"""gpt-oss: experts with biases and a clamped activation, sinks in attention, a window in every other layer."""

from dataclasses import replace

from quantlab.arch.llama import EMBEDDING, ENDS, ROUTED, bias, norm, router
from quantlab.arch.qwen2 import ATTENTION
from quantlab.arch.record import Architecture, Tensor

_BOTH, _DOWN = (f"model.layers.{{}}.mlp.experts.{name}_proj" for name in ("gate_up", "down"))


def _experts(name: str, shape: str, *forms: tuple[str, ...]) -> Tensor:
    return Tensor(f"blk.{{}}.{name}.weight", shape, "experts", forms=forms)


def _bias(name: str, shape: str, source: str, *change: str) -> Tensor:
    return Tensor(f"blk.{{}}.{name}.bias", shape, "bias", (f"{source}_bias",), change)


ARCH = Architecture(
    name="gpt-oss",
    classes=("GptOssForCausalLM",),
    tensors=(
        EMBEDDING,
        _experts("ffn_down_exps", "n_expert n_embd n_ff_exp", (_DOWN, "transpose"), (f"{_DOWN}_blocks", "mxfp4")),
        *(
            _experts(
                name,
                "n_expert n_ff_exp n_embd",
                (_BOTH, "transpose", part),
                (f"{_BOTH}_blocks", "mxfp4", part),
            )
            for name, part in (("ffn_gate_exps", "0"), ("ffn_up_exps", "1"))
        ),
        norm("attn_norm", "n_embd", "input_layernorm"),
        _bias("ffn_down_exps", "n_expert n_embd", _DOWN),
        _bias("ffn_gate_exps", "n_expert n_ff_exp", _BOTH, "columns", "0"),
        _bias("ffn_up_exps", "n_expert n_ff_exp", _BOTH, "columns", "1"),
        bias("ffn_gate_inp", "n_expert", "mlp.router"),
        router("mlp.router"),
        norm("post_attention_norm", "n_embd", "post_attention_layernorm"),
        *ATTENTION,
        bias("attn_k", "n_kv", "self_attn.k_proj"),
        bias("attn_output", "n_embd", "self_attn.o_proj"),
        bias("attn_q", "n_q", "self_attn.q_proj"),
        bias("attn_v", "n_kv", "self_attn.v_proj"),
        Tensor("blk.{}.attn_sinks.weight", "n_head", "bias", ("model.layers.{}.self_attn.sinks",)),
        *ENDS,
    ),
    layer=replace(
        ROUTED,
        ffn_norm="post_attention_norm",
        sinks="attn_sinks",
        gating="softmax_chosen",
        sums_to_one=False,
        activation="swiglu_oai",
    ),
    defaults={
        "gpt_oss": {
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "rope_theta": 150000.0,
            "rms_norm_eps": 1e-5,
        }
    },
    sizes={"n_ff_exp": "intermediate_size"},
    metadata={"attention.sliding_window": "window_size", "expert_feed_forward_length": "n_ff_exp"},
    skipped=("_proj_scales", ".rotary_emb.inv_freq"),
    packed=("MXFP4",),
    window_period=2,
)
