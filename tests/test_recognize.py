"""files/recognize.py: what is said of a stranger's file and its values fits one printable line."""

import sys

import numpy as np
import pytest

from quantlab.files.recognize import looks_like, reason, short


@pytest.mark.parametrize(
    ("start", "sentence"),
    [
        (b"PK\x03\x04", "torch file"),
        (b"\x1f\x8b", "gzip"),
        (b"<!DOCTYPE html>", "web page"),
        (b"{", "JSON"),
        (b"", "empty"),
        (b"\0" * 64, "not a model file"),
    ],
)
def test_files_are_recognized(start, sentence):
    assert sentence in looks_like(start)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        "\x1b[2J",
        "a\nb",
        "\ud800",
        10**5000,
        [10**5000],
        np.eye(9),
        [["x" * 999]],
        nested(sys.getrecursionlimit()),
        None,
    ],
    ids=range(9),
)
def test_any_value_is_short_and_printable(value):
    assert short(value).isprintable() and 0 < len(short(value)) <= 80


@pytest.mark.parametrize("text", ["", "a\nb", "\x1b[2J", "x" * 999, "\ud800"], ids=range(5))
def test_any_reason_is_short_and_printable(text):
    assert reason(ValueError(text)).isprintable() and 0 < len(reason(ValueError(text))) <= 200
