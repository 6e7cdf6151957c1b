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
    name, dtype, n_shards, *mtp = kind.split("-")
    src = hybrid_models.write_model(tmp_path / "made", name, dtype, int(n_shards), mtp=bool(mtp))
    file = ql.convert(src, outtype=dtype.lower(), as_llama_cpp=True, progress=False, mtp=bool(mtp))
    assert hashlib.sha256(file.read_bytes()).hexdigest() == DIGESTS[kind]


@pytest.mark.parametrize("name", hybrid_models.FAMILIES)
def test_logits_agree_with_transformers(name, tmp_path):
    found = logits(ql.open(hybrid_models.write_model(tmp_path, name)), TOKENS)[SEEN]
    expected = np.load(GOLDEN / "hybrid_logits.npz")[name]
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


@pytest.mark.parametrize("name", ["qwen35", "qwen3next"])
def test_layers_that_guess_ahead_are_kept_and_not_computed(name, tmp_path):
    src = hybrid_models.write_model(tmp_path / "made", name, mtp=True)
    with pytest.warns(UserWarning, match="left out, as llama.cpp's converter does with --no-mtp. mtp=True"):
        expected = logits(ql.open(src), TOKENS[:20])
    model = ql.open(ql.convert(src, tmp_path / "whole.gguf", mtp=True, progress=False))
    assert (model.hparams.n_layer, model.hparams.n_layer_nextn) == (4, 1)
    np.testing.assert_array_equal(logits(model, TOKENS[:20]), expected)
    assert ql.fit(model.path, vram="1GiB").n_layer == 4
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    options = {"types": ["Q8_0"], "groups": "kind", "chunks": 1, "n_ctx": 64, "progress": False}
    found = ql.sensitivity(model.path, tmp_path / "text.txt", **options)
    assert found.rows and not any("nextn" in name or "blk.4." in name for row in found.rows for name in row["types"])
    small = ql.open(ql.quantize(model.path, tmp_path / "small.gguf", ftype="Q8_0"))
    assert small.tensor("blk.4.nextn.eh_proj.weight").qtype == "Q8_0"


@pytest.mark.parametrize("name", ["qwen35moe", "qwen3next"])
def test_a_quantized_file_computes_what_the_same_types_do_in_memory(name, tmp_path):
    """Quantizing drops the leading 1 from the shape of the gate of the expert that every token sees."""
    base = ql.convert(hybrid_models.write_model(tmp_path / "made", name), progress=False)
    file = ql.quantize(base, tmp_path / "small.gguf", ftype="Q8_0")
    assert ql.open(file).tensor("blk.0.ffn_gate_inp_shexp.weight").shape == (hybrid_models.N_EMBD,)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    found = ql.compare(base, [file, "Q8_0"], tmp_path / "text.txt", n_ctx=64, chunks=1, progress=False)
    assert found.rows[1]["ppl"] == found.rows[2]["ppl"]


# ---- bad input


def test_without_such_layers_none_can_be_written(tmp_path):
    src = hybrid_models.write_model(tmp_path, "qwen35")
    with pytest.raises(ValueError, match="mtp=True, no layers here guess several tokens at once. Leave mtp out"):
        ql.convert(src, mtp=True, progress=False)


def test_rows_that_are_not_those_of_the_heads(tmp_path):
    src = hybrid_models.write_model(tmp_path, "qwen3next")
    weights = hybrid_models.weights("qwen3next")
    weights["model.layers.0.linear_attn.in_proj_qkvz.weight"] = np.zeros((190, 64), np.float32)
    hybrid_models.checkpoints.write_weights(src, weights, 1, "safetensors")
    with pytest.raises(ValueError, match="in_proj_qkvz.weight: 190 rows are not 192, those of q, k, v and z. Check"):
        ql.open(src)
