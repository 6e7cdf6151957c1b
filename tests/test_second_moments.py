"""Second moments and the linear algebra on them, against NumPy in float64."""

import numpy as np
import pytest
from numba import get_num_threads, set_num_threads

from quantlab.evaluate.engine.workers import Workers
from quantlab.evaluate.second_moments import Factor, accumulate, mirror, product


@pytest.fixture
def workers():
    with Workers() as running:
        yield running


@pytest.fixture
def moments(rng, workers):
    """Damped moments of 600 inputs whose columns are correlated and of different sizes: more than two spans."""
    mix = rng.standard_normal((600, 600)) / 25 + np.eye(600)
    x = (rng.standard_normal((900, 600)) @ mix * np.exp(rng.standard_normal(600))).astype(np.float32)
    h = np.zeros((600, 600), np.float32)
    accumulate(h, x, x, workers)
    mirror(h)
    exact = x.T.astype(np.float64) @ x
    assert np.abs(h - exact).max() < 1e-5 * np.abs(exact).max()
    h /= len(x)
    h[np.diag_indices(600)] *= 1.1
    return h


def test_moments_of_two_streams(rng, workers):
    a, b = rng.standard_normal((100, 40), np.float32), rng.standard_normal((100, 30), np.float32)
    total = np.ones((40, 30), np.float32)
    accumulate(total, a, b, workers)
    assert np.allclose(total, 1 + a.T @ b, atol=1e-4)


def test_factor_and_solution(moments, rng, workers):
    factor, exact = Factor(moments, workers), moments.astype(np.float64)
    assert not np.tril(factor.v, -1).any()
    assert np.abs(factor.v @ factor.v.T.astype(np.float64) - exact).max() < 1e-5 * np.abs(exact).max()
    x = rng.standard_normal((33, 600), np.float32)
    solved = np.linalg.solve(exact, x.T.astype(np.float64)).T
    assert np.abs(factor.solve(x) - solved).max() < 1e-4 * np.abs(solved).max()


def test_feedback_prices_an_error_as_the_moments_do(moments, rng, workers):
    """Σ weight · (error moved by the earlier errors)² = e H eᵀ."""
    factor, error, price = Factor(moments, workers), rng.standard_normal(600), 0.0
    for start in range(0, 600, 256):
        span = slice(start, min(start + 256, 600))
        moves, weight = factor.feedback(span)
        moves = np.vstack([moves[:start], np.triu(moves[start:], 1)])
        price += (weight * (error[span] + error[: span.stop] @ moves) ** 2).sum()
    assert price == pytest.approx(error @ moments.astype(np.float64) @ error, rel=1e-4)


def test_the_number_of_threads_changes_no_bit(moments, rng):
    x, results, before = rng.standard_normal((70, 600), np.float32), [], get_num_threads()
    for threads in (1, before):
        set_num_threads(threads)
        with Workers() as running:
            factor = Factor(moments, running)
            results.append((factor.v.tobytes(), factor.solve(x).tobytes(), product(x, moments, running).tobytes()))
    set_num_threads(before)
    assert results[0] == results[-1]


def test_moments_that_are_not_positive_are_refused(workers):
    with pytest.raises(ValueError, match=r"must be positive definite. Raise the damping"):
        Factor(-np.eye(32, dtype=np.float32), workers)
