"""Matrix products as ggml's CPU code computes them, to the last bit.

llama.cpp rounds activations to 8 bits before each product with quantized weights. One activation that falls to the
other side changes all that come after it, so that sums in another order, equal but for their last bit, end as much as
0.3 % away in perplexity. llama-perplexity's figures thus belong to its order of operations. The order here is that of
a build for x86-64 with AVX-512 (`GGML_NATIVE`) at its defaults: weights repacked, k-quants tiled. A product is

    out[row, column] = Σ over groups, in order:  d_weight · d_activation · (sum of integers over the group's columns)

where the integers of a group are summed exactly, in any order, and the groups by fused multiply-add. What differs
between the types is the group, and into how many partial sums it goes.

The integers are the codes of the weights. In k-quants and I-quants a sub-block has a whole number as its scale: the sum
over its columns is multiplied by it. Where `integer_tiles` works with 16 bits, the codes are, when they are packed.

Source: ggml/src/ggml-cpu of llama.cpp 0c1e57098; the functions are named in ORDERS.
"""

from dataclasses import dataclass

import numpy as np

from quantlab import quants
from quantlab.evaluate.engine import tiles
from quantlab.evaluate.engine.ggml_activations import Blocks
from quantlab.evaluate.engine.integer_tiles import DEPTH, GROUP_ROWS, LANE_ROWS, VNNI, add_groups, add_lanes
from quantlab.evaluate.engine.tiles import LANES
from quantlab.evaluate.engine.workers import blocks
from quantlab.quants.compiled import njit
from quantlab.quants.ggml_types import GGML_TYPES
from quantlab.quants.lanes import absolute, lanes, load, lowest, maximum, minimum, nearest_int, select, store, to_int

_PACKED_AT_ONCE = 1024  # rows of weights
_ROWS_OF_A_TASK = 4 * LANES  # rows that a thread puts into panels at a time
_SIGNS = np.int32(-0x7F7F7F80)  # the highest bit of each byte: to flip it adds 128
_NO_NUMBER = np.int32(2**31 - 1)
_NO_FLOATS = np.empty((0, 0, LANES), np.float32)


@dataclass(frozen=True)
class Order:
    """The steps of a product with weights of some type.

    Attributes
    ----------
    activations : str
        Type that they are rounded to.
    group : int
        Columns whose integers make one summand; 0: floats, see `GgmlEngine.pack`.
    run : int
        Columns of a group whose codes have a factor in common: a sub-block, else the group.
    lanes : int
        Partial sums that the groups go to in turn.
    tiled : bool
        The two scales are applied one after the other, instead of multiplied with each other first.
    unit : int
        Power of two that makes the weights whole numbers, once they are divided by the scale of their block.
    """

    activations: str
    group: int = 0
    run: int = 0
    lanes: int = 1
    tiled: bool = False
    unit: int = 1


# type of the weights -> what is done to the activations, and how the product is summed
ORDERS = {
    **{qtype: Order(qtype) for qtype in ("F32", "F16", "BF16")},
    **dict.fromkeys(("Q5_0", "Q8_0"), Order("Q8_0", 4, 4, lanes=8)),  # tinyBLAS_Q0_AVX
    **dict.fromkeys(("Q4_1", "Q5_1"), Order("Q8_1", 4, 4, lanes=8)),  # ggml_vec_dot_q4_1_q8_1, ggml_vec_dot_q5_1_q8_1
    **dict.fromkeys(("Q4_0", "IQ4_NL", "MXFP4"), Order("Q8_0", 32, 32)),  # gemm_q4_b32_8x8_q8_0_lut_avx
    "Q4_K": Order("Q8_K", 64, 32),  # ggml_gemm_q4_K_8x8_q8_K
    "Q2_K": Order("Q8_K", 128, 16),  # ggml_gemm_q2_K_8x8_q8_K
    # tiled_run_micro_vnni_8x16
    **dict.fromkeys(("Q5_K", "IQ4_XS", "IQ3_S"), Order("Q8_K", 256, 32, tiled=True)),
    **dict.fromkeys(("Q3_K", "Q6_K"), Order("Q8_K", 256, 16, tiled=True)),
    "IQ3_XXS": Order("Q8_K", 256, 32, tiled=True, unit=4),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS"), Order("Q8_K", 256, 32, tiled=True, unit=8)),
    **dict.fromkeys(("IQ2_XS", "IQ2_S"), Order("Q8_K", 256, 16, tiled=True, unit=8)),
}
# the same for experts: ggml_gemv_q4_K_8x8_q8_K, ggml_gemv_q2_K_8x8_q8_K
ORDERS_OF_EXPERTS = ORDERS | {"Q4_K": Order("Q8_K", 256, 32), "Q2_K": Order("Q8_K", 256, 16)}


def read_scales(data: np.ndarray, qtype: str) -> list[np.ndarray]:
    """Read the scale of each block and the scale of its minima, where there is one (Q4_1, Q5_1: the minimum).

    Parameters
    ----------
    data : np.ndarray [shape=(n_out, blocks, bytes), dtype=uint8]
    qtype : str

    Returns
    -------
    list of np.ndarray [shape=(n_out, blocks), dtype=float32]
        The first divided by `unit`.
    """
    if not GGML_TYPES[qtype].halves:  # MXFP4: a power of two
        return [np.ldexp(np.float32(1), data[:, :, 0].astype(np.int32) - 128)]
    d, *dmin = (_halves(data, at) for at in GGML_TYPES[qtype].halves)
    return [d / np.float32(ORDERS[qtype].unit), *dmin]


def with_scales(data: np.ndarray, qtype: str, n_in: int, d: float, dmin: float = 0) -> np.ndarray:
    """Decode blocks [n_out, blocks, bytes] as if their scales were these; float32 [n_out, n_in], whole numbers."""
    data = data.copy()
    if not GGML_TYPES[qtype].halves:
        data[:, :, 0] = 128
    for at, scale in zip(GGML_TYPES[qtype].halves, (d * ORDERS[qtype].unit, dmin), strict=False):
        data[:, :, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    return quants.dequantize(data.reshape(-1), qtype, (len(data), n_in))


@dataclass(frozen=True)
class Packed:
    """A weight matrix taken apart into integers and scales, in panels of LANES rows.

    Attributes
    ----------
    order : Order
    n_out : int
        Its rows.
    codes : np.ndarray [shape=(panels, n_in // DEPTH, LANES), dtype=int32]
        Words: four codes plus 128; without VNNI two codes times the factors of their runs.
    factors : np.ndarray [shape=(panels, n_in // run, LANES) or empty, dtype=int32]
        By which the sum of each run is multiplied.
    d : np.ndarray [shape=(panels, blocks of a row, LANES), dtype=float32]
        Scale of each block.
    mins : np.ndarray [shape=(panels, n_in // run // 2, LANES) or empty, dtype=int32]
        Pairs of int16: the minimum of each run.
    dmin : np.ndarray [like d, or empty]
        Scale of the minima; of Q4_1 and Q5_1 the minima.
    """

    order: Order
    n_out: int
    codes: np.ndarray
    factors: np.ndarray
    d: np.ndarray
    mins: np.ndarray
    dmin: np.ndarray


def pack(stored: np.ndarray, qtype: str, shape: tuple[int, ...], order: Order, workers) -> Packed:
    """Take a weight matrix apart whose type has an order.

    Parameters
    ----------
    stored : np.ndarray [dtype=uint8]
        As `LazyTensor.load` and `quants.quantize` give it.
    qtype : str
    shape : tuple of int
        (n_out, n_in).
    order : Order
        That of `ORDERS`, or of `ORDERS_OF_EXPERTS`.
    workers : Workers
    """
    n_out, n_in = shape
    data, n_panels = stored.reshape(n_out, -1, quants.block_bytes(qtype)), -(-n_out // LANES)
    d, *dmin = read_scales(data, qtype)
    is_super, n_runs = order.activations == "Q8_K", n_in // order.run
    codes = np.zeros((n_panels, n_in // DEPTH, LANES), np.int32)
    factors = np.zeros((n_panels if VNNI and is_super else 0, n_runs, LANES), np.int32)
    mins = np.zeros((n_panels if dmin and is_super else 0, n_runs // 2, LANES), np.int32)
    for rows in blocks(n_out, _PACKED_AT_ONCE):
        integers = with_scales(data[rows], qtype, n_in, 1)
        lowest = with_scales(data[rows], qtype, n_in, 0, -1)[:, :: order.run] if mins.size else None
        parts = blocks(len(integers), _ROWS_OF_A_TASK)
        workers.map(lambda part, x=integers, at=rows.start: _fill(x[part], codes, factors, at + part.start), parts)
        if mins.size:
            _fill_pairs(lowest, mins, rows.start)  # pyright: ignore[reportArgumentType]
    return Packed(order, n_out, codes, factors, _panels(d), mins, _panels(*dmin) if dmin else _NO_FLOATS)


def _fill(integers: np.ndarray, codes: np.ndarray, factors: np.ndarray, first: int) -> None:
    """Put some rows of integers [rows, n_in] in float32 into panels, as rows `first`, …."""
    if VNNI:
        _fill_quads(integers, codes, factors, first)
    else:
        _fill_pairs(integers, codes, first)


@njit(nogil=True, cache=True, error_model="numpy")
def _fill_quads(integers, codes, factors, first):
    """codes[p, i, c] = columns 4i … 4i + 3 of row first + r, divided by their run's factor, plus 128, in bytes."""
    n_in = integers.shape[1]
    run = n_in // factors.shape[1] if factors.shape[0] > 0 else n_in
    quads = np.empty(n_in, np.int8)
    words = quads.view(np.int32)
    for r in range(integers.shape[0]):
        p, c = divmod(first + r, LANES)
        row = integers[r]
        for i in range(n_in // run):
            inverse = np.float32(1)
            if factors.shape[0] > 0:
                factors[p, i, c] = _common_factor(row, i * run, run)
                inverse /= np.float32(factors[p, i, c])
            for j in range(i * run, (i + 1) * run, LANES):
                store(quads, j, nearest_int(load(row, j) * inverse))
        for i in range(words.shape[0]):
            codes[p, i, c] = words[i] ^ _SIGNS


@njit(nogil=True, inline="always")
def _common_factor(row, at, run):
    """Return the common factor of a run's integers, at least their scale; the rest fits into 8 bits.

    Euclid's algorithm, on all of them at once: the least remainder is the next divisor.
    """
    common = np.int32(0)
    while True:
        inverse, least = np.float32(1) / np.float32(max(common, 1)), lanes(_NO_NUMBER)
        for j in range(at, at + run, LANES):
            size = absolute(load(row, j))
            rest = to_int(size)
            if common > 0:
                rest = rest - nearest_int(size * inverse) * common
                rest = maximum(rest, -rest)
            least = minimum(least, select(rest == 0, lanes(_NO_NUMBER), rest))
        if lowest(least) == _NO_NUMBER:
            return max(common, np.int32(1))
        common = np.int32(lowest(least))


def _fill_pairs(integers: np.ndarray, words: np.ndarray, first: int) -> None:
    """words[p, i, c] = columns 2i and 2i + 1 of row first + r, in 16 bits each."""
    tiles.pack(integers.astype(np.int16).view(np.int32), words, first)


def _halves(data: np.ndarray, at: int) -> np.ndarray:
    """Read a float16 of each block as float32."""
    return np.ascontiguousarray(data[:, :, at : at + 2]).view(np.float16)[..., 0].astype(np.float32)


def _panels(scales: np.ndarray) -> np.ndarray:
    """Put scales [n_out, blocks] into panels [panels, blocks, LANES]."""
    panels = np.zeros((-(-len(scales) // LANES), scales.shape[1], LANES), np.float32)
    tiles.pack(scales, panels, 0)
    return panels


def product(x: Blocks, part: Packed, out: np.ndarray) -> None:
    """Compute out = x · weightᵀ.

    Parameters
    ----------
    x : Blocks
        Rounded to the type that `part` asks for, with the same `run`.
    part : Packed
    out : np.ndarray [shape=(nrows, n_out), dtype=float32]
    """
    order, rows = part.order, (x.codes.view(np.int32), x.d, x.starts)
    if order.lanes > 1:
        _sum_in_lanes(*rows, x.sums, part.codes, part.d, part.dmin, out)
        return
    run = order.run if part.factors.size else order.group
    pairs = order.group // order.run // 2 if part.mins.size else 0
    shape = run // DEPTH, order.group // run, pairs, part.codes.shape[1] * DEPTH // part.d.shape[1] // order.group
    panels = part.codes, part.factors, part.d, part.mins, part.dmin
    _sum_groups(*rows, x.sums.view(np.int32), *panels, shape, order.tiled, out)


@njit(nogil=True, cache=True)
def _sum_in_lanes(x, d, starts, sums, codes, d_weight, minima, out):
    """Eight partial sums, each of every eighth group of four columns; the minima of Q4_1 and Q5_1 apart."""
    for p in range(codes.shape[0]):
        for r in range(0, x.shape[0], LANE_ROWS):
            add_lanes(x, d, starts, sums, codes, d_weight, minima, r, p, out)


@njit(nogil=True, cache=True)
def _sum_groups(x, d, starts, sums, codes, factors, d_weight, mins, dmin, shape, tiled, out):
    """One partial sum: the integers of each group, then the groups in order."""
    for p in range(codes.shape[0]):
        for r in range(0, x.shape[0], GROUP_ROWS):
            add_groups(x, d, starts, sums, codes, factors, d_weight, mins, dmin, r, p, shape, tiled, out)
