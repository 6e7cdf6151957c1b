"""The blocks of 32 give llama.cpp's bytes, plain and weighted, and decode any bytes as it does."""

import ctypes

import check_kernels
import ml_dtypes
import numpy as np
import pytest
import rows
from ggml_library import library, needs_libggml
from hypothesis import given, settings

from quantlab import quants
from quantlab.quants import floats

WEIGHTED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1"]
TYPES = [*WEIGHTED, "Q8_0", "Q8_1"]


@pytest.mark.parametrize("qtype", TYPES)
def test_golden_digests(qtype):
    check_kernels.golden(qtype)


@pytest.mark.parametrize("qtype", TYPES)
def test_same_as_oracle(qtype):
    x = rows.every_kind(96)
    check_kernels.same_as_oracle(x, qtype)
    if qtype in WEIGHTED:
        check_kernels.same_as_oracle(x, qtype, rows.importances(96)["squares"])


@needs_libggml
@pytest.mark.parametrize("qtype", TYPES)
def test_same_as_libggml(qtype):
    for n in (32, 608, 4096):  # less than a chunk of blocks, neither a multiple of 256, and a usual width
        x = rows.bell((17, n), 5).astype(np.float32)
        check_kernels.same_as_libggml(x, qtype)
        if qtype in WEIGHTED:
            for weights in rows.importances(n).values():
                check_kernels.same_as_libggml(x, qtype, weights)


@pytest.mark.parametrize("qtype", TYPES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(x=check_kernels.ANY_ROW | check_kernels.SOME_LEVELS)
def test_any_row_same_as_oracle(qtype, x):
    check_kernels.same_as_oracle(x, qtype)
    if qtype in WEIGHTED:
        check_kernels.same_as_oracle(x[:, :64].copy(), qtype, np.abs(x[0, 64:128]))


@pytest.mark.parametrize("qtype", TYPES)
def test_decoder_of_random_bytes(qtype, rng):
    check_kernels.decodes_random_bytes(qtype, rng)


@pytest.mark.parametrize("qtype", TYPES)
def test_threads_do_not_change_bytes(qtype):
    check_kernels.threads_do_not_change_bytes(qtype, 512, 40)


def every_float(step):
    """Float32 of every exponent and sign that BF16 can hold: every `step`-th bit pattern."""
    x = np.arange(0, 2**32, step, dtype=np.uint64).astype(np.uint32).view(np.float32)
    with np.errstate(over="ignore"):
        return x[np.isfinite(x.astype(ml_dtypes.bfloat16))]


@pytest.mark.parametrize(("qtype", "dtype"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16)])
def test_16_bit_floats_round_as_numpy(qtype, dtype):
    x = np.concatenate([every_float(65521), np.float32([65519.996, 65520, 6.1e-5, 5.96e-8, 2.98e-8, 2.99e-8])])
    with np.errstate(over="ignore"):
        expected = x.astype(dtype)
    data = quants.quantize(x, qtype)
    np.testing.assert_array_equal(data.view(np.uint16), expected.view(np.uint16))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(quants.dequantize(data, qtype, x.shape)[finite], expected[finite].astype(np.float32))


@needs_libggml
@pytest.mark.parametrize(("qtype", "function"), [("F16", "ggml_fp32_to_fp16_row"), ("BF16", "ggml_fp32_to_bf16_row")])
def test_16_bit_floats_same_as_libggml(qtype, function):
    x = every_float(65521)
    theirs = np.empty(x.shape, np.uint16)
    getattr(library(), function)(x.ctypes, theirs.ctypes, ctypes.c_int64(x.size))
    np.testing.assert_array_equal(quants.quantize(x, qtype).view(np.uint16), theirs)


@pytest.mark.parametrize("qtype", ["F16", "BF16"])
def test_every_16_bit_float_decodes(qtype):
    halves = np.arange(65536, dtype=np.uint16)
    expected = halves.view(np.float16 if qtype == "F16" else ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(quants.dequantize(halves.view(np.uint8), qtype, (65536,)), expected)


def test_finiteness_check_finds_one_in_any_place():
    x = np.zeros((3, 50), np.float32)
    assert floats.all_finite(x.view(np.uint32))
    for place in np.ndindex(x.shape):
        for bad in (np.nan, np.inf, -np.inf):
            y = x.copy()
            y[place] = bad
            assert not floats.all_finite(y.view(np.uint32))
