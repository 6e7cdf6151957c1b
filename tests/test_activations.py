"""Activations rounded as ggml's CPU code does: the same numbers as the block formats hold."""

import ml_dtypes
import numpy as np
import pytest

from quantlab import quants
from quantlab.evaluate.engine.ggml_activations import Blocks, round_bf16, round_f16
from quantlab.evaluate.engine.workers import Workers


@pytest.fixture
def x(rng):
    """Rows of very different magnitudes, zeros among them."""
    x = (rng.standard_normal((32, 512)) * np.exp(4 * rng.standard_normal((32, 512)) - 6)).astype(np.float32)
    x[3] = 0
    x[4, :256] = 0
    x[5, 7] = -1e5
    return x


@pytest.mark.parametrize(("round_", "dtype"), [(round_f16, np.float16), (round_bf16, ml_dtypes.bfloat16)])
def test_float_types_round_to_the_nearest(x, round_, dtype):
    with np.errstate(over="ignore"):  # float16 has no 1e5
        expected = x.astype(dtype).astype(np.float32)
    found = np.empty_like(x)
    round_(x, found)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("qtype", ["Q8_0", "Q8_1", "Q8_K"])
def test_block_types_round_as_they_are_encoded(x, qtype):
    blocks = Blocks(x, qtype, 16, Workers())
    found = blocks.codes.reshape(*blocks.d.shape, -1) * blocks.d[..., None]
    np.testing.assert_array_equal(found.reshape(x.shape), quants.roundtrip(x, "Q8_K" if qtype == "Q8_K" else "Q8_0"))


@pytest.mark.parametrize(("qtype", "run"), [("Q8_0", 4), ("Q8_0", 32), ("Q8_K", 16), ("Q8_K", 32)])
def test_sums_are_those_of_the_runs(x, qtype, run):
    blocks = Blocks(x, qtype, run, Workers())
    sums = blocks.codes.reshape(len(x), -1, run).sum(axis=2)
    np.testing.assert_array_equal(blocks.starts, -128 * sums[:, : blocks.starts.shape[1]])
    if qtype == "Q8_K":
        np.testing.assert_array_equal(blocks.sums, sums)


def test_sums_of_blocks_are_scaled_and_rounded(x):
    blocks = Blocks(x[:3], "Q8_1", 4, Workers())
    top = np.abs(x[:3].reshape(3, -1, 32)).max(axis=2)
    sums = (top / np.float32(127)) * blocks.codes.reshape(3, -1, 32).sum(axis=2)  # the scale before it is rounded
    np.testing.assert_array_equal(blocks.sums, sums.astype(np.float16))


def test_of_two_greatest_the_positive_one_becomes_lowest():
    x = np.zeros((1, 256), np.float32)
    x[0, 3], x[0, 200] = -2, 2
    blocks = Blocks(x, "Q8_K", 32, Workers())
    assert blocks.codes[0, 200] == -127 and blocks.codes[0, 3] == 127 and blocks.d[0, 0] < 0
