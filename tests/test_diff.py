"""transform/diff.py and transform/compare.py: every kind of difference is found, named and measured."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from made_models import NARROW, made_gguf, made_shards

import quantlab as ql
from quantlab.files.bundled import model_path
from quantlab.files.gguf_file import TensorSpec, read_header, write_gguf
from quantlab.transform.compare import metadata_changes


def write(path, metadata, **tensors):
    """A file of F32 tensors, in the order given."""
    specs = [TensorSpec(name, x.shape, "F32") for name, x in tensors.items()]
    write_gguf(path, metadata, specs, list(tensors.values()))
    return path


def test_a_model_is_the_same_as_its_shards_but_for_the_order(tmp_path):
    found = ql.diff(made_gguf(tmp_path / "a.gguf"), made_shards(tmp_path))
    assert not found.tensors["change"].any() and not found.metadata
    assert not found.same_order and not found.is_same and "different order" in str(found)


def test_same_files_are_the_same(tmp_path):
    path = made_gguf(tmp_path / "a.gguf")
    found = ql.diff(path, path)
    assert found.is_same and "the same: 75 tensors and all metadata" in str(found)
    assert found.tensors["differing"].sum() == 0 and found.tensors["relative"].sum() == 0


def test_a_checkpoint_is_the_same_as_its_conversion(tmp_path):
    assert ql.diff("tiny", ql.convert(model_path("tiny"), tmp_path / "tiny.gguf")).is_same


def test_every_kind_of_change(tmp_path):
    x = np.arange(64, dtype=np.float32).reshape(2, 32)
    a = write(tmp_path / "a.gguf", {}, same=x, gone=x, shape=x, bytes=x)
    b = write(tmp_path / "b.gguf", {}, same=x, new=x, shape=x[:1], bytes=np.where(x == 5, np.float32(9), x))
    found = ql.diff(a, b)
    table = found.tensors.set_index("name")
    assert table["change"].to_dict() == {
        "same": "",
        "gone": "removed",
        "shape": "shape",
        "bytes": "bytes",
        "new": "added",
    }
    assert table.loc["bytes", "differing"] == 1 and table.loc["bytes", "blocks"] == 64
    assert table.loc["bytes", "max_abs"] == 4 and table.loc["bytes", "rmse"] == pytest.approx(0.5)  # sqrt(4² / 64)
    assert table.loc["bytes", "relative"] == pytest.approx(0.5 / np.sqrt(np.square(x).mean()))
    text = str(found)
    for words in ("1 same", "1 removed", "1 added", "1 of another shape", "1 with other bytes", "F32 (2, 32)"):
        assert words in text


def test_types_are_compared_by_value(tmp_path):
    a = made_gguf(tmp_path / "a.gguf", NARROW)
    b = ql.quantize(a, tmp_path / "b.gguf", ftype="Q8_0")
    row = ql.diff(a, b).tensors.set_index("name").loc["blk.0.attn_q.weight"]
    assert row["change"] == "type" and row["blocks"] == 0 and 0.001 < row["relative"] < 0.01
    x, y = (ql.open(path).tensor("blk.0.attn_q.weight").floats() for path in (a, b))
    assert row["rmse"] == pytest.approx(np.sqrt(np.square(x - y).mean()), rel=1e-6)


def test_differing_blocks_are_counted(tmp_path):
    a = ql.quantize(made_gguf(tmp_path / "m.gguf"), tmp_path / "a.gguf", ftype="Q4_K_M")
    raw = bytearray(a.read_bytes())
    info = next(t for t in read_header(a).tensors if t.name == "blk.0.ffn_up.weight")
    for block in (0, 3, 511):
        raw[info.offset + 144 * block + 20] ^= 0xFF
    b = tmp_path / "b.gguf"
    b.write_bytes(raw)
    table = ql.diff(a, b).tensors.set_index("name")
    assert table["differing"].sum() == table.loc["blk.0.ffn_up.weight", "differing"] == 3
    assert table.loc["blk.0.ffn_up.weight", "blocks"] == 512


def test_infinite_and_missing_values_leave_json_valid(tmp_path):
    x = np.ones((1, 32), np.float32)
    a = write(tmp_path / "a.gguf", {}, x=x, y=x)
    b = write(tmp_path / "b.gguf", {}, x=np.where(np.arange(32) == 3, np.nan, x).astype(np.float32), y=x * np.inf)
    rows = json.loads(ql.diff(a, b).to_json())["rows"]
    assert [row["differing"] for row in rows] == [1, 32] and rows[0]["rmse"] is rows[1]["max_abs"] is None


def test_metadata_changes():
    a = {"kept": 1.5, "gone": "x", "n": np.uint32(3), "list": ["a", "b", "c", "d", "e"], "nan": np.float32("nan")}
    b = {"nan": np.float32("nan"), "kept": 1.5, "n": np.int32(3), "list": ["a", "b", "c", "d", "f"], "new": True}
    changes = {change.key: change for change in metadata_changes(a, b)}
    assert {key: change.change for key, change in changes.items()} == {
        "gone": "removed",
        "n": "type",
        "list": "changed",
        "new": "added",
    }
    assert str(changes["n"]) == "n: type, uint32 3 → int32 3"
    assert "[4]=" in str(changes["list"]) and "'e'" in str(changes["list"]) and "'f'" in str(changes["list"])


def test_arrays_of_metadata():
    one, other = np.arange(4, dtype=np.float32), np.arange(4, dtype=np.float32)
    assert metadata_changes({"x": one}, {"x": other}) == []
    other[2] = 9
    assert "[2]=" in str(metadata_changes({"x": one}, {"x": other})[0])
    assert metadata_changes({"x": one}, {"x": one.astype(np.float64)})[0].change == "type"
    assert metadata_changes({"x": [["a"], ["b"]]}, {"x": [["a"], ["c"]]})[0].change == "changed"
    assert metadata_changes({"x": [one]}, {"x": [one + 1]})[0].change == "changed"
    assert metadata_changes({"x": [one]}, {"x": [one.astype(np.float64)]})[0].change == "type"


def test_a_strangers_values_cannot_write_to_the_terminal(tmp_path):
    x = np.ones((1, 32), np.float32)
    a = write(tmp_path / "a.gguf", {"key": "v\x1b[31m"}, x=x)
    found = ql.diff(a, write(tmp_path / "b.gguf", {"key": "<b>"}, x=x))
    assert "\x1b" not in str(found) and r"v\x1b[31m" in str(found)
    assert "<b>" not in found._repr_html_()


def test_the_word_diff(tmp_path):
    a = made_gguf(tmp_path / "a.gguf", NARROW)
    b = ql.quantize(a, tmp_path / "b.gguf", ftype="Q8_0")

    def quantlab(*arguments):
        command = [sys.executable, "-m", "quantlab.cli", "diff", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"})

    assert quantlab(a, a).returncode == 0
    done = quantlab(a, b, "--json", "-")
    assert done.returncode == 1 and json.loads(done.stdout)["protocol"]["same"] is False
    assert "metadata general.file_type: changed, uint32 1 → uint32 7" in done.stderr
    done = quantlab(a, tmp_path / "none.gguf")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "none.gguf" in done.stderr
