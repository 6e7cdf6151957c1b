"""Small random models whose logits another implementation has computed too."""

import json
from pathlib import Path

import checkpoints
import numpy as np

# name of a checkpoint -> what its configuration gets instead, so that scaled positions matter within `TOKENS`
NAMES = {
    "llama1": {},
    "llama2": {},
    "llama3": {"rope_theta": 1000.0, "rope_scaling": {"original_max_position_embeddings": 32, "factor": 8.0}},
    "mistral": {"sliding_window": None},
    "yi": {},
    "smollm": {},
    "tinyllama": {},
    "qwen2": {"rope_theta": 1000.0, "rope_scaling": {"original_max_position_embeddings": 16}},
    "qwen3": {},
}
TOKENS = np.random.default_rng(7).integers(3, checkpoints.N_VOCAB, 150)  # more than one block of queries
SEEN = [0, 1, 31, 128, 149]  # positions whose logits are kept


def write_model(folder: Path, name: str) -> Path:
    """Write a checkpoint in float32 with weights of a size that keeps attention soft."""
    checkpoints.write_checkpoint(folder, name, dtype="F32")
    config = json.loads((folder / "config.json").read_text())
    changes = dict(NAMES[name])
    if "rope_scaling" in changes:
        changes["rope_scaling"] = config["rope_scaling"] | changes["rope_scaling"]
    (folder / "config.json").write_text(json.dumps(config | changes))
    weights = {key: _scaled(key, value) for key, value in checkpoints.tensors(name).items()}
    checkpoints.write_weights(folder, weights, 1, "safetensors")
    return folder


def _scaled(key: str, value: np.ndarray) -> np.ndarray:
    if "norm" in key:
        return (1 + 0.2 * value).astype(np.float32)
    return (0.15 * value).astype(np.float32)
