"""Several files from one pass: the bytes of each alone, resumable."""

from dataclasses import replace

import pytest

import quantlab as ql
from quantlab.evaluate.imatrix import imatrix
from quantlab.transform import one_pass
from quantlab.transform.job import Options, make_job
from quantlab.transform.one_pass import in_shards, quantize_together
from quantlab.transform.unfinished import Unfinished

FTYPES = ("Q8_0", "Q4_K_M", "Q4_K_S", "Q2_K", "BF16")


@pytest.fixture(scope="module")
def matrix():
    return imatrix("tiny", chunks=1, progress=False)


def jobs_in(folder, matrix, ftypes=FTYPES):
    model = ql.open("tiny")
    return [make_job(model, folder / f"{ftype}.gguf", Options(ftype=ftype, imatrix=matrix)) for ftype in ftypes]


def test_each_file_has_the_bytes_that_quantize_gives(tmp_path, matrix):
    quantize_together(jobs_in(tmp_path, matrix), progress=False)
    for ftype in FTYPES:
        alone = ql.quantize("tiny", tmp_path / "alone.gguf", ftype=ftype, imatrix=matrix, overwrite=True)
        assert (tmp_path / f"{ftype}.gguf").read_bytes() == alone.read_bytes()
    assert not list(tmp_path.glob("*.part*"))


def test_each_type_is_encoded_once(tmp_path, matrix, monkeypatch):
    seen = []
    encode = one_pass.encode
    monkeypatch.setattr(one_pass, "encode", lambda step, *rest: seen.append(step.spec) or encode(step, *rest))
    quantize_together(jobs_in(tmp_path, matrix, ("Q4_K_M", "Q4_K_S")), progress=False)
    assert len(seen) == len({(spec.name, spec.qtype) for spec in seen})


def test_shards_are_those_of_split(tmp_path, matrix):
    job = in_shards(jobs_in(tmp_path, matrix, ["Q4_K_M"])[0], "1M")
    quantize_together([job], progress=False)
    whole = ql.quantize("tiny", tmp_path / "whole.gguf", ftype="Q4_K_M", imatrix=matrix)
    shards = ql.split(whole, tmp_path / "split", max_size="1M").shards
    assert len(shards) == len(job.outputs) > 2
    for output, shard in zip(job.outputs, shards, strict=True):
        assert output.path.read_bytes() == shard.path.read_bytes()


def test_a_file_that_fits_gets_no_shards(tmp_path, matrix):
    (job,) = jobs_in(tmp_path, matrix, ["Q4_K_M"])
    assert in_shards(job, "1G") is job


def test_a_stopped_pass_goes_on_with_what_each_file_lacks(tmp_path, matrix, monkeypatch):
    quantize_together(jobs_in(tmp_path, matrix, ("Q4_K_M", "Q2_K")), progress=False)
    expected = {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")}
    for path in tmp_path.glob("*.gguf"):
        path.unlink()
    finish, count = Unfinished.finish, iter(range(100))

    def stop(self, source):
        if next(count) == 41:
            raise KeyboardInterrupt
        finish(self, source)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Unfinished, "finish", stop)
        quantize_together(jobs_in(tmp_path, matrix, ("Q4_K_M", "Q2_K")), progress=False)
    assert not list(tmp_path.glob("*.gguf"))
    assert len(list(tmp_path.glob("*.gguf.part"))) == 2
    again = []
    encode = one_pass.encode
    monkeypatch.setattr(one_pass, "encode", lambda step, *rest: again.append(step.tensor.name) or encode(step, *rest))
    quantize_together(jobs_in(tmp_path, matrix, ("Q4_K_M", "Q2_K")), progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.gguf")} == expected
    assert len(set(again)) == len(ql.open("tiny")) - 20


# ---- bad input


def test_jobs_of_other_matrices_are_refused(tmp_path, matrix):
    one, two = jobs_in(tmp_path, matrix, ("Q4_K_M", "Q2_K"))
    with pytest.raises(ValueError, match="must be the source, with its order and matrix, of all jobs of one pass"):
        quantize_together([one, replace(two, options=replace(two.options, imatrix=None))])
