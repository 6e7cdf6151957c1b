"""The product over panels: against NumPy, at every kind of edge, and the same however it is cut."""

import numpy as np
import pytest

from quantlab.evaluate.engine.tiles import BLAS, COLUMNS, DEPTH, ROWS, fill_panels, multiply, n_panels


def in_panels(weight):
    panels = np.full((n_panels(len(weight)), weight.shape[1], COLUMNS), np.nan, np.float32)
    fill_panels(weight, panels, 0)
    return panels


def product(x, weight):
    out = np.full((len(x), len(weight)), np.nan, np.float32)
    multiply(x, in_panels(weight), out)
    return out


@pytest.mark.parametrize("nrows", [1, ROWS - 1, ROWS, 5 * ROWS + 2])
@pytest.mark.parametrize("n_out", [1, COLUMNS, 3 * COLUMNS + 5])
@pytest.mark.parametrize("n_in", [1, 96, DEPTH, 2 * DEPTH + 33])
def test_products_are_numpys(rng, nrows, n_out, n_in):
    x, weight = rng.standard_normal((nrows, n_in), np.float32), rng.standard_normal((n_out, n_in), np.float32)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    largest = np.abs(x).astype(np.float64) @ np.abs(weight).T  # what rounding errors are in proportion to
    assert (np.abs(product(x, weight) - exact) <= 1e-5 * largest).all()


def test_rows_do_not_depend_on_how_many_there_are(rng):
    x, weight = rng.standard_normal((50, 700), np.float32), rng.standard_normal((130, 700), np.float32)
    whole = product(x, weight)
    pieces = [product(x[rows], weight) for rows in (slice(0, 1), slice(1, 32), slice(32, 50))]
    np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=1e-5 if BLAS else 0, atol=1e-4 if BLAS else 0)


def test_weights_come_in_any_float_type_and_in_pieces(rng):
    weight = rng.standard_normal((100, 40)).astype(np.float16)
    panels = in_panels(weight)
    again = np.full_like(panels, np.nan)
    for start in (0, 30, 64):
        fill_panels(weight[start : start + 64], again, start)
    np.testing.assert_array_equal(panels, again)
    assert panels[0, 3, 7] == weight[7, 3]


def test_x_and_out_may_be_parts_of_wider_arrays(rng):
    x, weight = rng.standard_normal((20, 300), np.float32), rng.standard_normal((70, 100), np.float32)
    out = np.zeros((20, 200), np.float32)
    multiply(x[:, 50:150], in_panels(weight), out[:, 30:100])
    np.testing.assert_allclose(out[:, 30:100], x[:, 50:150] @ weight.T, rtol=1e-4, atol=1e-4)
    assert not out[:, :30].any() and not out[:, 100:].any()
