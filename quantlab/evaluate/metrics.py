"""Figures of a table, computed from scores of single tokens.

Source: llama-perplexity (tools/perplexity/perplexity.cpp of llama.cpp), which these definitions follow in every figure;
the overlaps, flips and bootstrap intervals are additions.
"""

from dataclasses import dataclass, fields

import numpy as np

DRAWS = 1000  # of the bootstrap
KLD_PERCENTILES = {
    "p999": 0.999,
    "p99": 0.99,
    "p95": 0.95,
    "p90": 0.90,
    "p10": 0.10,
    "p05": 0.05,
    "p01": 0.01,
    "p001": 0.001,
}
DP_PERCENTILES = {**KLD_PERCENTILES, "p75": 0.75, "p25": 0.25}


@dataclass(frozen=True)
class TokenScores:
    """The scores of every scored token of one variant; arrays [n_chunks, n_scored]."""

    nll: np.ndarray  # float64: -ln of the probability that the variant gave to the token that came, nats
    kld: np.ndarray  # float64: divergence of the variant's distribution from the base's, nats
    # same_top, correct: whether the most probable token is the base's; whether it is the one that came
    same_top: np.ndarray
    correct: np.ndarray
    # top5, top10: uint8: how many of the base's 5 and 10 most probable tokens are among the variant's
    top5: np.ndarray
    top10: np.ndarray
    top_p: np.ndarray  # float64: probability that the variant gave to its most probable token

    @classmethod
    def empty(cls, n_chunks: int, n_scored: int) -> "TokenScores":
        """Return empty arrays."""
        dtypes = (np.float64, np.float64, np.bool_, np.bool_, np.uint8, np.uint8, np.float64)
        return cls(*(np.zeros((n_chunks, n_scored), dtype) for dtype in dtypes))

    def at(self, place) -> dict[str, np.ndarray]:
        """Return views of some tokens' scores, by field."""
        return {field.name: getattr(self, field.name)[place] for field in fields(self)}


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return the mean and its standard error for independent tokens (10 values or fewer: no error)."""
    mean = values.mean()
    if values.size <= 10:
        return float(mean), 0.0
    return float(mean), float(np.sqrt(max(0.0, (values**2).mean() - mean**2) / (values.size - 1)))


def covariance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the covariance of the means of two paired samples."""
    return 0.0 if a.size < 10 else float(((a * b).mean() - a.mean() * b.mean()) / (a.size - 1))


def percentile(ordered: np.ndarray, fraction: float) -> float:
    """Return a percentile of an ascending float32 array, interpolated in float32 as in llama-perplexity."""
    place = np.float32(fraction) * np.float32(ordered.size - 1)
    low = min(int(place), ordered.size - 1)
    high, share = min(low + 1, ordered.size - 1), place - np.float32(low)
    return float((np.float32(1) - share) * ordered[low] + share * ordered[high])


def bootstrap(per_chunk: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean over chunks (one chunk: NaN)."""
    if per_chunk.size < 2:
        return float("nan"), float("nan")
    draws = np.random.default_rng(0).integers(per_chunk.size, size=(DRAWS, per_chunk.size))
    low, high = np.percentile(per_chunk[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def perplexity_row(scores: TokenScores) -> dict[str, float]:
    """Return ppl with its standard error and its bootstrap interval."""
    mean, error = mean_and_error(scores.nll)
    low, high = bootstrap(scores.nll.mean(axis=1))
    ppl = float(np.exp(mean))
    return {"ppl": ppl, "ppl_se": ppl * error, "ppl_low": float(np.exp(low)), "ppl_high": float(np.exp(high))}


def comparison_row(scores: TokenScores, base: TokenScores) -> dict[str, float]:
    """Return all figures of a variant compared with its base; fractions and nats."""
    return (
        perplexity_row(scores)
        | _ratio(scores, base)
        | _divergence(scores)
        | _probabilities(scores, base)
        | _agreement(scores, base)
    )


def _ratio(scores: TokenScores, base: TokenScores) -> dict[str, float]:
    """Return the change of the perplexity, with errors from the covariance of the two."""
    mean, error = mean_and_error(scores.nll)
    base_mean, base_error = mean_and_error(base.nll)
    shared = covariance(scores.nll, base.nll)
    ppl, base_ppl = np.exp(mean), np.exp(base_mean)
    ratio_error = np.sqrt(max(0.0, error**2 + base_error**2 - 2 * shared))
    delta_variance = (ppl * error) ** 2 + (base_ppl * base_error) ** 2 - 2 * ppl * base_ppl * shared
    low, high = bootstrap((scores.nll - base.nll).mean(axis=1))
    return {
        "ln_ratio": mean - base_mean,
        "ln_ratio_se": float(ratio_error),
        "ln_ratio_low": low,
        "ln_ratio_high": high,
        "delta_ppl": float(ppl - base_ppl),
        "delta_ppl_se": float(np.sqrt(max(0.0, delta_variance))),
        "nll_correlation": shared / (error * base_error) if error * base_error > 0 else float("nan"),
    }


def _divergence(scores: TokenScores) -> dict[str, float]:
    mean, error = mean_and_error(scores.kld)
    low, high = bootstrap(scores.kld.mean(axis=1))
    row = {"kld_mean": mean, "kld_se": error, "kld_low": low, "kld_high": high}
    return row | _spread("kld", scores.kld, KLD_PERCENTILES)


def _probabilities(scores: TokenScores, base: TokenScores) -> dict[str, float]:
    """Return figures of Δp, the change of the correct token's probability."""
    dp = np.exp(-scores.nll) - np.exp(-base.nll)
    mean, error = mean_and_error(dp)
    square, square_error = mean_and_error(dp**2)
    rms = float(np.sqrt(square))
    row = {"dp_mean": mean, "dp_mean_se": error, "dp_rms": rms, "dp_rms_se": 0.5 / rms * square_error if rms else 0.0}
    return row | _spread("dp", dp, DP_PERCENTILES)


def _spread(name: str, values: np.ndarray, percentiles: dict[str, float]) -> dict[str, float]:
    """Return extremes, median and percentiles."""
    ordered = np.sort(values.astype(np.float32), axis=None)
    middle = ordered.size // 2
    median = ordered[middle] if ordered.size % 2 else (ordered[middle] + ordered[middle - 1]) / 2
    row = {f"{name}_median": float(median), f"{name}_max": float(ordered[-1]), f"{name}_min": float(ordered[0])}
    return row | {f"{name}_{label}": percentile(ordered, fraction) for label, fraction in percentiles.items()}


def _agreement(scores: TokenScores, base: TokenScores) -> dict[str, float]:
    """Return the agreement of rankings; a flip is a token that only one of the two predicts correctly."""
    same = float(scores.same_top.mean())
    n = scores.same_top.size
    return {
        "same_top_p": same,
        "same_top_se": float(np.sqrt(same * (1 - same) / (n - 1))) if n > 1 else 0.0,
        "top5_overlap": float(scores.top5.mean() / 5),
        "top10_overlap": float(scores.top10.mean() / 10),
        "flips_p": float((scores.correct != base.correct).mean()),
    }


def running(scores: TokenScores, base: TokenScores) -> list[dict[str, float]]:
    """Return the main figures over the first chunk, the first two, …, as llama-perplexity prints them."""
    rows = []
    for n in range(1, len(scores.nll) + 1):
        first = {field: getattr(scores, field)[:n] for field in ("nll", "kld", "same_top")}
        base_nll = base.nll[:n]
        mean, error = mean_and_error(first["nll"])
        difference, difference_error = mean_and_error(first["nll"] - base_nll)
        kld, kld_error = mean_and_error(first["kld"])
        dp = np.exp(-first["nll"]) - np.exp(-base_nll)
        rows.append(
            {
                "chunk": n,
                "ppl": float(np.exp(mean)),
                "ppl_se": float(np.exp(mean)) * error,
                "ln_ratio": difference,
                "ln_ratio_se": difference_error,
                "kld_mean": kld,
                "kld_se": kld_error,
                "dp_rms": float(np.sqrt((dp**2).mean())),
                "same_top_p": float(first["same_top"].mean()),
            }
        )
    return rows
