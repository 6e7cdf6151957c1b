"""What must hold for the encoder and the decoder of every type; test_legacy and test_kquants ask it of theirs."""

import json
from hashlib import sha256
from pathlib import Path

import ggml_library
import naive
import numba
import numpy as np
import pytest
import rows
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from quantlab import quants
from quantlab.lab import speed
from quantlab.quants.arrays import encode
from quantlab.quants.ggml_types import GGML_TYPES

GOLDEN = json.loads((Path(__file__).parent / "golden" / "kernels.json").read_text())
ANY_ROW = st_numpy.arrays(
    np.float32, (1, 256), elements=st.floats(width=32, allow_nan=False, allow_infinity=False), fill=st.just(0)
)
SOME_LEVELS = st_numpy.arrays(np.float32, (1, 256), elements=st.floats(-1, 1, width=16))


def digest(array):
    return sha256(array.tobytes()).hexdigest()


def encoded(x, qtype, imatrix=None):
    """What the kernels make of rows, infinite scales included, which `quantize` refuses."""
    out = np.empty((len(x), quants.row_bytes(qtype, x.shape[1])), np.uint8)
    encode(np.ascontiguousarray(x), qtype, imatrix, out)
    return out


def golden(qtype):
    """The bytes are those of llama.cpp, by digest: all kinds of rows, all kinds of importance matrices."""
    assert digest(rows.every_kind(512)) == GOLDEN["input"]["sha256"]
    x, importances = rows.for_type(qtype, 512), rows.importances(512) | {"plain": None}
    ours = {kind: encoded(x, qtype, importances[kind]) for kind in GOLDEN["encoded"][qtype]}
    assert {kind: digest(data) for kind, data in ours.items()} == GOLDEN["encoded"][qtype]
    if qtype in GOLDEN["decoded"]:
        data = ours.get("plain", ours.get("squares"))
        assert digest(quants.dequantize(data, qtype, x.shape)) == GOLDEN["decoded"][qtype]


def same_as_oracle(x, qtype, imatrix=None):
    """The bytes are those of the scalar oracle."""
    np.testing.assert_array_equal(encoded(x, qtype, imatrix), naive.quantize(x, qtype, imatrix))


def same_as_libggml(x, qtype, imatrix=None):
    """The bytes are those of the C library here and now."""
    np.testing.assert_array_equal(encoded(x, qtype, imatrix), ggml_library.quantize(x, qtype, imatrix))


def decodes_random_bytes(qtype, rng):
    """Any bytes decode as gguf-py and, where installed, the C library decode them; a NaN may have any payload."""
    data = rng.integers(0, 256, (64, quants.row_bytes(qtype, 512)), dtype=np.uint8)
    ours = quants.dequantize(data, qtype, (64, 512))
    references = []
    if qtype not in ("Q8_1", "Q8_K", "Q1_0", "Q2_0"):  # which gguf-py does not decode
        with np.errstate(all="ignore"):
            references.append(gguf_dequantize(data, GGMLQuantizationType[qtype]))
    if ggml_library.library() and qtype != "Q8_1":
        references.append(ggml_library.dequantize(data, qtype, 512))
    for theirs in references:
        number = ~np.isnan(theirs)
        assert np.array_equal(np.isnan(ours), ~number)
        assert np.array_equal(ours[number].view(np.uint32), theirs[number].view(np.uint32))


def threads_do_not_change_bytes(qtype, n_per_row, nrows):
    """One thread and two give the same bytes, plain and weighted, and decode them alike."""
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("numba was started with one thread")
    x, weights = rows.bell((nrows, n_per_row), 6).astype(np.float32), rows.importances(n_per_row)["squares"]
    matrices = [None, weights] if GGML_TYPES[qtype].encoder else [weights]
    results = []
    for n in (1, 2):
        with speed.threads(n):
            data = [quants.quantize(x, qtype, imatrix) for imatrix in matrices]
            results.append([array.tobytes() for array in (*data, quants.dequantize(data[0], qtype, x.shape))])
    assert results[0] == results[1]
