"""transform/split.py: shards byte for byte as llama-gguf-split writes them; merged, the bytes that were split."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import made_models
import numpy as np
import pytest

import quantlab as ql
from quantlab.files.bundled import model_path
from quantlab.files.gguf_file import TensorSpec, read_header, write_gguf
from quantlab.transform import split as module

GOLDEN = Path(__file__).parent / "golden" / "split.json"
CASES = {  # options of llama-gguf-split → the same here
    "": {},
    "--split-max-tensors 20": dict(max_tensors=20),
    "--split-max-size 1M": dict(max_size="1M"),
    "--split-max-tensors 30 --no-tensor-first-split": dict(max_tensors=30, no_tensor_first_split=True),
    "--split-max-size 2M --no-tensor-first-split": dict(max_size="2M", no_tensor_first_split=True),
}


@pytest.fixture
def whole(tmp_path):
    return made_models.made_gguf(tmp_path / "wide.gguf")


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("options", CASES)
def test_shards_equal_llama_gguf_splits(whole, options):
    golden = json.loads(GOLDEN.read_text())["digests"]
    result = ql.split(whole, whole.with_name("x"), **CASES[options])
    assert {shard.path.name: sha256(shard.path) for shard in result.shards} == golden[options]
    assert [shard.nbytes for shard in result.shards] == [shard.path.stat().st_size for shard in result.shards]


@pytest.mark.parametrize("options", CASES)
def test_merging_gives_the_bytes_that_were_split(whole, options):
    shards = ql.split(whole, whole.with_name("x.gguf"), **CASES[options]).shards
    merged = ql.merge(shards[-1].path)
    assert merged.name == "x.gguf" and merged.read_bytes() == whole.read_bytes()


def test_the_shards_open_as_one_model(whole):
    first = ql.split(whole, whole.with_name("x"), max_tensors=20).shards[0]
    assert ql.diff(whole, first.path).is_same


def test_a_limit_in_bytes_is_a_number_too(whole):
    by_text, by_number = (ql.split(whole, max_size=size, dry_run=True) for size in ("1M", 1_000_000))
    assert [len(s.tensors) for s in by_text.shards] == [len(s.tensors) for s in by_number.shards]


def test_a_tensor_beyond_the_limit_gets_a_shard_of_its_own(whole):
    shards = ql.split(whole, max_size=1000, dry_run=True).shards
    assert max(len(shard.tensors) for shard in shards if any(t.nbytes > 1000 for t in shard.tensors)) == 1


def test_a_dry_run_writes_nothing(whole):
    before = sorted(whole.parent.iterdir())
    result = ql.split(whole, max_tensors=40, dry_run=True)
    assert sorted(whole.parent.iterdir()) == before
    assert json.loads(result.to_json())["rows"][0]["tensors"] == 40 and "00001-of-00002" in str(result)


def test_another_alignment_comes_back(tmp_path):
    x = np.ones((2, 32), np.float32)
    specs = [TensorSpec(name, x.shape, "F32") for name in "abc"]
    path = tmp_path / "a.gguf"
    write_gguf(path, {"general.alignment": np.uint32(128)}, specs, [x, x, x])
    merged = ql.merge(ql.split(path, tmp_path / "x", max_tensors=1).shards[0].path)
    assert merged.read_bytes() == path.read_bytes()


def test_existing_shards_are_kept_or_replaced_whole(whole):
    shards = ql.split(whole, whole.with_name("x"), max_tensors=40).shards
    shards[0].path.unlink()
    shards[1].path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"x-00002-of-00002.gguf: exists already"):
        ql.split(whole, whole.with_name("x"), max_tensors=40)
    assert not shards[0].path.exists() and shards[1].path.read_bytes() == b"mine"
    ql.split(whole, whole.with_name("x"), max_tensors=40, overwrite=True)
    with pytest.raises(FileExistsError, match=r"wide.gguf: exists already"):
        ql.merge(shards[0].path, whole)
    assert ql.merge(shards[0].path, whole, overwrite=True).exists()


def test_a_failure_leaves_no_shard(whole, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_gguf", full)
    before = sorted(whole.parent.iterdir())
    with pytest.raises(OSError, match="Free some space"):
        ql.split(whole, max_tensors=40)
    assert sorted(whole.parent.iterdir()) == before


def test_shards_that_do_not_belong_together_are_refused(whole, tmp_path):
    two = [shard.path for shard in ql.split(whole, tmp_path / "two", max_tensors=40).shards]
    three = [shard.path for shard in ql.split(whole, tmp_path / "three", max_tensors=30).shards]
    shutil.copy(three[1], two[1])
    with pytest.raises(ValueError, match=r"two-00002-of-00002.gguf: split.no=1, need 1 of 2"):
        ql.merge(two[0])
    two[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"two-00002-of-00002.gguf: this shard of 2 is missing"):
        ql.merge(two[0])


@pytest.mark.parametrize("count", ["x", np.int32([1, 2]), np.float32(2), np.float32("nan"), ["x"]])
def test_a_count_that_is_no_number_is_refused(tmp_path, count):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"split.count": count}, [], [])
    for word in (ql.split, ql.merge):
        with pytest.raises(ValueError, match=r"a.gguf: split.count=.*, need a whole number"):
            word(path, tmp_path / "b")


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_file_with_the_keys_of_shards_is_freed_of_them(tmp_path, count):
    path = tmp_path / "a.gguf"
    write_gguf(path, {"general.name": "a", "split.count": np.uint16(count)}, [], [])
    with pytest.raises(ValueError, match=r"a.gguf: has no shard numbers, so the output has no name. Give outfile"):
        ql.merge(path)
    assert read_header(ql.merge(path, tmp_path / "b.gguf")).metadata == {"general.name": "a"}


def test_bad_input_is_refused(whole):
    with pytest.raises(IsADirectoryError, match=r"is a folder, must be a GGUF file"):
        ql.split(whole.parent)
    with pytest.raises(ValueError, match=r"split.count is missing, must be one of several shards"):
        ql.merge(whole)
    shard = ql.split(whole, whole.with_name("x"), max_tensors=40).shards[0].path
    with pytest.raises(ValueError, match=r"is a shard already, must be a whole file"):
        ql.split(shard)
    with pytest.raises(ValueError, match=r"max_tensors and max_size: must not both"):
        ql.split(whole, max_tensors=1, max_size="1G")
    with pytest.raises(ValueError, match=r"max_tensors=0, must be at least 1. Choose a larger number."):
        ql.split(whole, max_tensors=0)
    for size in ("0M", "-1M", "1K", "M", "", "1.5G", "²M", 0):
        with pytest.raises(ValueError, match=r"max_size=.*, must be a positive number"):
            ql.split(whole, max_size=size)
    assert read_header(shard).metadata["split.count"] == 2


def test_the_words_split_and_merge(whole):
    def quantlab(*arguments):
        command = [sys.executable, "-m", "quantlab.cli", *arguments]
        environment = os.environ | {"TQDM_DISABLE": "1"}
        return subprocess.run(command, cwd=whole.parent, capture_output=True, text=True, env=environment)

    done = quantlab("split", "--split-max-tensors", "40", "wide.gguf", "x", "--json", "-")
    rows = json.loads(done.stdout)["rows"]
    assert done.returncode == 0 and [row["tensors"] for row in rows] == [40, 35]
    done = quantlab("merge", "x-00002-of-00002.gguf", "y.gguf")
    assert done.stdout == "y.gguf\n" and sha256(whole.with_name("y.gguf")) == sha256(whole)
    done = quantlab("merge", "wide.gguf")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "must be one of several shards" in done.stderr


# ---- shards, and files without tensors, are quantized


def test_one_file_of_weights_may_be_called_a_shard(tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(model_path("tiny"), folder)
    only = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert ql.quantize(only, tmp_path / "out.gguf", ftype="Q4_0").stat().st_size < only.stat().st_size


def test_a_vocabulary_alone_has_metadata_and_no_tensors(tmp_path):
    """As llama-quantize writes it; a first shard that holds only metadata is one too."""
    metadata = ql.open("tiny").metadata
    write_gguf(tmp_path / "vocab.gguf", metadata, [], [])
    out = ql.quantize(tmp_path / "vocab.gguf", tmp_path / "out.gguf", ftype="Q8_0")
    found = ql.open(out)
    tokens = list(found.metadata["tokenizer.ggml.tokens"])
    assert len(found) == 0 and found.ftype == 7 and tokens == list(metadata["tokenizer.ggml.tokens"])
    buffer = io.BytesIO()
    ql.quantize(tmp_path / "vocab.gguf", buffer, ftype="Q8_0")
    assert buffer.getvalue() == out.read_bytes()
    table = ql.sizes(tmp_path / "vocab.gguf").to_frame()
    assert (table["bytes"] == 0).all() and (table["bpw"] == 0).all()
    assert ql.verify(out, tmp_path / "vocab.gguf").verdict == "identical"


def test_a_first_shard_without_tensors_is_kept(tmp_path):
    whole = ql.quantize("tiny", tmp_path / "whole.gguf", ftype="F16")
    shards = ql.split(whole, tmp_path / "part", max_tensors=20, no_tensor_first_split=True).shards
    first = ql.quantize(shards[0].path, tmp_path / "q.gguf", ftype="Q8_0", keep_split=True)
    assert first.name == f"q-00001-of-{len(shards):05d}.gguf" and len(read_header(first).tensors) == 0
    assert ql.open(first).names == ql.open(shards[0].path).names
