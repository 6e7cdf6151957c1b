"""Second moments of a layer's inputs, and the linear algebra on them, with every sum in a fixed order.

    H = E[x̂ x̂ᵀ]   n × n, over the tokens of a text      H = V Vᵀ with V upper triangular

All large products go through the evaluator's own, which gives the same bits on any number of threads; only blocks of
256 × 256 are left to LAPACK, which runs on one thread here. Where the moments are a tensor on a graphics card, the
products are computed there.
"""

from typing import Any

import numpy as np

from quantlab.evaluate.engine.tiles import COLUMNS, DEPTH, multiply, n_panels, pack
from quantlab.evaluate.engine.workers import Workers, blocks
from quantlab.quants.compiled import njit
from quantlab.quants.feedback import SPAN

ROWS = 192  # rows of a product that a thread takes at a time
STRIP = 1024  # rows of the moments, or of weights, that are copied at a time
RIDGE = 1e-4  # least damping, of the mean of the diagonal


def own(x: np.ndarray, like) -> Any:
    """Return an array where another one is: on its device, if that is a tensor."""
    return x if isinstance(like, np.ndarray) else like.new_tensor(x)


def host(x) -> np.ndarray:
    """Return an array or a tensor in the machine's memory."""
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


def zeros(shape: tuple[int, ...], like) -> Any:
    """Return float32 zeros where another array is."""
    return np.zeros(shape, np.float32) if isinstance(like, np.ndarray) else like.new_zeros(shape)


def product(x, weight, workers: Workers) -> Any:
    """Return x · weightᵀ.

    Parameters
    ----------
    x : np.ndarray [shape=(nrows, n_in), dtype=float32, rows contiguous]
    weight : np.ndarray [shape=(n_out, n_in), dtype=float32]
    workers : Workers

    Returns
    -------
    np.ndarray [shape=(nrows, n_out), dtype=float32]
        Of tensors, a tensor.
    """
    if not isinstance(x, np.ndarray):
        return x @ weight.T
    out = np.empty((len(x), len(weight)), np.float32)
    if x.shape[1] == 0:
        out[:] = 0
        return out
    for some in blocks(len(weight), STRIP):
        mine, part = weight[some], out[:, some]
        panels = np.empty((n_panels(len(mine)), x.shape[1], COLUMNS), np.float32)

        def put(rows: slice, mine=mine, panels=panels) -> None:
            pack(mine[rows], panels, rows.start)

        workers.map(put, blocks(len(mine), COLUMNS))
        workers.map(lambda rows, panels=panels, part=part: multiply(x[rows], panels, part[rows]), blocks(len(x), ROWS))
    return out


def accumulate(
    total: np.ndarray, a: np.ndarray, b: np.ndarray, workers: Workers, minus: np.ndarray | None = None
) -> None:
    """Add Σ a[t, i] · b[t, j] over tokens t to ``total[i, j]``; if `b` is `a`, above the diagonal alone.

    Parameters
    ----------
    total : np.ndarray [shape=(n_a, n_b), dtype=float32]
    a, b : np.ndarray [shape=(n_tokens, n_a) and (n_tokens, n_b), dtype=float32]
    workers : Workers
    minus : np.ndarray [shape=(n_tokens, n_b), dtype=float32], optional
        What is taken off `b` first.
    """
    depth = min(DEPTH, len(a))
    turned = np.empty((a.shape[1], depth), np.float32)
    panels = np.empty((n_panels(b.shape[1]), depth, COLUMNS), np.float32)
    for tokens in blocks(len(a), depth):
        x, y, n = a[tokens], b[tokens], tokens.stop - tokens.start

        def put(part: slice, y=y, n=n, tokens=tokens) -> None:
            values = y[:, part] if minus is None else y[:, part] - minus[tokens, part]
            panels[part.start // COLUMNS, :n, : values.shape[1]] = values

        def add(rows: slice, n=n) -> None:
            first = rows.start // COLUMNS if b is a else 0
            found = workers.scratch("moments", rows.stop - rows.start, len(total[0]) - first * COLUMNS)
            multiply(turned[rows, :n], panels[first:, :n], found)
            total[rows, first * COLUMNS :] += found

        workers.map(lambda part, x=x: turn(x[:, part], turned[part]), blocks(a.shape[1], COLUMNS))
        workers.map(put, blocks(b.shape[1], COLUMNS))
        workers.map(add, blocks(a.shape[1], ROWS))


@njit(nogil=True, cache=True)
def turn(x, out):
    """Write x[t, c] to out[c, t], a cache line of each row of `out` at a time."""
    for start in range(0, x.shape[0], 16):
        for c in range(x.shape[1]):
            for t in range(start, min(start + 16, x.shape[0])):
                out[c, t] = x[t, c]


def mirror(total: np.ndarray) -> None:
    """Copy the upper triangle that `accumulate` filled to the lower one."""
    for rows in blocks(len(total), STRIP):
        total[rows, : rows.start] = total[: rows.start, rows].T
        corner = total[rows, rows]
        corner[:] = np.triu(corner) + np.triu(corner, 1).T


def damped_moments(inputs: np.ndarray, damping: float, workers: Workers) -> np.ndarray:
    """Return the second moments of inputs, a share of their diagonal added to it.

    Parameters
    ----------
    inputs : np.ndarray [shape=(n_tokens, n), dtype=float32]
    damping : float
        The share.
    workers : Workers

    Returns
    -------
    np.ndarray [shape=(n, n), dtype=float32, symmetric]
    """
    n = inputs.shape[1]
    h = np.zeros((n, n), np.float32)
    accumulate(h, inputs, inputs, workers)
    mirror(h)
    h /= len(inputs)
    damp(h, damping)
    return h


def damp(h, damping: float) -> Any:
    """Add a share of its diagonal to second moments, in place; return what was added [shape=(n,), dtype=float32]."""
    diagonal = host(h.diagonal())
    with np.errstate(over="ignore", invalid="ignore"):  # the caller checks for infinite inputs
        added = own(damping * diagonal + RIDGE * (diagonal.mean() or 1), h)
        h.reshape(-1)[:: len(h) + 1] += added
    return added


class Factor:
    """The upper triangular V of H = V Vᵀ.

    Parameters
    ----------
    h : np.ndarray [shape=(n, n), dtype=float32, symmetric]
        Or a tensor; what the methods take and return then are tensors, too.
    workers : Workers

    Raises
    ------
    ValueError
        If `h` is not positive definite.
    """

    def __init__(self, h, workers: Workers):
        self._workers, self.v = workers, zeros(h.shape, h)
        self._inverses = {}  # span's start -> inverse of its diagonal block
        for span in reversed(blocks(len(h), SPAN)):
            rest = h[: span.stop, span] - product(self.v[: span.stop, span.stop :], self.v[span, span.stop :], workers)
            corner = host(rest[span]).astype(np.float64)
            try:
                corner = np.linalg.cholesky(corner[::-1, ::-1])[::-1, ::-1]
            except np.linalg.LinAlgError:
                raise ValueError(
                    "second moments: must be positive definite. Raise the damping or give more text."
                ) from None
            self._inverses[span.start] = own(np.linalg.inv(corner).astype(np.float32), h)
            self.v[span, span] = own(corner.astype(np.float32), h)
            self.v[: span.start, span] = product(rest[: span.start], self._inverses[span.start], workers)

    def solve(self, x) -> Any:
        """Return x H⁻¹.

        Parameters
        ----------
        x : np.ndarray [shape=(nrows, n), dtype=float32]
        """
        x, v, workers = x.copy() if isinstance(x, np.ndarray) else x.clone(), self.v, self._workers
        for span in reversed(blocks(len(v), SPAN)):
            rest = x[:, span] - product(x[:, span.stop :], v[span, span.stop :], workers)
            x[:, span] = product(rest, self._inverses[span.start], workers)
        for span in blocks(len(v), SPAN):
            rest = x[:, span] - product(x[:, : span.start], v[: span.start, span].T, workers)
            x[:, span] = product(rest, self._inverses[span.start].T, workers)
        return x

    def feedback(self, span: slice) -> tuple[Any, Any]:
        """Return the feedback of errors of all columns up to a span's end, and the cost of its own errors.

        Returns
        -------
        factor : np.ndarray [shape=(span.stop, n_span), dtype=float32]
            Below and on the diagonal of the span's own rows without meaning.
        weight : np.ndarray [shape=(n_span,), dtype=float32]
        """
        diagonal = self.v.diagonal()[span]
        return self.v[: span.stop, span] / diagonal, diagonal**2
