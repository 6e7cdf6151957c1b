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
from quantlab.evaluate.engine.tiles import ROWS, WIDTH
from quantlab.evaluate.engine.workers import Workers

ORDERED = [qtype for qtype, order in ORDERS.items() if order.group and not qtype.startswith("IQ")]  # what we encode
f32 = np.float32


def fma(a, b, c) -> np.float32:
    """a · b + c: the product of two float32 is exact in float64."""
    return f32(np.float64(a) * np.float64(b) + np.float64(c))


def integers(data: bytes, qtype: str) -> tuple[np.ndarray, np.ndarray, float, float]:
    """One block of a type: the weights' integers, their integer minima, d and dmin."""
    at, at_min = ggml_products.scale_places(qtype)
    block = np.frombuffer(data, np.uint8)
    read = [0.0 if i is None else float(block[i : i + 2].copy().view(np.float16)[0]) for i in (at, at_min)]

    def decoded(d, dmin):
        changed = block.copy()
        changed[at : at + 2] = np.array([d], np.float16).view(np.uint8)
        if at_min is not None:
            changed[at_min : at_min + 2] = np.array([dmin], np.float16).view(np.uint8)
        return quants.dequantize(changed, qtype, (quants.block_size(qtype),)).astype(int)

    mins = decoded(0, -1) if at_min is not None else np.zeros(quants.block_size(qtype), int)
    return decoded(1, 0), mins, *read


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
    for at in ggml_products.scale_places(qtype):
        if at is not None:
            data[:, :, at : at + 2] = rng.normal(0, 0.01, (*data.shape[:2], 1)).astype(np.float16).view(np.uint8)
    return data.reshape(n_out, -1)


@pytest.mark.parametrize("qtype", [qtype for qtype, order in ORDERS.items() if order.group])
def test_random_blocks_give_the_oracles_bits(rng, qtype):
    n_out, n_in = 2 * WIDTH + 5, 768
    x = (rng.standard_normal((2 * ROWS + 1, n_in)) * np.exp(2 * rng.standard_normal((2 * ROWS + 1, n_in)))).astype(f32)
    x[3, :256] = 0
    data, expected = random_blocks(rng, qtype, n_out, n_in), np.full((len(x), n_out), np.nan, f32)
    ggml_oracle.product(x, [ggml_oracle.pack(data, qtype, (n_out, n_in))], expected, Workers())
    np.testing.assert_array_equal(product(x, [Stored(data, qtype, (n_out, n_in))]), expected)


@pytest.mark.parametrize("qtype", ORDERED)
def test_sums_keep_their_order(rng, qtype):
    weights = rng.standard_normal((70, 768)).astype(f32)  # more rows than a panel, and not a multiple of it
    x = (rng.standard_normal((5, 768)) * np.exp(rng.standard_normal((5, 768)))).astype(f32)
    data = quants.quantize(weights, qtype)
    out = product(x, [Stored(data, qtype, weights.shape)])
    blocks = Blocks(x, ORDERS[qtype].activations, Workers())
    for r in (0, 4):
        for c in (0, 1, 64, 69):
            assert out[r, c] == dot(data[c], qtype, blocks.codes[r], blocks.d[r], blocks.sums[r]), (r, c)


@pytest.mark.parametrize("qtype", [*ORDERED, "IQ4_NL", "IQ4_XS", "IQ2_XXS", "F16", "BF16", "F32"])
def test_is_the_product_of_what_is_left_after_rounding(rng, qtype):
    weights = rng.standard_normal((40, 512)).astype(f32)
    x = rng.standard_normal((200, 512)).astype(f32)
    if qtype.startswith("IQ"):
        data = rng.integers(0, 256, (40, quants.row_bytes(qtype, 512)), np.uint8)
        data.reshape(40, -1, quants.block_bytes(qtype))[:, :, :2] = np.array([0.01], np.float16).view(np.uint8)
    else:
        data = quants.quantize(weights, qtype)
    decoded = quants.dequantize(data, qtype, weights.shape).astype(np.float64)
    out, activations = product(x, [Stored(data, qtype, weights.shape)]), ORDERS[qtype].activations
    rounded = quants.roundtrip(x, "Q8_0" if activations == "Q8_1" else activations).astype(np.float64)
    expected = rounded @ decoded.T
    # Q8_1 keeps its sums in float16, 11 bits; else only float32 sums are in between
    tolerance = 2e-3 if activations == "Q8_1" else 2e-6
    np.testing.assert_allclose(out, expected, atol=tolerance * np.abs(expected).max())


def test_matrices_stand_side_by_side_each_in_its_type(rng):
    x = rng.standard_normal((9, 256)).astype(f32)
    tensors = []
    for qtype, n_out in (("Q4_K", 24), ("Q8_0", 8), ("Q5_0", 65), ("Q6_K", 16), ("F16", 3), ("IQ2_XXS", 5)):
        if qtype == "IQ2_XXS":
            data = np.zeros((n_out, quants.row_bytes(qtype, 256)), np.uint8)
            data[:, :2] = np.array([0.5], np.float16).view(np.uint8)
        else:
            data = quants.quantize(rng.standard_normal((n_out, 256)).astype(f32), qtype)
        tensors.append(Stored(data, qtype, (n_out, 256)))
    alone = [product(x, [tensor]) for tensor in tensors]
    np.testing.assert_array_equal(product(x, tensors), np.hstack(alone))
