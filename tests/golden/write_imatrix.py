"""Write imatrix_collected.json: sums that llama-imatrix collects from the bundled model on the primer.

`python tests/golden/write_imatrix.py LLAMA_IMATRIX`, after the model or the primer changed.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import quantlab as ql
from quantlab.files.bundled import data_dir, model_path
from quantlab.files.imatrix_file import read_imatrix

TOOL = Path(sys.argv[1]).absolute()
NAMES = [f"blk.{i}.{kind}.weight" for i in (0, 3, 7) for kind in ("attn_q", "attn_output", "ffn_up", "ffn_down")]

with tempfile.TemporaryDirectory() as folder:
    f16 = ql.convert(model_path("tiny"), Path(folder) / "F16.gguf", outtype="f16")
    out = f16.with_name("imatrix.gguf")
    protocol = ("-c", "512", "--chunks", "4", "-t", "2")
    command = [TOOL, "-m", f16, "-f", data_dir() / "text" / "primer.md", "-o", out, *protocol]
    subprocess.run(command, check=True, capture_output=True)
    matrix = read_imatrix(out)
said = subprocess.run([TOOL, "--version"], check=True, capture_output=True, text=True)
version = (said.stdout + said.stderr).split("\n")[0].strip()
golden = {
    "made by": "llama-imatrix -m F16.gguf -f primer.md -c 512 --chunks 4 -t 2, the bundled model: every 16th column",
    "tool": f"llama.cpp of llama-cpp-python 0.3.36, {version}",
    "count": int(matrix.counts[NAMES[0]].item()),
    "sums": {name: matrix.sums[name][0, ::16].tolist() for name in NAMES},
}
Path(__file__).with_name("imatrix_collected.json").write_text(json.dumps(golden, indent=1) + "\n")
