"""quantlab: a Jupyter-first workbench for GGUF quantization."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and checkers of types; at run time `__getattr__` imports what is asked for
    from quantlab import quants as quants
    from quantlab.evaluate.imatrix import imatrix as imatrix
    from quantlab.evaluate.perplexity import compare as compare
    from quantlab.evaluate.perplexity import kl_divergence as kl_divergence
    from quantlab.evaluate.perplexity import perplexity as perplexity
    from quantlab.evaluate.refine import refine as refine
    from quantlab.files.model import open as open
    from quantlab.run.fit import fit as fit
    from quantlab.run.generate import generate as generate
    from quantlab.study import plots as plots
    from quantlab.study import tables as tables
    from quantlab.study.exchange import exchange as exchange
    from quantlab.study.recipe import recipe as recipe
    from quantlab.study.release import release as release
    from quantlab.study.report import report as report
    from quantlab.study.sensitivity import sensitivity as sensitivity
    from quantlab.transform.convert import convert as convert
    from quantlab.transform.diff import diff as diff
    from quantlab.transform.inspect import inspect as inspect
    from quantlab.transform.plan import sizes as sizes
    from quantlab.transform.quantize import quantize as quantize
    from quantlab.transform.split import merge as merge
    from quantlab.transform.split import split as split
    from quantlab.transform.verify import verify as verify

__version__ = "0.2.0"

# public name -> module that defines it; a module is imported when one of its names is first asked for
_NAMES = {
    "open": "quantlab.files.model",
    "convert": "quantlab.transform.convert",
    "quantize": "quantlab.transform.quantize",
    "sizes": "quantlab.transform.plan",
    "inspect": "quantlab.transform.inspect",
    "diff": "quantlab.transform.diff",
    "verify": "quantlab.transform.verify",
    "split": "quantlab.transform.split",
    "merge": "quantlab.transform.split",
    "perplexity": "quantlab.evaluate.perplexity",
    "kl_divergence": "quantlab.evaluate.perplexity",
    "compare": "quantlab.evaluate.perplexity",
    "imatrix": "quantlab.evaluate.imatrix",
    "refine": "quantlab.evaluate.refine",
    "sensitivity": "quantlab.study.sensitivity",
    "recipe": "quantlab.study.recipe",
    "exchange": "quantlab.study.exchange",
    "report": "quantlab.study.report",
    "release": "quantlab.study.release",
    "fit": "quantlab.run.fit",
    "generate": "quantlab.run.generate",
}
_MODULES = {
    "quants": "quantlab.quants",
    "tables": "quantlab.study.tables",
    "plots": "quantlab.study.plots",
}

__all__ = [
    "__version__",
    "compare",
    "convert",
    "diff",
    "exchange",
    "fit",
    "generate",
    "imatrix",
    "inspect",
    "kl_divergence",
    "merge",
    "open",
    "perplexity",
    "plots",
    "quantize",
    "quants",
    "recipe",
    "refine",
    "release",
    "report",
    "sensitivity",
    "sizes",
    "split",
    "tables",
    "verify",
]


def __getattr__(name: str):
    """Import the module that owns `name` and return the object (PEP 562)."""
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _NAMES:
        from quantlab.files.progress import announce_compilation

        announce_compilation()
        return getattr(import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'quantlab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
