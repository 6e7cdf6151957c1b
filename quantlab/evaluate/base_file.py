"""What llama-perplexity keeps of a base model's predictions in its `--kl-divergence-base` file: 16 bits of each.

    per scored token:  float32 scale │ float32 lowest │ uint16 code × n_vocab       ln p = scale · code + lowest

The codes reach from the highest logit 16 nats down; what is less probable is stored as if it were 16 nats down.
"""

import numpy as np

NATS = np.float32(16)  # what the codes reach over at most
STEPS = np.float32(65535)


def stored_log_p(logits: np.ndarray) -> np.ndarray:
    """Return the log probabilities that the file would give back.

    Parameters
    ----------
    logits : np.ndarray [shape=(…, n_vocab), dtype=float32]

    Returns
    -------
    np.ndarray [shape=logits.shape, dtype=float32]
        Nats. Their exponentials add up to a little more than 1 where anything was cut off.

    Source: `log_softmax` in tools/perplexity/perplexity.cpp of llama.cpp.
    """
    top = logits.max(axis=-1, keepdims=True)
    low = np.maximum(logits.min(axis=-1, keepdims=True), top - NATS)
    log_sum = np.log(np.exp(logits - top).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (top - low) / STEPS
    per_step = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.where(logits > low, np.rint(per_step * (logits - low)), np.float32(0))
    return scale * codes + (low - top - log_sum)


def stored_kld(stored: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Return the divergence of each position as llama-perplexity computes it from its file.

    Parameters
    ----------
    stored : np.ndarray [shape=(…, n_vocab)]
        What `stored_log_p` gives of the base.
    log_q : np.ndarray [shape=(…, n_vocab)]
        Log probabilities of the variant, nats.

    Returns
    -------
    np.ndarray [shape=(…,)]
        Nats. Only what is more probable than e⁻¹⁶ counts, and nothing is scaled to add up to 1, so that it can be
        negative.

    Source: as `stored_log_p`.
    """
    return np.where(stored > -NATS, np.exp(stored) * (stored - log_q), 0).sum(axis=-1, dtype=np.float64)
