"""Gated delta nets in torch: all heads of all chunks at a time, one token after the other. See `engine.delta_net`."""

import torch
from torch.nn import functional

_L2_EPS = 1e-6


def mix_tokens(h, vectors: dict[str, torch.Tensor], parts: list[torch.Tensor], n_ctx: int, in_groups=False):
    """Return what a delta net makes of its products.

    Parameters
    ----------
    h : Hparams
        Those of the layer.
    vectors : dict of str to torch.Tensor
        `conv`, `time_step`, `decay` and `state_norm`.
    parts : list of torch.Tensor
        For each row q, k and v side by side; z; beta; alpha, with `in_groups` both in one, group by group.
    n_ctx : int
        Tokens of a chunk.
    in_groups : bool
        Whether the heads of v that share one of k lie together.

    Returns
    -------
    torch.Tensor [shape=(n_chunks, n_ctx, ssm_inner), dtype=float32]
    """
    per_group, keys = h.ssm_heads // h.ssm_groups, h.ssm_groups * h.ssm_state
    if in_groups:
        parts[2:] = [part.flatten(1) for part in parts[2].unflatten(1, (-1, 2, per_group)).unbind(2)]
    q_k_v, z, beta, alpha = (part.view(-1, n_ctx, part.shape[1]) for part in parts)
    q, k, v = _convolve(q_k_v, vectors["conv"]).split([keys, keys, h.ssm_inner], -1)
    q, k = (_unit(x.unflatten(-1, (h.ssm_groups, -1))) for x in (q, k))
    q, k = (x.repeat_interleave(per_group, 2) if in_groups else x.repeat(1, 1, per_group, 1) for x in (q, k))
    v = v.unflatten(-1, (h.ssm_heads, -1))
    kept = torch.exp(vectors["decay"] * functional.softplus(alpha + vectors["time_step"]))
    found = _scan(q.mul_(h.ssm_state**-0.5), k, v, kept, beta.sigmoid())
    found = functional.rms_norm(found, (h.ssm_value,), vectors["state_norm"], h.rms_eps)
    return found.flatten(2).mul_(functional.silu(z))


def _convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return silu(causal convolution of each column); `weight` [n, size] has the factor of the same row last."""
    out = x * weight[:, -1]
    for back in range(1, min(weight.shape[1], x.shape[1])):
        out[:, back:].addcmul_(x[:, :-back], weight[:, -1 - back])
    return functional.silu(out, inplace=True)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Return rows of length 1."""
    return x * (x.square().sum(-1, keepdim=True) + _L2_EPS).rsqrt()


def _scan(q, k, v, kept, rate) -> torch.Tensor:
    """Return Sᵀq of each token [n_chunks, n_ctx, heads, d_v]: S decays, then learns k and v, then is asked q."""
    state = v.new_zeros(*v.shape[::2], k.shape[-1], v.shape[-1])
    out = torch.empty_like(v)
    for t in range(v.shape[1]):
        state.mul_(kept[:, t, :, None, None])
        key = k[:, t, :, None]
        change = (v[:, t, :, None] - key @ state).mul_(rate[:, t, :, None, None])
        state.add_(key.transpose(-1, -2) * change)
        out[:, t] = (q[:, t, :, None] @ state).squeeze(-2)
    return out
