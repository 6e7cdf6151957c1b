"""Shared fixtures: one fixed seed, and a numba cache that a changed kernel never meets again."""

import hashlib
import os
import tempfile
from pathlib import Path

import pytest

_KERNELS = sorted((Path(__file__).parents[1] / "quantlab" / "quants").glob("*.py"))
_DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in _KERNELS)).hexdigest()[:16]
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"quantlab-numba-{_DIGEST}"))


@pytest.fixture
def rng():
    """A NumPy generator with the one seed that all tests share."""
    import numpy as np

    return np.random.default_rng(20231212)
