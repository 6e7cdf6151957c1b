"""File to file for architectures of which nothing is known but names and shapes, digest by digest."""

import hashlib
from pathlib import Path

import pytest
from families import RUNS, families, family_gguf, family_imatrix

from quantlab.files.model import open as open_model
from quantlab.transform.job import Options, make_job
from quantlab.transform.quantize import quantize
from quantlab.transform.rules import COMPARED
from quantlab.transform.slabs import row_ranges
from quantlab.transform.verify import verify

FAMILIES = families()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # metadata name the matrix as it is given
    return tmp_path


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_files_equal_llama_quantize(name, folder):
    family = FAMILIES[name]
    family_gguf(folder / "made.gguf", family)
    for suffix in ("gguf", "dat"):
        family_imatrix(folder / f"matrix.{suffix}", family, legacy=suffix == "dat")
    for run, (ftype, suffix) in RUNS.items():
        matrix = f"matrix.{suffix}" if suffix else None
        out = quantize("made.gguf", "out.gguf", ftype=ftype, imatrix=matrix, overwrite=True)
        assert hashlib.sha256(out.read_bytes()).hexdigest() == family["sha256"][run], run


def test_what_was_compared_is_here():
    assert {family["arch"] for family in FAMILIES.values()} | {"qwen2", "qwen3"} == set(COMPARED)


def notes(path, **options):
    return make_job(path, None, Options(ftype="Q4_K_M", **options)).notes


def test_experts_without_counts_and_new_architectures_are_said(folder):
    family = FAMILIES["mixtral"]
    made = family_gguf(folder / "made.gguf", family)
    for suffix in ("gguf", "dat"):
        matrix = family_imatrix(folder / f"matrix.{suffix}", family, legacy=suffix == "dat")
        n = 3 * sum(name.endswith("ffn_up_exps.weight") for name, _, _ in family["tensors"])
        text = f"{n} experts have no counts in the importance matrix: all their columns have the same weight"
        assert text in notes(made, imatrix=matrix)
    assert notes(made) == ()
    keys = {"unheard-of.expert_count": ["uint32", 8], "unheard-of.block_count": ["uint32", 4]}
    (note,) = notes(family_gguf(folder / "new.gguf", family | {"arch": "unheard-of", "keys": keys}))
    assert note.startswith("architecture=unheard-of: the rules follow tensor names")


def test_verify_tells_a_genuine_from_a_tampered_expert(folder):
    family = FAMILIES["mixtral"]
    made = family_gguf(folder / "made.gguf", family)
    matrix = family_imatrix(folder / "matrix.gguf", family, legacy=False)
    out = quantize(made, "out.gguf", ftype="Q3_K_L", imatrix=matrix)
    assert verify(out, made, imatrix=matrix).verdict == "identical"
    tensor = open_model(out).tensor("blk.1.ffn_up_exps.weight")
    raw = bytearray(out.read_bytes())
    at = tensor.offset + 5 * tensor.nbytes // tensor.shape[0]  # the first block of expert 5
    raw[at + 40 : at + 60] = bytes(20)
    Path("bad.gguf").write_bytes(raw)
    found = verify("bad.gguf", made, imatrix=matrix)
    assert found.verdict == "other"
    row = 5 * tensor.shape[1]
    assert any("blk.1.ffn_up_exps.weight: 1 of" in text and f"row {row}," in text for text in found.misfits)


def test_slabs_end_where_an_expert_does(folder, monkeypatch):
    model = open_model(family_gguf(folder / "made.gguf", FAMILIES["mixtral"]))
    tensor = model.tensor("blk.0.ffn_down_exps.weight")
    n_expert, per_expert, n_per_row = tensor.shape
    for slab in (n_per_row * 3, n_per_row * per_expert, n_per_row * per_expert * 5 // 2):
        monkeypatch.setattr("quantlab.transform.slabs.SLAB", slab)
        ranges = list(row_ranges(tensor))
        assert ranges[0][0] == 0 and ranges[-1][1] == tensor.nrows
        assert all(a[1] == b[0] for a, b in zip(ranges, ranges[1:], strict=False))
        for start, stop in ranges:
            assert start // per_expert == (stop - 1) // per_expert or start % per_expert == stop % per_expert == 0


def test_bad_input(folder):
    family = FAMILIES["mixtral"]
    made = family_gguf(folder / "made.gguf", family)
    with pytest.raises(ValueError, match="shape=.*, the metadata has n_expert=4. Convert it again"):
        keys = family["keys"] | {"llama.expert_count": ["uint32", 4]}
        make_job(family_gguf(folder / "four.gguf", family | {"keys": keys}), None, Options(ftype="Q4_0"))
    with pytest.raises(ValueError, match="ffn_gate_inp.weight: type=Q4_K, must stay F32"):
        make_job(made, None, Options(ftype="Q4_0", tensor_types=[("ffn_gate_inp", "Q4_K")]))
    tensors = [[n, [2, *s[1:]] if len(s) > 2 else s, q] for n, s, q in family["tensors"]]
    matrix = family_imatrix(folder / "two.gguf", family | {"tensors": tensors}, legacy=False)
    with pytest.raises(
        ValueError, match="exps.weight: the importance matrix has .* columns, must have .* for each of 8"
    ):
        make_job(made, None, Options(ftype="Q4_0", imatrix=matrix))
