"""Compute the logits of small random models with `transformers`: python tests/golden/make_transformers_logits.py

Needs torch and transformers, which nothing else here does. Writes transformers_logits.npz beside itself.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from llama_models import NAMES, SEEN, TOKENS, write_model  # noqa: E402


def logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits [n_tokens, n_vocab] of a checkpoint, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model(torch.tensor(tokens[None])).logits[0].numpy()


if __name__ == "__main__":
    found = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = logits(write_model(Path(folder), name), TOKENS)[SEEN]
    bundled = Path(__file__).parents[2] / "data" / "models" / "tiny"
    if bundled.exists():
        found["tiny"] = logits(bundled, TOKENS)[SEEN]
    np.savez_compressed(Path(__file__).with_name("transformers_logits.npz"), **found)
