"""Plain English: texts that users read have none of the turns that CONTRIBUTING asks to avoid.

These are help texts, error texts and other strings of the package, first lines of its docstrings, text cells of the
notebooks, README, CHANGELOG, CONTRIBUTING and the Makefile.
"""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TURNS = re.compile(
    r"\b(anew|foretells?|foretold|at hand|of ours|strangers?|so many|whatever|for ever\b|can(not)? be there|who looks"
    r"|what takes|takes long|the model as it is|bears? |mend(s|ed|ing)?\b|(is|are|be) no [a-z0-9{]"
    r"|how many at most|at most;|must be there|as it was given)",
    re.I,
)
QUESTIONS = re.compile(r"(What|How|Which|Whether|Where|Who|Why)\b")


def string_literals(tree):
    """Yield line and text of every string but docstrings; `{}` stands for what an f-string fills in."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts.update(id(part) for part in node.values)
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings | parts:
            yield node.lineno, node.value


def first_lines(tree):
    """Yield line and first line of every docstring."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if text := ast.get_docstring(node):
                yield node.body[0].lineno, text.splitlines()[0]


def python_faults(path):
    tree = ast.parse(path.read_text())
    for line, text in [*string_literals(tree), *first_lines(tree)]:
        if found := TURNS.search(text):
            yield f"{path}:{line}: {found[0]!r} in {text[:100]!r}"
    for line, text in first_lines(tree):
        if QUESTIONS.match(text):
            yield f"{path}:{line}: first line is a question: {text!r}"


def text_faults(where, text):
    for number, line in enumerate(text.splitlines(), 1):
        if found := TURNS.search(line):
            yield f"{where}:{number}: {found[0]!r} in {line.strip()[:100]!r}"


def notebook_faults(path):
    for i, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] != "markdown":  # strings and comments are read too
            source = "\n".join(re.findall(r"#.*|\"[^\"]*\"", source))
        yield from text_faults(f"{path.name} cell {i}", source)


@pytest.mark.parametrize("folder", sorted(p.name for p in (ROOT / "quantlab").iterdir() if p.is_dir()))
def test_package(folder):
    faults = [fault for path in sorted((ROOT / "quantlab" / folder).rglob("*.py")) for fault in python_faults(path)]
    assert not faults, "\n".join(faults)


def test_notebooks():
    faults = [fault for path in sorted((ROOT / "notebooks").glob("*.ipynb")) for fault in notebook_faults(path)]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile"])
def test_texts(name):
    faults = list(text_faults(name, (ROOT / name).read_text()))
    assert not faults, "\n".join(faults)


def test_turns_are_seen():
    for text in (
        "256 rows are no 3 heads",
        "a stranger's file",
        "more than 4 cannot be there",
        "Change so many at once",
    ):
        assert TURNS.search(text), text
    assert not TURNS.search("256 rows cannot be split into 3 heads. Check num_attention_heads in config.json.")
