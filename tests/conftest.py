"""Shared fixtures: one fixed seed; a numba cache that no changed kernel meets again; Ctrl-C for started programs."""

import hashlib
import os
import signal
import tempfile
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parents[1] / "quantlab"
_KERNELS = sorted((_PACKAGE / "quants").rglob("*.py"))
_KERNELS += [path for path in sorted((_PACKAGE / "evaluate").rglob("*.py")) if b"njit" in path.read_bytes()]
_DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in _KERNELS)).hexdigest()[:16]
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir()) / f"quantlab-numba-{_DIGEST}"))

if os.cpu_count() == 1:
    os.environ.setdefault("NUMBA_NUM_THREADS", "2")  # or the tests of threads would compare one with itself

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background; the programs we start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def rng():
    """A NumPy generator with the one seed that all tests share."""
    import numpy as np

    return np.random.default_rng(20231212)
