"""files/model.py and how its data reach a plan: files and kind known, headers read once, no kernel to print."""

import pytest
from checkpoints import write_checkpoint
from made_models import NARROW, made_gguf, made_imatrix, made_shards

from quantlab import quants
from quantlab.files import gguf_shards, model
from quantlab.files.imatrix_file import as_matrix, read_imatrix
from quantlab.files.model import as_model
from quantlab.files.model import open as open_model
from quantlab.transform.job import Options, make_job
from quantlab.transform.plan import plan


def test_a_plan_prints_without_kernels(tmp_path, monkeypatch):
    planned = plan(made_gguf(tmp_path / "a.gguf", NARROW), tmp_path / "b.gguf", ftype="Q8_0")
    monkeypatch.setattr(quants, "quantize", None)
    assert planned.seconds > 0 and "time" in str(planned) and '"seconds"' in planned.to_json()


def test_headers_are_read_once(tmp_path, monkeypatch):
    first, read = made_shards(tmp_path, NARROW), []
    for module in (model, gguf_shards):
        plain = module.read_header
        monkeypatch.setattr(module, "read_header", lambda path, plain=plain: read.append(path) or plain(path))
    job = make_job(first, tmp_path / "out.gguf", Options(ftype="Q8_0", keep_split=True))
    assert [len(output.steps) for output in job.outputs] == [len(job.steps) // 2, len(job.steps) - len(job.steps) // 2]
    assert len(set(read)) == len(job.files) == 2 and len(read) <= 3  # the first once more, to find the others


def test_a_model_knows_its_files_and_its_kind(tmp_path):
    shards, folder = open_model(made_shards(tmp_path, NARROW)), open_model(write_checkpoint(tmp_path / "m", "llama1"))
    assert not shards.is_checkpoint and [path.name for path in shards.files] == sorted(
        p.name for p in tmp_path.glob("*.gguf")
    )
    assert {tensor.file for tensor in shards} == set(shards.files)
    assert folder.is_checkpoint and [path.name for path in folder.files] == ["model.safetensors"]


def test_what_is_opened_stays_as_it_is(tmp_path):
    opened = open_model(made_gguf(tmp_path / "a.gguf", NARROW))
    assert as_model(opened) is opened and as_model(opened.path).names == opened.names
    path = made_imatrix(tmp_path / "a.imatrix", NARROW)
    matrix = read_imatrix(path)
    assert as_matrix(matrix) is matrix and as_matrix(None) is None and as_matrix(path).sums.keys() == matrix.sums.keys()


def test_shards_of_a_checkpoint_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "m", "llama1")
    with pytest.raises(ValueError, match="keep_split applies to GGUF files"):
        make_job(folder, None, Options(ftype="Q8_0", keep_split=True))
