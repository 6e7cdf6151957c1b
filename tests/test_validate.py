"""Encoded rows are refused where llama.cpp refuses them, whatever made a scale infinite."""

import checkpoints
import llama_models
import ml_dtypes
import numpy as np
import pytest

import quantlab as ql
from quantlab import quants
from quantlab.files.gguf_file import read_header
from quantlab.quants.validate import check_encoded, check_stored, invalid_blocks, is_valid

BLOCKS = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K".split()
DECODED = "F16 BF16 F32 IQ4_NL IQ4_XS IQ3_S IQ3_XXS IQ2_S IQ2_XS IQ2_XXS IQ1_S IQ1_M TQ1_0 TQ2_0".split() + BLOCKS
VALUE = r"(1e\+09|9\.98244e\+08)"  # as float32 and as bfloat16
LARGEST = {"Q4_0": 65504 * 8, "Q5_0": 65504 * 16, "Q8_0": 65504 * 127, "Q4_1": 65504 * 15, "Q5_1": 65504 * 31}


@pytest.mark.parametrize("qtype", DECODED)
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")  # gguf's decoders meet the infinite scales
def test_a_block_is_invalid_where_its_weights_are_not_finite(qtype, rng):
    n = quants.block_size(qtype)
    data = rng.integers(0, 256, (4096, 2 * quants.block_bytes(qtype)), np.uint8)
    finite = np.isfinite(quants.dequantize(data, qtype, (4096, 2 * n))).reshape(4096, 2, n).all(axis=2)
    assert np.array_equal(invalid_blocks(data, qtype), ~finite)
    assert 0 < finite.sum() < finite.size
    valid = finite.all(axis=1)
    assert is_valid(data[valid], qtype) and not any(is_valid(row[None], qtype) for row in data[~valid][:50])


@pytest.mark.parametrize("qtype", ["I8", "I32", "NVFP4"])
def test_types_without_a_rule_accept_all_bytes(qtype, rng):
    assert is_valid(rng.integers(0, 256, (64, 8 * quants.block_bytes(qtype)), np.uint8), qtype)


def test_mxfp4_refuses_its_nan():
    data = np.zeros((2, 34), np.uint8)
    data[1, 17] = 254
    assert is_valid(data, "MXFP4")
    data[1, 17] = 255
    assert invalid_blocks(data, "MXFP4").tolist() == [[False, False], [False, True]]


def spoiled(tmp_path, value: float):
    """A checkpoint in float32 one weight of which is `value`."""
    folder = llama_models.write_model(tmp_path / "model", "llama2")
    weights = {key: 0.1 * x for key, x in checkpoints.tensors("llama2").items()}
    weights["model.layers.0.mlp.down_proj.weight"][3, 5] = value
    checkpoints.write_weights(folder, weights, 1, "safetensors")
    return folder


def damage(path, name: str, row: int, block: int) -> None:
    """Make the scale of one Q4_0 block of a GGUF file infinite."""
    tensor = ql.open(path).tensor(name)
    offset = next(entry.offset for entry in read_header(path).tensors if entry.name == name)
    with open(path, "r+b") as file:
        file.seek(offset + row * quants.row_bytes("Q4_0", tensor.shape[-1]) + 18 * block)
        file.write(b"\x00\x7c")


# ---- weights that overflow


def large(value: float, dtype=np.float32) -> np.ndarray:
    """Small weights, and one of `value` in row 3, column 261."""
    x = np.random.default_rng(0).standard_normal((5, 512)).astype(dtype)
    x[3, 261] = value
    return x


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["F32", "BF16"])
@pytest.mark.parametrize("with_matrix", [False, True])
@pytest.mark.parametrize("qtype", BLOCKS)
def test_an_infinite_scale_is_refused(qtype, with_matrix, dtype):
    x, imatrix = large(-1e9, dtype), np.ones(512, np.float32) if with_matrix else None
    message = (
        rf"^blk\.0\.x: value=-{VALUE} in row 103, column 261, makes the scale of its {qtype} block infinite\. Choose"
    )
    with pytest.raises(ValueError, match=message):
        quants.quantize(x, qtype, imatrix, name="blk.0.x", first_row=100)
    with pytest.raises(ValueError, match=r"^w: value=.* in row 3, column 261, makes the scale"):
        quants.roundtrip(x, qtype, imatrix, name="w")
    assert np.isfinite(quants.roundtrip(large(1e4, dtype), qtype, imatrix)).all()


@pytest.mark.parametrize("qtype", LARGEST)
def test_the_largest_weight_that_a_scale_can_hold(qtype):
    x = np.zeros((1, 32), np.float32)
    x[0, 7] = LARGEST[qtype]
    assert np.isfinite(quants.roundtrip(x, qtype)).all()
    x[0, 7] *= 1.0003  # rounds to 65520 steps, the first number that no half holds
    with pytest.raises(ValueError, match=f"makes the scale of its {qtype} block infinite"):
        quants.quantize(x, qtype)


def test_a_brain_float_can_overflow_too():
    with pytest.raises(ValueError, match=r"value=3\.4\d*e\+38 in row 3, column 261, exceeds the range of BF16"):
        quants.quantize(large(3.4e38), "BF16")


@pytest.mark.parametrize("ftype", ["Q4_0", "Q8_0", "Q4_K_M", "F16"])
@pytest.mark.parametrize("outtype", ["f32", "bf16"])
def test_quantize_and_compare_name_tensor_row_and_value(tmp_path, outtype, ftype):
    folder = spoiled(tmp_path, 1e9)
    base = ql.convert(folder, tmp_path / "base.gguf", outtype=outtype, progress=False)
    message = rf"^blk\.0\.ffn_down\.weight: value={VALUE} in row 3, column 5, (makes|exceeds)"
    for src in (base, folder):
        with pytest.raises(ValueError, match=message):
            ql.quantize(src, tmp_path / "q.gguf", ftype=ftype)
    assert not list(tmp_path.glob("q.gguf*"))
    (tmp_path / "text.txt").write_text("the quick brown fox " * 60)
    for mode in ("float", "ggml-cpu"):
        with pytest.raises(ValueError, match=message):
            ql.compare(base, [ftype], tmp_path / "text.txt", n_ctx=16, chunks=1, mode=mode, progress=False)


def test_convert_refuses_what_q8_0_cannot_hold(tmp_path):
    message = r"^blk\.0\.ffn_down\.weight: value=1e\+09 in row 3, column 5, makes the scale of its Q8_0 block infinite"
    with pytest.raises(ValueError, match=message):
        ql.convert(spoiled(tmp_path, 1e9), tmp_path / "q.gguf", outtype="q8_0", progress=False)
    assert not (tmp_path / "q.gguf").exists()


# ---- files that have them


def test_verify_and_quantize_refuse_blocks_that_are_invalid(tmp_path):
    base = ql.convert(spoiled(tmp_path, 0.5), tmp_path / "base.gguf", outtype="f32", progress=False)
    path = ql.quantize(base, tmp_path / "q.gguf", ftype="Q4_0")
    damage(path, "blk.0.ffn_down.weight", row=3, block=1)
    found = ql.verify(path, base)
    assert found.verdict == "other"
    message = "the scale of the Q4_0 block in row 3, columns 32:64, must be finite"
    assert f"blk.0.ffn_down.weight: {message}; llama.cpp refuses it" in found.misfits
    for ftype in ("COPY", "Q8_0"):
        with pytest.raises(ValueError, match=f"blk.0.ffn_down.weight: {message}. Download the file again"):
            ql.quantize(path, tmp_path / "again.gguf", ftype=ftype, allow_requantize=True)
    (tmp_path / "text.txt").write_text("the quick brown fox " * 60)
    with pytest.raises(ValueError, match=f"blk.0.ffn_down.weight: {message}"):
        ql.perplexity(path, tmp_path / "text.txt", n_ctx=16, chunks=1, progress=False)


def test_what_is_stored_is_refused_by_place():
    x = np.ones((2, 4), np.float32)
    x[1, 2] = np.nan
    with pytest.raises(ValueError, match=r"^w: the value in row 11, column 2, must be finite"):
        check_stored(x.view(np.uint8), "F32", name="w", first_row=10)
    check_stored(x[:1].view(np.uint8), "F32", name="w")
    check_encoded(quants.quantize(np.ones((2, 32), np.float32), "Q4_0"), np.ones((2, 32), np.float32), "Q4_0")
