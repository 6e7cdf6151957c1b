"""Delta nets: what is converted equals llama.cpp's converter, what is computed equals transformers."""

import hashlib
import json
from pathlib import Path

import hybrid_models
import numpy as np
import pytest
from llama_models import SEEN, TOKENS

import quantlab as ql
from quantlab.evaluate.logits import logits

GOLDEN = Path(__file__).parent / "golden"
DIGESTS = json.loads((GOLDEN / "hybrid.json").read_text())["files"]
pytestmark = pytest.mark.filterwarnings("ignore:.*pre-tokenizer .* is not in llama.cpp's list")


@pytest.mark.parametrize("kind", DIGESTS)
def test_files_equal_the_converters(tmp_path, kind):
    name, dtype, n_shards = kind.split("-")
    src = hybrid_models.write_model(tmp_path / "made", name, dtype, int(n_shards))
    file = ql.convert(src, outtype=dtype.lower(), as_llama_cpp=True, progress=False)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == DIGESTS[kind]


@pytest.mark.parametrize("name", hybrid_models.FAMILIES)
def test_logits_agree_with_transformers(name, tmp_path):
    found = logits(ql.open(hybrid_models.write_model(tmp_path, name)), TOKENS)[SEEN]
    expected = np.load(GOLDEN / "hybrid_logits.npz")[name]
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


def test_torch_computes_the_same(tmp_path):
    pytest.importorskip("torch")
    model = ql.open(hybrid_models.write_model(tmp_path, "qwen3next"))
    found, expected = (logits(model, TOKENS[:60], device=device) for device in ("cpu-torch", "cpu"))
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


# ---- bad input


def test_rows_that_are_not_those_of_the_heads(tmp_path):
    src = hybrid_models.write_model(tmp_path, "qwen3next")
    weights = hybrid_models.weights("qwen3next")
    weights["model.layers.0.linear_attn.in_proj_qkvz.weight"] = np.zeros((190, 64), np.float32)
    hybrid_models.checkpoints.write_weights(src, weights, 1, "safetensors")
    with pytest.raises(ValueError, match="in_proj_qkvz.weight: 190 rows are not 192, those of q, k, v and z. Check"):
        ql.open(src)
