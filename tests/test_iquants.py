"""The newer types give llama.cpp's bytes, plain and weighted, and decode any bytes as it does."""

import check_kernels
import naive_newer
import numpy as np
import pytest
import rows
from ggml_library import needs_libggml
from hypothesis import given, settings

from quantlab import quants
from quantlab.evaluate import variants
from quantlab.files.model import open as open_model
from quantlab.quants import grids
from quantlab.quants.ggml_types import GGML_TYPES

WEIGHTED = [qtype for qtype in rows.NEWER if GGML_TYPES[qtype].weighted_encoder]
# ggml makes its tables for the others in 1 to 20 seconds of processor time; IQ1_M's search is another one there
QUICK = ["IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"]
SLOW = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S"]


@pytest.mark.parametrize("qtype", rows.NEWER)
def test_golden_digests(qtype):
    check_kernels.golden(qtype)


@pytest.mark.parametrize("qtype", naive_newer.ENCODERS)
def test_same_as_oracle(qtype):
    x = rows.every_kind(256)
    np.testing.assert_array_equal(check_kernels.encoded(x, qtype), naive_newer.quantize(x, qtype))
    if qtype in WEIGHTED:
        for kind in ("squares", "one-hot", "zeros"):
            weights = rows.importances(256)[kind]
            np.testing.assert_array_equal(
                check_kernels.encoded(x, qtype, weights), naive_newer.quantize(x, qtype, weights), kind
            )


@pytest.mark.parametrize("qtype", naive_newer.ENCODERS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(x=check_kernels.ANY_ROW | check_kernels.SOME_LEVELS)
def test_any_row_same_as_oracle(qtype, x):
    np.testing.assert_array_equal(check_kernels.encoded(x, qtype), naive_newer.quantize(x, qtype))


def same_as_libggml(qtype, widths):
    for n in widths:
        x = rows.bell((17, n), 5).astype(np.float32)
        if GGML_TYPES[qtype].encoder:
            check_kernels.same_as_libggml(x, qtype)
        for weights in rows.importances(n).values() if qtype in WEIGHTED else ():
            check_kernels.same_as_libggml(x, qtype, weights)


@needs_libggml
@pytest.mark.parametrize("qtype", QUICK)
def test_same_as_libggml(qtype):
    same_as_libggml(qtype, (256, 768))


@needs_libggml
@pytest.mark.long
@pytest.mark.parametrize("qtype", SLOW)
def test_same_as_libggml_whose_tables_take_long(qtype):
    same_as_libggml(qtype, (256, 4096))


@needs_libggml
@pytest.mark.parametrize("qtype", ["IQ4_XS", "IQ3_S", "IQ3_XXS"])
@settings(max_examples=100, deadline=None)
@given(x=check_kernels.SOME_LEVELS)
def test_any_row_same_as_libggml(qtype, x):
    check_kernels.same_as_libggml(x, qtype)
    check_kernels.same_as_libggml(x, qtype, np.abs(x[0, ::-1]).copy())


@pytest.mark.parametrize("qtype", rows.NEWER)
def test_decoder_of_random_bytes(qtype, rng):
    check_kernels.decodes_random_bytes(qtype, rng)


@pytest.mark.parametrize(("qtype", "size", "width"), [("Q1_0", 128, 1), ("Q2_0", 64, 2)])
def test_decoder_of_types_that_gguf_does_not_know(qtype, size, width, rng):
    blocks = rng.integers(0, 256, (32, 18), dtype=np.uint8)
    codes = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").reshape(32, size, width) @ [1, 2][:width]
    values = 2.0 * codes - 1 if width == 1 else codes - 1.0
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    expected = values.astype(np.float32) * scale
    np.testing.assert_array_equal(quants.dequantize(blocks, qtype, (32, size)), expected)


@pytest.mark.parametrize("qtype", rows.NEWER)
def test_threads_do_not_change_bytes(qtype):
    check_kernels.threads_do_not_change_bytes(qtype, 4096, 20)


@pytest.mark.parametrize("qtype", grids.DISTANCES)
def test_neighbours_are_the_nearest_points_in_order(qtype, rng):
    grid = grids.grid(qtype)
    weights = 4 if qtype.startswith("IQ3") else 8
    width, n_levels = (3, 8) if weights == 4 else (2, 3)
    shifts = width * np.arange(weights)
    levels = grid.points[:, None].astype(int) >> shifts & ((1 << width) - 1)
    assert np.array_equal(grid.index[grid.points], np.arange(len(levels)))
    for point in rng.integers(0, n_levels, (50, weights)):
        code = (point << shifts).sum()
        run = grid.codes[grid.start[code] : grid.start[code + 1]]
        if grid.index[code] >= 0:
            assert run.size == 0
            continue
        distance = ((levels - point) ** 2).sum(1)
        near = np.flatnonzero(distance <= np.unique(distance)[grids.DISTANCES[qtype] - 1])
        expected = grid.points[near[np.lexsort((near, distance[near]))]]
        assert np.array_equal(run[: len(expected)], expected) and len(run) % 16 == 0
        assert (run[len(expected) :] == expected[0]).all()


def test_gaps_of_zero_sub_blocks_in_iq3_s():
    """ggml's IQ3_S closes the gap that 32 zeros leave in positions and signs, so what follows decodes elsewhere."""
    x = rows.kinds(256)["normal"][None].copy()
    whole = quants.quantize(x, "IQ3_S")[0]
    x[0, :32] = 0
    block = quants.quantize(x, "IQ3_S")[0]
    assert np.array_equal(block[2:58], whole[10:66]) and not block[58:66].any()
    assert np.array_equal(block[74:102], whole[78:106]) and not block[102:106].any()


def test_types_that_need_importance_say_so():
    for qtype in ("IQ2_XXS", "IQ2_XS", "IQ1_S"):
        with pytest.raises(ValueError, match=f"x: qtype={qtype}, needs an importance matrix. Pass one as imatrix."):
            quants.quantize(np.zeros((1, 256), np.float32), qtype)


def test_comparing_a_type_that_needs_importance_says_so():
    with pytest.raises(ValueError, match=r"IQ2_S: blk\.0\.attn_k\.weight: type=IQ2_XS, needs an importance matrix\."):
        variants.resolve(open_model("tiny"), ["IQ2_S"])
