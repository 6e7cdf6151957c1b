"""Every notebook keeps to the form and runs; parameters are checked before a kernel starts."""

import ast
import base64
import importlib
import importlib.util
import io
import json
import re
import statistics
from pathlib import Path

import nbformat
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from quantlab.files.bundled import checkout, notebooks_dir
from quantlab.lab import notebooks

NAMES = notebooks.names()
QUICK = {
    "size_ppl_table": {"chunks": 2, "ftypes": ["Q8_0", "Q4_K_M", "Q2_K", "COPY"]},
    "one_superblock": {},
    "error_histograms": {"most": 4},
    "type_zoo": {"most": 4},
}
NEEDS = {"train_the_bundled_model": "torch", "run_it": "xllamacpp"}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(notebooks_dir() / f"{name}.ipynb", as_version=4)


INDEX = "\n".join(cell.source for cell in read("index").cells)


def about(name: str) -> str:
    """The title's cell and the one behind the parameters: the answer, what is read and written, how long it takes."""
    cells = read(name).cells
    return f"{cells[0].source}\n\n{cells[2].source}"


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
    assert "**The answer.**" in first.source and "data/runs/" in about(name)
    assert second.metadata["tags"] == ["parameters"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_short_and_solutions_are_collapsed(name):
    exercises = False
    for cell in read(name).cells:
        exercises |= "## Exercises" in cell.source
        if cell.cell_type == "markdown":
            prose = [line for line in cell.source.splitlines() if not line.startswith(("#", "    "))]
            assert sum(word.isalpha() or len(word) > 2 for word in " ".join(prose).split()) <= 60, cell.source
        elif exercises:
            assert cell.metadata["jupyter"]["source_hidden"]


@pytest.mark.parametrize("name", NAMES)
def test_comprehensions_are_simple(name):
    """No comprehension that takes a pair apart holds another one, or lies in one."""
    kinds = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    for source in code_of(name):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, kinds):
                found = [inner for inner in ast.walk(node) if isinstance(inner, kinds)]
                parts = [part for inner in found for part in inner.generators]
                assert len(parts) == 1 or not any(isinstance(part.target, ast.Tuple) for part in parts), source


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_thin(name):
    code = code_of(name)
    lines = [len(source.splitlines()) for source in code]
    assert statistics.median(lines) <= 6
    assert max(lines) <= 15
    assert not any(line.startswith("class ") for source in code for line in source.splitlines())
    assert sum(source.count("def ") for source in code) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_text_comes_before_code(name):
    kinds = [cell.cell_type for cell in read(name).cells]
    assert kinds[0] == "markdown"
    assert kinds.count("markdown") >= 0.4 * kinds.count("code")
    assert "code code code code" not in " ".join(kinds[3:])


@pytest.mark.parametrize("name", NAMES)
def test_exercises_are_at_the_end(name):
    cells = read(name).cells
    headings = [
        (i, line)
        for i, cell in enumerate(cells)
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("## ")
    ]
    start, heading = headings[-1]
    assert heading == "## Exercises"
    asked = sum(cell.source.count("**") // 2 for cell in cells[start:] if cell.cell_type == "markdown")
    assert asked >= 1 or "1. " in cells[start].source
    assert any(cell.cell_type == "code" for cell in cells[start:])
    assert cells[-1].cell_type == "code"


@pytest.mark.parametrize("name", NAMES)
def test_papermill_knows_every_parameter_and_its_meaning(name):
    papermill = pytest.importorskip("papermill")
    path = str(notebooks_dir() / f"{name}.ipynb")
    found = papermill.inspect_notebook(path)
    shown = CliRunner().invoke(importlib.import_module("papermill.cli").papermill, ["--help-notebook", path]).output
    shown = " ".join(shown.split())
    assert all(f"{key}: " in shown and " ".join(of["help"].split()) in shown for key, of in found.items())
    lines = [line for line in read(name).cells[1].source.splitlines() if line and line[0].isalpha()]
    assert len(found) == len(lines)
    assert "out" in found
    for parameter in found.values():
        assert parameter["inferred_type_name"] in {"str", "int", "float", "bool", "list[str]", "list[int]"}
        assert parameter["help"]
        ast.literal_eval(parameter["default"])


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
    assert not [output.text for output in outputs if output.get("name") == "stderr"]  # JupyterLab shows that in red
    shown = [cell for cell in nbformat.read(folder / f"{name}.ipynb", 4).cells if cell.cell_type == "code"]
    assert not [cell.source for cell in shown if _speaks(cell.source) and not cell.outputs]


def _speaks(source: str) -> bool:
    """Whether the last line of a cell is an expression, whose value is to be seen."""
    last = ast.parse(source).body[-1]
    return isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call)


def test_the_size_ppl_table_leaves_its_results(tmp_path):
    pytest.importorskip("papermill")
    folder = notebooks.run("size_ppl_table", {"model": "yi-34b", "rules": "2023-12", "out": str(tmp_path)})
    assert {".ipynb", ".html", ".csv", ".json", ".txt"} == {path.suffix for path in folder.iterdir()}
    rows = json.loads((folder / "size_ppl_table.json").read_text())["rows"]
    assert {row["variant"]: row["bytes"] for row in rows}["F16"] / 2**20 == pytest.approx(65593.31, abs=0.005)


def test_a_page_shows_a_sentence_for_a_control_and_no_progress_bar(tmp_path):
    bar = nbformat.v4.new_output("display_data", {notebooks._WIDGET: {"model_id": "1"}, "text/plain": "50%|bar"})
    slider = nbformat.v4.new_output(
        "execute_result", {notebooks._WIDGET: {"model_id": "2"}, "text/plain": "interactive()"}
    )
    said = [nbformat.v4.new_output("stream", name=name, text=f"to {name}") for name in ("stdout", "stderr")]
    cell = nbformat.v4.new_code_cell("1", outputs=[bar, *said, slider])
    state = {"widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}}}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=state), tmp_path / "a.ipynb")
    notebooks._write_html(tmp_path / "a.ipynb")
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert notebooks._NO_KERNEL in page and "to stdout" in page
    assert not any(text in page for text in ("50%|bar", "to stderr", "interactive()", "widget-view+json"))


def test_the_first_figure_is_the_picture(tmp_path):
    small = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(small, "PNG")
    shown = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(small.getvalue()).decode() + "\n"})
    cells = [nbformat.v4.new_markdown_cell("text"), nbformat.v4.new_code_cell("1", outputs=[shown])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    written = notebooks.picture("a", tmp_path, tmp_path / "a.png")
    assert Image.open(written).info["Software"] == "quantlab" and Image.open(written).getpixel((0, 0)) == (255, 0, 0)
    noise = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)).save(noise, "PNG")
    cells[1].outputs[0].data["image/png"] = base64.b64encode(noise.getvalue()).decode()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    assert notebooks.picture("a", tmp_path, tmp_path / "a.png").stat().st_size < 100_000 < len(noise.getvalue())
    nbformat.write(nbformat.v4.new_notebook(cells=cells[:1]), tmp_path / "a.ipynb")
    with pytest.raises(ValueError, match="a: shows no figure"):
        notebooks.picture("a", tmp_path, tmp_path / "b.png")


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_has_a_small_picture(name):
    path = notebooks_dir() / "pictures" / f"{name}.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 100_000


def test_the_index_maps_every_notebook():
    """Question, time, what comes before and picture, as the notebooks say, in an order in which they can be read."""
    rows = re.findall(r"^\| <img src=\"(.+?)\".*?> \| \[(\w+)\]\(\2.ipynb\) \| (.+) \| (.+) \| (.*) \|$", INDEX, re.M)
    assert sorted(name for _, name, *_ in rows) == NAMES
    seen = set()
    for picture, name, question, time, before in rows:
        first = about(name)
        assert picture == f"pictures/{name}.png"
        assert first.startswith(f"# {question}\n") and time in first and "2 cores" in first
        wanted = re.findall(r"\[(\w+)\]", re.search(r"^Before it: (.+)$", first, re.M)[1])
        assert re.findall(r"\[(\w+)\]", before) == wanted and set(wanted) <= seen
        seen.add(name)


def test_the_readme_lists_every_notebook_with_its_question():
    root = checkout()
    if root is None:
        pytest.skip("README.md is in a checkout only")
    readme = (root / "README.md").read_text(encoding="utf-8")
    for name, question, time in re.findall(r"\| \[(\w+)\]\(\w+.ipynb\) \| (.+) \| (.+) \| .*\|$", INDEX, re.M):
        listed = f"[{name}](notebooks/{name}.ipynb) | {question} | {time} |"
        assert listed in readme, f"add to README.md: | {listed}"


@pytest.mark.parametrize("path", sorted((notebooks_dir() / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_parameters_are_parameters_of_their_notebook(path):
    papermill = pytest.importorskip("papermill")
    (name,) = [name for name in NAMES if path.stem.startswith(name)]
    values = notebooks.read_parameters(path)
    declared = papermill.inspect_notebook(str(notebooks_dir() / f"{name}.ipynb"))
    assert notebooks._checked(name, values, declared) == values
    assert " hour" in path.read_text(encoding="utf-8")


def test_files_of_parameters_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a.yaml: no such file. Choose one of: .*size_ppl_table-llama-7b.yaml"):
        notebooks.read_parameters(tmp_path / "a.yaml")
    for content in (b"just words", b"- a\n- list", b"a: [1", b"\xff\xfe"):
        (tmp_path / "b.yaml").write_bytes(content)
        with pytest.raises(ValueError, match="b.yaml: must be a YAML file of lines"):
            notebooks.read_parameters(tmp_path / "b.yaml")


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
    defaults = {"model": "tiny", "chunks": 8, "n_ctx": 8, "ftypes": [], "out": ""}
    names = [
        notebooks._folder_name("a", given, defaults)
        for given in (
            {},
            {"model": "/home/me/My Model.gguf"},
            {"model": "/home/me/My-Model.gguf"},
            {"chunks": 64},
            {"n_ctx": 64},
            {"ftypes": ["Q4_K", "Q2_K"]},
            {"model": "x" * 300 + "1"},
            {"model": "x" * 300 + "2"},
            {"model": "ü" * 300},
        )
    ]
    assert len(set(names)) == len(names) and max(len(name.encode()) for name in names) < 120
    assert names[1].startswith("a-model=home-me-My-Model.gguf-") and names[3].startswith("a-chunks=64-")
    assert notebooks._folder_name("a", {"chunks": 8, "out": "x"}, defaults) == names[0]
    assert notebooks._folder_name("a", {"n_ctx": 4, "chunks": 2}, defaults) == notebooks._folder_name(
        "a", {"chunks": 2, "n_ctx": 4}, defaults
    )


def test_a_finished_run_is_never_replaced_silently(tmp_path, monkeypatch):
    """Also one that failed is repeated in its folder, and files of the user's are left alone."""
    pytest.importorskip("papermill")
    (tmp_path / "notebooks").mkdir()
    cells = [
        nbformat.v4.new_code_cell("row: int = 0  # row\nscale: float = 1.0  # scale\nout: str = ''  # folder"),
        nbformat.v4.new_code_cell("from pathlib import Path\nassert not Path('fail').exists()"),
        nbformat.v4.new_code_cell("_ = (Path(out) / 'row.txt').write_text(str(row))"),
    ]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "notebooks" / "a.ipynb")
    monkeypatch.setattr(notebooks, "notebooks_dir", lambda: tmp_path / "notebooks")
    monkeypatch.setattr(notebooks, "runs_dir", lambda: tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    first = notebooks.run("a", {"row": "3", "scale": "2"})
    assert (first / "row.txt").read_text() == "3"
    with pytest.raises(FileExistsError, match="holds a finished run of these parameters. Pass overwrite=True"):
        notebooks.run("a", {"scale": 2.0, "row": 3})
    assert notebooks.run("a", {"row": 3, "scale": 2}, overwrite=True) == first
    with pytest.raises(FileExistsError, match="holds other files"):
        notebooks.run("a", {"row": 4, "out": str(first)})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "row.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="mine: holds other files"):
        notebooks.run("a", {"out": "mine"})
    assert (tmp_path / "mine" / "row.txt").read_text() == "mine"
    (tmp_path / "fail").touch()
    with pytest.raises(ValueError, match="cell 2 failed|cell 3 failed"):
        notebooks.run("a", {"row": 5})
    (tmp_path / "fail").unlink()
    second = notebooks.run("a", {"row": 5})
    assert second != first and {path.name for path in (tmp_path / "runs").iterdir()} == {first.name, second.name}


def test_bad_parameters_are_refused_before_anything_runs(tmp_path):
    pytest.importorskip("papermill")
    with pytest.raises(ValueError, match="size_ppl_table: parameter=modle, must be one of: .* Did you mean model?"):
        notebooks.run("size_ppl_table", {"modle": "tiny", "out": str(tmp_path)})
    wrong = [("chunks", "many", "int"), ("chunks", "True", "int"), ("n_ctx", "0.5", "int"), ("chunks", 0.5, "int")]
    for key, value, kind in [*wrong, ("chunks", True, "int"), ("model", 7, "str"), ("ftypes", [4], "list[str]")]:
        with pytest.raises(ValueError, match=re.escape(f"size_ppl_table: {key}={value}, must be {kind}.")):
            notebooks.run("size_ppl_table", {key: value, "out": str(tmp_path)})
    assert not list(tmp_path.iterdir())


def test_an_unknown_notebook_is_refused():
    with pytest.raises(FileNotFoundError, match="nothing: no such notebook. Choose one of: .*size_ppl_table"):
        notebooks.run("nothing")


def test_a_cell_that_fails_is_one_line(tmp_path):
    pytest.importorskip("papermill")
    with pytest.raises(
        ValueError, match="size_ppl_table: cell .* failed with FileNotFoundError: no-such-model: no such"
    ):
        notebooks.run("size_ppl_table", {"model": "no-such-model", "out": str(tmp_path)})
