"""Every notebook keeps to the form and runs; parameters are checked before a kernel starts."""

import importlib.util
import json
import statistics
from pathlib import Path

import nbformat
import pytest

from quantlab.files.bundled import notebooks_dir
from quantlab.study import notebooks

NAMES = notebooks.names()
QUICK = {
    "size_ppl_table": {"chunks": 2, "ftypes": ["Q8_0", "Q4_K_M", "Q2_K", "COPY"]},
    "one_superblock": {},
    "error_histograms": {"most": 4},
}
NEEDS = {"train_the_bundled_model": "torch", "run_it": "xllamacpp"}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(notebooks_dir() / f"{name}.ipynb", as_version=4)


def code_of(name: str) -> list[str]:
    return [cell.source for cell in read(name).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_committed_cleared(name):
    for cell in read(name).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("name", NAMES)
def test_the_title_is_the_question_and_the_second_cell_the_parameters(name):
    first, second, *_ = read(name).cells
    title = first.source.splitlines()[0]
    assert title.startswith("# ") and title.endswith("?")
    assert "minute" in first.source or "second" in first.source
    assert second.metadata["tags"] == ["parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_thin(name):
    code = code_of(name)
    lines = [len(source.splitlines()) for source in code]
    assert statistics.median(lines) <= 6
    assert max(lines) <= 15
    assert not any(line.startswith("class ") for source in code for line in source.splitlines())
    assert sum(source.count("def ") for source in code) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_exercises_are_at_the_end(name):
    cells = read(name).cells
    headings = [cell.source.splitlines()[0] for cell in cells if cell.source.startswith("## ")]
    assert headings[-1] == "## Exercises"
    assert cells[-1].cell_type == "code"


@pytest.mark.parametrize("name", NAMES)
def test_papermill_knows_every_parameter_and_its_meaning(name):
    papermill = pytest.importorskip("papermill")
    found = papermill.inspect_notebook(str(notebooks_dir() / f"{name}.ipynb"))
    lines = [line for line in read(name).cells[1].source.splitlines() if line and line[0].isalpha()]
    assert len(found) == len(lines)
    assert "out" in found
    for parameter in found.values():
        assert parameter["inferred_type_name"] in {"str", "int", "float", "bool", "list[str]", "list[int]"}
        assert parameter["help"]


@pytest.mark.parametrize("name", sorted(QUICK))
def test_runs(name, tmp_path, monkeypatch):
    pytest.importorskip("papermill")
    monkeypatch.chdir(tmp_path)
    check(notebooks.run(name, {**QUICK[name], "out": str(tmp_path / "results")}), name)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_runs_with_its_defaults(name, tmp_path):
    pytest.importorskip("papermill")
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    check(notebooks.run(name, {"out": str(tmp_path)}), name)


def check(folder: Path, name: str) -> None:
    """The executed notebook has output and no error; the HTML copy is there."""
    assert (folder / f"{name}.html").stat().st_size > 10_000
    outputs = [
        output for cell in nbformat.read(folder / f"{name}.ipynb", 4).cells for output in cell.get("outputs", [])
    ]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if "Warning" in output.get("text", "")]


def test_the_size_ppl_table_leaves_its_results(tmp_path):
    pytest.importorskip("papermill")
    folder = notebooks.run("size_ppl_table", {"model": "yi-34b", "rules": "2023-12", "out": str(tmp_path)})
    assert {".ipynb", ".html", ".csv", ".json", ".txt"} == {path.suffix for path in folder.iterdir()}
    rows = json.loads((folder / "size_ppl_table.json").read_text())["rows"]
    assert {row["variant"]: row["bytes"] for row in rows}["F16"] / 2**20 == pytest.approx(65593.31, abs=0.005)


def test_the_first_figure_is_the_picture(tmp_path):
    shown = nbformat.v4.new_output("display_data", {"image/png": "aGVsbG8=\n"})
    cells = [nbformat.v4.new_markdown_cell("text"), nbformat.v4.new_code_cell("1", outputs=[shown])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    assert notebooks.picture("a", tmp_path, tmp_path / "a.png").read_bytes() == b"hello"
    nbformat.write(nbformat.v4.new_notebook(cells=cells[:1]), tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match="a: shows no figure"):
        notebooks.picture("a", tmp_path, tmp_path / "b.png")


def test_pictures_are_small():
    pictures = list((notebooks_dir() / "pictures").glob("*.png"))
    assert pictures
    assert all(path.stat().st_size < 100_000 for path in pictures)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("llama-7b", "str", "llama-7b"),
        ("8", "int", 8),
        ("-1", "int", -1),
        ("0.5", "float", 0.5),
        ("2", "float", 2),
        ("true", "bool", True),
        ("Q4_K_M, Q2_K", "list[str]", ["Q4_K_M", "Q2_K"]),
        ("1,2", "list[int]", [1, 2]),
        ("['a', 'b']", "list[str]", ["a", "b"]),
        ("", "list[str]", []),
    ],
)
def test_values_are_read_as_the_declared_type(text, kind, value):
    assert notebooks._read(text, kind, "") == value


def test_folders_are_named_after_what_was_asked():
    assert notebooks._folder_name("a", {}) == "a"
    assert notebooks._folder_name("a", {"model": "smollm2", "out": "x"}) == "a-smollm2"
    assert notebooks._folder_name("a", {"model": "/home/me/My Model.gguf"}) == "a-home-me-My-Model.gguf"


def test_bad_parameters_are_refused_before_anything_runs(tmp_path):
    pytest.importorskip("papermill")
    with pytest.raises(ValueError, match="size_ppl_table: parameter=modle, must be one of: .* Did you mean model?"):
        notebooks.run("size_ppl_table", {"modle": "tiny", "out": str(tmp_path)})
    for key, value, kind in [("chunks", "many", "int"), ("chunks", "True", "int"), ("n_ctx", "0.5", "int")]:
        with pytest.raises(ValueError, match=f"size_ppl_table: {key}={value}, must be {kind}."):
            notebooks.run("size_ppl_table", {key: value, "out": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_an_unknown_notebook_is_refused():
    with pytest.raises(FileNotFoundError, match="nothing: no such notebook. There are: .*size_ppl_table"):
        notebooks.run("nothing")


def test_a_cell_that_fails_is_one_line(tmp_path):
    pytest.importorskip("papermill")
    with pytest.raises(
        ValueError, match="size_ppl_table: cell .* failed with FileNotFoundError: no-such-model: no such"
    ):
        notebooks.run("size_ppl_table", {"model": "no-such-model", "out": str(tmp_path)})
