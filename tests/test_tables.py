"""The size/ppl table, and published figures beside exact ones."""

import json

import nbformat
import pandas as pd
import pytest

import quantlab as ql
from quantlab.files.model import open as open_model
from quantlab.study import tables


def test_eleven_of_sixteen_published_sizes_of_llama_7b_are_right():
    frame = tables.beside_published(ql.sizes("llama-7b", rules="2023-12"))
    assert len(frame) == 16
    assert frame["agrees"].sum() == 11
    wrong = frame[~frame["agrees"]].set_index("ftype")["published is"].to_dict()
    padded, whole = "one decimal, padded with a zero", "rounded up to a whole number"
    assert wrong == {"F32": whole, "F16": whole, "Q8_0": padded, "Q5_1": padded, "Q4_1": padded}


def test_a_table_resumes_only_from_its_own_states(tmp_path):
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match="holds the states of another run"):
        tables.size_ppl("tiny", ftypes=["Q4_0"], n_ctx=64, chunks=1, scratch=tmp_path)


def test_all_published_sizes_of_yi_34b_are_right():
    frame = tables.beside_published(ql.sizes("yi-34b", rules="2023-12"))
    assert frame["agrees"].all()
    exact = frame[frame["unit"] == "MiB"].set_index("ftype")["exact"]
    assert exact.round(2).to_dict() == {"F16": 65593.31, "Q5_K_M": 23193.68}


def test_sizes_of_other_rules_stand_beside_nothing():
    assert tables.beside_published(ql.sizes("llama-7b", rules="current")).empty


def test_a_figure_that_no_rounding_explains_is_called_another_size():
    assert tables._other_rounding(12.55, 14.00) == "another size"


def test_every_published_figure_names_protocol_and_source():
    frame = tables.published()
    assert frame["source"].notna().all()
    assert frame["protocol"].notna().all()
    assert frame[["ppl", "delta_ppl", "size"]].notna().any(axis=1).sum() >= len(frame) - 1  # F32's ppl was never given
    assert set(frame["size_unit"].dropna()) == {"MiB", "GiB", "GB"}


def test_a_model_that_is_not_here_has_sizes_and_published_differences_and_a_command():
    table = tables.size_ppl("llama-7b", rules="2023-12", chunks=8)
    rows = table.to_frame().set_index("ftype")
    assert not table.measured
    assert list(rows.index) == [ftype for ftype in tables.FTYPES if ftype != "COPY"]
    assert rows.loc["Q4_K_M", "bytes"] == 4080263168
    assert rows.loc["Q2_K", "published_delta_ppl"] == 0.6717
    assert rows[["ppl", "kld_mean"]].isna().all(axis=None)
    assert "quantlab table FOLDER -f primer --rules 2023-12 --chunks 8 -c 512`, about " in table.notes[0]
    assert "published Δppl" in str(table)


def test_hours_grow_with_the_work():
    once, twice = (tables._estimated_hours(10**10, 8192 * n, 20) for n in (1, 10))
    assert 3 < twice / once < 30


def test_published_differences_belong_to_their_rules_only():
    assert tables._published_delta_ppl("LLaMA-7B", "2023-12")["Q2_K"] == 0.6717
    assert tables._published_delta_ppl("LLaMA-7B", "current") == {}
    assert tables._published_delta_ppl("Mistral-7B-v0.1", "current")["Q2_K"] == pytest.approx(6.164 - 5.6934)
    assert tables._published_delta_ppl("tiny", "2023-12") == {}


@pytest.fixture(scope="module")
def table():
    """Two ftypes of the bundled model, and itself, on two chunks."""
    return tables.size_ppl("tiny", ftypes=["F16", "q2_k", "COPY"], chunks=2)


def test_rows_of_a_measured_model(table):
    rows = table.to_frame().set_index("ftype")
    assert list(rows.index) == ["F16", "Q2_K", "COPY"]
    assert rows.loc["COPY", "delta_ppl"] == 0
    assert rows.loc["Q2_K", "delta_ppl"] == pytest.approx(rows.loc["Q2_K", "ppl"] - rows.loc["COPY", "ppl"])
    assert rows.loc["Q2_K", "delta_ppl"] != 0 < rows.loc["Q2_K", "delta_ppl_se"]
    assert rows.loc["Q2_K", "bpw"] < 4 < rows.loc["F16", "bpw"]
    assert rows.loc["COPY", "kld_mean"] == 0 < rows.loc["Q2_K", "kld_se"] < rows.loc["Q2_K", "kld_mean"]
    assert rows["published_delta_ppl"].isna().all()
    assert table.notes == ()


def test_the_table_agrees_with_compare(table):
    rows = ql.compare("tiny", ["Q2_K"], chunks=2, progress=False).to_frame().set_index("variant")
    assert table.to_frame().set_index("ftype").loc["Q2_K", "ppl"] == rows.loc["Q2_K", "ppl"]


def test_both_rules_measures_what_differs_and_repeats_what_does_not(table):
    frame = tables.both_rules(table, "tiny").set_index(["rules", "ftype"])
    now, then = frame.loc["current"], frame.loc["2023-12"]
    assert sorted(then.index) == ["COPY", "F16", "Q2_K"]
    assert now.loc["F16"].equals(then.loc["F16"])
    assert then.loc["Q2_K", "bytes"] > now.loc["Q2_K", "bytes"]
    assert then.loc["Q2_K", "kld_mean"] < now.loc["Q2_K", "kld_mean"]


def test_the_table_as_json(table):
    document = json.loads(table.to_json())
    assert document["schema"] == 1
    assert document["protocol"]["chunks"] == 2
    assert [row["variant"] for row in document["rows"]] == ["F16", "Q2_K", "COPY"]
    assert {"bytes", "bpw", "ppl", "ppl_se"} <= set(document["rows"][0])


def test_the_table_as_text(table):
    lines = str(table).splitlines()
    assert lines[0] == "tiny: primer, 2 chunks of 512 tokens, rules current"
    assert "published" not in lines[2]
    assert lines[2].split() == ["ftype", "MiB", "bpw", "ppl", "Δppl", "KLD"]
    assert next(line for line in lines if "Q2_K" in line).count("±") == 3


def test_a_quantized_base_is_said_to_be_one(tmp_path):
    path = ql.quantize("tiny", tmp_path / "a.gguf", ftype="Q4_1")
    (note,) = tables._note_on_the_base(open_model(path))
    assert "already quantized (its types: Q4_1, Q6_K)" in note
    assert "The Q4_1 row says little about Q4_1" in note


def test_the_pareto_front_is_what_no_other_row_beats():
    frame = pd.DataFrame(
        {"ftype": list("abcdef"), "bytes": [1, 2, 2, 3, 4, 9], "kld_mean": [0.9, 0.5, 0.4, 0.4, 0.1, None]}
    )
    assert tables.pareto(frame)["ftype"].tolist() == ["a", "c", "e"]
    assert tables.pareto(frame.iloc[::-1])["ftype"].tolist() == ["a", "c", "e"]
    assert tables.pareto(frame.iloc[[5]]).empty


def left_by_a_run(folder, rows, n_ctx=512, rules="current", exception=None, **parameters):
    """What a papermill run leaves in its folder, by hand."""
    cell = nbformat.v4.new_code_cell(
        'model: str = "tiny"  # name\nbits: list[int] = [4, 2]', metadata={"tags": ["parameters"]}
    )
    ran = {"parameters": parameters, "exception": exception, "end_time": "2026-01-01T00:00:00"}
    folder.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": ran}), folder / "a.ipynb")
    protocol = dict.fromkeys(tables._COMPARABLE, "x") | {"n_ctx": n_ctx, "rules": rules}
    (folder / "a.json").write_text(json.dumps({"schema": 1, "protocol": protocol, "rows": rows}))


def test_a_grid_of_runs_is_one_table(tmp_path):
    left_by_a_run(tmp_path / "a-1", [{"variant": "Q4_0", "ppl": 7.0}, {"variant": "Q2_K", "ppl": 9.0}])
    left_by_a_run(tmp_path / "a-2", [{"variant": "Q2_K", "ppl": 8.0}], rules="2023-12", model="other", out="there")
    found = ql.tables.collect(tmp_path)
    assert found.index.names == ["protocol", "notebook", "run", "variant"]
    assert found["model"].tolist() == ["tiny", "tiny", "other"]
    assert found["bits"].tolist() == ["4,2"] * 3
    assert found["ppl"].tolist() == [7.0, 9.0, 8.0]
    assert not found["failed"].any()
    assert "out" not in found
    assert len(found.index.unique("protocol")) == 1  # the rules are what the grid varies


def test_runs_of_different_protocols_are_kept_apart(tmp_path):
    for n_ctx in (256, 512):
        left_by_a_run(tmp_path / str(n_ctx), [{"variant": "Q2_K", "ppl": 9.0}], n_ctx=n_ctx)
    labels = ql.tables.collect(tmp_path).index.unique("protocol")
    assert len(labels) == 2
    assert [" × 256, " in labels[0], " × 512, " in labels[1]] == [True, True]


def test_a_failed_run_and_one_without_results_have_a_row(tmp_path):
    left_by_a_run(tmp_path / "failed", [{"variant": "Q2_K", "ppl": 9.0}], exception=True, model="no-such")
    left_by_a_run(tmp_path / "without", [])
    (tmp_path / "no-run.ipynb").write_text('{"cells": [], "metadata": {}}')
    found = ql.tables.collect(tmp_path).droplevel(["protocol", "notebook", "variant"])
    assert found["failed"].to_dict() == {"failed": True, "without": False}
    assert found["model"].to_dict() == {"failed": "no-such", "without": "tiny"}
    assert "ppl" not in found


def test_a_parameter_and_a_result_of_one_name_are_told_apart(tmp_path):
    left_by_a_run(tmp_path / "run", [{"variant": "Q2_K", "bits": 2.6}])
    (row,) = ql.tables.collect(tmp_path).to_dict("records")
    assert (row["bits"], row["parameter bits"]) == (2.6, "4,2")


def test_nothing_to_collect(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="has no executed notebook. Run one: quantlab notebook"):
            ql.tables.collect(folder)


def test_unknown_names_are_refused():
    with pytest.raises(FileNotFoundError, match="nothing.gguf: no such file or folder"):
        tables.size_ppl("nothing.gguf")
    with pytest.raises(ValueError, match="ftype=Q4_K_X, must be one of .* Did you mean Q4_K_"):
        tables.size_ppl("llama-7b", ftypes=["Q4_K_X"])
    with pytest.raises(ValueError, match="rules=2024"):
        tables.size_ppl("llama-7b", rules="2024")


def test_nothing_is_not_negative():
    assert tables._with_error(-0.00001, 0.002) == "0.0000 ± 0.0020"
    assert tables._with_error(-0.00001, None, "+") == "+0.0000"
