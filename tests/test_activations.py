"""Activations rounded as ggml's CPU code does: the same numbers as the block formats hold."""

import ml_dtypes
import numpy as np
import pytest

from quantlab import quants
from quantlab.evaluate.activations import ROUNDED_TO, round_rows


@pytest.fixture
def x(rng):
    """Rows of very different magnitudes, zeros among them."""
    x = (rng.standard_normal((32, 512)) * np.exp(4 * rng.standard_normal((32, 512)) - 6)).astype(np.float32)
    x[3] = 0
    x[4, :256] = 0
    x[5, 7] = -1e5
    return x


@pytest.mark.parametrize(("weights", "dtype"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_float_types_round_to_the_nearest(x, weights, dtype):
    with np.errstate(over="ignore"):  # float16 has no 1e5
        expected = x.astype(dtype).astype(np.float32)
    assert np.array_equal(round_rows(x, weights, np.empty_like(x)), expected)


@pytest.mark.parametrize("weights", ["Q8_0", "Q4_0", "Q4_1", "Q5_1", "Q4_K", "Q6_K"])
def test_block_types_round_as_they_are_encoded(x, weights):
    kind = ROUNDED_TO[weights]
    found = round_rows(x, weights, np.empty_like(x))
    np.testing.assert_array_equal(found, quants.roundtrip(x, "Q8_K" if kind == "Q8_K" else "Q8_0"))


def test_float32_weights_leave_activations_alone(x):
    assert round_rows(x, "F32", np.empty_like(x)) is x
