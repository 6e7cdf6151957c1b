"""The lane-wise searches find what the oracle's scalar ones find, in every lane."""

import naive
import numpy as np
import pytest
import rows

from quantlab.quants import search

KINDS = [*rows.kinds(256)]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy scalars overflow where C is silent


@pytest.fixture(params=[slice(0, 16), slice(4, 20)], ids=["first kinds", "last kinds"])
def x(request):
    """16 rows of 256 weights, each of another kind."""
    return rows.every_kind(256)[request.param]


@pytest.fixture(params=["ones", "squares", "half zeros", "one-hot"])
def w(request):
    return np.tile(rows.importances(256)[request.param], (16, 1))


def columns(blocks):
    """Blocks (16, n) side by side, as the searches want them."""
    return np.ascontiguousarray(blocks.T).reshape(-1)


def field(array, at, block=0):
    return array[at + 16 * block : at + 16 * block + 16]


def room():
    return np.full(search.FOUND, np.nan, np.float32)


def assert_same(found, expected):
    np.testing.assert_array_equal(np.float32(found), np.float32(expected))  # NaN equals NaN, 0 equals -0


def levels_of(levels, block, n, lane):
    return levels[16 * n * block : 16 * n * (block + 1)][lane::16].tolist()


@pytest.mark.parametrize(
    "n, nmax, rmin, rdelta, nstep, use_mad",
    [(32, 15, -1, 0.1, 20, False), (32, 31, -0.9, 0.05, 36, False), (16, 3, -0.5, 0.1, 15, True)],
)
def test_make_qkx_quants(x, w, n, nmax, rmin, rdelta, nstep, use_mad):
    found, levels = room(), np.empty(256 * 16, np.uint8)
    f = np.float32
    search.make_qkx_quants(columns(x), columns(w), levels, found, n, nmax, f(rmin), f(rdelta), nstep, use_mad)
    for block in range(2):
        part = slice(n * block, n * (block + 1))
        for lane in range(16):
            scale, best, minimum = naive.make_qkx_quants(
                nmax, x[lane, part], w[lane, part], rmin, rdelta, nstep, use_mad
            )
            assert_same(field(found, search.SCALE, block)[lane], scale)
            assert_same(-field(found, search.LOW, block)[lane], minimum)
            assert levels_of(levels, block, n, lane) == best


@pytest.mark.parametrize("n, nmax", [(16, 4), (16, 32), (32, 8)])
def test_make_qx_quants(x, w, n, nmax):
    out, levels = np.empty(16, np.float32), np.empty(256 * 16, np.uint8)
    scale_of_second_block(columns(x), columns(w), levels, room(), n, nmax, out)
    part = slice(n, 2 * n)
    for lane in range(16):
        scale, best = naive.make_qx_quants(nmax, x[lane, part], w[lane, part])
        assert_same(out[lane], scale)
        assert levels_of(levels, 1, n, lane) == best


@search.kernel
def scale_of_second_block(x, w, levels, found, n, nmax, out):
    search.store(out, 0, search.make_qx_quants(x, 16 * n, w, found, levels, n, nmax))


def test_make_q3_quants(x):
    found, levels = room(), np.empty(256 * 16, np.uint8)
    search.make_q3_quants(columns(x), columns(x * x), found, levels, 4)
    for block in range(0, 16, 3):
        for lane in range(16):
            scale, best = naive.make_q3_quants(4, x[lane, 16 * block : 16 * block + 16])
            assert_same(field(found, search.SCALE, block)[lane], scale)
            assert levels_of(levels, block, 16, lane) == best


@pytest.mark.parametrize("n, nmax", [(16, 15), (8, 63)])
def test_make_qp_quants(x, w, n, nmax):
    scales = np.ascontiguousarray(x[:, :n])  # negative ones, too: a search for a scale may end there
    weights = np.ascontiguousarray(w[:, 90 : 90 + n])
    out, levels = np.empty(16, np.float32), np.empty(16 * n, np.uint8)
    scale_of_scales(columns(scales), columns(weights), levels, n, nmax, out)
    for lane in range(16):
        scale, best = naive.make_qp_quants(nmax, scales[lane], weights[lane])
        assert_same(out[lane], scale)
        assert levels_of(levels, 0, n, lane) == best


@search.kernel
def scale_of_scales(x, w, levels, n, nmax, out):
    search.store(out, 0, search.make_qp_quants(x, w, levels, n, nmax))
