"""Results print, show, become tables and JSON by one rule; JSON is valid whatever the numbers."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import quantlab as ql
from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.result import Result


@dataclass(frozen=True)
class Row:
    name: str
    size: float


@dataclass(frozen=True, repr=False)
class Plain(Result):
    protocol: dict
    rows: tuple


@dataclass(frozen=True, repr=False)
class Titled(Plain):
    _look = {"index": False, "float_format": "{:.1f}".format}

    def _document(self) -> dict:
        return super()._document() | {"notes": ("a", Path("b"))}

    def _lines(self) -> list[str]:
        return ["<title>", "second line"]


def test_protocol_and_rows_are_enough():
    result = Plain({"text": "primer"}, ({"a": 1, "b": "x"}, {"a": 2, "b": "y"}))
    assert json.loads(result.to_json()) == {"schema": 1, "protocol": {"text": "primer"}, "rows": list(result.rows)}
    pd.testing.assert_frame_equal(result.to_frame(), pd.DataFrame({"a": [1, 2], "b": ["x", "y"]}))
    assert str(result) == repr(result) == " a b\n 1 x\n 2 y"
    assert result._repr_html_().startswith("<table")


def test_lines_stand_above_the_table():
    result = Titled({}, (Row("n", 0.25),))
    assert str(result) == "<title>\nsecond line\nname  size\n   n   0.2"
    assert result._repr_html_().startswith("<p>&lt;title&gt;<br>second line</p><table")
    assert json.loads(result.to_json())["notes"] == ["a", "b"]


def test_what_is_not_a_finite_number_is_null():
    numbers = {"a": np.nan, "b": float("inf"), "c": np.float32(0.5), "d": np.int64(3), "e": np.array([1.0, -np.inf])}
    frame = pd.DataFrame({"x": [1, 2], "y": [0.5, np.nan], "z": [True, False]})
    document = json.loads(Plain(numbers, frame).to_json(), parse_constant=lambda name: 1 / 0)
    assert document["protocol"] == {"a": None, "b": None, "c": 0.5, "d": 3, "e": [1.0, None]}
    assert document["rows"] == [{"x": 1, "y": 0.5, "z": True}, {"x": 2, "y": None, "z": False}]


def test_a_result_is_a_sequence_of_the_rows_of_its_table():
    result = Plain({}, ({"a": 1, "b": "x"}, {"a": 2, "b": "y"}))
    assert len(result) == 2
    assert list(result) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    pd.testing.assert_frame_equal(pd.DataFrame(result), result.to_frame())
    assert Plain({}, ()), "a result without rows is a result"


def test_a_dataclass_with_its_own_repr_still_prints_its_table():
    @dataclass(frozen=True)  # without repr=False
    class Forgetful(Result):
        protocol: dict
        rows: tuple

    assert repr(Forgetful({}, ({"a": 1},))) == " a\n 1"


def test_what_notebooks_show_are_tables():
    sizes, inspection = ql.sizes("yi-34b", rules="2023-12"), ql.inspect("tiny")
    assert repr(sizes).splitlines()[0] == "Yi-34B, 34,388,917,248 weights, rules 2023-12"
    assert len(sizes) == len(pd.DataFrame(sizes)) == len(repr(sizes).splitlines()) - 2
    assert "blk.0.attn_q.weight" in repr(inspection)
    assert len(inspection) == len(inspection.model)
    tensor = inspection.model.tensor("blk.0.attn_q.weight")
    assert repr(tensor) == "LazyTensor(blk.0.attn_q.weight: BF16, 256 × 256, 131,072 bytes)"
    assert str(tensor).splitlines()[2:] == ["  type  BF16, 16 bits per weight", "  size  65,536 weights, 131,072 bytes"]
    assert tensor._repr_html_().startswith("<table><tr><th>tensor</th><td>blk.0.attn_q.weight</td></tr>")


def test_the_place_of_a_tensor_in_a_file_is_shown(tmp_path):
    path = tmp_path / "a.gguf"
    x = np.ones((2, 32), np.float32)
    write_gguf(path, {"general.architecture": "llama"}, [TensorSpec("x", x.shape, "F32")], [x])
    assert re.search(r" place  byte \d+ of a.gguf$", str(ql.open(path).tensor("x")))
