"""The same prompt through several bit widths."""

import json

import pytest

import quantlab as ql
from quantlab.run.generate import Continuation, Generation

PROMPT = "The weights of a model"


@pytest.fixture(scope="module")
def generation():
    pytest.importorskip("xllamacpp")
    return ql.generate(["F16", "Q8_0", "q2_k"], PROMPT, base="tiny", n_predict=16, seed=1, temp=1.0, n_threads=1)


def test_variants_are_ftypes_of_the_base(generation):
    assert [row.variant for row in generation.rows] == ["F16", "Q8_0", "Q2_K"]
    assert [len(row.tokens) for row in generation.rows] == [16, 16, 16]
    assert generation.rows[0].bytes > generation.rows[1].bytes > generation.rows[2].bytes
    assert generation.rows[0].n_same == 16


def test_n_same_counts_the_tokens_before_the_first_that_differs(generation):
    first = generation.rows[0].tokens
    for row in generation.rows:
        assert row.tokens[: row.n_same] == first[: row.n_same]
        assert row.n_same == 16 or row.tokens[row.n_same] != first[row.n_same]
    assert generation.rows[2].n_same < 16  # two bits do not write the same at temperature 1


def test_files_are_variants_too_and_leave_nothing_behind(tmp_path, generation, monkeypatch):
    file = ql.quantize("tiny", tmp_path / "mine.gguf", ftype="Q8_0")
    monkeypatch.setattr("quantlab.run.generate.runs_dir", lambda: tmp_path)
    again = ql.generate([file, "Q8_0"], PROMPT, base=file, n_predict=16, temp=1.0, n_threads=1, allow_requantize=True)
    assert [row.variant for row in again.rows] == ["mine", "Q8_0"]
    assert again.rows[0].tokens == generation.rows[1].tokens
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_the_first_differing_token_is_marked():
    rows = (
        Continuation("F16", 2 << 20, (5, 6, 7), ("a <", "b", "c"), 3),
        Continuation("Q2_K", 1 << 20, (5, 9, 9), ("a <", " d&", "e"), 1),
    )
    result = Generation("p", 1, 0.0, 3, rows)
    assert "a &lt;<mark> d&amp;</mark>e" in result._repr_html_()
    assert "[ d&]" in str(result)
    assert result.to_frame()["n_same"].tolist() == [3, 1]
    assert json.loads(result.to_json())["rows"][1]["text"] == "a < d&e"


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="must name at least one"):
        ql.generate([], PROMPT)
    with pytest.raises(ValueError, match="which needs base"):
        ql.generate(["Q4_K_M"], PROMPT)
    with pytest.raises(ValueError, match="ftype=Q9_K"):
        ql.generate(["Q9_K"], PROMPT, base="tiny")
    for option in ({"temp": float("nan")}, {"seed": 2**40}, {"n_predict": -5}):
        with pytest.raises(ValueError, match=f"^{next(iter(option))}=.*, must be "):
            ql.generate(["Q4_K_M"], PROMPT, base="tiny", **option)
    with pytest.raises(FileNotFoundError, match="nothing.gguf"):
        ql.generate(["nothing.gguf"], PROMPT)
