"""Whole quantized files, byte for byte against llama-quantize's digests; resume, reuse, bad input."""

import hashlib
import io
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import checkpoints
import made_models
import numpy as np
import pytest

from quantlab.files.bundled import model_path
from quantlab.files.byte_range import PLAIN_DTYPES
from quantlab.files.gguf_file import TensorSpec, read_header, write_gguf
from quantlab.files.imatrix_file import read_imatrix
from quantlab.files.model import open as open_model
from quantlab.transform.convert import convert
from quantlab.transform.mixture import FTYPES
from quantlab.transform.plan import plan
from quantlab.transform.quantize import quantize

GOLDEN = json.loads((Path(__file__).parent / "golden" / "quantize.json").read_text())["digests"]

# option of llama-quantize → the same here; each case is one more run of llama-quantize on the wide model
OPTIONS = {
    "--pure": dict(pure=True),
    "--leave-output-tensor": dict(leave_output_tensor=True),
    "--output-tensor-type q5_K --token-embedding-type q3_K": dict(
        output_tensor_type="q5_K", token_embedding_type="q3_K"
    ),
    "--tensor-type ATTN_V=q8_0 --tensor-type attn=q5_1": dict(tensor_types=[("ATTN_V", "q8_0"), ("attn", "q5_1")]),
    r"--tensor-type blk\.0\.attn_v=q4_K": dict(tensor_types=[(r"blk\.0\.attn_v", "q4_K")]),
    "--imatrix made.dat": dict(imatrix="made.dat"),
    "--imatrix made.imatrix --include-weights ffn_down --include-weights attn_v": dict(
        imatrix="made.imatrix", include_weights=["ffn_down", "attn_v"]
    ),
    "--imatrix made.imatrix --exclude-weights ffn": dict(imatrix="made.imatrix", exclude_weights=["ffn"]),
    "--override-kv general.name=str:other --override-kv made.n=int:-7 --override-kv made.x=float:0.1 "
    "--override-kv made.y=bool:true": dict(
        override_kv=["general.name=str:other", "made.n=int:-7", "made.x=float:0.1", "made.y=bool:true"]
    ),
    "--allow-requantize": dict(allow_requantize=True),
}
SOURCES = {  # file → how it is made
    "wide.gguf": lambda path: made_models.made_gguf(path),
    "bf16.gguf": lambda path: made_models.made_gguf(path, qtype="BF16"),
    "f32.gguf": lambda path: made_models.made_gguf(path, qtype="F32", seed=3),
    "tied.gguf": lambda path: made_models.made_gguf(path, tied=True),
    "narrow.gguf": lambda path: made_models.made_gguf(path, made_models.NARROW),
    "tiny.gguf": lambda path: made_models.gguf_of(path, model_path("tiny")),
}


def cases():
    """Yield every run: a key of the golden file (llama-quantize's arguments), the source and the options."""
    for ftype in FTYPES:
        for source, matrix in (("wide.gguf", "made.imatrix"), ("tiny.gguf", "tiny.imatrix")):
            yield f"{source} {ftype}", source, dict(ftype=ftype)
            yield f"--imatrix {matrix} {source} {ftype}", source, dict(ftype=ftype, imatrix=matrix)
    for arguments, options in OPTIONS.items():
        if arguments != "--allow-requantize":
            yield f"{arguments} wide.gguf Q4_K_M", "wide.gguf", dict(ftype="Q4_K_M", **options)
    for source in ("bf16.gguf", "f32.gguf", "tied.gguf", "narrow.gguf"):
        for ftype in ("Q4_K_M", "Q2_K", "Q3_K_L", "Q6_K", "F16", "COPY"):
            yield f"{source} {ftype}", source, dict(ftype=ftype)
    yield "--output-tensor-type q8_0 tied.gguf Q4_K_M", "tied.gguf", dict(ftype="Q4_K_M", output_tensor_type="q8_0")


def make_sources(folder):
    """Write every source and the matrices into a folder."""
    for name, make in SOURCES.items():
        make(folder / name)
    made_models.made_imatrix(folder / "made.imatrix")
    made_models.made_imatrix(folder / "made.dat", legacy=True)
    made_models.made_imatrix(folder / "tiny.imatrix", asdict(open_model("tiny").hparams))
    made_models.made_shards(folder)


CASES = {key: (source, options) for key, source, options in cases()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with every source and the matrices; tests run in it, since the matrix's path goes into the file."""
    folder = tmp_path_factory.mktemp("made")
    make_sources(folder)
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A folder of links to the made files, as the current folder."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_digests_are_of_the_bundled_model_that_is_there():
    assert GOLDEN["model.safetensors"] == sha256(model_path("tiny") / "model.safetensors"), (
        "run write_quantize.py again"
    )


@pytest.mark.parametrize("key", CASES)
def test_whole_files_equal_llama_quantize(work, key):
    source, options = CASES[key]
    if GOLDEN[key] == "refused":
        with pytest.raises(ValueError, match="needs an importance matrix"):
            quantize(source, "out.gguf", **options)
    else:
        assert sha256(quantize(source, "out.gguf", **options)) == GOLDEN[key]


def test_requantizing_equals_llama_quantize(work):
    quantize("wide.gguf", "q8_0.gguf", ftype="Q8_0")
    out = quantize("q8_0.gguf", "out.gguf", ftype="Q4_K_M", allow_requantize=True)
    assert sha256(out) == GOLDEN["--allow-requantize q8_0.gguf Q4_K_M"]


def test_shards_are_merged_or_kept_as_llama_quantize_does(work):
    shard = "made-00001-of-00002.gguf"
    assert sha256(quantize(shard, "merged.gguf", ftype="Q4_K_M")) == GOLDEN[f"{shard} Q4_K_M"]
    first = quantize(shard, "kept.gguf", ftype="Q4_K_M", keep_split=True)
    assert first.name == "kept-00001-of-00002.gguf"
    for i in (1, 2):
        assert sha256(f"kept-{i:05d}-of-00002.gguf") == GOLDEN[f"--keep-split {shard} Q4_K_M {i}"]


def test_2023_rules_change_types_and_nothing_else(work):
    old = read_header(quantize("wide.gguf", "old.gguf", ftype="Q2_K", rules="2023-12"))
    new = read_header(quantize("wide.gguf", "new.gguf", ftype="Q2_K"))
    assert old.metadata.keys() == new.metadata.keys()
    types = {tensor.name: tensor.qtype for tensor in old.tensors}
    assert types["blk.0.ffn_up.weight"] == "Q3_K"
    assert {tensor.name: tensor.qtype for tensor in new.tensors}["blk.0.ffn_up.weight"] == "Q2_K"


def test_an_object_with_write_takes_the_output(work):
    sink = io.BytesIO()
    assert quantize("wide.gguf", sink, ftype="Q4_K_M") is None
    assert hashlib.sha256(sink.getvalue()).hexdigest() == GOLDEN["wide.gguf Q4_K_M"]


def test_a_matrix_in_memory_gives_the_same_tensors(work):
    kept = quantize("wide.gguf", "a.gguf", ftype="Q4_K_M", imatrix=read_imatrix("made.imatrix"))
    read = quantize("wide.gguf", "b.gguf", ftype="Q4_K_M", imatrix="made.imatrix")
    a, b = read_header(kept), read_header(read)
    assert kept.read_bytes()[a.data_offset :] == read.read_bytes()[b.data_offset :]
    assert b.metadata["quantize.imatrix.file"] == "made.imatrix" and "quantize.imatrix.file" not in a.metadata


def test_default_output_stands_beside_the_input(work):
    assert quantize("wide.gguf", ftype="q4_0") == Path("ggml-model-Q4_0.gguf")


def test_lines_tell_shape_type_size_and_codes(work):
    lines = []
    quantize("wide.gguf", "out.gguf", ftype="Q4_0", report=lambda line: lines.append(str(line)), histogram=True)
    line = next(line for line in lines if "blk.3.ffn_down.weight" in line)
    found = re.search(r"256 × 512 +F16 → Q4_0 0\.25 → 0\.07 MiB  codes: ([0-9. ]+)", line)
    shares = [float(share) for share in found[1].split()]
    assert len(shares) == 16 and abs(sum(shares) - 1) < 0.01
    assert "75 tensors" in lines[0] or "75, " in lines[0]


def test_an_error_in_a_later_slab_names_its_rows(work, monkeypatch):
    monkeypatch.setattr("quantlab.transform.slabs.SLAB", 8192)
    model = open_model("wide.gguf")
    x = model.tensor("blk.3.ffn_up.weight").floats()
    x[300, 5] = np.nan
    specs = [TensorSpec("blk.3.ffn_up.weight", x.shape, "F32")]
    write_gguf("nan.gguf", model.metadata, specs, [x])
    with pytest.raises(ValueError, match=r"blk\.3\.ffn_up\.weight: value=nan in row 300, column 5, must be finite"):
        quantize("nan.gguf", "out.gguf", ftype="Q4_K_M")


def test_types_without_codes_have_no_histogram(work):
    lines = []
    options = dict(tensor_types=[("ffn_down", "BF16")], histogram=True)
    quantize("wide.gguf", "out.gguf", ftype="Q4_0", report=lambda line: lines.append(str(line)), **options)
    assert ["codes" in line for line in lines if "blk.3.ffn_" in line and "norm" not in line] == [False, True, True]


def test_the_plan_knows_the_size_of_the_file(work):
    planned = plan("wide.gguf", "out.gguf", ftype="Q3_K_M", imatrix="made.imatrix")
    assert planned.refusals == ()
    out = quantize("wide.gguf", "out.gguf", ftype="Q3_K_M", imatrix="made.imatrix")
    assert planned.bytes_written == out.stat().st_size
    assert list(planned.to_frame()["name"]) == [tensor.name for tensor in read_header(out).tensors]
    assert list(planned.to_frame()["qtype"]) == [tensor.qtype for tensor in read_header(out).tensors]
    assert "Q3_K_M" in str(planned) and "Q3_K_M" in planned._repr_html_()
    assert json.loads(planned.to_json())["protocol"]["bytes_written"] == planned.bytes_written


def test_fallbacks_are_accounted_for_or_refused(work):
    planned = plan("narrow.gguf", "out.gguf", ftype="Q4_K_M")
    account = planned.fallbacks.set_index(["columns", "wanted", "qtype"])["tensors"]
    assert account.loc[(96, "Q4_K", "Q5_0")] == 12 and account.loc[(72, "Q6_K", "F16")] == 1
    assert "fallback" in str(planned)
    with pytest.raises(ValueError, match=r"n_per_row=96 is not a multiple of the Q4_K block size 256 \(\d+ tensors\)"):
        quantize("narrow.gguf", "out.gguf", ftype="Q4_K_M", fallback=False)
    assert not Path("out.gguf").exists()


@pytest.mark.parametrize("name", ["yi", "llama2", "tinyllama"])
def test_a_checkpoint_is_quantized_in_one_pass(tmp_path, name):
    folder = checkpoints.write_checkpoint(tmp_path / name, name, "BF16", n_shards=2)
    for via, outtype in ((None, "auto"), ("f16", "f16")):
        two = quantize(convert(folder, tmp_path / f"{outtype}.gguf", outtype=outtype), ftype="Q4_K_M")
        lines = []
        one = quantize(
            folder,
            tmp_path / "one.gguf",
            ftype="Q4_K_M",
            via=via,
            report=lambda line, lines=lines: lines.append(str(line)),
            overwrite=True,
        )
        assert one.read_bytes() == two.read_bytes()
        assert ("keep the checkpoint's precision" in lines[0]) == (via is None)
        two.unlink()


# ---- go on, use again


class Stop(BaseException):
    """What a user's Ctrl-C is, for a test."""


@pytest.mark.parametrize("n", [1, 2, 30, 74])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(work, n):
    seen = []

    def stop(line):
        seen.append(line)
        if str(line).startswith(f"[{n:4}/"):
            raise Stop

    with pytest.raises(Stop):
        quantize("wide.gguf", "out.gguf", ftype="Q4_K_M", report=stop)
    assert not Path("out.gguf").exists() and Path("out.gguf.part").exists()
    lines = []
    quantize("wide.gguf", "out.gguf", ftype="Q4_K_M", report=lambda line: lines.append(str(line)))
    assert sha256("out.gguf") == GOLDEN["wide.gguf Q4_K_M"]
    assert n == 1 or any(str(line).startswith("going on after") for line in lines)
    assert sorted(path.name for path in work.glob("out*")) == ["out.gguf", "out.gguf.quantlab.json"]


def test_a_state_of_another_job_is_begun_anew(work):
    def stop(line):
        if str(line).startswith("[  40/"):
            raise Stop

    with pytest.raises(Stop):
        quantize("wide.gguf", "out.gguf", ftype="Q5_K_M", report=stop)
    lines = []
    quantize("wide.gguf", "out.gguf", ftype="Q4_K_M", report=lambda line: lines.append(str(line)))
    assert sha256("out.gguf") == GOLDEN["wide.gguf Q4_K_M"]
    assert not any(str(line).startswith("going on after") for line in lines)


def test_interrupted_shards_go_on(work):
    shard = "made-00001-of-00002.gguf"

    def stop(line):
        if str(line).startswith("[  60/"):
            raise Stop

    with pytest.raises(Stop):
        quantize(shard, "kept.gguf", ftype="Q4_K_M", keep_split=True, report=stop)
    assert not list(work.glob("kept*of*.gguf"))
    quantize(shard, "kept.gguf", ftype="Q4_K_M", keep_split=True)
    for i in (1, 2):
        assert sha256(f"kept-{i:05d}-of-00002.gguf") == GOLDEN[f"--keep-split {shard} Q4_K_M {i}"]


def test_unchanged_tensors_are_reused(work):
    quantize("wide.gguf", "old.gguf", ftype="Q4_K_S")
    lines = []
    quantize("wide.gguf", "out.gguf", ftype="Q4_K_M", reuse="old.gguf", report=lambda line: lines.append(str(line)))
    assert sha256("out.gguf") == GOLDEN["wide.gguf Q4_K_M"]
    reused = [line for line in lines if line.endswith("reused")]
    before, after = (read_header(name).tensors for name in ("old.gguf", "out.gguf"))
    assert len(reused) == sum(a.qtype == b.qtype for a, b in zip(before, after, strict=True)) < len(after)


def test_a_dry_run_tells_what_a_run_would_meet_and_writes_nothing(work):
    said = []
    quantize("wide.gguf", "old.gguf", ftype="Q4_K_S")
    shutil.copy("old.gguf", "out.gguf")
    before = sorted(work.iterdir())
    assert quantize("wide.gguf", "out.gguf", ftype="Q4_K_M", reuse="old.gguf", dry_run=True, report=said.append) is None
    plan, in_the_way, reusable = said
    assert plan.job.ftype.name == "Q4_K_M"
    assert in_the_way == "out.gguf: exists; the run needs overwrite=True or another name"
    old = {tensor.name: tensor.qtype for tensor in open_model("old.gguf")}
    same = [step for step in plan.job.steps if old[step.tensor.name] == step.choice.qtype]
    assert 0 < len(same) < len(plan.job.steps)
    assert reusable.startswith(f"{len(same)} of {len(plan.job.steps)} tensors can be reused")
    assert sorted(work.iterdir()) == before


def test_tensors_whose_source_or_matrix_changed_are_not_reused(work):
    made_models.made_gguf(work / "second.gguf", seed=5)
    quantize("second.gguf", "old.gguf", ftype="Q4_K_M")
    lines = []
    quantize("wide.gguf", "out.gguf", ftype="Q4_K_M", reuse="old.gguf", report=lambda line: lines.append(str(line)))
    assert sha256("out.gguf") == GOLDEN["wide.gguf Q4_K_M"]
    assert not any(line.endswith("reused") for line in lines)
    quantize(
        "wide.gguf",
        "m.gguf",
        ftype="Q4_K_M",
        imatrix="made.imatrix",
        reuse="out.gguf",
        report=lambda line, lines=lines: lines.append(str(line)),
    )
    assert sha256("m.gguf") == GOLDEN["--imatrix made.imatrix wide.gguf Q4_K_M"]


def test_digests_of_another_kind_are_read_and_reuse_nothing(work):
    quantize("wide.gguf", "old.gguf", ftype="Q4_K_S")
    stored = Path("old.gguf.quantlab.json")
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"schema": 2}))
    lines = []
    quantize("wide.gguf", "out.gguf", ftype="Q4_K_S", reuse="old.gguf", report=lambda line: lines.append(str(line)))
    assert "old.gguf: its digests are of an older kind, nothing can be reused" in lines
    assert Path("out.gguf").read_bytes() == Path("old.gguf").read_bytes()


# ---- bad input


def test_reuse_without_digests_is_refused(work):
    quantize("wide.gguf", "old.gguf", ftype="Q4_K_S")
    stored = Path("old.gguf.quantlab.json").read_text()
    Path("old.gguf.quantlab.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"old\.gguf\.quantlab\.json: is missing, but reusing old\.gguf"):
        quantize("wide.gguf", "out.gguf", ftype="Q4_K_M", reuse="old.gguf")
    for spoilt in ("{}", json.dumps(json.loads(stored) | {"schema": 1})):
        Path("old.gguf.quantlab.json").write_text(spoilt)
        with pytest.raises(
            ValueError, match=r"old\.gguf\.quantlab\.json: must hold the digests of old\.gguf, schema 3"
        ):
            quantize("wide.gguf", "out.gguf", ftype="Q4_K_M", reuse="old.gguf")
    quantize("wide.gguf", "old.gguf", ftype="Q3_K_S", overwrite=True)
    Path("old.gguf.quantlab.json").write_text(stored)
    with pytest.raises(ValueError, match=r"old\.gguf\.quantlab\.json: belongs to another file"):
        quantize("wide.gguf", "out.gguf", ftype="Q4_K_M", reuse="old.gguf")
    assert not list(work.glob("out*"))


def test_outputs_are_not_overwritten_and_inputs_never(work):
    quantize("wide.gguf", "out.gguf", ftype="Q4_0")
    with pytest.raises(FileExistsError, match=r"out\.gguf: exists already"):
        quantize("wide.gguf", "out.gguf", ftype="Q8_0")
    assert sha256(quantize("wide.gguf", "out.gguf", ftype="Q8_0", overwrite=True)) == GOLDEN["wide.gguf Q8_0"]
    with pytest.raises(ValueError, match="is the input, must be another file"):
        quantize("wide.gguf", "wide.gguf", ftype="Q8_0", overwrite=True)
    with pytest.raises(FileNotFoundError, match="folder .*none does not exist"):
        quantize("wide.gguf", "none/out.gguf", ftype="Q8_0")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_no_file_of_a_checkpoint_is_replaced(tmp_path, name):
    folder = tmp_path / "checkpoint"
    shutil.copytree(model_path("tiny"), folder)
    before = {path.name: sha256(path) for path in folder.iterdir()}
    with pytest.raises(ValueError, match="is the input, must be another file"):
        quantize(folder, folder / name, ftype="Q4_0", overwrite=True)
    assert {path.name: sha256(path) for path in folder.iterdir()} == before


def test_the_second_shard_of_the_input_is_not_replaced(work):
    shards = sorted(work.glob("*-of-*.gguf"))
    before = sha256(shards[1])
    with pytest.raises(ValueError, match="is the input, must be another file"):
        quantize(shards[0], shards[1], ftype="Q4_0", overwrite=True)
    assert sha256(shards[1]) == before


def test_what_has_no_effect_is_told(work):
    lines = []
    quantize(
        "wide.gguf",
        "out.gguf",
        ftype="Q4_0",
        tensor_types=[("^attn_v", "Q8_0")],
        report=lambda line, lines=lines: lines.append(str(line)),
    )
    assert "no tensor name matches ^attn_v" in lines[0]
    options = {"imatrix": "made.imatrix", "include_weights": ["no such name"]}
    assert "leave no entry of the importance matrix" in str(plan("wide.gguf", ftype="Q4_0", **options))


def test_nan_leaves_nothing_behind(work):
    header = read_header("wide.gguf")
    specs = [TensorSpec(t.name, t.shape, t.qtype) for t in header.tensors]
    data = [made_models.made_weights(s.name, s.shape).astype(made_models.DTYPES[s.qtype]) for s in specs]
    for name in ("blk.3.attn_k.weight", "blk.7.ffn_norm.weight"):
        index = [spec.name for spec in specs].index(name)
        broken = [*data[:index], np.full_like(data[index], np.nan), *data[index + 1 :]]
        write_gguf("nan.gguf", header.metadata, specs, broken)
        with pytest.raises(ValueError, match=re.escape(name)):
            quantize("nan.gguf", "out.gguf", ftype="Q4_K_M")
        assert not list(work.glob("out*"))


@pytest.mark.parametrize("qtype", ["F64", "I8", "I16", "I32", "I64"])
def test_numbers_of_other_types_are_refused_by_name(work, qtype):
    model = open_model("wide.gguf")
    name = "blk.0.ffn_up.weight"
    data = {tensor.name: tensor.load() for tensor in model}
    data[name] = np.ones(data[name].shape, PLAIN_DTYPES[qtype])
    specs = [TensorSpec(t.name, t.shape, qtype if t.name == name else t.qtype) for t in model]
    write_gguf("odd.gguf", model.metadata, specs, data.values())
    assert f"{name}: type={qtype}" in str(plan("odd.gguf", ftype="Q4_K_M"))
    with pytest.raises(ValueError, match=f"^{name}: type={qtype}, .* Start from F16, BF16 or F32"):
        quantize("odd.gguf", "out.gguf", ftype="Q4_K_M")
    assert not list(work.glob("out*"))


def test_values_beyond_f16_are_refused_as_llama_quantize_does(work):
    header = read_header("f32.gguf")
    specs = [TensorSpec(t.name, t.shape, t.qtype) for t in header.tensors]
    data = [tensor.load() for tensor in open_model("f32.gguf")]
    at = next(i for i, spec in enumerate(specs) if spec.name == "blk.0.attn_q.weight")
    data[at][3, 5] = 1e5
    write_gguf("large.gguf", header.metadata, specs, data)
    with pytest.raises(
        ValueError, match=r"blk\.0\.attn_q\.weight: value=100000 in row 3, column 5, exceeds the range of F16"
    ):
        quantize("large.gguf", "out.gguf", ftype="F16")
    assert not list(work.glob("out*"))
    assert quantize("large.gguf", "out.gguf", ftype="BF16").exists()


def test_bad_input(work):
    with pytest.raises(ValueError, match=r"ftype=Q4_M.* Did you mean Q4_K_M\?"):
        quantize("wide.gguf", "out.gguf", ftype="Q4_M")
    with pytest.raises(FileNotFoundError, match="none"):
        quantize("none.gguf", "out.gguf", ftype="Q4_0")
    with pytest.raises(ValueError, match="via=f32, must be f16"):
        quantize("wide.gguf", "out.gguf", ftype="Q4_0", via="f32")
    with pytest.raises(ValueError, match="must not both be given"):
        quantize("wide.gguf", "out.gguf", ftype="Q4_0", include_weights=["a"], exclude_weights=["b"])
    with pytest.raises(ValueError, match="Pass imatrix too"):
        quantize("wide.gguf", "out.gguf", ftype="Q4_0", include_weights=["a"])
    with pytest.raises(ValueError, match="importance matrix has 256 columns, must have 96"):
        quantize("narrow.gguf", "out.gguf", ftype="Q4_0", imatrix="made.imatrix")
    with pytest.raises(ValueError, match="needs an importance matrix"):
        quantize("wide.gguf", "out.gguf", ftype="Q2_K_S")
    quantize("wide.gguf", "q4.gguf", ftype="Q4_0")
    with pytest.raises(ValueError, match=r"type=Q6_K, is quantized already|type=Q4_0, is quantized already"):
        quantize("q4.gguf", "out.gguf", ftype="Q5_0")
    for override in (
        "a",
        "a=int",
        "a=int:x",
        "a=bool:yes",
        "a=list:1",
        "a=str:" + "x" * 128,
        "=int:3",
        "a=int:4294967296",
    ):
        with pytest.raises(ValueError, match="override="):
            quantize("wide.gguf", "out.gguf", ftype="Q4_0", override_kv=[override])
    with pytest.raises(ValueError, match=r"key=general\.alignment, must keep its value"):
        quantize("wide.gguf", "out.gguf", ftype="Q4_0", override_kv=["general.alignment=int:0"])
    with pytest.raises(ValueError, match="via=f16 rounds a checkpoint, this is a GGUF model"):
        quantize("wide.gguf", "out.gguf", ftype="Q4_0", via="f16")
    with pytest.raises(ValueError, match="as_llama_cpp=True converts a checkpoint, this is a GGUF model"):
        quantize("wide.gguf", "out.gguf", ftype="Q4_0", as_llama_cpp=True)
    with pytest.raises(ValueError, match="keep_split applies to GGUF files"):
        quantize(checkpoints.write_checkpoint(work / "yi", "yi"), "out.gguf", ftype="Q4_0", keep_split=True)
    assert not list(work.glob("out*"))


@pytest.mark.skipif(os.name != "posix", reason="files are locked where fcntl is")
def test_two_runs_do_not_write_the_same_file(work):
    def second(line):
        if str(line).startswith("[  10/"):
            quantize("wide.gguf", "out.gguf", ftype="Q4_0")

    with pytest.raises(OSError, match=r"out\.gguf: another run is writing it"):
        quantize("wide.gguf", "out.gguf", ftype="Q4_0", report=second)
