"""Gated delta nets: a layer that keeps a matrix per head instead of all keys and values.

    q, k, v ─ causal convolution ─ silu      state S [d_k, d_v] of each head of v, 0 before the first token of a chunk:
    S = S · e^g          g = a · softplus(alpha + dt)
    S = S + k ⊗ (v - Sᵀk) · sigmoid(beta)
    out = norm(Sᵀq) · silu(z)

Source: Yang et al. 2024, "Gated Delta Networks"; `build_layer_attn_linear` in src/models/qwen35.cpp of llama.cpp.
"""

import numpy as np

from quantlab.evaluate.engine.fused import exp32
from quantlab.quants.compiled import njit

_ONE, _ZERO = np.float32(1), np.float32(0)
_L2_EPS = np.float32(1e-6)


@njit(nogil=True, cache=True, error_model="numpy")
def convolve(x, weight, out):
    """out = silu(causal convolution of each column): x and out [n_ctx, n], weight [n, size], its last for this row."""
    size = weight.shape[1]
    for t in range(x.shape[0]):
        for c in range(x.shape[1]):
            total = _ZERO
            for i in range(max(0, size - 1 - t), size):
                total += weight[c, i] * x[t - size + 1 + i, c]
            out[t, c] = total / (_ONE + exp32(-total))


@njit(nogil=True, cache=True, error_model="numpy")
def delta_head(q, k, v, z, alpha, beta, decay, norm, eps, state, out):
    """Compute one head of one chunk.

    Parameters
    ----------
    q, k : np.ndarray [shape=(n_ctx, d_k), dtype=float32, C-contiguous]
        Convolved; changed.
    v : np.ndarray [shape=(n_ctx, d_v), dtype=float32, C-contiguous]
    z, out : np.ndarray [shape=(n_ctx, d_v), dtype=float32]
    alpha, beta : np.ndarray [shape=(n_ctx,), dtype=float32]
        `alpha` with dt already added.
    decay : float32
        a, negative.
    norm : np.ndarray [shape=(d_v,), dtype=float32]
    eps : float32
    state : np.ndarray [shape=(d_k, d_v), dtype=float32, C-contiguous]
        Scratch space.
    """
    d_k, d_v = state.shape
    state[:] = _ZERO
    seen, value = np.empty(d_v, np.float32), np.empty(d_v, np.float32)
    scale = np.float32(d_k) ** np.float32(-0.5)
    for t in range(q.shape[0]):
        _normalize(q[t], scale)
        _normalize(k[t], _ONE)
        soft = np.float32(np.log1p(np.exp(np.float64(alpha[t])))) if alpha[t] < 20 else alpha[t]
        kept = np.float32(np.exp(np.float64(decay * soft)))
        seen[:] = _ZERO
        for i in range(d_k):
            row, key = state[i], k[t, i]
            for j in range(d_v):
                row[j] *= kept
                seen[j] += row[j] * key
        rate = _ONE / (_ONE + exp32(-beta[t]))
        for j in range(d_v):
            seen[j] = (v[t, j] - seen[j]) * rate
        value[:] = _ZERO
        for i in range(d_k):
            row, key, query = state[i], k[t, i], q[t, i]
            for j in range(d_v):
                row[j] += key * seen[j]
                value[j] += row[j] * query
        total = _ZERO
        for j in range(d_v):
            total += value[j] * value[j]
        inverse = _ONE / np.sqrt(total / np.float32(d_v) + eps)
        for j in range(d_v):
            out[t, j] = value[j] * inverse * norm[j] * (z[t, j] / (_ONE + exp32(-z[t, j])))


@njit(nogil=True, error_model="numpy")
def _normalize(x, scale):
    """Scale a row to length `scale`."""
    total = _ZERO
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    factor = scale / np.sqrt(total + _L2_EPS)
    for i in range(x.shape[0]):
        x[i] *= factor


def mix_tokens(engine, layer, projected: np.ndarray, out: np.ndarray, head: int) -> None:
    """Compute head `head` of one chunk.

    Parameters
    ----------
    engine : CpuEngine
    layer : LayerWeights
    projected : np.ndarray [shape=(n_ctx, n), dtype=float32]
        Side by side q and k of all groups, v and z of all heads, beta, alpha; with `in_groups` of each group its
        beta and its alpha.
    out : np.ndarray [shape=(n_ctx, ssm_inner), dtype=float32]
    """
    h, vectors, scratch = layer.hparams, layer.vectors, engine.workers.scratch
    d_k, d_v, n = h.ssm_state, h.ssm_value, len(projected)
    per_group, keys = h.ssm_heads // h.ssm_groups, h.ssm_groups * h.ssm_state
    if layer.does.in_groups:
        group, place = divmod(head, per_group)
        rates = 2 * group * per_group + place, (2 * group + 1) * per_group + place
    else:
        group, rates = head % h.ssm_groups, (head, h.ssm_heads + head)
    starts = {"q": group * d_k, "k": keys + group * d_k, "v": 2 * keys + head * d_v}
    parts = {}
    for name, start in starts.items():
        columns = slice(start, start + (d_v if name == "v" else d_k))
        parts[name] = scratch(f"delta_{name}", n, columns.stop - columns.start)
        convolve(projected[:, columns], vectors["conv"][columns], parts[name])
    z = projected[:, h.conv_width + head * d_v :][:, :d_v]
    beta, alpha = (projected[:, h.conv_width + h.ssm_inner + at].copy() for at in rates)
    alpha += vectors["time_step"][head]
    state = scratch("delta_state", d_k, d_v)
    own = out[:, head * d_v :][:, :d_v]
    decay, norm = vectors["decay"][head], vectors["state_norm"]
    delta_head(*parts.values(), z, alpha, beta, decay, norm, engine.eps, state, own)
