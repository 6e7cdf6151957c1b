"""Causal attention within one chunk, a few queries at a time with their visible keys.

scores = q · kᵀ          softmax of each row over the keys up to its own          out = scores · v
"""

import math

import numpy as np

from quantlab.evaluate.engine.fused import causal_softmax, row_max, softcap
from quantlab.evaluate.engine.ggml_steps import exp32, fma, total16
from quantlab.evaluate.engine.tiles import COLUMNS, ROWS, WIDTH, compiled, multiply, pack, tile
from quantlab.quants.compiled import njit

QUERIES = 60  # positions at a time: whole tiles, and few keys that only the last of them may see
KEYS = 64  # keys that flash attention takes at a time (GGML_FA_TILE_KV)
_ZERO, _ONE, _NO_SCORE = np.float32(0), np.float32(1), np.float32(-np.inf)


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


@njit(nogil=True, cache=True, error_model="numpy")
def flash_attention(q, k, v, first, window, scale, cap, sinks, out, keys, values):
    """Compute `causal_attention` in ggml's order of operations (ggml_compute_forward_flash_attn_ext_tiled).

    q, out : float32 [rows, heads, dim], row 0 at position `first`; k, v : float32 [first + rows, dim], the values
    that float16 has; keys, values : scratch space for panels of k and of vᵀ.
    """
    pack(k, keys, 0)
    for p in range(values.shape[0]):
        columns = v[:, p * WIDTH : (p + 1) * WIDTH]
        values[p, : len(v), : columns.shape[1]] = columns
    n_values = values.shape[0] * WIDTH
    score, half = np.empty((ROWS, KEYS), np.float32), np.empty(8, np.float32)
    top, total = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    value = np.empty((ROWS, n_values), np.float32)
    for h in range(q.shape[1]):
        for start in range(0, q.shape[0], ROWS):
            query = q[start : min(start + ROWS, q.shape[0]), h]
            n, low = query.shape[0], max(0, first + start + 1 - window)
            top[:], total[:], value[:] = -np.inf, _ZERO, _ZERO
            for key in range(low // KEYS * KEYS, first + start + n, KEYS):
                seen = first + start + 1 - key  # by the first of the rows
                n_keys = min(KEYS, k.shape[0] - key)
                for p in range(key // WIDTH, -(-(key + n_keys) // WIDTH)):
                    at = p * WIDTH - key
                    tile(query, keys[p], 0, k.shape[1], score[:n, at : at + WIDTH], False)
                for r in range(n):
                    last = min(max(seen + r, 0), n_keys)
                    shrink = _weigh(score[r], seen + r - window, last, scale, cap, top, total, r, half)
                    if shrink != _ONE:
                        for i in range(n_values):
                            value[r, i] *= shrink
                for p in range(values.shape[0]):
                    sums = value[:n, p * WIDTH : (p + 1) * WIDTH]
                    tile(score[:n], values[p, key : key + n_keys], 0, n_keys, sums, True)
            for r in range(n):
                shrink = _ONE
                if sinks[h] > _NO_SCORE:
                    over = np.float32(math.exp(-np.float32(abs(np.float32(sinks[h] - top[r])))))
                    shrink, sink = (over, _ONE) if sinks[h] > top[r] else (_ONE, over)
                    total[r] = fma(total[r], shrink, sink)
                inverse = _ONE / total[r]
                for i in range(out.shape[2]):
                    out[start + r, h, i] = np.float32(value[r, i] * shrink) * inverse


@njit(inline="always")
def _weigh(score, low, seen, scale, cap, top, total, r, half):
    """Turn scores of up to KEYS keys into weights and add them to the row's total; return what came before shrinks by.

    Those from `low` on and before `seen` count; the others get no weight.
    """
    if cap > _ZERO:
        for j in range(KEYS):
            score[j] = np.float32(math.tanh(np.float32(score[j] * np.float32(scale / cap)))) * cap
        scale = _ONE
    for j in range(KEYS):
        score[j] = np.float32(score[j] * scale) if low <= j < seen else _NO_SCORE
    shrink, top_score = _ONE, row_max(score)
    if top_score == _NO_SCORE:
        score[:] = _ZERO
        return shrink
    if top_score > top[r]:
        shrink = np.float32(math.exp(np.float32(top[r] - top_score)))
        total[r] *= shrink
        top[r] = top_score
    for j in range(KEYS):
        score[j] = exp32(np.float32(score[j] - top[r]))
    whole = 0.0
    for j in range(0, KEYS, 16):
        whole += np.float64(total16(score, j, half))
    total[r] = np.float32(np.float64(total[r]) + whole)
    return shrink
