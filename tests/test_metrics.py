"""Figures from token scores: closed forms, and definitions written once more in plain NumPy."""

import numpy as np
import pytest

from quantlab.evaluate import metrics
from quantlab.evaluate.engine import fused
from quantlab.evaluate.metrics import TokenScores


def score(base, other, targets):
    """Scores of rows of logits, as one chunk."""
    scores = TokenScores.empty(1, len(targets))
    arrays = (scores.nll, scores.kld, scores.same_top, scores.top5, scores.top10, scores.correct, scores.top_p)
    fused.score(base, other, targets, *(array[0] for array in arrays))
    return scores


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.fixture
def logits(rng):
    """Base and variant logits of 300 positions over 1000 tokens, and what came."""
    base = (4 * rng.standard_normal((300, 1000))).astype(np.float32)
    other = (base + 0.3 * rng.standard_normal(base.shape)).astype(np.float32)
    return base, other, rng.integers(1000, size=300).astype(np.int32)


def test_uniform_logits_have_a_perplexity_of_n_vocab():
    logits = np.full((20, 777), 3.5, np.float32)
    scores = score(logits, logits, np.arange(20, dtype=np.int32))
    assert metrics.perplexity_row(scores)["ppl"] == pytest.approx(777, rel=1e-6)  # exp32 is good to 1e-7
    assert np.all(scores.nll == scores.nll[0, 0])


def test_a_model_diverges_from_itself_by_exactly_nothing(logits):
    base, _, targets = logits
    scores = score(base, base, targets)
    row = metrics.comparison_row(scores, scores)
    zeros = ("kld_mean", "kld_se", "kld_max", "kld_min", "ln_ratio", "ln_ratio_se", "delta_ppl", "dp_rms", "flips_p")
    assert [row[key] for key in zeros] == [0] * len(zeros)
    assert row["same_top_p"] == row["top5_overlap"] == row["top10_overlap"] == 1


def test_scores_agree_with_float64(logits):
    base, other, targets = logits
    p, q = log_softmax(base), log_softmax(other)
    scores = score(base, other, targets)
    # float32 exponentials and sums of 1000 terms
    np.testing.assert_allclose(scores.nll[0], -q[np.arange(300), targets], rtol=2e-6)
    np.testing.assert_allclose(scores.kld[0], (np.exp(p) * (p - q)).sum(axis=1), rtol=1e-4, atol=1e-6)
    assert np.array_equal(scores.same_top[0], p.argmax(1) == q.argmax(1))
    assert np.array_equal(scores.correct[0], q.argmax(1) == targets)
    np.testing.assert_allclose(scores.top_p[0], np.exp(q.max(1)), rtol=2e-6)
    for n, found in ((5, scores.top5), (10, scores.top10)):
        tops = [np.argsort(-x, axis=1, kind="stable")[:, :n] for x in (p, q)]
        assert found[0].tolist() == [len(np.intersect1d(a, b)) for a, b in zip(*tops, strict=True)]


def test_of_equal_logits_the_first_is_the_top():
    base = np.zeros((1, 600), np.float32)
    other = base.copy()
    other[0, 300] = np.float32(1e-6)
    assert score(base, base, np.zeros(1, np.int32)).correct[0, 0]
    assert not score(base, other, np.zeros(1, np.int32)).same_top[0, 0]


def test_far_apart_logits_stay_finite():
    base = np.array([[200, -200, 0, 1]] * 11, np.float32)
    base = np.hstack([base, np.full((11, 20), -1e4, np.float32)])
    scores = score(base, np.ascontiguousarray(base[:, ::-1]), np.zeros(11, np.int32))
    assert np.isfinite(scores.nll).all() and np.isfinite(scores.kld).all()


def test_errors_follow_llama_perplexity(logits):
    base, other, targets = logits
    base_scores, scores = score(base, base, targets), score(base, other, targets)
    row = metrics.comparison_row(scores, base_scores)
    nll, base_nll, n = scores.nll[0], base_scores.nll[0], 300
    var = [((x**2).mean() - x.mean() ** 2) / (n - 1) for x in (nll, base_nll)]
    cov = ((nll * base_nll).mean() - nll.mean() * base_nll.mean()) / (n - 1)
    ppl = np.exp([nll.mean(), base_nll.mean()])
    dp = np.exp(-nll) - np.exp(-base_nll)
    expected = {
        "ppl": ppl[0],
        "ppl_se": ppl[0] * np.sqrt(var[0]),
        "ln_ratio": nll.mean() - base_nll.mean(),
        "ln_ratio_se": np.sqrt(var[0] + var[1] - 2 * cov),
        "delta_ppl": ppl[0] - ppl[1],
        "delta_ppl_se": np.sqrt(ppl[0] ** 2 * var[0] + ppl[1] ** 2 * var[1] - 2 * ppl[0] * ppl[1] * cov),
        "nll_correlation": cov / np.sqrt(var[0] * var[1]),
        "kld_mean": scores.kld.mean(),
        "kld_median": np.median(scores.kld),
        "kld_max": scores.kld.max(),
        "dp_mean": dp.mean(),
        "dp_rms": np.sqrt((dp**2).mean()),
        "dp_rms_se": 0.5 / np.sqrt((dp**2).mean()) * np.sqrt(((dp**4).mean() - (dp**2).mean() ** 2) / (n - 1)),
        "flips_p": (scores.correct != base_scores.correct).mean(),
    }
    for key, value in expected.items():
        assert row[key] == pytest.approx(value, rel=1e-5), key  # medians and extremes are kept in float32


def test_percentiles_are_interpolated_in_float32(rng):
    values = np.sort(rng.standard_normal(4080).astype(np.float32))
    for fraction in (0.001, 0.01, 0.5, 0.9, 0.99, 0.999):
        assert metrics.percentile(values, fraction) == pytest.approx(np.quantile(values, fraction), abs=1e-4)
    assert metrics.percentile(values, 1.0) == values[-1]


def test_few_values_have_no_error():
    assert metrics.mean_and_error(np.arange(10.0)) == (4.5, 0.0)
    assert metrics.mean_and_error(np.arange(11.0))[1] > 0


def test_bootstrap_covers_the_mean_and_narrows(rng):
    few, many = rng.standard_normal(8), rng.standard_normal(800)
    low, high = metrics.bootstrap(few)
    assert low < few.mean() < high
    assert np.diff(metrics.bootstrap(many)) < (high - low) / 4
    assert np.isnan(metrics.bootstrap(few[:1])).all()


def test_running_figures_end_at_the_whole(logits):
    base, other, targets = logits
    parts = [score(base[i : i + 100], other[i : i + 100], targets[i : i + 100]) for i in (0, 100, 200)]
    same = [score(base[i : i + 100], base[i : i + 100], targets[i : i + 100]) for i in (0, 100, 200)]
    whole, base_whole = (
        TokenScores(*(np.concatenate([getattr(p, f) for p in ps]) for f in TokenScores.__dataclass_fields__))
        for ps in (parts, same)
    )
    rows = metrics.running(whole, base_whole)
    total = metrics.comparison_row(whole, base_whole)
    assert [row["chunk"] for row in rows] == [1, 2, 3]
    for key in ("ppl", "ppl_se", "ln_ratio", "kld_mean", "kld_se", "dp_rms", "same_top_p"):
        assert rows[-1][key] == pytest.approx(total[key], rel=1e-12)
    assert rows[-1]["ln_ratio_se"] == pytest.approx(total["ln_ratio_se"], rel=1e-6)  # paired differences, or covariance
    assert rows[0]["ppl"] == pytest.approx(np.exp(parts[0].nll.mean()))
