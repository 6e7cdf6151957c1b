"""The k-quants give llama.cpp's bytes, plain and weighted, and decode any bytes as it does."""

import check_kernels
import numpy as np
import pytest
import rows
from ggml_library import needs_libggml
from hypothesis import given, settings

WEIGHTED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
TYPES = [*WEIGHTED, "Q8_K"]


@pytest.mark.parametrize("qtype", TYPES)
def test_golden_digests(qtype):
    check_kernels.golden(qtype)


@pytest.mark.parametrize("qtype", TYPES)
def test_same_as_oracle(qtype):
    x = rows.every_kind(256)
    check_kernels.same_as_oracle(x, qtype)
    if qtype in WEIGHTED:
        check_kernels.same_as_oracle(x, qtype, rows.importances(256)["squares"])


@needs_libggml
@pytest.mark.parametrize("qtype", TYPES)
def test_same_as_libggml(qtype):
    for n in (256, 768, 4096):
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
        check_kernels.same_as_oracle(x, qtype, np.abs(x[0, ::-1]).copy())


@needs_libggml
@pytest.mark.parametrize("qtype", TYPES)
@settings(max_examples=200, deadline=None)
@given(x=check_kernels.ANY_ROW | check_kernels.SOME_LEVELS)
def test_any_row_same_as_libggml(qtype, x):
    check_kernels.same_as_libggml(x, qtype)
    if qtype in WEIGHTED:
        check_kernels.same_as_libggml(x, qtype, np.abs(x[0, ::-1]).copy())


@pytest.mark.parametrize("qtype", TYPES)
def test_decoder_of_random_bytes(qtype, rng):
    check_kernels.decodes_random_bytes(qtype, rng)


@pytest.mark.parametrize("qtype", TYPES)
def test_threads_do_not_change_bytes(qtype):
    check_kernels.threads_do_not_change_bytes(qtype, 4096, 40)
