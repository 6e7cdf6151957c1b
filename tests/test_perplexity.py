"""Perplexity and comparison, on a small random model: against plain NumPy, across threads, in pieces, after a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import llama_models
import numba
import numpy as np
import pytest

import quantlab as ql
from quantlab.evaluate import budget
from quantlab.evaluate.logits import logits
from quantlab.transform.mixture import Recipe

N_CTX = 32
OPTIONS = {"n_ctx": N_CTX, "progress": False}
WORDS = Path(__file__).read_text(encoding="utf-8")  # this very file is the text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with BOS, and a text of some 20 chunks."""
    folder = llama_models.write_model(tmp_path_factory.mktemp("model") / "llama2", "llama2")
    (folder.parent / "text.txt").write_text(WORDS[:2000], encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def text(folder):
    return folder.parent / "text.txt"


def log_softmax(x):
    x = x.astype(np.float64) - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def chunks_of(model, text):
    """Original chunks of a text [n_chunks, N_CTX]."""
    tokens = model.vocab.encode(text.read_text())
    return tokens[: len(tokens) // N_CTX * N_CTX].reshape(-1, N_CTX)


def test_perplexity_is_that_of_the_second_halves(folder, text):
    model, nll = ql.open(folder), []
    for chunk in chunks_of(model, text):
        evaluated = np.concatenate([[model.vocab.bos_id], chunk[1:]])
        predicted = log_softmax(logits(model, evaluated)[N_CTX // 2 : -1])
        nll.append(-predicted[np.arange(len(predicted)), chunk[N_CTX // 2 + 1 :]])
    found = ql.perplexity(folder, text, **OPTIONS)
    assert found.ppl == pytest.approx(np.exp(np.mean(nll)), rel=1e-6)
    assert found.ppl_se == pytest.approx(found.ppl * np.std(nll) / np.sqrt(np.size(nll) - 1), rel=1e-6)
    assert found.protocol.bos == "first of each chunk"
    assert found.running["ppl"].tolist() == pytest.approx(
        np.exp([np.mean(nll[: i + 1]) for i in range(len(nll))]), rel=1e-6
    )


def test_full_protocol_scores_all_but_the_first(folder, text):
    model, nll = ql.open(folder), []
    for chunk in chunks_of(model, text):
        predicted = log_softmax(logits(model, chunk)[:-1])
        nll.append(-predicted[np.arange(N_CTX - 1), chunk[1:]])
    found = ql.perplexity(folder, text, protocol="full", **OPTIONS)
    assert found.ppl == pytest.approx(np.exp(np.mean(nll)), rel=1e-6)


def test_variants_in_memory_are_those_in_files(folder, text, tmp_path):
    files = [ql.quantize(folder, tmp_path / f"{ftype}.gguf", ftype=ftype) for ftype in ("Q8_0", "Q4_1")]
    recipe = Recipe({tensor.name: tensor.qtype for tensor in ql.open(files[1])}).save(tmp_path / "mine.txt")
    variants = ["Q8_0", "Q4_1", "COPY", f"eight={files[0]}", files[1], recipe, "Q8_0"]
    found = ql.compare(folder, variants, text, **OPTIONS).to_frame().set_index("variant")
    assert list(found.index) == ["llama2", "Q8_0", "Q4_1", "COPY", "eight", "Q4_1#2", "mine", "Q8_0#2"]
    for a, b in (("Q8_0", "eight"), ("Q4_1", "Q4_1#2"), ("Q4_1", "mine"), ("Q8_0", "Q8_0#2"), ("llama2", "COPY")):
        assert found.loc[a].equals(found.loc[b]), (a, b)
    assert found.loc["COPY", "kld_max"] == found.loc["COPY", "kld_min"] == 0
    assert 0 < found.loc["Q8_0", "kld_mean"] < found.loc["Q4_1", "kld_mean"]


def test_comparison_agrees_with_plain_numpy(folder, text, tmp_path):
    base, other = ql.open(folder), ql.open(ql.quantize(folder, tmp_path / "q.gguf", ftype="Q4_0"))
    kld, same = [], []
    for chunk in chunks_of(base, text)[:3]:
        evaluated = np.concatenate([[base.vocab.bos_id], chunk[1:]])
        p, q = (log_softmax(logits(model, evaluated)[N_CTX // 2 : -1]) for model in (base, other))
        kld.append((np.exp(p) * (p - q)).sum(axis=1))
        same.append(p.argmax(axis=1) == q.argmax(axis=1))
    row = ql.compare(folder, ["Q4_0"], text, chunks=3, **OPTIONS).rows[1]
    assert row["kld_mean"] == pytest.approx(np.mean(kld), rel=1e-4)
    assert row["same_top_p"] == np.mean(same)


@pytest.mark.parametrize("mode", ["float", "ggml-cpu"])
def test_threads_and_batches_do_not_matter(folder, text, mode, monkeypatch):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one thread is all there is")
    two = ql.compare(folder, ["Q4_0"], text, mode=mode, **OPTIONS).rows
    numba.set_num_threads(1)
    try:
        monkeypatch.setattr(budget, "ROWS_AT_ONCE", N_CTX)
        one = ql.compare(folder, ["Q4_0"], text, mode=mode, **OPTIONS).rows
    finally:
        numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)
    ppl, kld = (1e-5, 1e-3) if mode == "float" else (2e-4, 1e-3)  # products of other sizes may add up in another order
    for a, b in zip(one, two, strict=True):
        assert a["ppl"] == pytest.approx(b["ppl"], rel=ppl)
        assert a["kld_mean"] == pytest.approx(b["kld_mean"], rel=kld)


KILLED = """
import os, sys
import quantlab as ql
from quantlab.evaluate.states import HiddenStates

advance = HiddenStates.advance

def advance_and_die(self):
    advance(self)
    if self.layer == 1:
        os.kill(os.getpid(), 9)

HiddenStates.advance = advance_and_die
ql.compare(sys.argv[1], ["Q4_0"], sys.argv[2], n_ctx=int(sys.argv[3]), scratch=sys.argv[4], progress=False)
"""


def test_a_killed_run_resumes_to_the_same_bits(folder, text, tmp_path):
    scratch = tmp_path / "scratch"
    command = [sys.executable, "-c", KILLED, folder, text, str(N_CTX), scratch]
    assert subprocess.run(command, check=False).returncode == -9
    assert json.loads((scratch / "progress.json").read_text())["layer"] == 1
    with pytest.raises(ValueError, match="holds the states of another run"):
        ql.compare(folder, ["Q5_0"], text, scratch=scratch, **OPTIONS)
    resumed = ql.compare(folder, ["Q4_0"], text, scratch=scratch, **OPTIONS)
    assert not scratch.exists()
    assert resumed.rows == ql.compare(folder, ["Q4_0"], text, **OPTIONS).rows


def test_results_are_one_shape_everywhere(folder, text):
    found = ql.compare(folder, "Q8_0", text, chunks=2, **OPTIONS)
    document = json.loads(found.to_json())
    assert document["schema"] == 1
    assert document["protocol"]["n_ctx"] == N_CTX and document["protocol"]["chunks"] == 2
    keys = "variant bytes bpw ppl ppl_se ln_ratio ln_ratio_se kld_mean kld_se kld_median kld_p99 kld_p999"
    assert set(f"{keys} dp_mean dp_rms same_top_p".split()) <= set(document["rows"][1])
    assert list(found.to_frame()["variant"]) == ["llama2", "Q8_0"]
    assert "llama2" in str(found) and "<table" in found._repr_html_()


def test_results_of_different_protocol_are_not_joined(folder, text):
    a, b = (ql.compare(folder, [ftype], text, chunks=2, **OPTIONS) for ftype in ("Q8_0", "Q4_0"))
    assert list(a.join(b).to_frame()["variant"]) == ["llama2", "Q8_0", "Q4_0"]
    other = ql.compare(folder, ["Q4_0"], text, chunks=3, **OPTIONS)
    with pytest.raises(ValueError, match="protocol: tokens_sha256=.* must be the same"):
        a.join(other)


def test_an_importance_matrix_is_used_and_named(folder, text, rng):
    from quantlab.files.imatrix_file import ImportanceMatrix

    model = ql.open(folder)
    shapes = {
        tensor.name: tensor.shape[-1] for tensor in model if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    }
    sums = {name: np.exp(2 * rng.standard_normal((1, n))).astype(np.float32) for name, n in shapes.items()}
    counts = {name: np.ones(1, np.float32) for name in shapes}
    matrix = ImportanceMatrix(sums, counts, 1, 512, ("made up",))
    plain, weighted = (
        ql.compare(model, ["Q4_0"], text, imatrix=m, chunks=2, **OPTIONS).rows[1] for m in (None, matrix)
    )
    assert (plain["variant"], weighted["variant"]) == ("Q4_0", "Q4_0+imatrix")
    assert plain["kld_mean"] != weighted["kld_mean"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "exact"}, "mode=exact, must be one of float, ggml-cpu"),
        ({"protocol": "hf"}, "protocol=hf, must be one of llama.cpp, full"),
        ({"n_ctx": 2}, "n_ctx=2, must be at least 4"),
        ({"n_ctx": 4096}, r"text.txt: n_tokens=\d+, must be at least 2 \* n_ctx = 8192"),
        ({"chunks": 0}, "chunks=0, must be at least 1"),
        ({"memory": "much"}, "memory=much, must be a positive number of bytes"),
        ({"memory": "1KiB"}, r"memory=1KiB, must be at least .* GiB for this model"),
    ],
)
def test_options_out_of_range_are_refused(folder, text, options, message):
    with pytest.raises(ValueError, match=message):
        ql.perplexity(folder, text, **(OPTIONS | options))


def test_variants_of_another_model_are_refused(folder, text, tmp_path):
    other = ql.quantize(llama_models.write_model(tmp_path / "llama1", "llama1"), tmp_path / "o.gguf", ftype="Q8_0")
    with pytest.raises(ValueError, match="o.gguf: .* Compare variants of one model"):
        ql.compare(folder, [other], text, **OPTIONS)
    with pytest.raises(ValueError, match="ftype=Q4_K_X, must be one of .* Did you mean Q4_K_"):
        ql.compare(folder, ["Q4_K_X"], text, **OPTIONS)
    with pytest.raises(ValueError, match="recipe: blk.9.attn_q.weight is not a tensor of"):
        ql.compare(folder, [Recipe({"blk.9.attn_q.weight": "Q4_0"})], text, **OPTIONS)


def test_other_architectures_are_refused_by_name(tmp_path, text):
    from quantlab.files.gguf_file import TensorSpec, write_gguf

    names = ("context_length", "embedding_length", "feed_forward_length", "block_count", "attention.head_count")
    metadata = {"general.architecture": "gpt2"} | {f"gpt2.{name}": np.uint32(64) for name in names}
    metadata["gpt2.attention.layer_norm_rms_epsilon"] = np.float32(1e-5)
    path = tmp_path / "g.gguf"
    x = np.ones((2, 32), np.float32)
    write_gguf(path, metadata, [TensorSpec("x", x.shape, "F32")], [x])
    with pytest.raises(ValueError, match="g.gguf: architecture=gpt2, must be one of .*llama, .*qwen3"):
        ql.perplexity(path, text, **OPTIONS)


AFRESH = """
import quantlab as ql
for mode in ("float", "ggml-cpu"):
    print(ql.compare("tiny", ["Q4_K_M"], "primer", chunks=1, mode=mode, progress=False).to_json())
"""


@pytest.mark.slow
def test_a_process_that_compiles_and_one_that_loads_what_is_compiled_agree_to_the_last_bit(tmp_path):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    first, second = (subprocess.check_output([sys.executable, "-c", AFRESH], env=environment) for _ in range(2))
    assert first == second
