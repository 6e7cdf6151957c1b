"""Size of llama.cpp's compute buffer, which holds all intermediate results of one batch of tokens.

The bytes of a result that nothing reads any more are given to another one. The buffer is largest while the
feed-forward holds gate, up and their product, or while attention holds queries, keys and values (without flash
attention: the scores). The residual stream lies beside them up to three times. The widest layer counts.

For the published dense shapes, for experts as Mixtral's and Qwen3's, and for DeepSeek's latent attention this equals
what llama.cpp logs, to the two decimals of the log. Of Gemma and Qwen3.5 it does so with flash attention; without, it
is within 11 %. A feed-forward less than 2.5 times as wide as the stream, without experts, is within a third.

Source: llama.cpp, `ggml/src/ggml-alloc.c` (the allocator), `src/models/llama.cpp` and `src/llama-graph.cpp` (the
graph), and what `GGML_SCHED_DEBUG=2` prints of it.
"""

from __future__ import annotations

F32, F16, I32, I64 = 4, 2, 4, 8  # bytes
CELLS = 256  # the KV cache has a multiple of so many


def compute_bytes(hparams, *, n_ctx: int, n_ubatch: int = 512, flash_attn: bool = True) -> int:
    """Compute the size of llama.cpp's compute buffer, in bytes.

    Parameters
    ----------
    hparams : Hparams
    n_ctx, n_ubatch, flash_attn
        As for `quantlab.fit`.

    Examples
    --------
    >>> from quantlab.arch import Hparams
    >>> smollm2 = Hparams(arch="llama", n_layer=30, n_embd=576, n_ff=1536, n_head=9, n_head_kv=3)
    >>> round(compute_bytes(smollm2, n_ctx=2048) / 1024**2, 2)
    16.64
    """
    n_tokens = min(n_ctx, n_ubatch)
    layers = [hparams.at(i) for i in range(hparams.n_layer if hparams.varies else 1)]
    most = max(_layer(layer, n_tokens, 0 if flash_attn else cells(n_ctx)) for layer in layers)
    return _inputs(hparams, n_ctx, n_tokens, flash_attn) + n_tokens * (most + 2 * hparams.n_embd_layers) * F32


def _layer(hparams, n_tokens: int, n_scores: int) -> int:
    """Count a token's numbers at the widest place of a layer; `n_scores` are those of a head, if they are stored."""
    n_embd, n_head = hparams.n_embd, hparams.n_head
    scores = n_scores * n_head
    if hparams.recurrent:  # a delta net: before and after its convolution, and its state
        state = hparams.ssm_state * hparams.ssm_inner // n_tokens
        return 3 * n_embd + max(_feed_forward(hparams), 2 * hparams.conv_width + state)
    q, kv = hparams.head_dim * n_head, hparams.head_dim * hparams.n_head_kv
    if hparams.n_lora_kv:  # queries as projected, times the matrix of keys, and both parts joined
        rotated = hparams.n_rot * n_head
        attention = hparams.n_q_mla + hparams.n_lora_kv * n_head + q + (rotated if rotated > n_embd else 0)
        return 3 * n_embd + max(_feed_forward(hparams), attention + scores)
    gated = 4 * q if hparams.ssm_heads else 0
    most = 3 * n_embd + max(_feed_forward(hparams), 2 * q, q + 3 * kv, gated)
    return max(most, 2 * max(n_embd, q) + 2 * q + scores) if scores else most


def _feed_forward(hparams) -> int:
    """Count a token's numbers in gate, up and their product (experts: or in their outputs, if wider).

    What experts give is put where gate and up lay, unless it does not fit there.
    """
    if not hparams.n_expert or hparams.dense:
        # what layers learn of tokens left a place behind, which one of the three takes if it fits there
        return (2 if hparams.n_ff <= hparams.n_embd_layers else 3) * hparams.n_ff
    inner, outer = ((hparams.n_ff_exp or hparams.n_ff) * hparams.n_expert_used, hparams.n_embd * hparams.n_expert_used)
    return 3 * inner + (outer if outer > 2 * inner else 0)


def input_bytes(hparams, *, n_ctx: int, n_ubatch: int = 512, flash_attn: bool = True) -> int:
    """Compute the compute buffer's part on the CPU when every layer is on the GPU: inputs and embeddings."""
    n_tokens = min(n_ctx, n_ubatch)
    return _inputs(hparams, n_ctx, n_tokens, flash_attn) + n_tokens * hparams.n_embd * F32


def cells(n_ctx: int) -> int:
    """Round a context up to the number of cells in its KV cache."""
    return -(-n_ctx // CELLS) * CELLS


def _inputs(hparams, n_ctx: int, n_tokens: int, flash_attn: bool) -> int:
    """Count the bytes of a batch's inputs: tokens, positions, places in the caches, embeddings, masks."""
    layers = [hparams.at(i) for i in range(hparams.n_layer if hparams.varies else 1)]
    caches = {}  # those of layers with a window have fewer cells
    for layer in layers:
        if not layer.recurrent:
            n_cells = cells(min(n_ctx, layer.window + n_tokens) if layer.window else n_ctx)
            # without flash attention V lies transposed
            v_places = 1 if flash_attn or layer.n_lora_kv else layer.head_dim * layer.n_head_kv
            caches[bool(layer.window)] = n_cells * (F16 if flash_attn else F32) + (1 + v_places) * I64
    embeddings = 2 * hparams.n_embd * F32  # given in place of tokens, as images are; and mixed with them
    return n_tokens * (3 * I32 + I64 + embeddings + sum(caches.values()))
