"""Recipes: the best of all, the same whoever measured, what llama-quantize makes of them, and what they gain."""

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from quantlab.files.model import open as open_model
from quantlab.study.front import front, judge, reduction
from quantlab.study.recipe import open_menu, recipe
from quantlab.study.sensitivity import sensitivity, weight_errors
from quantlab.transform.mixture import Recipe, read_tensor_types
from quantlab.transform.plan import sizes
from quantlab.transform.quantize import quantize

SHORT = dict(chunks=1, n_ctx=64, types=["Q2_K", "Q4_K", "Q6_K"], progress=False)


@pytest.fixture(scope="module")
def model():
    return open_model("tiny")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("damages")


@pytest.fixture(scope="module")
def measured(model, cache):
    return sensitivity(model, cache=cache, **SHORT)


def stock(model, ftype):
    return int(sizes("tiny").to_frame().set_index("ftype").loc[ftype, "bytes"])


def test_size_is_that_of_the_file(model, measured, tmp_path):
    best = recipe(measured, model, like="Q4_K_M")
    assert best.bytes <= best.limit == stock(model, "Q4_K_M") and best.ftype == "Q4_K_M"
    written = open_model(quantize(model, tmp_path / "a.gguf", ftype=best.ftype, tensor_types=best.tensor_types()))
    assert {t.name: t.qtype for t in written} == {t.name: best.types.get(t.name, "F32") for t in model}
    assert sum(t.nbytes for t in written) == best.bytes
    assert best.bpw == pytest.approx(8 * best.bytes / model.n_weights)


def test_no_exchange_makes_it_better(model, measured):
    best, menu = recipe(measured, model, target_bpw=4.0), open_menu(measured, model)
    chosen = {row["group"]: row for row in best.rows}
    names = list(menu.groups)
    for a in names[::7]:
        for b in names:
            for row_a in menu.groups[a]:
                for row_b in menu.groups[b] if a != b else []:
                    more = row_a["bytes"] + row_b["bytes"] - chosen[a]["bytes"] - chosen[b]["bytes"]
                    worse = row_a["delta_kld"] + row_b["delta_kld"] - chosen[a]["delta_kld"] - chosen[b]["delta_kld"]
                    assert best.bytes + more > best.limit or worse > -1e-12


def test_prediction_is_the_sum(model, measured):
    best = recipe(measured, model, target_size="2800KiB")
    rows = {(row["group"], row["qtype"]): row["delta_kld"] for row in measured.rows}
    assert best.predicted == pytest.approx(sum(rows[name, qtype] for name, qtype in best.types.items()), rel=1e-12)
    assert best.limit == 2800 << 10
    assert open_menu(measured, model).predicted(dict.fromkeys(best.types, "Q4_K")) == pytest.approx(
        sum(rows[name, "Q4_K"] for name in best.types), rel=1e-12
    )


def test_everything_fits_and_nothing_is_changed(model, measured):
    best = recipe(measured, model, target_bpw=17)
    assert set(best.types.values()) == {"BF16"} and best.predicted == 0 and best.bytes == model.nbytes


def test_constraints(model, measured):
    options = {"keep": {"output.weight": "Q6_K"}, "min_type": {"attn_v": "Q4_K"}, "max_type": [("ffn", "Q4_K")]}
    best = recipe(measured, model, like="Q3_K_M", **options)
    assert best.types["output.weight"] == "Q6_K"
    assert {best.types[f"blk.{i}.attn_output.weight"] for i in range(8)} != {"Q6_K"}  # a whole name means it alone
    assert all(qtype != "Q2_K" for name, qtype in best.types.items() if "attn_v" in name)
    assert all(qtype in ("Q2_K", "Q4_K") for name, qtype in best.types.items() if "ffn" in name)
    assert best.predicted >= recipe(measured, model, like="Q3_K_M").predicted
    assert best.provenance["constraints"]["min_type"] == [("attn_v", "Q4_K")]


@pytest.fixture(scope="module")
def by_kind(model, tmp_path_factory):
    """A recipe whose groups are kinds of tensors, as a file."""
    found = sensitivity(model, groups="kind", cache=False, **SHORT)
    return recipe(found, model, like="Q4_K_S").save(tmp_path_factory.mktemp("recipe") / "a.txt").read_bytes()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_file_on_any_number_of_threads(model, by_kind, tmp_path, threads):
    again = sensitivity(model, groups="kind", threads=threads, cache=False, **SHORT)
    assert recipe(again, model, like="Q4_K_S").save(tmp_path / "b.txt").read_bytes() == by_kind


def test_the_same_file_through_processes(model, by_kind, tmp_path):
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        again = sensitivity(model, groups="kind", executor=pool, cache=False, **SHORT)
    assert recipe(again, model, like="Q4_K_S").save(tmp_path / "b.txt").read_bytes() == by_kind


def test_the_same_file_through_dask(model, by_kind, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with distributed.Client(cluster) as client:
            again = sensitivity(model, groups="kind", executor=client.get_executor(), cache=False, **SHORT)
    assert recipe(again, model, like="Q4_K_S").save(tmp_path / "b.txt").read_bytes() == by_kind


def test_the_error_of_weights_as_criterion(model, measured, cache):
    by_error = recipe(measured, model, like="Q4_K_M", criterion="error")
    best = recipe(measured, model, like="Q4_K_M")
    of = {(row["group"], row["qtype"]): row for row in measured.rows}
    sums = {
        (figure, one.name): sum(of[pair][figure] for pair in one.types.items())
        for figure in ("error", "delta_kld")
        for one in (best, by_error)
    }
    assert best.name == "recipe" and by_error.name == "recipe by error"
    assert sums["error", "recipe by error"] < sums["error", "recipe"]
    assert sums["delta_kld", "recipe"] < sums["delta_kld", "recipe by error"] == pytest.approx(by_error.predicted)
    alone = weight_errors(model, types=SHORT["types"], cache=cache, progress=False)
    unmeasured = recipe(alone, model, like="Q4_K_M", criterion="error")
    assert unmeasured.types == by_error.types and unmeasured.predicted is None
    assert "weighted error" in str(unmeasured) and "weights alone" in str(alone)
    with pytest.raises(ValueError, match="its damage is unknown. Measure the sensitivity again"):
        recipe(alone, model, like="Q4_K_M")


def test_held_against_another_recipe(model, measured):
    best, other = (recipe(measured, model, like="Q3_K_M", criterion=criterion) for criterion in ("kld", "error"))
    judged = judge([best], model, "primer", against=[other], chunks=2, n_ctx=128, progress=False)
    _, theirs, ours = judged.rows
    assert [theirs["variant"], ours["variant"], ours["against"]] == ["recipe by error", "recipe", "recipe by error"]
    assert ours["less"] == pytest.approx(1 - ours["kld_mean"] / theirs["kld_mean"])
    with pytest.raises(ValueError, match="against=2 recipes, must be as many as are judged, 1"):
        judge([best], model, against=[other, other])


def test_types_can_be_excluded(model, measured):
    best = recipe(measured, model, like="Q4_K_M", exclude=["q6_k"])
    assert "Q6_K" not in best.types.values() and best.provenance["constraints"]["exclude"] == ["Q6_K"]
    assert best.predicted >= recipe(measured, model, like="Q4_K_M").predicted


def test_a_ftype_that_needs_a_matrix_is_not_next_in_size(model, measured):
    sizes_of = open_menu(measured, model).ftypes()
    assert "IQ3_M" in sizes_of and not {"IQ2_XS", "IQ1_S", "Q2_K_S"} & sizes_of.keys()


def test_files(model, measured, tmp_path):
    best = recipe(measured, model, like="Q4_K_M")
    path = best.save(tmp_path / "r.txt")
    assert Recipe.load(path).types == best.types
    assert read_tensor_types(path)[0] == (r"^output\.weight$", best.types["output.weight"])
    kept = json.loads((tmp_path / "r.txt.json").read_text())
    assert kept["protocol"]["bytes"] == best.bytes and kept["protocol"]["calibration"]["text"] == "sampled"
    assert [row["qtype"] for row in kept["rows"]] == [row["qtype"] for row in best.rows]
    assert best.command("r.txt", imatrix="m.gguf") == (
        "llama-quantize --imatrix m.gguf --tensor-type-file r.txt model.gguf model-r.gguf Q4_K_M"
    )
    from_file = recipe(measured.save(tmp_path / "s.json"), model, like="Q4_K_M")
    assert from_file.types == best.types


def test_front_falls_and_beats_every_ftype(model, measured):
    frame = front(measured, model, points=6).to_frame()
    recipes = frame[frame["variant"] == "recipe"]
    assert recipes["bytes"].is_monotonic_increasing and recipes["predicted_kld"].is_monotonic_decreasing
    pure = frame[frame["variant"] == "Q6_K"].iloc[0]
    assert recipes[recipes["bytes"] <= pure["bytes"]]["predicted_kld"].min() <= pure["predicted_kld"]
    assert np.isnan(frame.set_index("variant").loc["Q5_K_M", "predicted_kld"])  # Q5_K was not measured


def test_judged_on_another_text(model, measured):
    best = recipe(measured, model, like="Q4_K_M")
    judged = judge(best, model, "primer", chunks=2, n_ctx=128, progress=False)
    base, ftype, ours = judged.rows
    assert ours["variant"] == f"recipe {best.bpw:.2f} bpw"
    assert base["kld_mean"] == 0 and ftype["variant"] == ours["against"] == "Q4_K_M"
    assert ours["less"] == pytest.approx(1 - ours["kld_mean"] / ftype["kld_mean"])
    assert ours["predicted_kld"] == best.predicted and "less_se" in str(judged)
    assert json.loads(judged.to_json())["rows"][2]["same_top_p"] > 0.5


def test_reduction_is_paired():
    theirs = np.array([1.0, 3.0, 2.0, 5.0])
    assert reduction(0.8 * theirs, theirs) == (pytest.approx(0.2), pytest.approx(0, abs=1e-15))
    assert reduction(theirs[::-1], theirs)[1] > 0
    assert np.isnan(reduction(theirs, 0 * theirs)).all()


@pytest.mark.long
def test_gains_on_the_bundled_model(model):
    # calibrated on what the model writes, judged on the primer
    found = sensitivity(model, "sampled", chunks=4, types=["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"], progress=False)
    wanted = {"Q4_K_M": 0.30, "Q3_K_M": 0.25, "Q2_K": 0.40}  # measured on 2 chunks: 0.39, 0.32, 0.47
    judged = judge([recipe(found, model, like=ftype) for ftype in wanted], model, "primer", progress=False)
    for row in judged.rows[1 + len(wanted) :]:
        assert row["less"] - 2 * row["less_se"] > wanted[row["against"]]
        assert row["bytes"] <= stock(model, row["against"])


def test_the_word(tmp_path, monkeypatch, measured):
    from quantlab.cli import app
    from quantlab.cli.recipes import _other_text

    monkeypatch.chdir(tmp_path)
    measured.save("s.json")
    words = ["recipe", "tiny", "--sensitivity", "s.json", "--like", "Q4_K_M", "--judge", "none", "--json", "-"]
    done = CliRunner().invoke(
        app, [*words, "--exchanges", "0", "--keep", "output.weight=Q6_K", "--quantize", "out.gguf"]
    )
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["protocol"]["ftype"] == "Q4_K_M" and "llama-quantize" in done.stderr
    assert done.stderr.count("predicted KLD") == 1
    types = {tensor.name: tensor.qtype for tensor in open_model("out.gguf")}
    assert Recipe.load("recipe.txt").types.items() <= types.items()
    assert isinstance(CliRunner().invoke(app, words).exception, FileExistsError)
    same = CliRunner().invoke(app, [*words, "--overwrite", "--quantize", "recipe.txt.json"])
    assert "recipe.txt.json: is given for two outputs" in str(same.exception)
    same = CliRunner().invoke(app, [*words, "--overwrite", "-o", "s.json"])
    assert "s.json: is the input" in str(same.exception)
    wrong = CliRunner().invoke(app, [*words, "--overwrite", "--chunks", "3"])
    assert wrong.exit_code == 2 and "holds damages" in wrong.stderr
    for more, text in (
        (["--criterion", "error", "--minutes", "1"], "error measures nothing"),
        (["--exchanges", "0", "--minutes", "1"], "is a limit for exchanges"),
        (["--exchanges", "0", "-f", "sampled"], "holds damages"),
    ):
        wrong = CliRunner().invoke(app, [*words, "--overwrite", *more])
        assert wrong.exit_code == 2 and text in wrong.stderr
    wrong = CliRunner().invoke(app, [*words, "--overwrite", "--judge", "sampled"])
    assert wrong.exit_code == 2 and "is the calibration text, choose another" in wrong.stderr
    assert _other_text("sampled", None, None, "error") == "sampled"  # errors are calibrated on no text
    wrong = CliRunner().invoke(app, [*words, "--overwrite", "--judge", "missing.txt"])
    assert "missing.txt: no such file. Give a text file" in str(wrong.exception) and "KLD" not in wrong.output
    options = ["--exchanges", "2", "--minutes", "5", "--exclude", "Q6_K,Q5_K", "-o", "moved.txt"]
    moved = CliRunner().invoke(app, [*words, "--overwrite", *options])
    assert json.loads(moved.stdout)["protocol"]["exchanges"]["tried"] == 2
    assert "Q6_K" not in Recipe.load("moved.txt").types.values()


def test_bad_input(model, measured, tmp_path):
    with pytest.raises(ValueError, match="must be exactly one of the three"):
        recipe(measured, model)
    with pytest.raises(ValueError, match="must be exactly one of the three"):
        recipe(measured, model, like="Q4_K_M", target_bpw=4)
    with pytest.raises(ValueError, match="criterion=mse, must be one of kld, error"):
        recipe(measured, model, like="Q4_K_M", criterion="mse")
    with pytest.raises(ValueError, match="exclude: type=Q7_K, must be one of"):
        recipe(measured, model, like="Q4_K_M", exclude=["Q7_K"])
    with pytest.raises(ValueError, match="target_bpw=-1, must be a positive number"):
        recipe(measured, model, target_bpw=-1)
    with pytest.raises(ValueError, match="target_size=little, must be a number of bytes"):
        recipe(measured, model, target_size="little")
    with pytest.raises(ValueError, match="ftype=Q9_K, must be one of"):
        recipe(measured, model, like="Q9_K")
    with pytest.raises(ValueError, match="limit=1000 bytes, must be at least"):
        recipe(measured, model, target_size=1000)
    with pytest.raises(ValueError, match="the constraints exclude all measured types"):
        recipe(measured, model, like="Q4_K_M", keep={"output.weight": "Q5_K"})
    with pytest.raises(ValueError, match="must be a regular expression"):
        recipe(measured, model, like="Q4_K_M", min_type={"(": "Q5_K"})
    with pytest.raises(ValueError, match="type=Q7_K, must be one of"):
        recipe(measured, model, like="Q4_K_M", keep={"output": "Q7_K"})
    with pytest.raises(ValueError, match="name=attn_z, must match a measured tensor"):
        recipe(measured, model, like="Q4_K_M", max_type={"attn_z": "Q4_K"})
    with pytest.raises(ValueError, match="name=attn_norm, must match"):
        recipe(measured, model, like="Q4_K_M", keep={"attn_norm": "Q4_K"})
    twice = replace(measured, rows=(*measured.rows, measured.rows[0] | {"group": "again"}))
    with pytest.raises(ValueError, match="is in groups .* and again, must be in one"):
        recipe(twice, model, like="Q4_K_M")
    strange = replace(measured, rows=(*measured.rows, measured.rows[0] | {"types": {"x": "Q4_K"}}))
    with pytest.raises(ValueError, match="x is not a tensor of"):
        recipe(strange, model, like="Q4_K_M")
    with pytest.raises(ValueError, match="recipes: must be at least one"):
        judge([], model)
    other = replace(measured, protocol=measured.protocol | {"model_sha256": "0", "model": "another"})
    with pytest.raises(ValueError, match="the sensitivity belongs to another model, another"):
        recipe(other, model, like="Q4_K_M")
    weighted = replace(measured, protocol=measured.protocol | {"imatrix": "0"})
    with pytest.raises(ValueError, match="the sensitivity was measured with a matrix"):
        recipe(weighted, model, like="Q4_K_M")
    with pytest.raises(ValueError, match="points=1, must be at least 2"):
        front(measured, model, points=1)
    with pytest.raises(FileNotFoundError):
        recipe(Path(tmp_path / "none.json"), model, like="Q4_K_M")
