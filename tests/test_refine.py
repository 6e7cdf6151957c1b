"""Refined files: less damage in the same bytes, the same on any number of threads and after an interruption."""

import resource
import subprocess
import sys

import made_models
import numpy as np
import pytest
from numba import get_num_threads, set_num_threads
from test_verify import rewritten

import quantlab as ql
from quantlab.cli import app
from quantlab.evaluate import refine as module
from quantlab.files.bundled import bundled_path, read_text
from quantlab.files.model import open as open_model
from quantlab.study.front import judge_refined
from quantlab.study.tables import size_ppl
from quantlab.transform.mixture import Recipe

OPTIONS = {"ftype": "Q2_K", "chunks": 2, "sweeps": 1, "progress": False}


@pytest.fixture(scope="module")
def refined(tmp_path_factory):
    """The bundled model at Q2_K, refined on two chunks."""
    return ql.refine("tiny", tmp_path_factory.mktemp("refined") / "a.gguf", **OPTIONS)


def test_the_file_is_the_ordinary_one_with_other_bytes(refined, tmp_path):
    ordinary = open_model(ql.quantize("tiny", tmp_path / "b.gguf", ftype="Q2_K", report=lambda _: None))
    model = open_model(refined)
    assert [(t.name, t.shape, t.qtype) for t in model] == [(t.name, t.shape, t.qtype) for t in ordinary]
    others = {t.name for t in model if not np.array_equal(t.load(), ordinary.tensor(t.name).load())}
    matrices = {t.name for t in model if len(t.shape) == 2}
    assert others == matrices - {"token_embd.weight"}
    added = {key: value for key, value in model.metadata.items() if key not in ordinary.metadata}
    assert all(key.startswith(module.PREFIX) for key in added)
    assert {key.removeprefix(module.PREFIX): added[key] for key in added}["chunks"] == 2


def test_it_does_less_damage_on_a_text_it_has_not_seen(refined):
    judged = judge_refined(refined, "tiny", "primer", chunks=2, progress=False)
    row = judged.rows[2]
    assert judged.helped and row["less"] > 0.25 and row["less"] > 5 * row["less_se"]


def test_one_thread_writes_the_same_bytes(refined, tmp_path):
    before = get_num_threads()
    set_num_threads(1 if before > 1 else before)
    try:
        again = ql.refine("tiny", tmp_path / "a.gguf", **OPTIONS)
    finally:
        set_num_threads(before)
    assert again.read_bytes() == refined.read_bytes()


@pytest.mark.parametrize("stop_at", ["blk.0.ffn_up.weight", "blk.5.attn_k.weight", "output.weight"])
def test_a_stopped_run_resumes_to_the_same_bytes(refined, tmp_path, monkeypatch, stop_at):
    whole = module._patching

    class Stopped(Exception):
        pass

    def until(path):
        from contextlib import contextmanager

        @contextmanager
        def stopping():
            with whole(path) as write:

                def write_until(name, data):
                    if name == stop_at:
                        raise Stopped
                    write(name, data)

                yield write_until

        return stopping()

    monkeypatch.setattr(module, "_patching", until)
    with pytest.raises(Stopped):
        ql.refine("tiny", tmp_path / "a.gguf", scratch=tmp_path / "scratch", **OPTIONS)
    assert not (tmp_path / "a.gguf").exists()
    monkeypatch.setattr(module, "_patching", whole)
    path = ql.refine("tiny", tmp_path / "a.gguf", scratch=tmp_path / "scratch", **OPTIONS)
    assert path.read_bytes() == refined.read_bytes()
    assert [item.name for item in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize("chunks, damping", [(2, 0.3), (16, 0.1), (64, 0.05)])
def test_damping_falls_with_the_tokens_for_each_input(chunks, damping):
    assert module.auto_damping(open_model(bundled_path("tiny")), np.zeros((chunks, 512))) == pytest.approx(damping)


def test_a_recipe_gives_the_types(tmp_path):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("^blk\\.0\\.ffn_down\\.weight$=Q4_K\n")
    path = ql.refine("tiny", tmp_path / "a.gguf", recipe=recipe, **OPTIONS)
    assert open_model(path).tensor("blk.0.ffn_down.weight").qtype == "Q4_K"


def test_a_refined_ftype_is_a_row_of_the_table(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(read_text("sampled").text[:6000])  # a few chunks
    table = size_ppl("tiny", ftypes=["Q2_K", "q2_k+Refined"], chunks=2, calibrate_on=text)
    ordinary, refined = table.rows
    assert refined["ftype"] == "Q2_K+refined" and refined["bytes"] == ordinary["bytes"]
    assert refined["kld_mean"] < 0.8 * ordinary["kld_mean"]


def test_sensitivity_measures_refined_bytes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(read_text("sampled").text[:6000])
    options = {"groups": {"down": ["blk.1.ffn_down.weight"]}, "chunks": 2, "cache": tmp_path, "progress": False}
    ordinary, refined = (
        ql.sensitivity("tiny", text, types=["Q2_K", "Q8_0"], refined=refined, **options) for refined in (False, True)
    )
    (two, eight), (two_refined, eight_refined) = ordinary.rows, refined.rows
    assert two_refined["delta_kld"] < 0.8 * two["delta_kld"]
    assert eight_refined["delta_kld"] == eight["delta_kld"]  # no grid: ordinary bytes
    again = ql.sensitivity("tiny", text, types=["Q2_K", "Q8_0"], refined=True, **options)
    assert again.rows == refined.rows and again.protocol["refined"] == refined.protocol["refined"]


# ---- bad input


def test_inputs_that_are_not_finite_are_named(tmp_path):
    norm = np.full(256, 3e38, np.float32)
    path = rewritten("tiny", tmp_path / "a.gguf", blk_2_attn_norm_weight=norm)
    with pytest.raises(ValueError, match=r"blk.2.attn_q.weight: its inputs are not all finite. Check the model"):
        ql.refine(path, tmp_path / "b.gguf", **OPTIONS)
    assert [item.name for item in tmp_path.iterdir()] == ["a.gguf"]


def test_a_matrix_of_another_model_is_refused(tmp_path):
    matrix = made_models.made_imatrix(tmp_path / "a.imatrix", made_models.WIDE | {"n_embd": 512})
    with pytest.raises(ValueError, match=r"attn_k.weight: the importance matrix has 512 columns, must have 256"):
        ql.refine("tiny", tmp_path / "b.gguf", imatrix=matrix, **OPTIONS)
    assert [item.name for item in tmp_path.iterdir()] == ["a.imatrix"]


def test_a_full_disk_leaves_nothing(tmp_path):
    program = "from quantlab.cli import main; main()"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))  # noqa: E731
    command = [sys.executable, "-c", program, "refine", "tiny", "a.gguf", "Q2_K", "--chunks", "2", "--judge", "none"]
    run = subprocess.run(command, cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("quantlab: ") and "File too large" in run.stderr
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_refined_for_a_comparison_is_said(tmp_path):
    for change, text in (
        ({"text": "sampled"}, r"Q2_K\+refined: calibrate_on=sampled, is the text to judge on. Choose another"),
        ({"scratch": tmp_path}, r"Q2_K\+refined: cannot resume from scratch=.* Refine to a file first"),
        ({"variants": "Q9_K+refined"}, r"Q9_K"),
    ):
        with pytest.raises(ValueError, match=text):
            ql.compare("tiny", **{"variants": ["Q2_K+refined"], "progress": False, "chunks": 1} | change)
    with pytest.raises(ValueError, match=r"Q2_K\+refined: must have weights to refine, llama-7b is a shape"):
        size_ppl("llama-7b", ftypes=["Q2_K+refined"])
    assert not list(tmp_path.iterdir())


def test_a_missing_text_to_judge_on_is_said_first(tmp_path):
    words = ["refine", "tiny", str(tmp_path / "a.gguf"), "Q2_K", "--chunks", "2", "--judge", str(tmp_path / "b.txt")]
    with pytest.raises(FileNotFoundError, match=r"b.txt: no such file. Give a text file"):
        app(words, standalone_mode=False)
    assert not list(tmp_path.iterdir())


def test_bad_options_are_refused_and_nothing_is_written(tmp_path):
    out = tmp_path / "a.gguf"
    for change, text in (
        ({"sweeps": -1}, r"sweeps=-1, must be 0 or more"),
        ({"damping": 0.0}, r"damping=0.0, must be above 0"),
        ({"damping": "much"}, r"damping=much, must be above 0 and at most 10. Give auto"),
        ({"recipe": Recipe({"blk.9.attn_q.weight": "Q3_K"})}, r"recipe: blk.9.attn_q.weight is not a tensor of .*tiny"),
        ({"ftype": "F16"}, r"no tensor of .* can be refined"),
        ({"n_ctx": 64, "chunks": 4}, r"256 tokens are fewer than the 512 inputs of the widest layer. Give at least 8"),
        ({"text": ["sampled", "primer"], "chunks": 1}, r"chunks=1, must be at least one for each of 2 texts"),
        ({"memory": "300MiB"}, r"must be at least .* GiB for 2 chunks"),
    ):
        with pytest.raises(ValueError, match=text):
            ql.refine("tiny", out, **OPTIONS | change)
    assert not list(tmp_path.iterdir())
    out.write_text("mine")
    with pytest.raises(FileExistsError):
        ql.refine("tiny", out, **OPTIONS)
    assert out.read_text() == "mine"
