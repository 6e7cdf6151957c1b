"""transform/layout.py: a file's types as lines for --tensor-type-file, and on another file."""

import hashlib

import numpy as np
import pytest
from made_models import NARROW, WIDE, made_gguf
from typer.testing import CliRunner

from quantlab.cli import app
from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.files.model import open as open_model
from quantlab.transform.diff import diff
from quantlab.transform.layout import layout, layout_lines
from quantlab.transform.mixture import read_tensor_types
from quantlab.transform.plan import plan
from quantlab.transform.quantize import quantize

SMALL = WIDE | {"n_layer": 2}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def files(tmp_path):
    source = made_gguf(tmp_path / "f16.gguf", SMALL)
    return source, quantize(source, tmp_path / "q.gguf", ftype="Q3_K_M", tensor_types=[("blk.1.ffn_up", "Q5_K")])


def test_a_layout_that_is_applied_gives_the_same_bytes(files, tmp_path):
    source, quantized = files
    done = CliRunner().invoke(app, ["quantize", str(source), str(tmp_path / "b.gguf"), "--layout-of", str(quantized)])
    assert done.exit_code == 0, done.output
    assert sha256(tmp_path / "b.gguf") == sha256(quantized)


def test_a_layout_is_printed_as_a_tensor_type_file(files, tmp_path):
    source, quantized = files
    done = CliRunner().invoke(app, ["inspect", str(quantized), "--layout"])
    (tmp_path / "types.txt").write_text(done.stdout)
    pairs = read_tensor_types(tmp_path / "types.txt")
    assert done.stdout.splitlines() == layout_lines(layout(open_model(quantized)))
    assert (r"^blk\.1\.ffn_up\.weight$", "Q5_K") in pairs and not any("norm" in regex for regex, _ in pairs)
    other = quantize(source, tmp_path / "c.gguf", ftype="Q3_K_M", tensor_types=pairs)
    assert sha256(other) == sha256(quantized)


def test_what_differs_between_two_layouts_is_said(files, tmp_path):
    source, quantized = files
    other = quantize(source, tmp_path / "plain.gguf", ftype="Q3_K_M")
    assert "layout ffn_up.weight: Q3_K → Q5_K in 1 layers: 1" in str(diff(other, quantized))


def test_a_layout_of_another_depth_is_refused_tensor_by_tensor(files, tmp_path):
    _, quantized = files
    deeper = made_gguf(tmp_path / "deep.gguf", WIDE | {"n_layer": 3})
    refusals = plan(deeper, tmp_path / "out.gguf", layout_of=quantized).refusals
    assert "blk.2.attn_k.weight: is missing from the layout of q.gguf. Use a file of the same model." in refusals
    assert sum(line.startswith("blk.2.") for line in refusals) == len(refusals) == 7
    with pytest.raises(ValueError, match=r"blk.2.attn_k.weight: is missing from the layout of q.gguf"):
        quantize(deeper, tmp_path / "out.gguf", layout_of=quantized)
    assert not (tmp_path / "out.gguf").exists()


def test_bad_input(files, tmp_path):
    source, quantized = files
    narrow = made_gguf(tmp_path / "narrow.gguf", NARROW)
    refusals = plan(narrow, tmp_path / "out.gguf", layout_of=quantized).refusals
    assert "blk.0.attn_k.weight: n_per_row=96 is not a multiple of the Q3_K block size 256." in refusals
    x = np.ones((2, 32), np.float32)
    other = tmp_path / "other.gguf"
    write_gguf(other, {"general.architecture": "gpt2"}, [TensorSpec("blk.0.attn_q.weight", x.shape, "F32")], [x])
    with pytest.raises(ValueError, match="other.gguf: architecture=gpt2, must be llama, the source's"):
        quantize(source, tmp_path / "out.gguf", layout_of=other)
    with pytest.raises(ValueError, match="must be exactly one of them"):
        quantize(source, tmp_path / "out.gguf")
    with pytest.raises(ValueError, match="pure: has no meaning with layout_of"):
        quantize(source, tmp_path / "out.gguf", layout_of=quantized, pure=True)
