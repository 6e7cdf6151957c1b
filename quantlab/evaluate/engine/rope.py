"""Rotary positions: the angle of each pair of dimensions at each position."""

from math import ceil, cos, floor, log, pi, sin

import numpy as np

from quantlab.evaluate.engine.ggml_steps import fma
from quantlab.quants.compiled import njit

_ZERO, _ONE = np.float32(0), np.float32(1)


def rope_factors(model, n_ctx: int) -> np.ndarray | None:
    """Return the divisors of a model's rotary frequencies [shape=(n_rot // 2,)] (None: no divisors).

    Of two tables that of long contexts counts where `n_ctx` is beyond the context length of the first training.
    """
    scaling = model.hparams.at(0).rope_scaling
    kind = "long" if n_ctx > (scaling and scaling.orig_ctx or model.hparams.n_ctx) else "short"
    for name in ("rope_freqs.weight", f"rope_factors_{kind}.weight"):
        if name in model:
            return model.tensor(name).floats()
    return None


def rope_angles(hparams, n_ctx: int, factors: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Compute the rotation of each position.

    Parameters
    ----------
    hparams : Hparams
    n_ctx : int
        Positions 0 … n_ctx - 1.
    factors : np.ndarray [shape=(n_rot // 2,), dtype=float32] or None
        What each frequency is divided by.

    Returns
    -------
    cos, sin : np.ndarray [shape=(n_ctx, n_rot // 2), dtype=float32]
        Including the magnitude that YaRN gives them.

    Source: Peng et al. 2023, "YaRN", and `rope_yarn` in ggml-cpu/ops.cpp of llama.cpp.
    """
    n_rot, scaling, magnitude = hparams.n_rot, hparams.rope_scaling, 1.0
    pair = np.arange(n_rot // 2, dtype=np.float64)
    frequency = hparams.rope_base ** (-2 * pair / n_rot)
    if factors is not None:
        frequency /= factors
    if scaling is not None:
        magnitude = scaling.attn_factor
        stretched = frequency / scaling.factor
        kept = np.zeros_like(pair)  # share of each frequency that is not stretched
        if scaling.type == "yarn":
            magnitude *= _yarn_magnitude(scaling)
            low, high = _yarn_range(hparams)
            kept = 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)
        frequency = stretched * (1 - kept) + frequency * kept
    angle = np.arange(n_ctx)[:, None] * frequency
    return (np.cos(angle) * magnitude).astype(np.float32), (np.sin(angle) * magnitude).astype(np.float32)


def _yarn_magnitude(scaling) -> float:
    """Return YaRN's factor for queries and keys."""
    growth = 0.1 * log(max(1.0, scaling.factor))
    return (1 + growth) / (1 + scaling.log_mul * growth)


def _yarn_range(hparams) -> tuple[int, int]:
    """Return the ramp's first and last pair, with `beta_fast` and `beta_slow` turns in the original context.

    By default 32 times and once.
    """
    n_rot, scaling, base = hparams.n_rot, hparams.rope_scaling, hparams.rope_base
    orig_ctx = scaling.orig_ctx or hparams.n_ctx
    turns = scaling.beta_fast, scaling.beta_slow
    low, high = (n_rot * log(orig_ctx / (turn * 2 * pi)) / (2 * log(base)) for turn in turns)
    return max(0, floor(low)), min(n_rot - 1, ceil(high))


def rope_angles_as_ggml(hparams, n_ctx: int, factors: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Compute the same in the order of ggml_rope_cache_init, in float32: each angle from the one before."""
    scaling, n_rot = hparams.rope_scaling, hparams.n_rot
    scale, magnitude, ramp = _ONE, _ONE, np.zeros(n_rot // 2, np.float32)
    if scaling is not None:
        scale, magnitude = _ONE / np.float32(scaling.factor), np.float32(scaling.attn_factor)
        if scaling.type == "yarn":
            low, high = _yarn_range(hparams)
            pair = np.arange(n_rot // 2, dtype=np.float32)
            ramp = _ONE - np.clip((pair - np.float32(low)) / np.float32(max(0.001, high - low)), 0, 1, dtype=np.float32)
            magnitude *= _yarn_magnitude_as_ggml(scaling)
    factors = np.ones(n_rot // 2, np.float32) if factors is None else factors.astype(np.float32)
    return _angles(n_ctx, n_rot // 2, np.float32(hparams.rope_base), factors, scale, ramp, magnitude)


def _yarn_magnitude_as_ggml(scaling) -> np.float32:
    """Return YaRN's factor in float32: llama.cpp divides by what ggml's rotation multiplies by."""
    tenth, growth = np.float32(0.1), np.log(_ONE / (_ONE / np.float32(scaling.factor)))
    kept = _ONE + tenth * growth
    wanted = kept / (_ONE + tenth * np.float32(scaling.log_mul) * growth)
    return wanted * (_ONE / kept) * np.float32(1 + np.float64(tenth) * np.float64(growth))


@njit(cache=True)
def _angles(n_ctx, pairs, base, factors, scale, ramp, magnitude):
    """Return cosines and sines [n_ctx, pairs]; `ramp` is the share of each frequency that is not scaled."""
    cosines, sines = np.empty((n_ctx, pairs), np.float32), np.empty((n_ctx, pairs), np.float32)
    step = np.float32(base ** np.float32(-_ONE / np.float32(pairs)))
    for p in range(n_ctx):
        theta = np.float32(p)
        for i in range(pairs):
            whole = np.float32(theta / factors[i])
            angle = np.float32(scale * whole)
            if ramp[i] > _ZERO:
                angle = fma(angle, _ONE - ramp[i], np.float32(whole * ramp[i]))
            cosines[p, i] = np.float32(cos(np.float32(angle))) * magnitude
            sines[p, i] = np.float32(sin(np.float32(angle))) * magnitude
            theta = np.float32(theta * step)
    return cosines, sines
