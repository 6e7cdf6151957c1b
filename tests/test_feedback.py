"""Feedback and descent on every grid: what they say they lower is lower."""

import numpy as np
import pytest

from quantlab import quants
from quantlab.evaluate.engine.workers import Workers
from quantlab.evaluate.refine_rows import refine_rows
from quantlab.evaluate.second_moments import Factor
from quantlab.quants.block_numbers import GRIDS, pack, unpack
from quantlab.quants.feedback import descend, feed_back
from quantlab.quants.ggml_types import GGML_TYPES

ENCODED = [qtype for qtype in GRIDS if GGML_TYPES[qtype].can_encode]
N = 256


@pytest.fixture(scope="module")
def h():
    """Damped moments of correlated inputs."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1000, N)) @ (rng.standard_normal((N, N)) / 16 + np.eye(N))
    h = (x.T @ x / 1000).astype(np.float32)
    h[np.diag_indices(N)] *= 1.05
    return h


def errors_of(values, wanted, h):
    e = values.astype(np.float64) - wanted
    return np.einsum("ij,jk,ik->i", e, h.astype(np.float64), e)


def flat(blocks):
    return [part.reshape(-1) for part in blocks.parts]


@pytest.mark.parametrize("qtype", ENCODED)
def test_feedback_costs_what_it_says_and_less_than_rounding(qtype, h, rng):
    w = (rng.standard_normal((32, N)) / 20).astype(np.float32)
    w[1], w[2, 5], w[3] = 0, 3, 0.01  # zeros, an outlier, a constant
    blocks, grid, cost = unpack(quants.quantize(w, qtype), qtype), GRIDS[qtype], np.empty(32, np.float32)
    before = errors_of(blocks.values(), w, h)
    with Workers() as workers:
        moves, weight = Factor(h, workers).feedback(slice(0, N))
    within = np.ascontiguousarray(moves.T).reshape(-1)
    sizes = (grid.super_block, grid.sub_block)
    feed_back(w.reshape(-1), w.reshape(-1), within, weight, grid.levels, grid.edges, *sizes, *flat(blocks), cost)
    after = errors_of(blocks.values(), w, h)
    assert np.allclose(cost, after, rtol=1e-3, atol=1e-9)
    assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("qtype", ENCODED)
def test_no_sweep_raises_the_error_of_a_row(qtype, h, rng):
    w = (rng.standard_normal((32, N)) / 20).astype(np.float32)
    w[1], w[2, 5], w[3] = 0, 3, 0.01
    blocks, grid = unpack(quants.quantize(w, qtype), qtype), GRIDS[qtype]
    ranges = [np.float32(x) for x in (*grid.sc_range, grid.m_range[1])]
    for _ in range(3):
        values, change = blocks.values(), np.empty((32, N), np.float32)
        before = errors_of(values, w, h)
        gradient = ((values - w) @ h).reshape(-1)
        descend(
            N, h.reshape(-1), gradient, grid.levels, grid.edges, grid.super_block, grid.sub_block, *ranges,
            *flat(blocks), change.reshape(-1),
        )  # fmt: skip
        after = errors_of(blocks.values(), w, h)
        assert (after <= before * (1 + 1e-4) + 1e-9).all()
        assert np.allclose(values + change, blocks.values(), atol=1e-5)
        assert np.array_equal(quants.dequantize(pack(blocks), qtype, w.shape), blocks.values())
    assert after.sum() < 0.9 * errors_of(quants.roundtrip(w, qtype), w, h).sum()


@pytest.mark.parametrize("qtype", ["Q2_K", "Q3_K", "Q4_0"])
def test_a_row_is_what_it_is_among_others(qtype, h, rng):
    w = (rng.standard_normal((19, N)) / 20).astype(np.float32)
    with Workers() as workers:
        factor = Factor(h, workers)
        whole = refine_rows(w, h, factor, qtype, workers)
        alone = refine_rows(w[7:8], h, factor, qtype, workers)
    assert whole.shape == (19, quants.row_bytes(qtype, N))
    assert np.array_equal(whole[7:8], alone)


def test_outputs_are_not_shrunk(h, rng):
    """At two bits, least errors alone would shrink the outputs by several percent."""
    w = (rng.standard_normal((64, N)) / 20).astype(np.float32)
    with Workers() as workers:
        values = quants.dequantize(refine_rows(w, h, Factor(h, workers), "Q2_K", workers), "Q2_K", w.shape)
    kept = np.einsum("ij,jk,ik->i", w, h, values) / np.einsum("ij,jk,ik->i", w, h, w)
    assert np.allclose(kept, 1, atol=2e-3)
