"""transform/verify.py: what is genuine is told from what is not, and what does not fit is named.

Files of llama-quantize are those of tests/test_quantize.py, byte for byte, so that ours stand for them here; a file of
a compiler that fuses is put together from the fused kernels, which tests/test_rounding.py holds to such a build.
"""

import json
import os
import re
import subprocess
import sys

import made_models
import numpy as np
import pytest
from checkpoints import write_checkpoint
from test_rounding import needs_fma

import quantlab as ql
from quantlab.files.gguf_file import TensorSpec, read_header, write_gguf
from quantlab.files.imatrix_file import read_imatrix
from quantlab.quants.codebook import CODES
from quantlab.quants.fused import quantize_fused


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Sources, a matrix, and two quantized files."""
    folder = tmp_path_factory.mktemp("made")
    made_models.made_gguf(folder / "wide.gguf")
    made_models.made_gguf(folder / "other.gguf", seed=1)
    made_models.made_gguf(folder / "narrow.gguf", made_models.NARROW)
    made_models.made_imatrix(folder / "made.imatrix")
    matrix = read_imatrix(folder / "made.imatrix")
    made_models.write_imatrix(
        type(matrix)({n: x[:, ::-1].copy() for n, x in matrix.sums.items()}, matrix.counts, 3, 512, ("made.txt",)),
        folder / "wrong.imatrix",
    )
    ql.quantize(folder / "wide.gguf", folder / "plain.gguf", ftype="Q4_K_M")
    ql.quantize(folder / "wide.gguf", folder / "weighted.gguf", ftype="Q4_K_M", imatrix=folder / "made.imatrix")
    return folder


def rewritten(path, out, metadata=None, **blocks):
    """Copy a file with other metadata, or other bytes for some tensors (names with _ for .)."""
    model = ql.open(path)
    specs = [TensorSpec(t.name, t.shape, t.qtype) for t in model]
    data = (blocks.get(t.name.replace(".", "_"), t.load()) for t in model)
    write_gguf(out, model.metadata | (metadata or {}), specs, data)
    return out


@pytest.mark.parametrize("ftype", ["Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_S", "Q6_K", "Q8_0", "F16", "BF16"])
@pytest.mark.parametrize("imatrix", [None, "made.imatrix"])
def test_quantized_files_are_identical(made, tmp_path, ftype, imatrix):
    matrix = imatrix and made / imatrix
    path = ql.quantize(made / "wide.gguf", tmp_path / "q.gguf", ftype=ftype, imatrix=matrix)
    found = ql.verify(path, made / "wide.gguf", imatrix=matrix)
    assert found.verdict == "identical" and found.is_genuine and not found.misfits
    assert ftype in found.mixture and found.tensors["differing"].sum() == 0


def test_the_rule_set_is_found(made, tmp_path):
    path = ql.quantize(made / "wide.gguf", tmp_path / "q.gguf", ftype="Q2_K", rules="2023-12")
    assert ql.verify(path, made / "wide.gguf").mixture == "Q2_K, rules 2023-12"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(pure=True), "Q4_K_M --pure"),
        (dict(tensor_types=[("ffn_up", "Q2_K")]), "Q4_K_M, rules current, but blk.0.ffn_up.weight Q2_K, "),
        (dict(output_tensor_type="Q8_0"), "Q4_K_M, rules current, but output.weight Q8_0"),
    ],
)
def test_types_that_no_ftype_gives_are_taken_as_they_are(made, tmp_path, options, words):
    path = ql.quantize(made / "wide.gguf", tmp_path / "q.gguf", ftype="Q4_K_M", **options)
    found = ql.verify(path, made / "wide.gguf")
    assert found.verdict == "identical" and found.mixture.startswith(words)


def test_fallback_types_are_identical(made, tmp_path):
    path = ql.quantize(made / "narrow.gguf", tmp_path / "q.gguf", ftype="Q4_K_M")
    assert ql.verify(path, made / "narrow.gguf").verdict == "identical"


def test_shards_are_verified_as_one_file(made, tmp_path):
    shards = ql.split(made / "plain.gguf", tmp_path / "x", max_tensors=40).shards
    assert ql.verify(shards[0].path, made / "wide.gguf").verdict == "identical"


@pytest.mark.parametrize("via", [None, "f16"])
@pytest.mark.parametrize("ftype", ["Q5_0", "Q5_K_M"])  # of the second, F16 changes one block of one tensor
def test_the_precision_of_a_checkpoint_is_found(tmp_path, via, ftype):
    path = ql.quantize("tiny", tmp_path / "q.gguf", ftype=ftype, via=via)
    found = ql.verify(path, "tiny")
    assert found.verdict == "identical" and found.notes[0].startswith("weights of the source as ")


@pytest.mark.parametrize("as_llama_cpp", [False, True])
def test_both_vocabularies_of_a_checkpoint_are_genuine(tmp_path, as_llama_cpp):
    src = write_checkpoint(tmp_path / "m", "llama1")
    path = ql.quantize(src, tmp_path / "q.gguf", ftype="Q8_0", as_llama_cpp=as_llama_cpp)
    place = ql.open(path).metadata["tokenizer.ggml.tokens"].index("<|user|>")
    assert ql.open(path).metadata["tokenizer.ggml.token_type"][place] == (1 if as_llama_cpp else 4)
    assert ql.verify(path, src).verdict == "identical"


def fused_file(made, out, ftype, imatrix=None):
    """The file that a compiler that fuses would have made."""
    path = ql.quantize(made / "wide.gguf", out, ftype=ftype, imatrix=imatrix, overwrite=True)
    weights = read_imatrix(imatrix).entries if imatrix else {}
    source, blocks = ql.open(made / "wide.gguf"), {}
    for tensor in ql.open(path):
        if tensor.qtype in CODES:
            x = source.tensor(tensor.name).floats()
            blocks[tensor.name.replace(".", "_")] = quantize_fused(x, tensor.qtype, weights.get(tensor.name))
    return rewritten(path, out.with_name("fused.gguf"), **blocks)


@needs_fma
@pytest.mark.parametrize("ftype", ["Q5_K_M", "Q2_K", "Q4_K_S"])
@pytest.mark.parametrize("imatrix", [None, "made.imatrix"])
def test_another_compilers_rounding_is_named_so(made, tmp_path, ftype, imatrix):
    matrix = imatrix and made / imatrix
    path = fused_file(made, tmp_path / "q.gguf", ftype, matrix)
    found = ql.verify(path, made / "wide.gguf", imatrix=matrix)
    assert found.verdict == "rounding" and found.is_genuine
    assert found.tensors["fused"].sum() == found.tensors["differing"].sum() > 0
    assert "same type, rules and matrix, another compiler's rounding" in str(found)


@needs_fma
def test_a_changed_block_among_fused_ones_is_found(made, tmp_path):
    path = fused_file(made, tmp_path / "q.gguf", "Q5_K_M")
    raw = bytearray(path.read_bytes())
    info = next(t for t in read_header(path).tensors if t.name == "blk.2.ffn_up.weight")
    raw[info.offset + 176 * 7 + 60] ^= 0x33  # a few codes
    path.write_bytes(raw)
    found = ql.verify(path, made / "wide.gguf")
    assert found.verdict == "other" and list(found.tensors.query("verdict == 'other'")["name"]) == [
        "blk.2.ffn_up.weight"
    ]
    assert "1 of 512 Q5_K blocks differ from the source's, the first in row 7, weights 0:256" in str(found)


@pytest.mark.parametrize("at", [0, 2, 5, 15, 16, 143])  # d, dmin, scales, codes
@pytest.mark.parametrize("bit", [1, 0x80])
def test_one_flipped_bit_is_found(made, tmp_path, at, bit):
    raw = bytearray((made / "plain.gguf").read_bytes())
    info = next(t for t in read_header(made / "plain.gguf").tensors if t.name == "blk.1.ffn_up.weight")
    raw[info.offset + 144 * 3 + at] ^= bit
    path = tmp_path / "q.gguf"
    path.write_bytes(raw)
    found = ql.verify(path, made / "wide.gguf")
    assert found.verdict == "other" and len(found.misfits) == 1 and found.tensors["left"].sum() == 1


def test_scales_that_are_not_finite_are_found_without_a_warning(made, tmp_path):
    raw = bytearray((made / "plain.gguf").read_bytes())
    info = next(t for t in read_header(made / "plain.gguf").tensors if t.name == "blk.1.ffn_up.weight")
    raw[info.offset : info.offset + 4] = b"\x00\x7c\x00\x7e"  # d infinite, dmin NaN
    (tmp_path / "q.gguf").write_bytes(raw)
    found = ql.verify(tmp_path / "q.gguf", made / "wide.gguf")
    assert found.verdict == "other" and found.tensors["left"].sum() == 1 and "NaN" not in found.to_json()


def test_rows_of_zeros_in_the_source_are_infinitely_far(tmp_path):
    x = np.zeros((1, 32), np.float32)
    for name, value in (("a.gguf", 0), ("b.gguf", 3)):
        write_gguf(tmp_path / name, {}, [TensorSpec("x", x.shape, "F32")], [x + np.float32(value)])
    (misfit,) = ql.verify(tmp_path / "b.gguf", tmp_path / "a.gguf").misfits
    assert misfit.startswith("x: 32 of 32 F32 values differ from the source's") and misfit.endswith(
        "(relative distance inf)"
    )


def test_a_changed_norm_is_found(made, tmp_path):
    x = ql.open(made / "plain.gguf").tensor("output_norm.weight").load()
    x[5] = np.nextafter(x[5], np.float32(9))
    found = ql.verify(rewritten(made / "plain.gguf", tmp_path / "q.gguf", output_norm_weight=x), made / "wide.gguf")
    (misfit,) = found.misfits
    assert misfit.startswith("output_norm.weight: 1 of 256 F32 values differ from the source's, the first in row 0, w")


def test_another_source_is_found(made):
    found = ql.verify(made / "plain.gguf", made / "other.gguf")
    quantized = found.tensors.query("qtype != 'F32'")
    assert found.verdict == "other" and (quantized["verdict"] == "other").all()
    assert quantized["relative"].min() > 1.2  # two independent vectors of one length are sqrt(2) of it apart


def test_the_matrix_makes_the_difference(made):
    assert ql.verify(made / "weighted.gguf", made / "wide.gguf", imatrix=made / "made.imatrix").verdict == "identical"
    found = ql.verify(made / "weighted.gguf", made / "wide.gguf")
    assert found.verdict == "other" and "the file records" in str(found) and "pass it as imatrix" in str(found)
    assert ql.verify(made / "weighted.gguf", made / "wide.gguf", imatrix=made / "wrong.imatrix").verdict == "other"
    found = ql.verify(made / "plain.gguf", made / "wide.gguf", imatrix=made / "made.imatrix")
    assert found.verdict == "other" and "the file was made without this one" in found.misfits[0]


def test_entries_that_were_excluded_are_accepted(made, tmp_path):
    options = dict(imatrix=made / "made.imatrix", exclude_weights=["ffn_up"])
    path = ql.quantize(made / "wide.gguf", tmp_path / "q.gguf", ftype="Q4_K_M", **options)
    found = ql.verify(path, made / "wide.gguf", imatrix=made / "made.imatrix")
    assert not (found.tensors["verdict"] == "other").any() and "8 fit better without it" in str(found)
    assert found.misfits == ("metadata quantize.imatrix.entries_count: changed, 56 in the matrix → 48",)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"llama.context_length": np.uint32(4096)}, "metadata llama.context_length: changed, uint32 128 → uint32 4096"),
        ({"llama.context_length": np.int32(128)}, "metadata llama.context_length: type, uint32 128 → int32 128"),
        ({"general.url": "https://…"}, "metadata general.url: added, string 'https://…'"),
        ({"general.file_type": np.uint32(17)}, "metadata general.file_type: 17 (Q5_K_M), the types are Q4_K_M, rules"),
        ({"general.file_type": "x"}, "metadata general.file_type: None (unknown ftype), the types are Q4_K_M"),
        ({"general.quantization_version": np.uint32(1)}, "metadata general.quantization_version: changed, 2 → 1"),
        ({"general.quantization_version": np.int32([2, 2])}, "metadata general.quantization_version: changed, 2 → [2"),
    ],
)
def test_metadata_that_a_quantizer_would_not_have_written(made, tmp_path, metadata, words):
    found = ql.verify(rewritten(made / "plain.gguf", tmp_path / "q.gguf", metadata), made / "wide.gguf")
    assert found.verdict == "other" and len(found.misfits) == 1 and found.misfits[0].startswith(words)
    assert (found.tensors["verdict"] == "identical").all()


def test_a_matrix_is_recorded_as_strangers_like(made, tmp_path):
    for value in (np.int32([1, 2]), ["a", "b"], np.float32("nan")):
        path = rewritten(made / "plain.gguf", tmp_path / "q.gguf", {"quantize.imatrix.file": value})
        (note,) = ql.verify(path, made / "wide.gguf").notes
        assert note.startswith("importance matrix: none given; the file records ")


def test_missing_metadata_and_tensors_are_named(made, tmp_path):
    model = ql.open(made / "plain.gguf")
    kept = [t for t in model if t.name != "blk.3.attn_q.weight"]
    x = np.ones((1, 32), np.float32)
    specs = [TensorSpec(t.name, t.shape, t.qtype) for t in kept] + [TensorSpec("extra", x.shape, "F32")]
    metadata = {key: value for key, value in model.metadata.items() if key != "general.name"}
    write_gguf(tmp_path / "q.gguf", metadata, specs, [*(t.load() for t in kept), x])
    found = ql.verify(tmp_path / "q.gguf", made / "wide.gguf")
    assert "metadata general.name: removed, string 'made'" in found.misfits
    assert "extra: is not in the source" in found.misfits and "blk.3.attn_q.weight: is missing" in found.misfits


def test_types_without_an_encoder_are_named(made, tmp_path):
    model = ql.open(made / "plain.gguf")
    specs = [TensorSpec(t.name, t.shape, "I32" if t.name == "blk.0.ffn_up.weight" else t.qtype) for t in model]
    data = [np.zeros(s.nbytes, np.uint8) if s.qtype == "I32" else model.tensor(s.name).load() for s in specs]
    write_gguf(tmp_path / "q.gguf", model.metadata, specs, data)
    found = ql.verify(tmp_path / "q.gguf", made / "wide.gguf")
    assert found.verdict == "other"
    assert any(m.startswith("blk.0.ffn_up.weight: I32 cannot be quantized here") for m in found.misfits)


def test_json_and_page(made):
    found = ql.verify(made / "plain.gguf", made / "wide.gguf")
    table = json.loads(found.to_json())
    assert table["protocol"]["verdict"] == "identical" and table["protocol"]["misfits"] == []
    assert len(table["rows"]) == len(found.tensors) and "NaN" not in found.to_json()
    assert "identical" in found._repr_html_()


def test_the_word_verify(made):
    def quantlab(*arguments):
        command = [sys.executable, "-m", "quantlab.cli", "verify", *arguments]
        environment = os.environ | {"TQDM_DISABLE": "1"}
        return subprocess.run(command, cwd=made, capture_output=True, text=True, env=environment)

    done = quantlab("plain.gguf", "--source", "wide.gguf", "--json", "-")
    assert done.returncode == 0 and json.loads(done.stdout)["protocol"]["verdict"] == "identical"
    done = quantlab("plain.gguf", "--source", "other.gguf")
    assert done.returncode == 1 and "does not fit: " in done.stdout and re.search(r"^and \d+ more$", done.stdout, re.M)
    assert quantlab("plain.gguf").returncode == 2
    done = quantlab("plain.gguf", "--source", "none.gguf")
    assert done.returncode == 1 and done.stderr.count("\n") == 1


def test_bad_input_is_refused(made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.imatrix"):
        ql.verify(made / "plain.gguf", made / "wide.gguf", imatrix=tmp_path / "none.imatrix")
    bad = made_models.made_gguf(tmp_path / "nan.gguf")
    raw = bytearray(bad.read_bytes())
    info = next(t for t in read_header(bad).tensors if t.name == "blk.0.ffn_up.weight")
    raw[info.offset : info.offset + 2] = b"\xff\x7f"
    bad.write_bytes(raw)
    with pytest.raises(ValueError, match=r"blk.0.ffn_up.weight: value=nan in row 0, column 0, must be finite"):
        ql.verify(made / "plain.gguf", bad)
