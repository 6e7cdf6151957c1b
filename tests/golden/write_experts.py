"""Write digests and logits: `python tests/golden/write_experts.py CONVERT_HF_TO_GGUF`.

experts.json, hybrid.json, gemma4.json and latent.json hold SHA-256 digests of what llama.cpp's converter makes of the
checkpoints of `expert_models.py`, `hybrid_models.py`, `gemma_models.py` and `latent_models.py`, the .npz files logits
that transformers computes of them in float32. Needs torch and transformers, which nothing else here does.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import expert_models  # noqa: E402
import gemma_models  # noqa: E402
import hybrid_models  # noqa: E402
import latent_models  # noqa: E402
from llama_models import SEEN, TOKENS  # noqa: E402
from make_transformers_logits import logits  # noqa: E402

# made vocabularies are not in the converter's list of pre-tokenizers: it is told their name
RUN = """
import runpy, sys
from pathlib import Path
sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def digest(model: Path, outtype: str, *options: str) -> str:
    """SHA-256 of the file that the converter writes."""
    out = model.parent / "out.gguf"
    run = [sys.executable, "-c", RUN, sys.argv[1], str(model), *options]
    subprocess.run([*run, "--outtype", outtype, "--outfile", str(out)], check=True, capture_output=True)
    return hashlib.sha256(out.read_bytes()).hexdigest()


def write(module, stem: str, digests: dict[str, str], *options: str) -> None:
    """Write digests, with others that there are, and logits of the checkpoints of a module."""
    found = {}
    for name in module.FAMILIES:
        for kind in module.WRITTEN:
            dtype, n_shards, *mtp = kind.split("-")
            with tempfile.TemporaryDirectory() as folder:
                more = {"mtp": True} if mtp else {}
                model = module.write_model(Path(folder) / "made", name, dtype, int(n_shards), **more)
                digests[f"{name}-{kind}"] = digest(model, dtype.lower(), *([] if mtp else options))
                if kind == "F32-1":
                    found[name] = logits(model, TOKENS)[SEEN]
    here = Path(__file__).parent
    text = {"source": "convert_hf_to_gguf.py of llama.cpp 0c1e57098: SHA-256 of the file", "files": digests}
    (here / f"{stem}.json").write_text(json.dumps(text, indent=1) + "\n")
    np.savez_compressed(here / f"{stem}_logits.npz", **found)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        model = expert_models.write_model(Path(folder) / "made", "gpt-oss")
        expert_models.pack_experts(model)
        write(expert_models, "experts", {"gpt-oss-MXFP4": digest(model, "f16")})
    write(hybrid_models, "hybrid", {}, "--no-mtp")
    write(gemma_models, "gemma4", {})
    with tempfile.TemporaryDirectory() as folder:
        model = latent_models.write_model(Path(folder) / "made", "deepseek-v3")
        latent_models.pack_fp8(model)
        write(latent_models, "latent", {"deepseek-v3-FP8-1": digest(model, "bf16")})
