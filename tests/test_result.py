"""Results print, show, become tables and JSON by one rule; JSON is valid whatever the numbers."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

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
