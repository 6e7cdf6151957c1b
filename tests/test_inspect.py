"""transform/inspect.py: types, sizes and the mixture of a file; no stranger's file writes to terminal or page."""

import json
import subprocess
import sys

import numpy as np
import pytest
from made_models import NARROW, made_gguf

import quantlab as ql
from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.transform.inspect import inspect


@pytest.mark.parametrize(("ftype", "rules"), [("Q4_K_M", "current"), ("Q2_K", "2023-12"), ("F16", "current")])
def test_the_mixture_is_recognized(tmp_path, ftype, rules):
    source = made_gguf(tmp_path / "a.gguf")
    path = ql.quantize(source, tmp_path / "b.gguf", ftype=ftype, rules=rules)
    found = inspect(path).mixtures
    assert found[0]["ftype"] == ftype and rules in [m["rules"] for m in found if m["ftype"] == ftype]
    assert f"mixture: {ftype}, rules " in str(inspect(path))


def test_fallbacks_belong_to_the_mixture(tmp_path):
    path = ql.quantize(made_gguf(tmp_path / "a.gguf", NARROW), tmp_path / "b.gguf", ftype="Q4_K_M")
    assert inspect(path).mixtures[0]["ftype"] == "Q4_K_M"


def test_a_file_of_other_types_is_no_mixture(tmp_path):
    path = ql.quantize(
        made_gguf(tmp_path / "a.gguf"), tmp_path / "b.gguf", ftype="Q4_K_M", tensor_types=[("ffn_up", "Q2_K")]
    )
    assert inspect(path).mixtures == () and "mixture: unknown" in str(inspect(path))


def test_json_holds_metadata_and_tensors(tmp_path):
    found = inspect(made_gguf(tmp_path / "a.gguf"))
    table = json.loads(found.to_json())
    assert table["protocol"]["bytes"] == found.model.nbytes == sum(row["bytes"] for row in table["rows"])
    assert table["protocol"]["metadata"][0] == {"key": "general.architecture", "type": "string", "value": "'llama'"}
    assert [row["name"] for row in table["rows"]] == found.model.names
    assert found.types["bytes"].sum() == found.model.nbytes


def test_an_empty_file_is_shown(tmp_path):
    write_gguf(tmp_path / "a.gguf", {}, [], [])
    found = inspect(tmp_path / "a.gguf")
    assert "0 weights, 0 bytes" in str(found) and json.loads(found.to_json())["rows"] == []


HOSTILE = "<script>alert(1)</script>\x1b[31m\udcff\n"


def test_a_strangers_file_cannot_write_to_terminal_or_page(tmp_path):
    path = tmp_path / "<img src=x>.gguf"
    metadata = {"general.name": HOSTILE, "<b>": [HOSTILE], "nested": [[HOSTILE]], "nan": np.float32(np.nan)}
    x = np.ones((1, 32), np.float32)
    write_gguf(path, metadata, [TensorSpec("<i>", x.shape, "F32")], [x])
    found = inspect(path)
    text = str(found)
    assert "\x1b" not in text and "\udcff" not in text and r"\x1b[31m\udcff\n" in text
    for page in (found._repr_html_(), ql.open(path)._repr_html_()):
        assert not any(tag in page for tag in ("<script", "<img", "<b>", "<i>", "\x1b")) and "&lt;script&gt;" in page
    assert "NaN" not in found.to_json()


def test_long_values_are_shortened(tmp_path):
    write_gguf(tmp_path / "a.gguf", {"tokens": ["x" * 100] * 50_000, "text": "y" * 10_000}, [], [])
    assert len(str(inspect(tmp_path / "a.gguf"))) < 1000


def test_the_word_inspect(tmp_path):
    path = made_gguf(tmp_path / "a.gguf", NARROW)
    done = subprocess.run(
        [sys.executable, "-m", "quantlab.cli", "inspect", str(path), "--json", "-"], capture_output=True, text=True
    )
    assert done.returncode == 0 and json.loads(done.stdout)["protocol"]["mixtures"][0]["ftype"] == "F16"
    assert "mixture: F16, rules current" in done.stderr
