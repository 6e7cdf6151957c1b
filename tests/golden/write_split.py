"""Write split.json: what llama-gguf-split makes of the model of tests/test_split.py.

`python tests/golden/write_split.py LLAMA_GGUF_SPLIT`, after the cases changed. The digests here come from llama.cpp
0c1e57098.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import made_models
import test_split as tests

TOOL = Path(sys.argv[1]).absolute()
digests = {}
with tempfile.TemporaryDirectory() as folder:
    whole = made_models.made_gguf(Path(folder) / "wide.gguf")
    for options in tests.CASES:
        subprocess.run(
            [TOOL, "--split", *options.split(), whole, whole.with_name("x")], check=True, capture_output=True
        )
        shards = sorted(Path(folder).glob("x-*.gguf"))
        digests[options] = {shard.name: tests.sha256(shard) for shard in shards}
        for shard in shards:
            shard.unlink()
source = "llama-gguf-split --split OPTIONS wide.gguf x, llama.cpp 0c1e57098; see the script"
tests.GOLDEN.write_text(json.dumps({"source": source, "digests": digests}, indent=1) + "\n")
print(sum(map(len, digests.values())), "digests")
