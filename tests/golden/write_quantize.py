"""Write quantize.json: what llama-quantize makes of the sources of tests/test_quantize.py.

`python tests/golden/write_quantize.py LLAMA_QUANTIZE`, after the bundled model or the cases changed. The digests here
come from llama.cpp 0c1e57098, x86-64, GNU compiler, whose quantizers hold no fused multiply-add.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import test_quantize as tests

from quantlab.files.bundled import model_path

TOOL = Path(sys.argv[1]).absolute()
GOLDEN = Path(__file__).with_name("quantize.json").absolute()
SHARD = "made-00001-of-00002.gguf"


def run(arguments: str, outfile: str) -> None:
    """Run llama-quantize on ``OPTIONS IN FTYPE``."""
    *options, source, ftype = arguments.split()
    subprocess.run([TOOL, *options, source, outfile, ftype, "2"], check=True, capture_output=True)


def digest_of(arguments: str) -> str:
    """Return the SHA-256 of what llama-quantize writes, "refused" where it wants an importance matrix."""
    try:
        run(arguments, "out.gguf")
    except subprocess.CalledProcessError as error:
        if b"requires an importance matrix" not in error.stdout + error.stderr:
            raise
        return "refused"
    return tests.sha256("out.gguf")


with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    tests.make_sources(Path())
    digests = {key: digest_of(key) for key in tests.CASES}
    run("wide.gguf Q8_0", "q8_0.gguf")
    for key in ("--allow-requantize q8_0.gguf Q4_K_M", f"{SHARD} Q4_K_M"):
        digests[key] = digest_of(key)
    run(f"--keep-split {SHARD} Q4_K_M", "kept.gguf")
    for i in (1, 2):
        digests[f"--keep-split {SHARD} Q4_K_M {i}"] = tests.sha256(f"kept-{i:05d}-of-00002.gguf")
    digests["model.safetensors"] = hashlib.sha256((model_path("tiny") / "model.safetensors").read_bytes()).hexdigest()

source = (
    "llama-quantize OPTIONS IN OUT FTYPE 2, llama.cpp 0c1e57098; keys read OPTIONS IN FTYPE [shard]; see the script"
)
GOLDEN.write_text(json.dumps({"source": source, "digests": digests}, indent=1) + "\n")
print(len(digests), "digests")
