"""Arrays go in and out whatever their dtype, shape and strides; bad input is refused before any byte is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ggml_library
import ml_dtypes
import naive
import numpy as np
import pandas as pd
import pytest
import rows
from ggml_library import needs_libggml
from gguf import GGMLQuantizationType

import quantlab as ql
from quantlab import quants
from quantlab.files import bundled
from quantlab.quants import arrays
from quantlab.quants.ggml_types import GGML_TYPES

NAME = "blk.0.attn_q.weight"


def normal(*shape):
    return (0.02 * rows.bell(shape, 7)).astype(np.float32)


def python(code, **environment):
    """Run code in a fresh process that shares this one's compiled kernels; return what it prints."""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    ).stdout


# ---- what goes in


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_input_is_encoded_as_its_float32_values(dtype):
    x = normal(3, 64).astype(dtype)
    np.testing.assert_array_equal(quants.quantize(x, "Q8_0"), quants.quantize(x.astype(np.float32), "Q8_0"))


@pytest.mark.parametrize("shape", [(32,), (1, 32), (3, 64), (2, 3, 96), (2, 0, 32), (0, 32)])
def test_leading_axes_stay(shape):
    x = normal(*shape)
    data = quants.quantize(x, "Q4_0")
    assert data.dtype == np.uint8
    assert data.shape == (*shape[:-1], shape[-1] // 32 * 18)
    np.testing.assert_array_equal(data.ravel(), quants.quantize(x.reshape(-1, 32), "Q4_0").ravel())
    assert quants.dequantize(data, "Q4_0", shape).shape == shape


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[::2],
        lambda x: x[:, ::-1],
        lambda x: x[:, 32:96],
        lambda x: x.reshape(8, 16, 64)[:, 3:9],
    ],
    ids=["transposed", "every second row", "reversed", "columns", "inner rows"],
)
def test_strides_do_not_matter(view):
    x = view(normal(128, 64))
    x = x if x.shape[-1] % 32 == 0 else x[..., :32]
    np.testing.assert_array_equal(quants.quantize(x, "Q5_1"), quants.quantize(x.copy(), "Q5_1"))
    np.testing.assert_array_equal(quants.roundtrip(x, "Q5_1"), quants.roundtrip(x.copy(), "Q5_1"))


def test_pieces_join_without_a_seam(monkeypatch):
    x, imatrix = normal(37, 96), rows.importances(96)["squares"]
    for weights in (None, imatrix):
        whole = quants.quantize(x, "Q4_0", weights)
        restored, lost = quants.roundtrip(x, "Q4_0", weights), quants.errors(x, "Q4_0", weights)
        monkeypatch.setattr(arrays, "PIECE", 64)  # less than a row
        np.testing.assert_array_equal(quants.quantize(x, "Q4_0", weights), whole)
        np.testing.assert_array_equal(quants.roundtrip(x, "Q4_0", weights), restored)
        np.testing.assert_array_equal(quants.dequantize(whole, "Q4_0", x.shape), restored)
        assert quants.errors(x, "Q4_0", weights).rmse == pytest.approx(lost.rmse, rel=1e-12)  # order of the sums
        np.testing.assert_array_equal(quants.errors(x, "Q4_0", weights).codes, lost.codes)
        monkeypatch.undo()


def test_types_that_ignore_the_importance_matrix():
    x, imatrix = normal(2, 256), rows.importances(256)["squares"]
    for qtype in ("F32", "F16", "BF16", "Q8_0", "Q8_1", "Q8_K"):
        assert not quants.types().loc[qtype, "uses_imatrix"]
        np.testing.assert_array_equal(quants.quantize(x, qtype, imatrix), quants.quantize(x, qtype))


def test_out_is_filled_and_returned():
    x = normal(4, 64)
    data, restored = np.empty((4, 68), np.uint8), np.empty((4, 64), np.float32)
    assert quants.quantize(x, "Q8_0", out=data) is data
    assert quants.dequantize(data, "Q8_0", x.shape, out=restored) is restored
    np.testing.assert_array_equal(restored, quants.roundtrip(x, "Q8_0"))
    expected = quants.roundtrip(x, "Q8_0")
    assert quants.roundtrip(x, "Q8_0", out=x) is x
    np.testing.assert_array_equal(x, expected)


def test_float32_is_kept():
    x = normal(2, 5)
    np.testing.assert_array_equal(quants.roundtrip(x, "F32"), x)
    np.testing.assert_array_equal(quants.quantize(x, "F32"), x.view(np.uint8))


# ---- the table


def test_the_table_shows_every_type_by_its_number():
    table = quants.types()
    assert set(GGMLQuantizationType.__members__) <= set(table.index)
    assert table["id"].is_monotonic_increasing
    assert quants.row_bytes("Q4_K", 4096) == 2304
    assert table.loc["Q6_K", ["block", "bytes", "bpw"]].tolist() == [256, 210, 6.5625]
    encoded = table.index[table["can_encode"]]
    assert set(naive.WEIGHTED) <= set(table.index[table["uses_imatrix"]]) <= set(encoded)
    for qtype in encoded:
        x, weights = np.ones((1, 256), np.float32), np.ones(256, np.float32)
        assert quants.quantize(x, qtype, weights).shape == (1, quants.row_bytes(qtype, 256))


# ---- what was lost


def test_errors_by_hand():
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = 127, 0.4, -0.4  # Q8_0 steps by 1 here: both small weights are lost
    lost = quants.errors(x, "Q8_0")
    assert lost.max_abs == pytest.approx(0.4)
    assert lost.rmse == pytest.approx((2 * 0.4**2 / 32) ** 0.5)
    assert lost.relative == pytest.approx((2 * 0.4**2 / (127**2 + 2 * 0.4**2)) ** 0.5)
    assert lost.snr_db == pytest.approx(-20 * np.log10(lost.relative))
    assert lost.codes.nonzero()[0].tolist() == [128, 255] and lost.codes[128] == 31
    assert lost.bpw == 8.5 and lost.n_weights == 32 and not lost.imatrix


def test_fewer_bits_lose_more():
    x = normal(16, 512)
    lost = [quants.errors(x, qtype).rmse for qtype in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")]
    assert lost == sorted(lost) and lost[0] > 0


def test_errors_as_frame_json_and_html():
    lost = quants.errors(normal(2, 256), "Q4_K", np.ones(256, np.float32))
    frame = lost.to_frame()
    assert isinstance(frame, pd.DataFrame) and frame.loc[0, "qtype"] == "Q4_K" and bool(frame.loc[0, "imatrix"])
    record = json.loads(lost.to_json())
    assert record["schema"] == 1 and sum(record["rows"][0]["codes"]) == 512
    assert json.loads(quants.errors(normal(1, 32), "F32").to_json())["rows"][0]["snr_db"] is None
    assert "<table" in lost._repr_html_()


@pytest.mark.parametrize("qtype", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_histogram_counts_the_codes_that_decode(qtype):
    # one scale for all sub-blocks: then the decoded values are the codes, shifted and stretched
    x = np.tile(normal(32), 16)[None] if qtype.endswith("K") else normal(1, 32)
    data = quants.quantize(x, qtype)
    values = quants.dequantize(data, qtype, x.shape).ravel()
    used = np.sort(quants.code_histogram(data, qtype)[quants.code_histogram(data, qtype) > 0])
    assert used.sum() == x.size
    if qtype in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K"):
        np.testing.assert_array_equal(used, np.sort(np.unique(values, return_counts=True)[1]))


# ---- bad input


def refused(match, x=None, qtype="Q4_K", imatrix=None, **options):
    with pytest.raises(ValueError, match=match):
        quants.quantize(normal(4, 256) if x is None else x, qtype, imatrix, name=NAME, **options)


def test_row_length_is_refused():
    refused(
        r"^blk\.0\.attn_q\.weight: n_per_row=576 is not a multiple of the Q4_K block size 256\. Choose", normal(2, 576)
    )
    refused(r"n_per_row=40 is not a multiple of the Q8_0 block size 32\. Choose F16", normal(2, 40), "Q8_0")


def test_dtype_is_refused():
    refused(
        r"^blk\.0\.attn_q\.weight: dtype=float64, must be float32, float16 or bfloat16", normal(2, 256).astype(float)
    )
    refused("dtype=int64", np.zeros((2, 256), int))


def test_scalar_is_refused():
    refused(r"shape=\(\), must have at least one axis", np.float32(1))


def test_type_is_refused():
    refused("qtype='Q4_X', must be a ggml type", qtype="Q4_X")
    refused("qtype=I32, has no encoder", qtype="I32")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_non_finite_weight_is_named(bad, dtype):
    x = normal(2, 3, 256).astype(dtype)
    x[1, 2, 17] = bad
    out = np.full((2, 3, 144), 77, np.uint8)
    refused(r"^blk\.0\.attn_q\.weight: value=(nan|inf|-inf) in row 5, column 17, must be finite", x, out=out)
    assert (out == 77).all()
    for function in (quants.roundtrip, quants.errors):
        with pytest.raises(ValueError, match=r"^x: value=.* in row 5, column 17"):
            function(x, "Q4_K")


@pytest.mark.parametrize("n", [1, 15, 16, 17, 31, 1 << 14, (1 << 14) + 3])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_half_that_is_not_finite_is_found_in_any_place(n, dtype):
    """Also among the last ones, that do not fill sixteen lanes."""
    for place in {0, n // 2, n - 1}:
        x = np.ones((1, n), dtype)
        x[0, place] = -np.inf
        for qtype in ("F16", "BF16", "F32"):
            with pytest.raises(ValueError, match=f"row 0, column {place}, must be finite"):
                quants.quantize(x, qtype)


def test_importance_matrix_is_checked():
    weights = np.ones(256, np.float32)
    refused(
        r"^blk\.0\.attn_q\.weight: imatrix is float32 of shape \(255,\), must be float32 of shape \(256,\)",
        imatrix=weights[1:],
    )
    refused("imatrix is float64", imatrix=weights.astype(float))
    for bad in (-1, np.nan, np.inf):
        weights[3] = bad
        refused(r"imatrix\[3\]=.*, must be finite and not negative", imatrix=weights)


def test_out_is_checked():
    refused(
        r"^out: uint8 of shape \(4, 143\), must be a writeable C-contiguous uint8 of shape \(4, 144\)",
        out=np.empty((4, 143), np.uint8),
    )
    refused("^out: ", out=np.empty((4, 288), np.uint8)[:, ::2])
    with pytest.raises(ValueError, match="^out: float64"):
        quants.dequantize(np.zeros(18, np.uint8), "Q4_0", (32,), out=np.empty(32))


def test_bytes_to_decode_are_checked():
    data = np.zeros((2, 144), np.uint8)
    for match, arguments in (
        (r"^data: size=288 bytes, must be 144 for shape \(256,\) in Q4_K", (data, "Q4_K", (256,))),
        (r"^data: dtype=int8, must be uint8", (data.view(np.int8), "Q4_K", (2, 256))),
        (r"^data: n_per_row=100 is not a multiple", (data, "Q4_K", (2, 100))),
        (r"^data: shape=\(\), must have at least one axis", (data, "Q4_K", ())),
        (r"^data: qtype=I32, cannot be decoded", (data, "I32", (72,))),
    ):
        with pytest.raises(ValueError, match=match):
            quants.dequantize(*arguments)
    with pytest.raises(ValueError, match="qtype='F16', has no table of codes"):
        quants.code_histogram(data, "F16")
    with pytest.raises(ValueError, match="data: 145 of uint8, must be whole Q4_K blocks of 144"):
        quants.code_histogram(np.zeros(145, np.uint8), "Q4_K")
    with pytest.raises(ValueError, match=r"x: shape=\(0, 32\), must not be empty"):
        quants.errors(np.zeros((0, 32), np.float32), "Q4_0")


# ---- real weights


@pytest.mark.slow
@needs_libggml
@pytest.mark.parametrize("name", ["tiny", pytest.param("smollm2", marks=pytest.mark.long)])
def test_every_tensor_of_a_model_same_as_libggml(name):
    try:
        path = bundled.model_path(name)
    except FileNotFoundError:
        pytest.skip(f"{name} has not been fetched")
    searched = [t.name for t in GGML_TYPES.values() if t.family in ("legacy", "k-quant") and t.weighted_encoder]
    for tensor in ql.open(path):
        if len(tensor.shape) != 2:
            continue
        x, weights = tensor.floats(), rows.importances(tensor.shape[1])["squares"]
        for qtype in ("Q8_0", *searched):
            if tensor.shape[1] % quants.block_size(qtype):
                continue
            for imatrix in (None, weights):
                ours = quants.quantize(x, qtype, imatrix)
                np.testing.assert_array_equal(ours, ggml_library.quantize(x, qtype, imatrix), f"{tensor.name} {qtype}")


# ---- cost


def test_quantizing_adds_little_memory():
    """Any size adds at most 64 MiB to input and output: here 256 MiB of bfloat16, rows of it and one long row."""
    code = """
import resource
import ml_dtypes, numpy as np
from quantlab import quants
from quantlab.quants.ggml_types import GGML_TYPES
n = 1 << 27
x = np.full((n // 4096, 4096), 0.5, ml_dtypes.bfloat16)
out = np.ones((n // 4096, 4096 // 32 * 18), np.uint8)
quants.quantize(x[:8], "Q4_0")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
quants.quantize(x, "Q4_0", out=out)
quants.quantize(x.reshape(-1), "Q4_0", out=out.reshape(-1))
quants.quantize(x.T[:, :1024], "Q4_0")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    added = int(python(code)) * (1 if sys.platform == "darwin" else 1024)
    assert added <= 64 << 20


def test_import_compiles_nothing():
    code = """
from numba.core import event
with event.install_recorder("numba:compile") as recorder:
    from quantlab.quants import kquants, legacy
    import quantlab.quants as quants
    quants.types()
print(len(recorder.buffer))
"""
    assert int(python(code)) == 0


def test_same_bytes_without_the_compiler():
    code = """
from hashlib import sha256
import numpy as np, rows
from quantlab import quants
from quantlab.quants.ggml_types import GGML_TYPES
from quantlab.quants.ggml_types import GGML_TYPES
x, imatrix = rows.every_kind(256)[::6].copy(), rows.importances(256)["squares"]
table, digest = quants.types(), sha256()
np.seterr(all="ignore")
for qtype in table.index[table["can_encode"]]:
    try:
        data = quants.quantize(x, qtype, imatrix)
        digest.update(data)
        digest.update(quants.dequantize(data, qtype, x.shape))
        if GGML_TYPES[qtype].encoder:
            digest.update(quants.quantize(x, qtype))
    except ValueError as error:  # MXFP4 has no scale for numbers this small
        assert qtype == "MXFP4"
        digest.update(str(error).encode())
print(digest.hexdigest())
"""
    assert python(code, NUMBA_DISABLE_JIT="1") == python(code)


@pytest.mark.slow
@pytest.mark.parametrize("cpu", ["x86-64-v3", "x86-64"], ids=["AVX2", "SSE2"])
def test_same_bytes_on_smaller_processors(cpu, tmp_path):
    """The golden digests again, compiled for a processor without AVX-512, and without AVX."""
    environment = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    tests = [Path(__file__).with_name(f"test_{module}.py") for module in ("legacy", "kquants", "iquants")]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "golden", *map(str, tests)]
    subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[1])
