"""Products summed in ggml's order: against the same order in plain Python, one number at a time."""

import ggml_oracle
import numpy as np
import pytest

import quantlab as ql
from quantlab import quants
from quantlab.evaluate.engine import Stored, ggml_products
from quantlab.evaluate.engine.ggml import GgmlEngine
from quantlab.evaluate.engine.ggml_activations import Blocks
from quantlab.evaluate.engine.ggml_products import ORDERS
from quantlab.evaluate.engine.integer_tiles import GROUP_ROWS, LANES
from quantlab.evaluate.engine.workers import Workers
from quantlab.quants.ggml_types import GGML_TYPES

ORDERED = [qtype for qtype, order in ORDERS.items() if order.group]
f32 = np.float32


def fma(a, b, c) -> np.float32:
    """a · b + c: the product of two float32 is exact in float64."""
    return f32(np.float64(a) * np.float64(b) + np.float64(c))


def integers(data: bytes, qtype: str) -> tuple[np.ndarray, np.ndarray, float, float]:
    """One block of a type: the weights' integers, their integer minima, d and dmin."""
    size, block = quants.block_size(qtype), np.frombuffer(data, np.uint8).reshape(1, 1, -1)
    d, *dmin = (float(scales[0, 0]) for scales in ggml_products.read_scales(block, qtype))

    def decoded(*scales):
        return ggml_products.with_scales(block, qtype, size, *scales)[0].astype(int)

    mins = decoded(0, -1) if dmin else np.zeros(size, int)
    return decoded(1), mins, d, *(dmin or (0.0,))


def dot(row: np.ndarray, qtype: str, codes: np.ndarray, d: np.ndarray, sums: np.ndarray) -> np.float32:
    """One number of the product: a row of encoded weights times a row of rounded activations."""
    order, size = ORDERS[qtype], quants.block_size(qtype)
    lanes, low = [f32(0)] * order.lanes, f32(0)
    for b, block in enumerate(row.reshape(-1, quants.block_bytes(qtype))):
        weights, mins, scale, scale_min = integers(block.tobytes(), qtype)
        scale, scale_min, x = f32(scale), f32(scale_min), codes[b * size : (b + 1) * size].astype(int)
        for g in range(size // order.group):
            group = slice(g * order.group, (g + 1) * order.group)
            total, minimum = int(weights[group] @ x[group]), int(mins[group] @ x[group])
            lane = g % order.lanes
            if order.tiled:
                term = fma(-scale_min, f32(minimum), f32(scale * f32(total)))
                lanes[lane] = fma(term, d[b], lanes[lane])
            else:
                lanes[lane] = fma(f32(scale * d[b]), f32(total), lanes[lane])
                if order.activations == "Q8_K":
                    low = fma(f32(scale_min * d[b]), f32(minimum), low)
        if order.activations == "Q8_1":
            low = fma(scale_min, sums[b], low)
    while len(lanes) > 1:  # halves onto each other
        half = len(lanes) // 2
        lanes = [f32(a + b) for a, b in zip(lanes[half:], lanes[:half], strict=True)]
    return f32(lanes[0] + low) if order.activations == "Q8_1" else f32(lanes[0] - low)


def product(x: np.ndarray, tensors: list[Stored]) -> np.ndarray:
    """The product as the engine computes it, for matrices side by side."""
    with GgmlEngine(ql.open("tiny"), 64) as engine:
        matrix, _ = engine.matrix(tensors)
        out = np.full((len(x), matrix.n_out), np.nan, f32)
        engine.multiply(x, matrix, out)
    return out


def random_blocks(rng, qtype: str, n_out: int, n_in: int) -> np.ndarray:
    """Rows of random bytes, but for scales that are finite."""
    data = rng.integers(0, 256, (n_out, n_in // quants.block_size(qtype), quants.block_bytes(qtype)), np.uint8)
    for at in GGML_TYPES[qtype].halves:
        data[:, :, at : at + 2] = rng.normal(0, 0.01, (*data.shape[:2], 1)).astype(np.float16).view(np.uint8)
    if not GGML_TYPES[qtype].halves:
        data[:, :, 0] = rng.integers(118, 128, data.shape[:2])
    return data.reshape(n_out, -1)


def made(rng, qtype: str, n_out: int, n_in: int) -> Stored:
    """A matrix of normal weights, of codebooks (slow to search) random blocks."""
    shape = (n_out, n_in)
    if GGML_TYPES[qtype].family == "i-quant":
        return Stored(random_blocks(rng, qtype, *shape), qtype, shape)
    return Stored(quants.quantize(rng.standard_normal(shape).astype(f32), qtype), qtype, shape)


@pytest.mark.parametrize("qtype", ORDERED)
def test_random_blocks_give_the_oracles_bits(rng, qtype):
    n_out, n_in, n_rows = 4 * LANES + 5, 768, 2 * GROUP_ROWS + 1
    x = (rng.standard_normal((n_rows, n_in)) * np.exp(2 * rng.standard_normal((n_rows, n_in)))).astype(f32)
    x[3, :256] = 0
    data, expected = random_blocks(rng, qtype, n_out, n_in), np.full((len(x), n_out), np.nan, f32)
    ggml_oracle.product(x, [ggml_oracle.pack(data, qtype, (n_out, n_in))], expected, Workers())
    np.testing.assert_array_equal(product(x, [Stored(data, qtype, (n_out, n_in))]), expected)


@pytest.mark.parametrize("qtype", ORDERED)
def test_sums_keep_their_order(rng, qtype):
    tensor = made(rng, qtype, 70, 768)  # more rows than a panel, and not a multiple of it
    x = (rng.standard_normal((5, 768)) * np.exp(rng.standard_normal((5, 768)))).astype(f32)
    out = product(x, [tensor])
    blocks = Blocks(x, ORDERS[qtype].activations, ORDERS[qtype].run, Workers())
    for r in (0, 4):
        for c in (0, 1, 64, 69):
            assert out[r, c] == dot(tensor.data[c], qtype, blocks.codes[r], blocks.d[r], blocks.sums[r]), (r, c)


@pytest.mark.parametrize("qtype", [*ORDERED, "F16", "BF16", "F32"])
def test_is_the_product_of_what_is_left_after_rounding(rng, qtype):
    tensor, x = made(rng, qtype, 40, 512), rng.standard_normal((200, 512)).astype(f32)
    decoded = quants.dequantize(tensor.data, qtype, tensor.shape).astype(np.float64)
    out, activations = product(x, [tensor]), ORDERS[qtype].activations
    rounded = quants.roundtrip(x, "Q8_0" if activations == "Q8_1" else activations).astype(np.float64)
    expected = rounded @ decoded.T
    # Q8_1 keeps its sums in float16, 11 bits; else only float32 sums are in between
    tolerance = 2e-3 if activations == "Q8_1" else 2e-6
    np.testing.assert_allclose(out, expected, atol=tolerance * np.abs(expected).max())


def test_matrices_stand_side_by_side_each_in_its_type(rng):
    x = rng.standard_normal((9, 256)).astype(f32)
    widths = {"Q4_K": 24, "Q8_0": 8, "Q5_0": 65, "Q6_K": 16, "F16": 3, "IQ2_XXS": 5}
    tensors = [made(rng, qtype, n_out, 256) for qtype, n_out in widths.items()]
    alone = [product(x, [tensor]) for tensor in tensors]
    np.testing.assert_array_equal(product(x, tensors), np.hstack(alone))


def test_types_without_an_order_are_refused_before_the_pass():
    with pytest.raises(ValueError, match="TQ2_0 in mode ggml-cpu.*mode float"):
        ql.compare("tiny", ["TQ2_0"], chunks=1, mode="ggml-cpu", progress=False)
