"""Oracle of `ggml_products`: the same products from integers in float32, which are slow and plainer to read."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit

from quantlab import quants
from quantlab.evaluate.engine.ggml_activations import half, round_bf16, round_f16
from quantlab.evaluate.engine.ggml_products import ORDERS, Order, read_scales, with_scales
from quantlab.evaluate.engine.ggml_steps import fma

_ZERO, _ONE, _127 = np.float32(0), np.float32(1), np.float32(127)


class Blocks:
    """Activations rounded to blocks of 8-bit integers.

    Parameters
    ----------
    x : np.ndarray [shape=(nrows, n_per_row), dtype=float32]
    qtype : str
        `Q8_0`, `Q8_1` or `Q8_K`.
    workers : Workers
        For scratch space.

    Attributes
    ----------
    qtype : str
    codes : np.ndarray [shape=(nrows, n_per_row), dtype=float32]
        Integers -127 … 127.
    d : np.ndarray [shape=(nrows, blocks of a row), dtype=float32]
        Scale of each block.
    sums : np.ndarray [shape=(nrows, n_per_row // 32 or, of Q8_K, // 16), dtype=float32]
        Of Q8_1 scale times sum of a block's codes, in float16; of Q8_K the sums of every 16 codes.
    """

    def __init__(self, x: np.ndarray, qtype: str, workers):
        self.qtype = qtype
        block, step, round_ = (256, 16, _round_q8_k) if qtype == "Q8_K" else (32, 32, _round_q8_0)
        self.codes = workers.scratch("codes", *x.shape)
        self.d = workers.scratch("d", len(x), x.shape[1] // block)
        self.sums = workers.scratch("sums", len(x), x.shape[1] // step)
        round_(x, self.codes, self.d, self.sums)

    def floats(self) -> np.ndarray:
        """Return the numbers that the blocks hold [like `codes`], in place of the codes."""
        blocks = self.codes.reshape(*self.d.shape, -1)
        blocks *= self.d[..., None]
        return self.codes


@njit(nogil=True, cache=True)
def _round_q8_0(x, codes, d, sums):
    """Blocks of 32 with a float16 scale; Q8_1's are the same, but for the sums."""
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // 32):
            row, code = x[r, 32 * b : 32 * b + 32], codes[r, 32 * b : 32 * b + 32]
            top, total = _ZERO, _ZERO
            for i in range(32):
                top = max(top, abs(row[i]))
            inverse = _127 / top if top > _ZERO else _ZERO
            for i in range(32):
                code[i] = np.rint(row[i] * inverse)
                total += code[i]
            d[r, b] = half(top / _127)
            sums[r, b] = half(np.float32(top / _127) * total)


@njit(nogil=True, cache=True)
def _round_q8_k(x, codes, d, sums):
    """Super-blocks of 256 with a float32 scale; the number of greatest magnitude becomes -127."""
    for r in range(x.shape[0]):
        for b in range(x.shape[1] // 256):
            row, code = x[r, 256 * b : 256 * b + 256], codes[r, 256 * b : 256 * b + 256]
            top, highest = _ZERO, _ZERO
            for i in range(256):
                top = max(top, abs(row[i]))
                highest = max(highest, row[i])
            inverse = _ZERO
            if top > _ZERO:
                inverse = -_127 / top if highest == top else _127 / top
            d[r, b] = _ONE / inverse if top > _ZERO else _ZERO
            for i in range(256):
                code[i] = min(_127, np.rint(row[i] * inverse))
            for j in range(16):
                total = _ZERO
                for i in range(16 * j, 16 * j + 16):
                    total += code[i]
                sums[r, 16 * b + j] = total


PANEL = 64  # rows of weights that stand side by side for `_sum_in_lanes`
_ROWS = 128  # rows of activations that `_sum_groups` takes at a time
_PACKED_AT_ONCE = 1024  # rows of weights
_NONE = np.empty((0, 0), np.float32)


@dataclass(frozen=True)
class Packed:
    """A weight matrix taken apart into integers and scales.

    Attributes
    ----------
    qtype : str
    n_out : int
        Its rows.
    codes : np.ndarray [shape=(n_in, n_out), with several lanes (panels, n_in, PANEL), dtype=float32]
        Integers: the codes, of k-quants times the scales of their sub-blocks. Where no order is kept: the weights.
    d : np.ndarray [shape=(blocks of a row, n_out), dtype=float32]
        Scale of each block.
    dmin : np.ndarray [like d, or empty]
        Scale of the minima; of Q4_1 and Q5_1 the minima.
    mins : np.ndarray [shape=(n_in // 16, n_out) or empty, dtype=float32]
        Integer minimum of every 16 columns.
    """

    qtype: str
    n_out: int
    codes: np.ndarray
    d: np.ndarray
    dmin: np.ndarray
    mins: np.ndarray


def pack(stored: np.ndarray, qtype: str, shape: tuple[int, int]) -> Packed:
    """Take a weight matrix apart.

    Parameters
    ----------
    stored : np.ndarray
        As `LazyTensor.load` and `quants.quantize` give it.
    qtype : str
    shape : tuple of int
        (n_out, n_in).
    """
    (n_out, n_in), order = shape, ORDERS[qtype]
    if not order.group:
        floats = quants.dequantize(stored, qtype, shape) if stored.dtype == np.uint8 else stored.astype(np.float32)
        return Packed(qtype, n_out, floats.T, _NONE, _NONE, _NONE)
    blocks = stored.reshape(n_out, -1, quants.block_bytes(qtype))
    d, *dmin = (scales.T.copy() for scales in read_scales(blocks, qtype))
    panelled, with_mins = order.lanes > 1, bool(dmin) and order.activations == "Q8_K"
    codes = np.zeros((-(-n_out // PANEL), n_in, PANEL) if panelled else (n_in, n_out), np.float32)
    mins = np.empty((n_in // 16, n_out), np.float32) if with_mins else _NONE
    for start in range(0, n_out, _PACKED_AT_ONCE):
        rows = slice(start, start + _PACKED_AT_ONCE)
        integers = with_scales(blocks[rows], qtype, n_in, 1)
        if panelled:
            for first in range(0, len(integers), PANEL):
                panel = integers[first : first + PANEL]
                codes[(start + first) // PANEL, :, : len(panel)] = panel.T
        else:
            codes[:, rows] = integers.T
        if with_mins:
            mins[:, rows] = with_scales(blocks[rows], qtype, n_in, 0, -1)[:, ::16].T
    return Packed(qtype, n_out, codes, d, dmin[0] if dmin else _NONE, mins)


def product(x: np.ndarray, parts: Sequence[Packed], out: np.ndarray, workers) -> None:
    """Compute out = x · weightᵀ, for matrices over the same input side by side.

    Parameters
    ----------
    x : np.ndarray [shape=(nrows, n_in), dtype=float32]
    parts : sequence of Packed
    out : np.ndarray [shape=(nrows, their rows), dtype=float32]
    workers : Workers
        For scratch space.
    """
    column, blocks = 0, None
    for part in parts:
        order, target = ORDERS[part.qtype], out[:, column : column + part.n_out]
        column += part.n_out
        if not order.group:
            np.matmul(_rounded(x, order.activations, workers), part.codes, out=target)
            continue
        if blocks is None or blocks.qtype != order.activations:
            blocks = Blocks(x, order.activations, workers)
        if order.lanes > 1:
            _sum_in_lanes(blocks.codes, blocks.d, blocks.sums, part.codes, part.d, part.dmin, target)
        else:
            _sum_groups(blocks, part, order, target, workers)


def _rounded(x: np.ndarray, qtype: str, workers) -> np.ndarray:
    """What is left of activations after rounding to `qtype`."""
    if qtype == "F32":
        return x
    if qtype.startswith("Q8"):
        return Blocks(x, qtype, workers).floats()
    out = workers.scratch("rounded", *x.shape)
    (round_f16 if qtype == "F16" else round_bf16)(x, out)
    return out


def _sum_groups(blocks: Blocks, part: Packed, order: Order, out: np.ndarray, workers) -> None:
    """One partial sum: the integers of each group by BLAS, then the groups in order."""
    exact = np.float64 if order.tiled else np.float32  # what holds the sums of integers
    n_in, n_out = part.codes.shape
    sums = workers.scratch("group", _ROWS, n_out, dtype=exact)
    low = workers.scratch("low", _ROWS, n_out)
    taken = workers.scratch("taken", _ROWS, n_out)
    for start in range(0, len(out), _ROWS):
        rows = slice(start, min(start + _ROWS, len(out)))
        n, total = rows.stop - start, out[rows]
        total[:], taken[:n] = 0, 0
        for at in range(0, n_in, order.group):
            columns, b = slice(at, at + order.group), at * len(part.d) // n_in
            d = blocks.d[rows, b]
            np.matmul(blocks.codes[rows, columns].astype(exact), part.codes[columns].astype(exact), out=sums[:n])
            if part.mins.size:
                fine = slice(at // 16, (at + order.group) // 16)
                np.matmul(blocks.sums[rows, fine], part.mins[fine], out=low[:n])
            if order.tiled:
                _add_tile(sums[:n], d, part.d[b], low[:n], part.dmin[b : b + 1], total)
                continue
            _add_group(sums[:n], d, part.d[b], total)
            if part.mins.size:
                _add_group(low[:n], d, part.dmin[b], taken[:n])
        if part.mins.size and not order.tiled:
            total -= taken[:n]


@njit(nogil=True, cache=True)
def _add_group(sums, d, d_weight, out):
    """out += d · d_weight · sums."""
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[r, c] = fma(np.float32(d_weight[c] * d[r]), sums[r, c], out[r, c])


@njit(nogil=True, cache=True)
def _add_tile(sums, d, d_weight, low, dmin, out):
    """out += d · (d_weight · sums - dmin · low), the minima only where there are any."""
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            term = np.float32(d_weight[c] * np.float32(sums[r, c]))
            if dmin.shape[1] > 0:
                term = fma(-dmin[0, c], low[r, c], term)
            out[r, c] = fma(term, d[r], out[r, c])


@njit(nogil=True, cache=True)
def _sum_in_lanes(x, d, sums, panels, d_weight, minima, out):
    """Eight partial sums, each of every eighth group of four columns; the minima of Q4_1 and Q5_1 apart."""
    lanes, scale, low = np.empty((8, PANEL), np.float32), np.empty(PANEL, np.float32), np.empty(PANEL, np.float32)
    for p in range(panels.shape[0]):
        first = p * PANEL
        width = min(PANEL, out.shape[1] - first)
        for r in range(out.shape[0]):
            lanes[:] = np.float32(0)
            low[:] = np.float32(0)
            for b in range(d.shape[1]):
                for c in range(width):
                    scale[c] = d_weight[b, first + c] * d[r, b]
                for j in range(8):
                    k = 32 * b + 4 * j
                    x0, x1, x2, x3 = x[r, k], x[r, k + 1], x[r, k + 2], x[r, k + 3]
                    w, lane = panels[p, k : k + 4], lanes[j]
                    for c in range(PANEL):
                        total = fma(x3, w[3, c], fma(x2, w[2, c], fma(x1, w[1, c], np.float32(x0 * w[0, c]))))
                        lane[c] = fma(scale[c], total, lane[c])
                if minima.shape[0] > 0:
                    for c in range(width):
                        low[c] = fma(minima[b, first + c], sums[r, b], low[c])
            for c in range(width):
                even = np.float32(lanes[4, c] + lanes[0, c]) + np.float32(lanes[6, c] + lanes[2, c])
                odd = np.float32(lanes[5, c] + lanes[1, c]) + np.float32(lanes[7, c] + lanes[3, c])
                out[r, first + c] = np.float32(even + odd) + low[c]
