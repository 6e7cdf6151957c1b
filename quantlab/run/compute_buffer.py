"""Size of llama.cpp's compute buffer, which holds all intermediate results of one batch of tokens.

The bytes of a result that nothing reads any more are given to another one. The buffer is largest while the
feed-forward holds gate, up and their product, or while attention holds queries, keys and values (without flash
attention: the scores). The residual stream lies beside them up to three times.

For the published dense shapes, and for experts as Mixtral's and Qwen3's, this equals what llama.cpp logs, to the two
decimals of the log. Where the feed-forward is at least 2.5 times as wide as the stream it is within 6 %; of narrower
ones, which no published model has, within a third.

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
        Needs ``n_embd n_ff n_head n_head_kv head_dim``; with experts `n_expert`, `n_expert_used`, `n_ff_exp` too.
    n_ctx, n_ubatch, flash_attn
        As for `quantlab.fit`.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> smollm2 = SimpleNamespace(n_embd=576, n_ff=1536, n_head=9, n_head_kv=3, head_dim=64)
    >>> round(compute_bytes(smollm2, n_ctx=2048) / 1024**2, 2)
    16.64
    """
    n_tokens, n_embd = min(n_ctx, n_ubatch), hparams.n_embd
    q, kv = hparams.head_dim * hparams.n_head, hparams.head_dim * hparams.n_head_kv
    most = 3 * n_embd + max(_feed_forward(hparams), 2 * q, q + 3 * kv)
    if not flash_attn:
        most = max(most, 2 * max(n_embd, q) + 2 * q + cells(n_ctx) * hparams.n_head)
    return _inputs(hparams, n_ctx, n_tokens, flash_attn) + n_tokens * most * F32


def _feed_forward(hparams) -> int:
    """Count a token's numbers in gate, up and their product (experts: or in their outputs, if wider).

    What experts give is put where gate and up lay, unless it does not fit there.
    """
    if not getattr(hparams, "n_expert", 0):
        return 3 * hparams.n_ff
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
    """Count the bytes of a batch's inputs: tokens, positions, places in the cache, embeddings, mask."""
    v_places = 1 if flash_attn else hparams.head_dim * hparams.n_head_kv  # without flash attention V lies transposed
    mask = cells(n_ctx) * (F16 if flash_attn else F32)
    embeddings = 2 * hparams.n_embd * F32  # given in place of tokens, as images are; and mixed with them
    return n_tokens * (3 * I32 + (2 + v_places) * I64 + embeddings + mask)
