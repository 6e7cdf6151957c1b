"""Causal attention within one chunk, a few queries at a time with their visible keys.

scores = q · kᵀ          softmax of each row over the keys up to its own          out = scores · v
"""

import numpy as np

from quantlab.evaluate.engine.fused import causal_softmax, softcap
from quantlab.evaluate.engine.tiles import COLUMNS, compiled, multiply, pack

QUERIES = 60  # positions at a time: whole tiles, and few keys that only the last of them may see


@compiled
def causal_attention(q, k, v, first, window, scale, cap, sinks, out, keys, values, scores):
    """Compute attention of the query heads that share one k and one v head.

    Parameters
    ----------
    q : np.ndarray [shape=(n_ctx, n_heads, head_dim), dtype=float32]
    k, v : np.ndarray [shape=(n_ctx, head_dim), dtype=float32]
        v may have other columns.
    first : int
        Position from which on the result is wanted.
    window : int
        Keys that a position sees, its own included.
    scale : float32
        What scores are multiplied by.
    cap : float32
        c of c · tanh(score / c); 0: none.
    sinks : np.ndarray [shape=(n_heads,), dtype=float32]
        Of each head a score that belongs to no key; -inf: none.
    out : np.ndarray [shape=(n_ctx, n_heads, columns of v), dtype=float32]
    keys, values, scores : np.ndarray [dtype=float32]
        Scratch space: panels of k [n_ctx, head_dim], panels of vᵀ [columns of v, n_ctx], and [QUERIES * n_ctx].
    """
    n_ctx, n_heads = q.shape[:2]
    pack(k, keys, 0)
    for p in range(values.shape[0]):
        columns = v[:, p * COLUMNS : (p + 1) * COLUMNS]
        values[p, :, : columns.shape[1]] = columns
    for start in range(first, n_ctx, QUERIES):
        stop = min(start + QUERIES, n_ctx)
        panel = max(0, start - window + 1) // COLUMNS  # the first that any of these queries sees
        low = panel * COLUMNS
        seen = scores[: (stop - start) * (stop - low)].reshape(stop - start, stop - low)
        for h in range(n_heads):
            multiply(q[start:stop, h], keys[panel : -(-stop // COLUMNS)], seen)
            if cap > 0:
                seen *= scale
                softcap(seen, cap)
                causal_softmax(seen, start - low, window, np.float32(1), sinks[h])
            else:
                causal_softmax(seen, start - low, window, scale, sinks[h])
            multiply(seen, values[:, low:stop], out[start:stop, h])


def heads(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """View rows [nrows, n_heads * head_dim] as [nrows, n_heads, head_dim]."""
    return np.lib.stride_tricks.as_strided(
        rows,
        (len(rows), rows.shape[1] // head_dim, head_dim),
        (rows.strides[0], head_dim * rows.itemsize, rows.itemsize),
    )
