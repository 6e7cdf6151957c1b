"""Sizes without weights, and the account of what falls back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import made_models
import pandas as pd
import pytest

from quantlab.files.bundled import data_dir, model_path
from quantlab.transform.mixture import Choice
from quantlab.transform.plan import fallbacks, sizes


def gib(table):
    frame = table.to_frame().set_index("ftype")
    return frame["bytes"] / 1024**3


def test_yi_34b_has_the_published_sizes_in_bytes():
    rows = {row["ftype"]: row["bytes"] for row in json.loads(sizes("yi-34b", rules="2023-12").to_json())["rows"]}
    assert round(rows["F16"] / 1024**2, 2) == 65593.31
    assert round(rows["Q5_K_M"] / 1024**2, 2) == 23193.68


def test_llama_7b_rounds_to_the_published_sizes_where_those_are_right():
    published = pd.read_csv(data_dir() / "published.csv")
    published = published[published["source"].str.contains("948ff137") & (published["model"] == "LLaMA-7B")]
    exact = gib(sizes("llama-7b", rules="2023-12"))
    wrong = {row.ftype for row in published.itertuples() if round(exact[row.ftype], 2) != row.size}
    assert len(published) == 16
    assert wrong == {"Q4_1", "Q5_1", "Q8_0", "F16", "F32"}


@pytest.mark.parametrize(
    ("ftype", "bpw"),  # llama.cpp, tools/quantize/README.md: Llama-3.1-8B, which has 64 rope factors more
    [("Q2_K", 3.1593), ("Q2_K_S", 2.9697), ("Q3_K_S", 3.6429), ("Q3_K_L", 4.2979), ("Q4_K_S", 4.6672)]
    + [("Q4_K_M", 4.8944), ("Q5_K_S", 5.5704), ("Q5_K_M", 5.7036), ("Q6_K", 6.5633), ("Q8_0", 8.5008)],
)
def test_llama_3_8b_has_the_bits_per_weight_that_llama_cpp_publishes(ftype, bpw):
    assert round(sizes("llama-3-8b").to_frame().set_index("ftype").loc[ftype, "bpw"], 4) == bpw


def test_the_rule_sets_differ_in_size():
    new, old = (gib(sizes("llama-7b", rules=rules)) for rules in ("current", "2023-12"))
    assert (round(new["Q2_K"], 3), round(old["Q2_K"], 3)) == (2.358, 2.631)
    assert new["Q4_K_M"] == old["Q4_K_M"]


@pytest.mark.parametrize("shape", sorted(path.stem for path in (data_dir() / "shapes").glob("*.json")))
def test_every_bundled_shape_has_sizes(shape):
    table = sizes(shape)
    assert list(table.to_frame().columns) == ["ftype", "bytes", "bpw"]
    assert table.to_frame()["bytes"].is_monotonic_decreasing
    assert "Q4_K_M" in str(table) and "Q4_K_M" in table._repr_html_()


def test_fallbacks_are_grouped_and_weighed():
    shapes = {"a.weight": (3, 576), "b.weight": (1, 576), "c.weight": (4, 1024)}
    fallen, base = Choice("Q5_0", "Q4_K", "base + fallback"), Choice("Q4_K", "Q4_K", "base")
    account = fallbacks({"a.weight": fallen, "b.weight": fallen, "c.weight": base}, shapes)
    assert account.to_dict("records") == [
        {"columns": 576, "wanted": "Q4_K", "qtype": "Q5_0", "tensors": 2, "share": 0.36, "bpw_gained": 0.36}
    ]
    assert fallbacks({"c.weight": base}, shapes).empty


def test_names_of_shapes_may_have_capitals():
    assert sizes("Yi-34B") == sizes("yi-34b")


def test_bad_input():
    with pytest.raises(FileNotFoundError, match="yi-35b"):
        sizes("yi-35b")
    with pytest.raises(ValueError, match="rules=2024"):
        sizes("yi-34b", rules="2024")


PEAK = """
import resource, sys
from quantlab.transform.quantize import quantize

lines = []
quantize("wide.gguf", "out.gguf", ftype=sys.argv[1], report=lines.append)
print(lines[0].peak_memory / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("ftype", ["Q4_K_M", "F32"])
def test_a_run_takes_no_more_memory_than_foretold(tmp_path, ftype):
    made_models.made_gguf(tmp_path / "wide.gguf")
    (tmp_path / "peak.py").write_text(PEAK)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    line = f'"{sys.executable}" peak.py {ftype}; exit'  # a child of the shell, which is small: a peak outlives exec
    found = subprocess.check_output(line, shell=True, cwd=tmp_path, env=environment, text=True)
    foretold, peak = map(float, found.split())
    assert 0.7 * foretold < peak <= foretold


def test_sizes_follow_from_a_configuration_alone(tmp_path):
    """A folder with config.json, and config.json itself, give the sizes of the whole checkpoint."""
    whole = model_path("tiny")
    shutil.copy(whole / "config.json", tmp_path)
    rows = [row for row in sizes("tiny").rows if row.ftype != "COPY"]
    assert list(sizes(tmp_path).rows) == rows == list(sizes(tmp_path / "config.json").rows)
