"""Llama, Mistral and similar models: a decoder with rotary positions over neighbouring dimensions.

Dense, or with experts as Mixtral.
"""

from dataclasses import replace

from quantlab.arch.record import Architecture, Layer, Tensor


def matrix(name: str, shape: str, hugging_face: str, meta: str = "", heads: str = "", *, only: str = "") -> Tensor:
    """Return a matrix of each layer; `heads` names the head count of a matrix with permuted rows."""
    change = ("permute", heads) if heads else ()
    names, meta = (f"model.layers.{{}}.{hugging_face}.weight",), meta and f"layers.{{}}.{meta}.weight"
    return Tensor(f"blk.{{}}.{name}.weight", shape, "matrix", names, change, meta=meta, only=only)


def norm(name: str, shape: str, hugging_face: str, meta: str = "", change: tuple[str, ...] = ()) -> Tensor:
    """Return a norm of each layer."""
    names, meta = (f"model.layers.{{}}.{hugging_face}.weight",), meta and f"layers.{{}}.{meta}.weight"
    return Tensor(f"blk.{{}}.{name}.weight", shape, "norm", names, change, meta=meta)


def bias(name: str, size: str, hugging_face: str, heads: str = "", *, optional: bool = False) -> Tensor:
    """Return the bias of a matrix of each layer."""
    change = ("permute", heads) if heads else ()
    names = (f"model.layers.{{}}.{hugging_face}.bias",)
    return Tensor(f"blk.{{}}.{name}.bias", size, "bias", names, change, optional=optional)


def experts(name: str, shape: str, one: str, forms: tuple[tuple[str, ...], ...] = ()) -> Tensor:
    """Return the stacked matrices of a layer's experts; `one` names a single one, `forms` other layouts."""
    names = (f"model.layers.{{}}.{one}.weight",)
    return Tensor(f"blk.{{}}.{name}.weight", shape, "experts", names, ("stack",), only="n_expert", forms=forms)


def router(hugging_face: str) -> Tensor:
    """Return the matrix that scores the experts."""
    names = (f"model.layers.{{}}.{hugging_face}.weight",)
    return Tensor("blk.{}.ffn_gate_inp.weight", "n_expert n_embd", "router", names, only="n_expert")


ROUTED = Layer(
    router=("ffn_gate_inp",),
    experts_in=("ffn_gate_exps", "ffn_up_exps"),
    experts_down=("ffn_down_exps",),
    sums_to_one=True,
    ffn_in=(),
    ffn_down=(),
)
EMBEDDING = Tensor(
    "token_embd.weight", "n_vocab n_embd", "embedding", ("model.embed_tokens.weight",), meta="tok_embeddings.weight"
)
ENDS = (
    Tensor("output_norm.weight", "n_embd", "norm", ("model.norm.weight",), meta="norm.weight"),
    Tensor("output.weight", "n_vocab n_embd", "output", ("lm_head.weight",), meta="output.weight", optional=True),
)
FEED_FORWARD = (
    norm("attn_norm", "n_embd", "input_layernorm", "attention_norm"),
    matrix("ffn_down", "n_embd n_ff", "mlp.down_proj", "feed_forward.w2", only="!n_expert"),
    matrix("ffn_gate", "n_ff n_embd", "mlp.gate_proj", "feed_forward.w1", only="!n_expert"),
    matrix("ffn_up", "n_ff n_embd", "mlp.up_proj", "feed_forward.w3", only="!n_expert"),
    norm("ffn_norm", "n_embd", "post_attention_layernorm", "ffn_norm"),
)

ARCH = Architecture(
    name="llama",
    classes=("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM", "LlamaModel", "MixtralForCausalLM"),
    tensors=(
        Tensor("rope_freqs.weight", "n_pairs", "rope", optional=True),
        EMBEDDING,
        *FEED_FORWARD,
        experts("ffn_gate_exps", "n_expert n_ff n_embd", "block_sparse_moe.experts.{}.w1"),
        experts("ffn_down_exps", "n_expert n_embd n_ff", "block_sparse_moe.experts.{}.w2"),
        experts("ffn_up_exps", "n_expert n_ff n_embd", "block_sparse_moe.experts.{}.w3"),
        router("block_sparse_moe.gate"),
        matrix("attn_k", "n_kv n_embd", "self_attn.k_proj", "attention.wk", heads="n_head_kv"),
        matrix("attn_output", "n_embd n_q", "self_attn.o_proj", "attention.wo"),
        matrix("attn_q", "n_q n_embd", "self_attn.q_proj", "attention.wq", heads="n_head"),
        matrix("attn_v", "n_kv n_embd", "self_attn.v_proj", "attention.wv"),
        bias("attn_k", "n_kv", "self_attn.k_proj", heads="n_head_kv", optional=True),
        bias("attn_output", "n_embd", "self_attn.o_proj", optional=True),
        bias("attn_q", "n_q", "self_attn.q_proj", heads="n_head", optional=True),
        bias("attn_v", "n_kv", "self_attn.v_proj", optional=True),
        bias("ffn_down", "n_embd", "mlp.down_proj", optional=True),
        bias("ffn_gate", "n_ff", "mlp.gate_proj", optional=True),
        bias("ffn_up", "n_ff", "mlp.up_proj", optional=True),
        *ENDS,
    ),
    layer=Layer(rope="pairs"),
    kinds=(("n_expert", replace(ROUTED, rope="pairs")),),
    defaults={
        "llama": {"max_position_embeddings": 2048, "head_dim": 0},
        "mistral": {"max_position_embeddings": 4096 * 32, "num_key_value_heads": 8, "head_dim": 0},
        "mixtral": {
            "max_position_embeddings": 4096 * 32,
            "num_key_value_heads": 8,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
        },
    },
    metadata={"vocab_size": "n_vocab", "rope.dimension_count": "n_rot"},
    has_llama_vocab=True,
)
