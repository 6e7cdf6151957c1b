"""quants/compiled.py: compiled kernels are kept for later processes, until some kernel of the package changes."""

import importlib.util
import os

import pytest

from quantlab.quants import compiled

pytestmark = pytest.mark.skipif("NUMBA_DISABLE_JIT" in os.environ, reason="nothing is compiled")


def kernel_of(path):
    """Load a module afresh, as another process would, and run its kernel."""
    spec = importlib.util.spec_from_file_location("made_kernel", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.twice(2) == 4
    return module.twice


def test_a_kernel_is_compiled_again_once_any_file_has_changed(tmp_path, monkeypatch):
    path = tmp_path / "made_kernel.py"
    path.write_text(
        "from quantlab.quants.compiled import njit\n\n\n@njit(cache=True)\ndef twice(x):\n    return x + x\n"
    )
    assert kernel_of(path).stats.cache_misses and kernel_of(path).stats.cache_hits
    monkeypatch.setattr(compiled, "sources_digest", lambda: "after an update")
    assert kernel_of(path).stats.cache_misses and kernel_of(path).stats.cache_hits
