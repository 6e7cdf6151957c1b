"""Rows that every quantizer must pass, made without a normal distribution's logarithms so that any machine makes the
same bits: sums of uniform numbers, products and quotients."""

import numpy as np


def bell(shape, seed):
    """Float64 numbers of mean 0 and variance 1, close to normal."""
    generator = np.random.RandomState(seed)  # whose numbers no NumPy version may change
    return generator.random_sample((12, *np.atleast_1d(shape))).sum(0) - 6


def kinds(n):
    """One float32 row of `n` weights of each kind."""
    x, index = bell(n, 1), np.arange(n)
    rows = {
        "normal": 0.02 * x,
        "zeros": 0 * index,
        "negative zeros": -0.0 * index,
        "constant": 0 * index + 0.37,
        "negative constant": 0 * index - 0.37,
        "linspace": np.linspace(-1, 1, n),
        "one outlier": np.where(index == 7, 5, 0.01 * x),
        "one weight": np.where(index == 40, 1e-3, 0),
        "all negative": -np.abs(x),
        "all positive": np.abs(x),
        "alternating": np.where(index % 2, 0.1, -0.1),
        "denormal": 1e-40 * x,
        "nearly denormal": 1e-38 * x,
        "below the smallest scale": 1e-16 * x,
        "tiny": 1e-30 * x,
        "large": 1e4 * x,
        "huge": 1e36 * x,
        "heavy tails": 0.02 * x / (0.001 + np.abs(bell(n, 2))),
        "few values": np.round(3 * x),
        "zero sub-block": np.where((index % 256 >= 16) & (index % 256 < 64), 0, 0.02 * x),
    }
    return {kind: row.astype(np.float32) for kind, row in rows.items()}


def every_kind(n):
    """Float32 rows (kinds, n)."""
    return np.stack(list(kinds(n).values()))


def importances(n):
    """Importance matrices (n,) of several kinds, float32."""
    x, index = bell(n, 3), np.arange(n)
    columns = {
        "ones": np.ones(n),
        "zeros": np.zeros(n),
        "one-hot": index == 33,
        "squares": x * x,
        "heavy tails": (x / (0.001 + np.abs(bell(n, 4)))) ** 2,
        "half zeros": np.where(index % 256 < 100, 0, np.abs(x)),
    }
    return {kind: column.astype(np.float32) for kind, column in columns.items()}


# types that came after 2023; of these ggml aborts where squares of weights are infinite
NEWER = ["IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"]
NEWER += ["TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0"]
_ABORTING = {"IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS"}


def for_type(qtype, n):
    """Float32 rows (kinds, n) that ggml can quantize to a type."""
    return np.stack([row for kind, row in kinds(n).items() if kind != "huge" or qtype not in _ABORTING])
