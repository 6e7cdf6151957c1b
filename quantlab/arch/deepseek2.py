"""DeepSeek V2 and V3: latent attention, a shared expert, experts chosen within groups; the first layers are dense."""

from dataclasses import replace
from math import log

from quantlab.arch.hparams import Hparams
from quantlab.arch.llama import EMBEDDING, ENDS, ROUTED, experts, matrix, norm, router
from quantlab.arch.record import Architecture, Layer, Tensor

_ATTENTION = Layer(
    attn_qkv=("attn_q", "attn_q_a", "attn_kv_a_mqa"),
    latent_q_norm="attn_q_a_norm",
    latent_q=("attn_q_b",),
    latent_norm="attn_kv_a_norm",
    latent_k=("attn_k_b",),
    latent_v=("attn_v_b",),
    rope="pairs",
)
_EXPERTS = {"down": "n_expert n_embd n_ff_exp", "gate": "n_expert n_ff_exp n_embd", "up": "n_expert n_ff_exp n_embd"}
_SHARED = {"down": "n_embd n_ff_shexp", "gate": "n_ff_shexp n_embd", "up": "n_ff_shexp n_embd"}
_DENSE = {"down": "n_embd n_ff", "gate": "n_ff n_embd", "up": "n_ff n_embd"}


def _by_head(name: str, shape: str, part: str) -> Tensor:
    source = ("model.layers.{}.self_attn.kv_b_proj.weight",)
    return Tensor(f"blk.{{}}.{name}.weight", shape, "matrix", source, ("head", part))


def _derive(h: Hparams) -> dict:
    """Return which layers are dense, the size of the shared expert, and the scale of scores.

    YaRN's magnitude scales all scores, not the rotation. Source: `src/models/deepseek2.cpp` of llama.cpp.
    """
    if h.attn_scale:  # done
        return {}
    found = {"n_ff_shexp": h.n_expert_shared * h.n_ff_exp, "dense": tuple(int(i < h.n_dense) for i in range(h.n_layer))}
    scaling, magnitude = h.rope_scaling, 1.0
    if scaling:
        growth = 0.1 * log(max(1.0, scaling.factor))
        magnitude = scaling.attn_factor * (1 + 10 * scaling.log_mul * growth if scaling.log_mul else 1 + growth)
        found["rope_scaling"] = replace(scaling, log_mul=float(scaling.log_mul > 0))
    return found | {"attn_scale": magnitude**2 * max(1, h.head_dim_mla) ** -0.5}


ARCH = Architecture(
    name="deepseek2",
    classes=("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"),
    tensors=(
        EMBEDDING,
        norm("attn_norm", "n_embd", "input_layernorm"),
        matrix("attn_q", "n_q_mla n_embd", "self_attn.q_proj", only="!n_lora_q"),
        matrix("attn_q_a", "n_lora_q n_embd", "self_attn.q_a_proj", only="n_lora_q"),
        replace(norm("attn_q_a_norm", "n_lora_q", "self_attn.q_a_layernorm"), only="n_lora_q"),
        matrix("attn_q_b", "n_q_mla n_lora_q", "self_attn.q_b_proj", only="n_lora_q"),
        matrix("attn_kv_a_mqa", "head_dim n_embd", "self_attn.kv_a_proj_with_mqa"),
        norm("attn_kv_a_norm", "n_lora_kv", "self_attn.kv_a_layernorm"),
        _by_head("attn_k_b", "n_head n_lora_kv n_nope", "k"),
        _by_head("attn_v_b", "n_head head_dim_v n_lora_kv", "v"),
        matrix("attn_output", "n_embd n_v", "self_attn.o_proj"),
        norm("ffn_norm", "n_embd", "post_attention_layernorm"),
        *(matrix(f"ffn_{name}", shape, f"mlp.{name}_proj", only="dense") for name, shape in _DENSE.items()),
        *(
            replace(experts(f"ffn_{name}_exps", shape, f"mlp.experts.{{}}.{name}_proj"), only="!dense")
            for name, shape in _EXPERTS.items()
        ),
        *(
            matrix(f"ffn_{name}_shexp", shape, f"mlp.shared_experts.{name}_proj", only="!dense")
            for name, shape in _SHARED.items()
        ),
        replace(router("mlp.gate"), only="!dense"),
        Tensor(
            "blk.{}.exp_probs_b.bias",
            "n_expert",
            "bias",
            ("model.layers.{}.mlp.gate.e_score_correction_bias",),
            optional=True,
            only="!dense",
        ),
        *ENDS,
    ),
    layer=replace(
        _ATTENTION,
        router=ROUTED.router,
        experts_in=ROUTED.experts_in,
        experts_down=ROUTED.experts_down,
        ffn_in=("ffn_gate_shexp", "ffn_up_shexp"),
        ffn_down=("ffn_down_shexp",),
        choice_bias="exp_probs_b",
    ),
    kinds=(("dense", _ATTENTION),),
    defaults={
        "deepseek_v2": {
            "max_position_embeddings": 2048,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "moe_intermediate_size": 1407,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
        },
        "deepseek_v3": {
            "max_position_embeddings": 4096,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "n_group": 8,
            "topk_group": 4,
        },
    },
    sizes={
        "n_lora_q": "q_lora_rank",
        "n_lora_kv": "kv_lora_rank",
        "head_dim_v": "v_head_dim",
        "n_ff_exp": "moe_intermediate_size",
        "n_expert_shared": "n_shared_experts",
        "n_dense": "first_k_dense_replace",
        "expert_groups": "n_group",
        "expert_groups_used": "topk_group",
    },
    metadata={
        "expert_group_count": "expert_groups",
        "expert_group_used_count": "expert_groups_used",
        "expert_gating_func": "expert_gating",
        "leading_dense_block_count": "n_dense",
        "vocab_size": "n_vocab",
        "attention.q_lora_rank": "n_lora_q",
        "attention.kv_lora_rank": "n_lora_kv",
        "attention.key_length": "head_dim",
        "attention.value_length": "n_lora_kv",
        "attention.key_length_mla": "head_dim_mla",
        "attention.value_length_mla": "head_dim_v",
        "expert_feed_forward_length": "n_ff_exp",
        "expert_shared_count": "n_expert_shared",
        "expert_weights_scale": "expert_scale",
        "expert_weights_norm": "expert_norm",
        "attention.temperature_scale": "attn_temp_scale",
        "rope.dimension_count": "n_rot",
        "rope.scaling.yarn_log_multiplier": "yarn_log_mul_tenth",
    },
    order=tuple(
        """block_count context_length embedding_length feed_forward_length attention.head_count attention.head_count_kv
        rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scaling.yarn_ext_factor
        rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.freq_base
        attention.layer_norm_rms_epsilon expert_count expert_used_count expert_group_count expert_group_used_count
        expert_gating_func attention.key_length attention.value_length file_type leading_dense_block_count vocab_size
        attention.q_lora_rank attention.kv_lora_rank attention.key_length_mla attention.value_length_mla
        expert_feed_forward_length expert_shared_count expert_weights_scale expert_weights_norm rope.dimension_count
        rope.scaling.yarn_log_multiplier""".split()
    ),
    left_out=("model.layers.{}.",),
    yarn=("beta_fast", "beta_slow", "log_mul"),
    derive=_derive,
)
