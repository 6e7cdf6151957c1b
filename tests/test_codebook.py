"""Where the codes lie, and what they stand for: first + step * code is what the decoder gives."""

import numpy as np
import pytest

from quantlab import quants
from quantlab.quants.codebook import CODES, code_values, put, take


@pytest.mark.parametrize("qtype", CODES)
def test_codes_and_grid_give_the_decoded_weights(qtype, rng):
    x = rng.standard_normal((3, 512)).astype(np.float32)
    data = quants.quantize(x, qtype)
    codes = quants.codes(data, qtype)
    first, step = quants.grid(data, qtype)
    decoded = quants.dequantize(data, qtype, codes.shape)
    np.testing.assert_allclose(
        first + step * code_values(qtype)[codes], decoded, atol=2e-6
    )  # the decoder rounds elsewhere
    counts = quants.code_histogram(data, qtype)
    by_value = np.argsort(code_values(qtype), kind="stable")
    np.testing.assert_array_equal(np.bincount(codes.ravel(), minlength=len(counts))[by_value], counts)


@pytest.mark.parametrize("qtype", CODES)
def test_put_is_the_inverse_of_take(qtype, rng):
    blocks = rng.integers(0, 256, (5, quants.block_bytes(qtype)), np.uint8)
    for place in CODES[qtype]:
        again = blocks.copy()
        again[:, place.start : place.stop] = 0
        put(place, again, take(place, blocks))
        np.testing.assert_array_equal(again, blocks)


@pytest.mark.parametrize("function", [quants.codes, quants.grid, quants.code_histogram])
def test_bad_input(function):
    with pytest.raises(ValueError, match="qtype='Q8_K', has no table of codes. Choose one of Q4_0, "):
        function(np.zeros(292, np.uint8), "Q8_K")
    with pytest.raises(ValueError, match="data: 143 of uint8, must be whole Q4_K blocks of 144 uint8. Check"):
        function(np.zeros(143, np.uint8), "Q4_K")
