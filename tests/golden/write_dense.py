"""Write dense.json and dense_logits.npz: `python tests/golden/write_dense.py CONVERT_HF_TO_GGUF`.

The first holds SHA-256 digests of what llama.cpp's converter makes of the checkpoints of `dense_models.py`, the second
logits that transformers computes of them in float32. Needs torch and transformers, which nothing else here does.
"""

import hashlib
import json
import runpy
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from dense_models import FAMILIES, FP8, WRITTEN, write_fp8, write_model  # noqa: E402
from llama_models import SEEN, TOKENS  # noqa: E402
from make_transformers_logits import logits  # noqa: E402

# made vocabularies are not in the converter's list of pre-tokenizers: it is told their name
NAMES = {"bpe_llama3": "llama-bpe", "bpe_smollm": "smollm", "spm": ""}


def converted(model: Path, outtype: str, pre: str) -> str:
    """Convert a checkpoint with the converter that the command line names; return the SHA-256 of the file."""
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    out, before = model.with_name("out.gguf"), sys.argv
    sys.argv = [sys.argv[1], str(model), "--outtype", outtype, "--outfile", str(out)]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.argv = before
    return hashlib.sha256(out.read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(sys.argv[1]).parent))
    digests, found = {}, {}
    for name in FAMILIES:
        for kind in WRITTEN:
            dtype, n_shards = kind.split("-")
            with tempfile.TemporaryDirectory() as folder:
                model = write_model(Path(folder) / "made", name, dtype, int(n_shards))
                digests[f"{name}-{kind}"] = converted(model, dtype.lower(), NAMES[FAMILIES[name][3]])
                if kind == "F32-1":
                    found[name] = logits(model, TOKENS)[SEEN]
    fp8 = {}
    for name in FP8:
        for outtype in ("f32", "bf16"):
            with tempfile.TemporaryDirectory() as folder:
                fp8[f"{name}-{outtype}"] = converted(write_fp8(Path(folder) / "made", name), outtype, "")
    here = Path(__file__).parent
    source = "convert_hf_to_gguf.py of llama.cpp 0c1e57098: SHA-256 of the file"
    (here / "dense.json").write_text(json.dumps({"source": source, "files": digests, "fp8": fp8}, indent=1) + "\n")
    np.savez_compressed(here / "dense_logits.npz", **found)
