"""Editors and checkers of types see the public names, with signatures; modules show their own names alone."""

import ast
import importlib
from pathlib import Path

import pytest

import quantlab as ql

ROOT = Path(__file__).parents[1]
NAMES = [name for name in ql.__all__ if not name.startswith("_")]


def imported_for_checkers() -> set[str]:
    """Names that `quantlab/__init__.py` imports under `if TYPE_CHECKING`."""
    tree = ast.parse((ROOT / "quantlab" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {alias.asname or alias.name for node in block.body for alias in node.names}


def test_checkers_see_every_public_name():
    assert imported_for_checkers() == set(NAMES) == {*ql._NAMES, *ql._MODULES}
    assert (ROOT / "quantlab" / "py.typed").exists()


def test_jedi_completes_public_names_with_signatures():
    jedi = pytest.importorskip("jedi")
    source = "import quantlab as ql\nql."
    completions = {item.name: item for item in jedi.Script(source, path=ROOT / "a.py").complete(2, 3)}
    assert set(NAMES) <= completions.keys()
    for call, parameter in (("compare", "variants"), ("quantize", "ftype"), ("tables.size_ppl", "ftypes")):
        (signature,) = jedi.Script(f"{source}{call}(", path=ROOT / "a.py").get_signatures(2, 4 + len(call))
        assert parameter in [item.name for item in signature.params]
        assert signature.docstring().strip()


def test_ipython_completes_what_is_there():
    jedi = pytest.importorskip("jedi")
    names = {item.name for item in jedi.Interpreter("ql.", [{"ql": ql}]).complete()}
    assert set(NAMES) <= names


@pytest.mark.parametrize("name", ["tables", "plots", "quants"])
def test_modules_show_their_own_names(name):
    module = getattr(ql, name)
    assert dir(module) == sorted(module.__all__)
    for item in module.__all__:
        owner = importlib.import_module(getattr(module, item).__module__)
        assert owner.__name__.startswith(module.__name__)
