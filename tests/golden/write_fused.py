"""Write fused.npz: blocks of a llama-quantize whose compiler fused products with sums, where they are not ours.

`python tests/golden/write_fused.py LLAMA_QUANTIZE`, a build whose ggml-quants.c was compiled with -mfma and
-ffp-contract=fast. The blocks here come from llama.cpp 0c1e57098, x86-64, GCC 12.2.0, -march=native (AVX2 and FMA).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import made_models
import test_rounding as tests

from quantlab import quants
from quantlab.files.model import open as open_model

TOOL = Path(sys.argv[1]).absolute()
FTYPES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S"}  # whose pure files have nothing but the type

stored = {}
with tempfile.TemporaryDirectory() as folder:
    source = made_models.made_gguf(Path(folder) / "wide.gguf")
    matrix = made_models.made_imatrix(Path(folder) / "made.imatrix")
    for qtype, weighted in tests.CASES:
        out = Path(folder) / "out.gguf"
        options = ["--imatrix", matrix] if weighted else []
        subprocess.run(
            [TOOL, *options, "--pure", source, out, FTYPES.get(qtype, qtype), "2"], check=True, capture_output=True
        )
        theirs = open_model(out).tensor(tests.TENSOR).load().reshape(-1, quants.block_bytes(qtype))
        x, imatrix = tests.sample(Path(folder), weighted)
        ours = quants.quantize(x, qtype, imatrix).reshape(theirs.shape)
        differing = np.flatnonzero((ours != theirs).any(axis=1))
        key = tests.key_of(qtype, weighted)
        stored[f"{key} at"], stored[f"{key} blocks"] = differing.astype(np.int32), theirs[differing]
        print(f"{key:14} {len(differing)} of {len(ours)}")
np.savez_compressed(Path(__file__).with_name("fused.npz"), **stored)
