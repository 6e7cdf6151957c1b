"""The collected importance matrix: against its definition, llama-imatrix's own, and itself on other threads."""

import json
from pathlib import Path

import numpy as np
import pytest
from numba import get_num_threads, set_num_threads
from typer.testing import CliRunner

from quantlab.evaluate.imatrix import imatrix
from quantlab.files.bundled import Text, model_path
from quantlab.files.imatrix_file import ImportanceMatrix, merge, read_imatrix
from quantlab.files.model import open as open_model
from quantlab.transform.quantize import quantize

GOLDEN = json.loads((Path(__file__).parent / "golden" / "imatrix_collected.json").read_text())
SHORT = dict(chunks=2, n_ctx=128, progress=False)


def naive_first_layer(model, tokens):
    """Inputs of attn_q and attn_v of layer 0, from the definition."""
    x = model.tensor("token_embd.weight").floats()[tokens].astype(np.float64)
    norm = model.tensor("blk.0.attn_norm.weight").floats()
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + model.hparams.rms_eps) * norm


def test_first_layer_is_the_definition():
    model = open_model(model_path("tiny"))
    text = Text.from_bytes("own", b"Weights are stored in blocks. " * 60)
    tokens = model.vocab.encode(text.text)[: 2 * 128].reshape(2, 128)
    tokens[:, 0] = model.vocab.bos_id
    matrix = imatrix(model, text, **SHORT)
    expected = (naive_first_layer(model, tokens.reshape(-1)) ** 2).sum(axis=0)
    np.testing.assert_allclose(matrix.sums["blk.0.attn_q.weight"][0], expected, rtol=1e-5)  # float32 norms
    assert matrix.counts["blk.0.attn_q.weight"] == 2 * 128
    assert (matrix.chunk_count, matrix.chunk_size, matrix.datasets) == (2, 128, ("own",))


def test_one_entry_per_matrix_of_a_layer():
    model = open_model(model_path("tiny"))
    matrix = imatrix(model, **SHORT)
    wanted = {t.name: t.shape[-1] for t in model if t.name.startswith("blk.") and len(t.shape) == 2}
    assert {name: sums.shape[1] for name, sums in matrix.sums.items()} == wanted
    for i in range(model.hparams.n_layer):
        q, k, gate, up = (matrix.sums[f"blk.{i}.{kind}.weight"] for kind in ("attn_q", "attn_k", "ffn_gate", "ffn_up"))
        assert np.array_equal(q, k) and np.array_equal(gate, up)


def test_process_output_adds_the_output_matrix():
    matrix = imatrix("tiny", process_output=True, **SHORT)
    assert matrix.sums["output.weight"].shape == (1, 256)
    assert matrix.counts["output.weight"] == 2 * 128


def test_agrees_with_llama_imatrix():
    # llama-imatrix multiplies in another order and rounds activations to the weights' own type
    matrix = imatrix("tiny", "primer", chunks=4, progress=False)
    errors = []
    for name, expected in GOLDEN["sums"].items():
        errors.append(np.abs(matrix.sums[name][0, ::16] / np.array(expected) - 1))
    errors = np.concatenate(errors)
    assert np.median(errors) < 1e-3 and np.percentile(errors, 99) < 1e-2
    assert all(matrix.counts[name] == GOLDEN["count"] for name in GOLDEN["sums"])


def test_threads_do_not_matter():
    before = get_num_threads()
    try:
        set_num_threads(1)
        one = imatrix("tiny", chunks=3, progress=False)
    finally:
        set_num_threads(before)
    many = imatrix("tiny", chunks=3, progress=False)
    assert all(np.array_equal(one.sums[name], many.sums[name]) for name in one.sums)


def test_earlier_files_are_added(tmp_path):
    first = imatrix("tiny", "primer", **SHORT)
    path = first.save(tmp_path / "a.gguf")
    both = imatrix("tiny", "sampled", in_files=[path, first], **SHORT)
    second = imatrix("tiny", "sampled", **SHORT)
    name = "blk.3.ffn_down.weight"
    assert np.array_equal(both.sums[name], first.sums[name] + first.sums[name] + second.sums[name])
    assert both.chunk_count == 6 and both.datasets == ("primer", "primer", "sampled")


def test_it_is_what_quantize_takes(tmp_path):
    matrix = imatrix("tiny", **SHORT)
    from_file = quantize("tiny", tmp_path / "a.gguf", ftype="Q4_K_S", imatrix=matrix.save(tmp_path / "m.gguf"))
    as_object = quantize("tiny", tmp_path / "b.gguf", ftype="Q4_K_S", imatrix=matrix)
    without = quantize("tiny", tmp_path / "c.gguf", ftype="Q4_K_S")
    tensors = [
        [tensor.load().tobytes() for tensor in open_model(path) if tensor.qtype == "Q4_K"]
        for path in (from_file, as_object, without)
    ]
    assert tensors[0] == tensors[1] != tensors[2]


def test_statistics_of_a_known_matrix():
    sums = {
        "blk.0.attn_q.weight": np.array([[4, 0, 0, 0]], np.float32),
        "blk.1.attn_q.weight": np.array([[2, 2, 2, 2]], np.float32),
    }
    frame = ImportanceMatrix(sums, dict.fromkeys(sums, np.full(1, 2, np.float32)), 1, 2).to_frame()
    one_hot, flat = frame.set_index("layer").loc[0], frame.set_index("layer").loc[1]
    assert (one_hot.total, one_hot.entropy, one_hot.active, one_hot.zd, one_hot.cos_previous) == (2, 0, 0.25, 0.25, 0)
    assert (flat.total, flat.entropy, flat.entropy_norm, flat["std"], flat.cos_previous) == (4, 2, 1, 0, 0.5)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command line in an empty folder."""
    from quantlab.cli import app

    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, ["imatrix", *map(str, args)])


def test_the_word_collects_merges_and_shows(run):
    done = run("tiny", "-c", 128, "--chunks", 2, "-o", "a.gguf")
    assert (done.exit_code, done.stdout) == (0, "a.gguf\n")
    twice = ["--in-file", "a.gguf"] * 2
    assert run(*twice, "-o", "b.dat", "-c", 128, "--legacy").exit_code == 0
    assert read_imatrix("b.dat").is_legacy and read_imatrix("b.dat").chunk_count == 4
    shown = run("--in-file", "a.gguf", "--show-statistics", "--json", "-")
    assert len(json.loads(shown.stdout)["rows"]) == 56 and "entropy" in shown.stderr
    for clash in (["-o", "a.gguf"], ["-o", "c.gguf", "--json", "c.gguf"]):
        assert isinstance(run("--in-file", "a.gguf", *clash, "--overwrite").exception, ValueError)
    refused = run("tiny", "-c", 128, "--chunks", 2, "-o", "a.gguf")
    assert isinstance(refused.exception, FileExistsError) and "%" not in refused.stderr


def test_bad_input(tmp_path):
    one = np.ones(1, np.float32)
    narrow = ImportanceMatrix(
        {"blk.0.attn_q.weight": np.ones((1, 8), np.float32)}, {"blk.0.attn_q.weight": one}, 1, 128
    )
    with pytest.raises(ValueError, match="mode=exact, must be one of float, ggml-cpu, half"):
        imatrix("tiny", mode="exact")
    with pytest.raises(ValueError, match="must be at least 2"):
        imatrix("tiny", Text.from_bytes("short", b"Too short."), progress=False)
    with pytest.raises(FileNotFoundError, match="no such importance matrix"):
        imatrix("tiny", in_files=[tmp_path / "none.gguf"], progress=False)
    with pytest.raises(ValueError, match="no importance matrix, must be at least one. Give a model"):
        merge([])
    with pytest.raises(ValueError, match="shapes .* must be equal"):
        merge(
            [narrow, ImportanceMatrix(dict.fromkeys(narrow.sums, np.ones((1, 4), np.float32)), narrow.counts, 1, 128)]
        )
    with pytest.raises(ValueError, match=r"in_files: blk.0.attn_q.weight: shape=\(1, 8\), must be \(1, 256\)"):
        imatrix("tiny", in_files=[narrow], **SHORT)
    larger = ImportanceMatrix({"blk.99.attn_q.weight": np.ones((1, 8), np.float32)}, narrow.counts, 1, 128)
    with pytest.raises(ValueError, match="in_files: blk.99.attn_q.weight is not a tensor of"):
        imatrix("tiny", in_files=[larger], **SHORT)


def test_a_run_that_fails_leaves_no_file(run):
    Path("other.gguf").write_bytes(b"not a matrix")
    assert isinstance(run("--in-file", "other.gguf", "-o", "c.gguf").exception, ValueError)
    assert not Path("c.gguf").exists()
