"""What long work says before it starts."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = """
import numpy as np
import quantlab as ql

assert ql.quantize  # with a public function comes the announcement
ql.quants.dequantize(np.zeros((1, 64), np.uint8), "BF16", (1, 32))
ql.quants.dequantize(np.zeros((1, 64), np.uint8), "F16", (1, 32))
"""


def said(cache: Path) -> list[str]:
    """What a process prints that calls two small kernels, with `cache` for compiled code."""
    env = os.environ | {"NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, cwd=ROOT, capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).splitlines()


def test_compiling_kernels_is_said_once_and_not_when_they_are_loaded(tmp_path):
    lines = said(tmp_path)
    assert len(lines) == 1 and lines[0].startswith("compiling kernels for this machine")
    assert said(tmp_path) == []
