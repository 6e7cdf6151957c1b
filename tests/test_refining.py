"""What the notebook on refining takes from the package: a layer's inputs, and one matrix refined for them."""

import numpy as np
import pytest

import quantlab as ql
from quantlab.lab.refining import layer_inputs, refined

NAME = "blk.1.ffn_down.weight"


def test_inputs_have_the_mean_squares_of_the_importance_matrix():
    inputs = layer_inputs("tiny", NAME, chunks=1)
    matrix = ql.imatrix("tiny", "sampled", chunks=1, progress=False)
    assert inputs.shape == (512, 512)
    np.testing.assert_allclose((inputs.astype(np.float64) ** 2).sum(axis=0), matrix.sums[NAME][0], rtol=1e-4)


def test_refined_weights_change_the_outputs_less():
    inputs, weights = layer_inputs("tiny", NAME, chunks=2), ql.open("tiny").tensor(NAME).floats()
    ways = [ql.quants.roundtrip(weights, "Q3_K"), *(refined(weights, inputs, "Q3_K", sweeps=n) for n in (0, 1))]
    ordinary, fed_back, swept = (np.square(inputs @ (way - weights).T).mean() for way in ways)
    assert swept < fed_back < 0.9 * ordinary


def test_what_is_no_matrix_of_a_layer_is_refused():
    with pytest.raises(ValueError, match=r"output.weight: must be the matrix of a layer, such as"):
        layer_inputs("tiny", "output.weight", chunks=1)
