"""quantlab: a Jupyter-first workbench for GGUF quantization."""

from importlib import import_module

__version__ = "0.1.0"

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

__all__ = ["__version__", *_NAMES, *_MODULES]  # noqa: PLE0604 - the names are resolved by __getattr__


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
