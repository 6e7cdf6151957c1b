"""Feedback and descent on every grid: what they say they lower is lower."""

import numpy as np
import pytest
from numba import get_num_threads, set_num_threads

from quantlab import quants
from quantlab.evaluate.engine.workers import Workers
from quantlab.evaluate.refine_rows import refine_rows
from quantlab.evaluate.second_moments import Factor
from quantlab.quants.block_numbers import GRIDS, pack, unpack
from quantlab.quants.feedback import descend, feed_back
from quantlab.quants.ggml_types import GGML_TYPES
from quantlab.quants.grids import point_levels
from quantlab.quants.points import choose, new_block

ENCODED = [qtype for qtype in GRIDS if GGML_TYPES[qtype].can_encode]
N = 256
EQUAL = np.ones(N, np.float32)  # some types are not encoded without weights


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
    blocks, grid, cost = unpack(quants.quantize(w, qtype, EQUAL), qtype), GRIDS[qtype], np.empty(32, np.float32)
    before = errors_of(blocks.values(), w, h)
    with Workers() as workers:
        moves, weight = Factor(h, workers).feedback(slice(0, N))
    within = np.ascontiguousarray(moves.T).reshape(-1)
    sizes = (grid.super_block, grid.sub_block)
    known = grid.levels, grid.edges, grid.points
    feed_back(w.reshape(-1), w.reshape(-1), within, weight, *known, *sizes, *flat(blocks), cost)
    after = errors_of(blocks.values(), w, h)
    assert np.allclose(cost, after, rtol=1e-3, atol=1e-9)
    assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("qtype", ENCODED)
def test_no_sweep_raises_the_error_of_a_row(qtype, h, rng):
    w = (rng.standard_normal((32, N)) / 20).astype(np.float32)
    w[1], w[2, 5], w[3] = 0, 3, 0.01
    blocks, grid = unpack(quants.quantize(w, qtype, EQUAL), qtype), GRIDS[qtype]
    ranges = [np.float32(x) for x in (*grid.sc_range, grid.m_range[1])]
    for _ in range(3):
        values, change = blocks.values(), np.empty((32, N), np.float32)
        before = errors_of(values, w, h)
        gradient = ((values - w) @ h).reshape(-1)
        descend(
            N, h.reshape(-1), gradient, grid.levels, grid.edges, grid.points, grid.super_block, grid.sub_block,
            *ranges, *flat(blocks), change.reshape(-1),
        )  # fmt: skip
        after = errors_of(blocks.values(), w, h)
        assert (after <= before * (1 + 1e-4) + 1e-9).all()
        assert np.allclose(values + change, blocks.values(), atol=1e-5)
        assert np.array_equal(quants.dequantize(pack(blocks), qtype, w.shape), blocks.values())
    ordinary = quants.dequantize(quants.quantize(w, qtype, EQUAL), qtype, w.shape)
    assert after.sum() < 0.9 * errors_of(ordinary, w, h).sum()


@pytest.mark.parametrize("qtype", ["Q2_K", "Q3_K", "Q4_0", "IQ2_XXS", "IQ3_S"])
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


@pytest.mark.parametrize("qtype", ["IQ2_S", "IQ3_XXS"])
def test_one_thread_chooses_the_same_bytes(qtype, h, rng):
    w, found, before = (rng.standard_normal((150, N)) / 20).astype(np.float32), [], get_num_threads()
    try:
        for n_threads in (before, 1):
            set_num_threads(n_threads)
            with Workers() as workers:
                found.append(refine_rows(w, h, Factor(h, workers), qtype, workers, sweeps=1))
    finally:
        set_num_threads(before)
    assert np.array_equal(*found)


def made_block(grid, rng):
    """Eight columns of 16 rows with a made form."""
    block, levels = new_block(grid.points), grid.levels
    factor = np.tril(rng.standard_normal((8, 8)) / 3, -1) + np.eye(8)
    block.factor[:], block.weight[:] = factor.reshape(-1), rng.uniform(0.5, 2, 8)
    block.z[:] = rng.standard_normal(128) * levels[-1] / 2
    block.sign[:] = np.where(block.z < 0, -1, 1)
    return block


@pytest.mark.parametrize("qtype", ["IQ2_XS", "IQ3_S"])
def test_of_all_points_the_best_is_chosen(qtype, rng):
    grid = GRIDS[qtype]
    block, n = made_block(grid, rng), grid.points.weights
    choose(block, grid.points, grid.levels, False)
    z, sign, q = (part.reshape(8, 16)[:n].astype(np.float64) for part in (block.z, block.sign, block.q))
    values = grid.levels[len(grid.levels) // 2 + point_levels(qtype)].astype(np.float64)
    factor = block.factor.reshape(8, 8)[:n, :n].astype(np.float64)

    def cost(values):
        return np.einsum("i,i...->...", block.weight[:n], np.einsum("ij,j...->i...", factor, values) ** 2)

    best = cost(values.T[:, :, None] * sign[:, None] - z[:, None]).min(axis=0)
    assert np.allclose(cost(q - z), best, rtol=1e-4)


@pytest.mark.parametrize("qtype", ["IQ2_XXS", "IQ3_XXS", "IQ2_S"])
def test_free_signs_cost_less_and_bound_ones_are_even(qtype, rng):
    grid = GRIDS[qtype]
    block = made_block(grid, rng)
    block.sign[:] = 1
    choose(block, grid.points, grid.levels, False)
    without = cost_of_lanes(block)
    choose(block, grid.points, grid.levels, True)
    minus = (block.code.reshape(8, 16) < len(grid.levels) // 2).sum(axis=0)
    assert np.array_equal(block.q, grid.levels[block.code.astype(int)])
    assert (minus % 2 == 0).all() == grid.points.even
    assert cost_of_lanes(block).sum() < 0.5 * without.sum()


def cost_of_lanes(block):
    """The error of the values chosen, by the definition."""
    e = (block.q - block.z).reshape(8, 16)
    return block.weight @ (block.factor.reshape(8, 8) @ e) ** 2
