"""Refinement of one matrix: codes and scales that lower ``tr(E H Eᵀ)``, in independent rows.

target ─ span by span: moved by earlier errors, scales searched, codes by feedback ─ sweeps of descent ─ rescale ─ bytes
"""

import numpy as np

from quantlab import quants
from quantlab.evaluate.engine.workers import Workers, blocks
from quantlab.evaluate.second_moments import Factor, host, own, product, zeros
from quantlab.quants.block_numbers import GRIDS, Blocks, pack, unpack
from quantlab.quants.feedback import SPAN, descend, feed_back

ROWS = 64  # rows that a thread takes at a time; a multiple of the 16 lanes


def refine_rows(target: np.ndarray, h, factor: Factor, qtype: str, workers: Workers, *, sweeps: int = 2) -> np.ndarray:
    """Encode rows of weights so that the layer's outputs are nearest to those of `target`.

    Parameters
    ----------
    target : np.ndarray [shape=(nrows, n), dtype=float32]
        The weights wanted.
    h : np.ndarray [shape=(n, n), dtype=float32]
        Second moments of the inputs, damped; or a tensor on the card that is to compute the products.
    factor : Factor
        Of `h`.
    qtype : str
        One of `quants.block_numbers.GRIDS`.
    workers : Workers
    sweeps : int
        How often codes and scales are gone through after the feedback.

    Returns
    -------
    np.ndarray [shape=(nrows, row_bytes), dtype=uint8]
    """
    nrows = len(target)
    target = np.pad(target, ((0, -nrows % 16), (0, 0)))  # kernels take 16 rows at a time
    chosen = _feed_back(target, factor, qtype, workers)
    if sweeps:
        gradient = product(own(chosen.values() - target, h), h, workers)
        for _ in range(sweeps):
            _sweep(chosen, gradient, h, workers)
    _rescale(chosen, target, h, workers)
    return pack(chosen)[:nrows]


def _feed_back(target: np.ndarray, factor: Factor, qtype: str, workers: Workers) -> Blocks:
    """Choose scales and codes span by span; each row keeps the better of two searches for scales."""
    grid, n, spans = GRIDS[qtype], target.shape[1], []
    error = zeros(target.shape, factor.v)
    for span in blocks(n, SPAN):
        moves, weight = factor.feedback(span)
        moved = target[:, span] + host(product(error[:, : span.start], moves[: span.start].T, workers))
        within, weight = np.ascontiguousarray(host(moves[span.start :]).T), host(weight)
        tried = []
        equal = None if grid.points.weights == 1 else np.ones_like(weight)  # IQ2 has no search without weights
        for importance in (equal, weight):
            blocks_ = unpack(quants.quantize(moved, qtype, importance), qtype)
            cost = _round(target[:, span], moved, within, weight, blocks_, workers)
            tried.append((blocks_, cost))
        (plain, cost), (weighted, other) = tried
        better = other < cost
        for part, new in zip(plain.parts, weighted.parts, strict=True):
            part[better] = new[better]
        error[:, span] = own(target[:, span] - plain.values(), error)
        spans.append(plain)
    return Blocks(grid, *(np.concatenate(parts, axis=1) for parts in zip(*(s.parts for s in spans), strict=True)))


def _round(wanted, moved, within, weight, chosen: Blocks, workers: Workers) -> np.ndarray:
    """Rewrite the codes of a span by feedback; return the cost of each row's errors."""
    grid, cost = chosen.grid, np.empty(len(wanted), np.float32)

    def work(rows: slice) -> None:
        parts = [np.ascontiguousarray(part[rows]) for part in (wanted, moved)]
        feed_back(
            *(part.reshape(-1) for part in parts), within.reshape(-1), weight, grid.levels, grid.edges,
            grid.points, grid.super_block, grid.sub_block,
            *(part[rows].reshape(-1) for part in chosen.parts), cost[rows],
        )  # fmt: skip

    workers.map(work, blocks(len(wanted), ROWS))
    return cost


def _sweep(chosen: Blocks, gradient, h, workers: Workers) -> None:
    """Sweep once over all spans, keeping `gradient` [shape=(nrows, n)] equal to (values - target) H."""
    grid, n = chosen.grid, gradient.shape[1]
    ranges = [np.float32(x) for x in (*grid.sc_range, grid.m_range[1])]
    for span in blocks(n, SPAN):
        moments, before = np.ascontiguousarray(host(h[span, span])).reshape(-1), host(gradient[:, span])
        width = span.stop - span.start
        change = np.empty((len(gradient), width), np.float32)
        sizes = (grid.super_block, grid.super_block, grid.sub_block, grid.sub_block, 1)

        def work(rows: slice) -> None:
            g = np.ascontiguousarray(before[rows])  # noqa: B023
            views = [
                part[rows, span.start // size : span.stop // size]  # noqa: B023
                for part, size in zip(chosen.parts, sizes, strict=True)  # noqa: B023
            ]
            parts = [np.ascontiguousarray(view) for view in views]
            descend(
                width, moments, g.reshape(-1), grid.levels, grid.edges, grid.points,  # noqa: B023
                grid.super_block, grid.sub_block, *ranges,
                *(part.reshape(-1) for part in parts), change[rows].reshape(-1),  # noqa: B023
            )  # fmt: skip
            for view, part in zip(views, parts, strict=True):
                view[:] = part

        workers.map(work, blocks(len(gradient), ROWS))
        if change.any():
            gradient += product(own(change, h), h[:, span], workers)


def _rescale(chosen: Blocks, target: np.ndarray, h, workers: Workers) -> None:
    """Scale each row so that its outputs are not shrunk: w H ŵᵀ = w H wᵀ."""
    wanted = host(product(own(target, h), h, workers))
    whole = np.einsum("ij,ij->i", wanted, target, dtype=np.float64)
    kept = np.einsum("ij,ij->i", wanted, chosen.values(), dtype=np.float64)
    factor = np.where(kept > 0.5 * whole, whole / np.where(kept > 0, kept, 1), 1)[:, None]
    for part in (chosen.d, chosen.dmin):
        scaled = (part * factor).astype(np.float16).astype(np.float32)
        part[:] = np.where(np.isfinite(scaled), scaled, part)
