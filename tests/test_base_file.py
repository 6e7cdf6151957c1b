"""The 16 bits that llama-perplexity keeps of each log probability, beside a slow derivation and closed forms."""

import math

import numpy as np
import pytest

from quantlab.evaluate.base_file import stored_kld, stored_log_p


def naive(logits):
    """One row, a number at a time, every operation in float32 but the sum."""
    f32 = np.float32
    top = max(logits)
    low = max(min(logits), f32(top - f32(16)))
    log_sum = f32(math.log(sum(float(np.exp(f32(x - top))) for x in logits)))
    scale = f32(f32(top - low) / f32(65535))
    inverse = f32(f32(1) / scale)
    codes = [int(np.rint(f32(inverse * f32(x - low)))) if x > low else 0 for x in logits]
    assert 0 <= min(codes) and max(codes) <= 65535
    return [f32(f32(scale * f32(code)) + f32(f32(low - top) - log_sum)) for code in codes]


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 6, (2, 3, 500)).astype(np.float32)


def log_p(logits):
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def test_the_same_numbers_as_derived_one_at_a_time(logits):
    stored = stored_log_p(logits)
    assert stored.dtype == np.float32
    for found, row in zip(stored.reshape(-1, 500), logits.reshape(-1, 500), strict=True):
        np.testing.assert_array_equal(found, np.array(naive(row)))


def test_half_a_step_is_lost_at_most_and_all_below_16_nats(logits):
    exact, stored = log_p(logits), stored_log_p(logits)
    depth = logits.max(axis=-1, keepdims=True) - logits
    step = 16 / 65535
    assert np.abs(stored - exact)[depth < 16].max() < 0.51 * step
    floor = np.broadcast_to(stored.min(axis=-1, keepdims=True), stored.shape)
    np.testing.assert_array_equal(stored[depth > 16], floor[depth > 16])
    assert (depth > 16).any()


def test_equal_logits_have_no_scale():
    np.testing.assert_allclose(stored_log_p(np.full((1, 8), 3, np.float32)), -math.log(8), rtol=1e-6)


def test_the_divergence_of_a_model_from_its_own_file_is_nearly_nothing(logits):
    found = stored_kld(stored_log_p(logits), log_p(logits))
    assert found.shape == (2, 3)
    assert 0 < np.abs(found).max() < 1e-3


def test_the_divergence_from_the_file_is_near_the_exact_one(logits):
    p, q = log_p(logits), log_p(logits + np.random.default_rng(1).normal(0, 0.3, logits.shape))
    exact = (np.exp(p) * (p - q)).sum(axis=-1)
    np.testing.assert_allclose(stored_kld(stored_log_p(logits), q), exact, atol=1e-3)
