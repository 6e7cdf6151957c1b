"""transform/convert.py: what is written equals what llama.cpp's converters write, byte for byte."""

import hashlib
import json
import resource
import subprocess
import sys

import checkpoints
import ml_dtypes
import numpy as np
import pytest
from checkpoints import (
    DTYPES,
    GOLDEN,
    N_EMBD,
    N_FF,
    content_digest,
    tensors,
    write_checkpoint,
    write_meta,
    write_safetensors,
    write_torch,
)

import quantlab as ql
from quantlab.files.bundled import model_path
from quantlab.files.byte_range import PLAIN_DTYPES
from quantlab.files.torch_zip import read_torch
from quantlab.transform.convert import convert

CURRENT, OLD, BUNDLED = json.loads((GOLDEN / "convert.json").read_text()).values()
pytestmark = pytest.mark.filterwarnings("ignore:.*pre-tokenizer .* is not in llama.cpp's list")


@pytest.mark.parametrize("folder", CURRENT)
def test_files_equal_the_current_converters(tmp_path, folder):
    name, dtype, n_shards = folder.split("-")
    src = write_checkpoint(tmp_path / folder, name, dtype, int(n_shards))
    for outtype, digest in CURRENT[folder].items():
        path = convert(src, outtype=outtype, as_llama_cpp=True, progress=False)
        assert path == src / f"ggml-model-{outtype.upper()}.gguf"
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, outtype


@pytest.mark.filterwarnings("ignore:.* became zero in F16")
@pytest.mark.parametrize("outtype", BUNDLED)
def test_the_bundled_model_equals_the_current_converters(tmp_path, outtype):
    path = convert(model_path("tiny"), tmp_path / "a.gguf", outtype=outtype, progress=False)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == BUNDLED[outtype]


@pytest.mark.parametrize("folder", OLD)
def test_tensors_and_vocabulary_equal_those_of_2023(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(checkpoints, "N_VOCAB", 600)
    name, dtype, form = folder.split("-")
    if name == "meta":
        src = write_meta(tmp_path / folder, "llama1", dtype, int(form))
    elif form == "bin":
        src = write_checkpoint(tmp_path / folder, name, dtype, 3, "bin")
    else:
        src = write_checkpoint(tmp_path / folder, name, dtype, int(form))
    for outtype, digest in OLD[folder].items():
        path = convert(src, outtype=outtype, as_llama_cpp=True, progress=False)
        assert content_digest(path) == digest, outtype


@pytest.mark.parametrize("form", ["bin", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_files_give_the_same_bytes_as_safetensors(tmp_path, dtype, form):
    src = write_checkpoint(tmp_path / f"llama1-{dtype}-1", "llama1", dtype, 1, form)
    path = convert(src, outtype=dtype.lower(), progress=False)
    names = [tensor.name for tensor in ql.open(path)]
    same = write_checkpoint(tmp_path / "same" / f"llama1-{dtype}-1", "llama1", dtype)
    other = ql.open(convert(same, outtype=dtype.lower(), progress=False))
    assert sorted(names) == sorted(other.names)
    for tensor in ql.open(path):
        assert np.array_equal(tensor.load(), other.tensor(tensor.name).load())


def test_a_single_file_is_enough_with_its_configuration(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1")
    whole = convert(src, progress=False).read_bytes()
    assert convert(src / "model.safetensors", src / "b.gguf", progress=False).read_bytes() == whole
    meta = write_meta(tmp_path / "meta", n_parts=1)
    first = convert(meta, progress=False)
    assert content_digest(convert(meta / "consolidated.00.pth", meta / "b.gguf", progress=False)) == content_digest(
        first
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_keeps_the_checkpoints_type(tmp_path, dtype):
    model = ql.open(convert(write_checkpoint(tmp_path / "m", "llama1", dtype), progress=False))
    assert model.tensor("blk.0.attn_q.weight").qtype == dtype
    assert model.tensor("output_norm.weight").qtype == "F32"


def test_an_opened_checkpoint_is_the_file_it_would_become(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama2", "BF16", 3)
    lazy, written = ql.open(src), ql.open(convert(src, progress=False))
    assert list(lazy.metadata) == list(written.metadata) and lazy.names == written.names
    assert lazy.hparams == written.hparams and lazy.vocab.digest == written.vocab.digest
    for tensor in lazy:
        assert np.array_equal(tensor.load(), written.tensor(tensor.name).load())
        assert np.array_equal(tensor.rows(1, 2), written.tensor(tensor.name).rows(1, 2)) if tensor.nrows > 1 else True


def test_values_outside_f16_are_counted(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1", "F32")
    weights = tensors("llama1")
    weights["lm_head.weight"][0, :3] = [1e5, -1e9, 1e-20]
    write_safetensors(src / "model.safetensors", weights)
    with (
        pytest.warns(UserWarning, match=r"1 values of 1 tensors became zero in F16"),
        pytest.warns(UserWarning, match=r"2 values of 1 tensors became infinite in F16, most of them in output.weight"),
    ):
        convert(src, outtype="f16", progress=False)


def test_the_plan_line_comes_first(tmp_path, capsys):
    src = write_checkpoint(tmp_path / "m", "llama1")
    path = convert(src)
    plan = capsys.readouterr().err.splitlines()[0]
    assert f"{len(ql.open(path))} tensors, {path.stat().st_size / 2**20:.1f} MiB to write (" in plan
    assert "GiB are free), about" in plan and "MiB of memory" in plan


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_that_are_not_finite_are_refused_and_leave_nothing(tmp_path, dtype, value):
    src = write_checkpoint(tmp_path / "m", "llama1", dtype)
    weights = {name: x.astype(DTYPES[dtype]) for name, x in tensors("llama1").items()}
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    write_safetensors(src / "model.safetensors", weights)
    before = sorted(src.iterdir())
    with pytest.raises(
        ValueError, match=f"blk.1.ffn_up.weight: value {value} at row 5, column 7; every weight must be"
    ):
        convert(src, progress=False)
    assert sorted(src.iterdir()) == before


@pytest.mark.parametrize("outtype", ["auto", "f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("dtype", ["I8", "I16", "I32", "I64"])
def test_whole_numbers_are_refused_as_weights(tmp_path, monkeypatch, dtype, outtype):
    """A checkpoint that another program has quantized already."""
    monkeypatch.setitem(DTYPES, dtype, PLAIN_DTYPES[dtype])
    src = write_checkpoint(tmp_path / "m", "llama1", "BF16")
    weights = {name: x.astype(DTYPES["BF16"]) for name, x in tensors("llama1").items()}
    weights["model.layers.0.mlp.up_proj.weight"] = np.ones((N_FF, N_EMBD), PLAIN_DTYPES[dtype])
    write_safetensors(src / "model.safetensors", weights)
    with pytest.raises(ValueError, match="blk.0.ffn_up.weight: dtype=int.*, must be floating-point weights"):
        convert(src, outtype=outtype, progress=False)


def test_the_largest_finite_values_pass(tmp_path):
    for dtype, number in DTYPES.items():
        src = write_checkpoint(tmp_path / dtype, "llama1", dtype)
        weights = {name: x.astype(number) for name, x in tensors("llama1").items()}
        weights["lm_head.weight"][0, :2] = [ml_dtypes.finfo(number).max, ml_dtypes.finfo(number).min]
        write_safetensors(src / "model.safetensors", weights)
        convert(src, progress=False)


def test_an_existing_output_is_refused(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1")
    convert(src, progress=False)
    with pytest.raises(FileExistsError, match="ggml-model-BF16.gguf: exists already"):
        convert(src, progress=False)
    convert(src, overwrite=True, progress=False)


def test_a_matrix_with_strides_gives_the_same_bytes(tmp_path):
    """Meta's parts may hold views, here every matrix as the transpose of its storage."""
    src = write_meta(tmp_path / "m", n_parts=1)
    expected = content_digest(convert(src, progress=False))
    stored = read_torch(src / "consolidated.00.pth")
    weights = {name: np.asfortranarray(x.rows(0, x.nrows).reshape(x.shape)) for name, x in stored.items()}
    write_torch(src / "consolidated.00.pth", weights)
    assert content_digest(convert(src, overwrite=True, progress=False)) == expected


def test_an_unknown_outtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="outtype='q4_k', must be one of auto f32 f16 bf16 q8_0"):
        convert(write_checkpoint(tmp_path / "m", "llama1"), outtype="q4_k", progress=False)


def quantlab(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "quantlab.cli", *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on file size stands in for the full disk: both end a write half-way."""
    src = write_checkpoint(tmp_path / "m", "llama1")
    before = sorted(src.iterdir())
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = quantlab("convert", src, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("File too large. Free some space or choose another folder.")
    assert "Traceback" not in done.stderr and sorted(src.iterdir()) == before


def test_no_file_of_the_checkpoint_is_replaced(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1")
    before = (src / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"config\.json: is the input, must be another file"):
        convert(src, src / "config.json", overwrite=True, progress=False)
    assert (src / "config.json").read_bytes() == before


def test_the_word_convert(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1")
    done = quantlab("convert", src, "--outtype", "f16", "--outfile", tmp_path / "a.gguf")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "a.gguf")
    done = quantlab("convert", tmp_path / "nothing")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.startswith("quantlab: ")
        and "no such file or folder" in done.stderr
        and done.stderr.count("\n") == 1
    )
