"""Routing: the experts of each token, and their weights.

scores [n_tokens, n_expert] ─ gating ─ the greatest n_used of each row ─ weights ─ tokens sorted by expert
"""

import math
from dataclasses import dataclass

import numpy as np

from quantlab.evaluate.engine.ggml_steps import exp32, total16
from quantlab.quants.compiled import njit

_ONE = np.float32(1)
_LEAST_SUM = np.float32(6.103515625e-5)  # what sums of weights are at least, as in llama.cpp


@dataclass(frozen=True)
class Routes:
    """Tokens, sorted by their experts.

    Attributes
    ----------
    tokens : np.ndarray [shape=(n,), dtype=int64]
        Expert by expert the tokens that see it, ascending.
    weights : np.ndarray [shape=(n,), dtype=float32]
        What the expert's result is multiplied by for each of them.
    ends : np.ndarray [shape=(n_expert + 1,), dtype=int64]
        Expert e has those from `ends[e]` to `ends[e + 1]`.
    ranks : np.ndarray [shape=(n_tokens, n_used), dtype=int64]
        Of each token the positions in `tokens` and `weights` of its experts, the first chosen first.
    """

    tokens: np.ndarray
    weights: np.ndarray
    ends: np.ndarray
    ranks: np.ndarray

    def of(self, expert: int) -> slice:
        """Return the positions of an expert's tokens."""
        return slice(int(self.ends[expert]), int(self.ends[expert + 1]))

    @property
    def used(self) -> list[int]:
        """The experts of any token."""
        return np.flatnonzero(np.diff(self.ends)).tolist()


def sort_tokens(tokens: np.ndarray, ids: np.ndarray, weights: np.ndarray, n_expert: int) -> Routes:
    """Sort tokens by expert.

    Parameters
    ----------
    tokens : np.ndarray [shape=(n,), dtype=int64]
    ids : np.ndarray [shape=(n, n_used), dtype=int32]
        The experts of each token.
    weights : np.ndarray [shape=(n, n_used), dtype=float32]
    n_expert : int

    Examples
    --------
    >>> ids, weights = np.array([[2, 0], [0, 1]], np.int32), np.array([[0.75, 0.25], [0.5, 0.5]], np.float32)
    >>> routes = sort_tokens(np.array([7, 8]), ids, weights, 4)
    >>> routes.tokens, routes.weights[routes.of(2)], routes.used
    (array([7, 8, 8, 7]), array([0.75], dtype=float32), [0, 1, 2])
    """
    order = np.argsort(ids, axis=None, kind="stable")
    ends = np.searchsorted(ids.reshape(-1)[order], np.arange(n_expert + 1))
    ranks = np.argsort(order).reshape(ids.shape)
    return Routes(tokens[order // ids.shape[1]], weights.reshape(-1)[order], ends, ranks)


@njit(nogil=True, cache=True, error_model="numpy")
def choose(scores, bias, gating, sums_to_one, scale, groups, ids, weights):
    """Choose the experts of each token, largest score first, equal ones in order.

    Parameters
    ----------
    scores : np.ndarray [shape=(n_tokens, n_expert), dtype=float32]
        What the router gives; changed.
    bias : np.ndarray [shape=(n_expert,), dtype=float32]
        Added to the weights while experts are chosen.
    gating : int
        0: softmax of all scores, 1: sigmoid of each, 2: softmax of those chosen.
    sums_to_one : bool
        Whether the weights are divided by their sum.
    scale : float32
        What they are multiplied by in the end.
    groups : (int, int)
        Groups that neighbouring experts form, and of how many a token's are chosen: those whose two largest scores
        have the largest sums. (0, 0): no groups.
    ids, weights : np.ndarray [shape=(n_tokens, n_used), dtype=int32 and float32]
        The result.

    Source: build_moe_ffn in src/llama-graph.cpp of llama.cpp.
    """
    n_used, (n_groups, n_kept) = ids.shape[1], groups
    kept, sums = np.ones(max(1, n_groups), np.bool_), np.empty(n_groups, np.float32)
    per_group = scores.shape[1] // len(kept)
    for t in range(scores.shape[0]):
        row = scores[t]
        if gating == 0:
            _softmax(row)
        elif gating == 1:
            for e in range(row.shape[0]):
                row[e] = _ONE / (_ONE + np.float32(math.exp(-row[e])))
        if n_groups > 1:
            _keep_groups(row, bias, n_kept, kept, sums)
        for i in range(n_used):
            best = -1
            for e in range(row.shape[0]):
                is_free = kept[e // per_group]
                for j in range(i):
                    is_free = is_free and ids[t, j] != e
                if is_free and (best < 0 or row[e] + bias[e] > row[best] + bias[best]):
                    best = e
            ids[t, i], weights[t, i] = best, row[best]
        if gating == 2:
            _softmax(weights[t])
        if sums_to_one:
            total = 0.0
            for i in range(n_used):
                total += weights[t, i]
            for i in range(n_used):
                weights[t, i] /= max(np.float32(total), _LEAST_SUM)
        for i in range(n_used):
            weights[t, i] *= scale


@njit(nogil=True, error_model="numpy")
def _keep_groups(row, bias, n_kept, kept, sums):
    """Say which groups of experts a token's may be of."""
    size = row.shape[0] // kept.shape[0]
    for g in range(kept.shape[0]):
        first, second = -np.inf, -np.inf
        for e in range(g * size, (g + 1) * size):
            score = row[e] + bias[e]
            first, second = max(first, score), max(second, min(first, score))
        kept[g], sums[g] = False, first + second
    for _ in range(n_kept):
        best = np.argmax(sums)
        kept[best], sums[best] = True, -np.inf


@njit(nogil=True, error_model="numpy")
def _softmax(row):
    """Apply softmax to a short row in place, in llama.cpp's order (ggml_compute_forward_soft_max_f32)."""
    top, total, half = row[0], 0.0, np.empty(8, np.float32)
    for i in range(row.shape[0]):
        top = max(top, row[i])
    whole = row.shape[0] // 16 * 16
    for i in range(whole):
        row[i] = exp32(np.float32(row[i] - top))
    for i in range(0, whole, 16):
        total += total16(row, i, half)
    for i in range(whole, row.shape[0]):
        row[i] = np.float32(math.exp(np.float32(row[i] - top)))
        total += row[i]
    inverse = np.float32(1.0 / total)
    for i in range(row.shape[0]):
        row[i] *= inverse


@njit(nogil=True, cache=True)
def take_rows(x, rows, out):
    """out[i] = x[rows[i]]."""
    for i in range(rows.shape[0]):
        out[i] = x[rows[i]]


@njit(nogil=True, cache=True)
def add_rows(x, rows, weights, change):
    """x[rows[i]] += weights[i] · change[i]."""
    for i in range(rows.shape[0]):
        row, weight = x[rows[i]], weights[i]
        for j in range(row.shape[0]):
            row[j] += weight * change[i, j]


@njit(nogil=True, cache=True)
def put_rows(out, weights, change):
    """out[i] = weights[i] · change[i]."""
    for i in range(weights.shape[0]):
        for j in range(out.shape[1]):
            out[i, j] = weights[i] * change[i, j]


@njit(nogil=True, cache=True)
def add_sums(x, rows, ranks, summands):
    """x[rows[i]] += Σ summands[ranks[i]], the sum in this order."""
    total = np.empty(x.shape[1], np.float32)
    for i in range(ranks.shape[0]):
        total[:] = summands[ranks[i, 0]]
        for k in range(1, ranks.shape[1]):
            total += summands[ranks[i, k]]
        x[rows[i]] += total
