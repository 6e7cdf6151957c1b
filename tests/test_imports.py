"""Imports go one way between the rooms, nothing heavy happens at import, every package imported is declared."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "quantlab"
MODULES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))

# room -> the rooms that it may import, besides itself
ALLOWED = {
    "quants": set(),
    "arch": set(),
    "files": {"quants", "arch"},
    "transform": {"quants", "arch", "files"},
    "evaluate": {"quants", "arch", "files", "transform"},
    "study": {"quants", "arch", "files", "transform", "evaluate"},
    "lab": {"quants", "arch", "files", "transform", "evaluate", "study"},
    "run": {"quants", "arch", "files", "transform"},
}
LATE = {"study": {"run"}}  # what a room may import inside functions: a report lets llama.cpp continue a text


def imports(path: Path) -> list[tuple[str, bool]]:
    """Dotted names that a module imports, each with whether it does so at the top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_one_way(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name, at_top in imports(path):
        parts = name.split(".")
        if parts[0] != "quantlab":
            continue
        if room == "cli":
            assert parts[1:2] in ([], ["cli"]) or not at_top, (
                f"{path.name} imports {name} at the top, not inside a word"
            )
        elif room != "__init__" and parts[1:] and parts[1] in ALLOWED:
            allowed = {room, *ALLOWED[room], *([] if at_top else LATE.get(room, ()))}
            assert parts[1] in allowed, f"{path.name}: {room} must not import {parts[1]}"


def test_every_room_is_in_the_table():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= {*ALLOWED, "cli"}


def test_every_third_party_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    declared = {line.split(">=")[0].lower().replace("_", "-") for line in lines}
    owners = packages_distributions()
    tools = {path.stem for path in TOOLS}
    for path in MODULES + TOOLS:
        for name, _ in imports(path):
            package = name.split(".")[0]
            if package == "quantlab" or package in sys.stdlib_module_names or (path in TOOLS and package in tools):
                continue
            names = {owner.lower().replace("_", "-") for owner in owners.get(package, [package])}
            assert names & declared, (
                f"{path.relative_to(ROOT)} imports {package}, which pyproject.toml does not declare"
            )


def test_importing_the_package_imports_no_room():
    code = "import sys, quantlab; print(sorted(m for m in sys.modules if m.startswith('quantlab.') or m == 'numpy'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_architectures_are_read_without_numba_and_files():
    code = "import sys, quantlab.arch; quantlab.arch.architectures(); print([m for m in sys.modules if 'numba' in m or "
    code += "m.startswith('quantlab.') and not m.startswith('quantlab.arch')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_quantize_is_imported_without_numba():
    code = "import sys, quantlab.transform.quantize; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_resolve():
    import quantlab as ql

    assert set(ql.__all__) <= set(dir(ql))
    for name in ql.__all__:
        assert getattr(ql, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        ql.nothing  # noqa: B018
