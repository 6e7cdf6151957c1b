"""Experts: what is converted equals llama.cpp's converter, what is computed equals transformers."""

import hashlib
import json
from pathlib import Path

import expert_models
import numpy as np
import pytest
from llama_models import SEEN, TOKENS
from typer.testing import CliRunner

import quantlab as ql
from quantlab import quants
from quantlab.cli import app
from quantlab.evaluate.engine.routing import choose, sort_tokens
from quantlab.evaluate.logits import logits
from quantlab.study.proxy import weighted_error

GOLDEN = Path(__file__).parent / "golden"
DIGESTS = json.loads((GOLDEN / "experts.json").read_text())["files"]
pytestmark = pytest.mark.filterwarnings("ignore:.*pre-tokenizer .* is not in llama.cpp's list")
OPTIONS = {"as_llama_cpp": True, "progress": False}


def file_digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", [kind for kind in DIGESTS if "MXFP4" not in kind])
def test_files_equal_the_converters(tmp_path, kind):
    name, dtype, n_shards = kind.rsplit("-", 2)
    src = expert_models.write_model(tmp_path / "made", name, dtype, int(n_shards))
    assert file_digest(ql.convert(src, outtype=dtype.lower(), **OPTIONS)) == DIGESTS[kind]


def test_experts_in_mxfp4_are_kept_without_loss(tmp_path):
    src = expert_models.write_model(tmp_path / "made", "gpt-oss")
    meant = expert_models.pack_experts(src)
    file = ql.convert(src, outtype="f16", **OPTIONS)
    assert file_digest(file) == DIGESTS["gpt-oss-MXFP4"]
    model = ql.open(file)
    both, down = (meant[f"model.layers.1.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    for name, values in {"gate": both[:, ::2], "up": both[:, 1::2], "down": down}.items():
        tensor = model.tensor(f"blk.1.ffn_{name}_exps.weight")
        assert tensor.qtype == "MXFP4"
        np.testing.assert_array_equal(quants.dequantize(tensor.load(), "MXFP4", tensor.shape), values)


@pytest.mark.parametrize("name", expert_models.FAMILIES)
def test_logits_agree_with_transformers(name, tmp_path):
    found = logits(ql.open(expert_models.write_model(tmp_path, name)), TOKENS)[SEEN]
    expected = np.load(GOLDEN / "experts_logits.npz")[name]
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


def test_projections_of_all_experts_in_one_tensor_are_the_same_model(tmp_path):
    src = expert_models.write_model(tmp_path / "made", "qwen3moe")
    file = ql.convert(src, outtype="f32", **OPTIONS).read_bytes()
    weights = expert_models.weights("qwen3moe")
    for i in range(expert_models.N_LAYER):
        of = f"model.layers.{i}.mlp.experts"
        parts = {
            part: np.stack([weights.pop(f"{of}.{e}.{part}.weight") for e in range(expert_models.N_EXPERT)])
            for part in ("down_proj", "gate_proj", "up_proj")
        }
        weights[f"{of}.down_proj"] = parts["down_proj"]
        weights[f"{of}.gate_up_proj"] = np.concatenate([parts["gate_proj"], parts["up_proj"]], axis=1)
    expert_models.checkpoints.write_weights(src, weights, 1, "safetensors")
    again = ql.open(ql.convert(src, src / "again.gguf", outtype="f32", **OPTIONS))
    (src / "first.gguf").write_bytes(file)
    first = ql.open(src / "first.gguf")
    assert sorted(first.names) == sorted(again.names)
    for tensor in first:
        np.testing.assert_array_equal(tensor.load(), again.tensor(tensor.name).load())


def test_importance_is_counted_for_each_expert(tmp_path):
    src = expert_models.write_model(tmp_path / "made", "qwen3moe")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    matrix = ql.imatrix(src, tmp_path / "text.txt", n_ctx=64, chunks=2, progress=False)
    for kind, width in (("gate", 64), ("down", 32)):
        name = f"blk.1.ffn_{kind}_exps.weight"
        assert matrix.sums[name].shape == (expert_models.N_EXPERT, width)
        assert matrix.counts[name].sum() == 2 * 2 * 64  # each of 128 tokens sees two experts
        assert ((matrix.sums[name] > 0).any(axis=1) == (matrix.counts[name] > 0)).all()
    assert matrix.counts["blk.1.ffn_gate_inp.weight"].tolist() == [128]
    found = ql.compare(src, ["Q8_0", "Q4_0"], tmp_path / "text.txt", imatrix=matrix, n_ctx=64, chunks=2, progress=False)
    kld = [row["kld_mean"] for row in found.rows if row["variant"].startswith("Q")]
    assert 0 < kld[0] < kld[1]


def test_experts_have_damages_by_tensor(tmp_path):
    src = expert_models.write_model(tmp_path / "made", "qwen3moe")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    options = {"n_ctx": 64, "chunks": 2, "progress": False}
    matrix = ql.imatrix(src, tmp_path / "text.txt", **options)
    options |= {"types": ["Q8_0", "Q4_0"], "imatrix": matrix, "cache": tmp_path / "cache"}
    found = ql.sensitivity(src, tmp_path / "text.txt", **options)
    name = "blk.1.ffn_gate_exps.weight"
    tensor, each = ql.open(src).tensor(name), matrix.entries[name].reshape(expert_models.N_EXPERT, -1)
    by_hand = {
        qtype: sum(weighted_error(x, qtype, w) for x, w in zip(tensor.floats(), each, strict=True))
        for qtype in options["types"]
    }
    rows = {row["qtype"]: row for row in found.rows if row["group"] == name}
    assert {qtype: row["error"] for qtype, row in rows.items()} == pytest.approx(by_hand)
    assert 0 < rows["Q8_0"]["delta_kld"] < rows["Q4_0"]["delta_kld"]
    best = ql.recipe(found, src, like="Q4_1", imatrix=matrix)
    assert best.types[name] in ("Q8_0", "Q4_0")


@pytest.mark.parametrize("gating", [0, 1, 2])
def test_the_best_experts_are_chosen(gating):
    rng = np.random.default_rng(gating)
    scores, bias = rng.standard_normal((50, 12), np.float32), rng.standard_normal(12, np.float32)
    ids, weights = np.empty((50, 3), np.int32), np.empty((50, 3), np.float32)
    choose(scores.copy(), bias, gating, gating != 2, np.float32(2.5), (0, 0), ids, weights)
    x = scores.astype(np.float64)
    probabilities = [np.exp(x) / np.exp(x).sum(axis=1, keepdims=True), 1 / (1 + np.exp(-x)), x][gating]
    expected = np.argsort(-(probabilities + bias), axis=1)[:, :3]
    np.testing.assert_array_equal(ids, expected)
    chosen = np.take_along_axis(probabilities, expected, axis=1)
    chosen = np.exp(chosen) if gating == 2 else chosen
    np.testing.assert_allclose(weights, 2.5 * chosen / chosen.sum(axis=1, keepdims=True), rtol=1e-5)
    routes = sort_tokens(np.arange(50), ids, weights, 12)
    for expert in range(12):
        own = routes.of(expert)
        assert routes.tokens[own].tolist() == np.flatnonzero((expected == expert).any(axis=1)).tolist()


def test_a_recipe_for_packed_experts_may_quantize_them_again(tmp_path):
    src = expert_models.write_model(tmp_path / "made", "gpt-oss")
    expert_models.pack_experts(src)
    base, out = ql.convert(src, tmp_path / "base.gguf", progress=False), tmp_path / "out.gguf"
    limit = ["--criterion", "error", "--types", "Q4_0,Q8_0", "--target-size", "1MiB", "--keep", "blk.0.*exps=Q4_0"]
    limit += ["--judge", "none", "-o", str(tmp_path / "r.txt"), "--quantize", str(out)]
    said = CliRunner().invoke(app, ["recipe", str(base), *limit]).output
    assert "llama-quantize --allow-requantize --tensor-type-file" in said
    assert [ql.open(out).tensor(f"blk.{i}.ffn_up_exps.weight").qtype for i in (0, 1)] == ["Q4_0", "MXFP4"]


# ---- bad input


def test_a_missing_expert_is_named(tmp_path):
    src = expert_models.write_model(tmp_path, "mixtral")
    weights = expert_models.weights("mixtral")
    del weights["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    expert_models.checkpoints.write_weights(src, weights, 1, "safetensors")
    with pytest.raises(ValueError, match=r"blk.1.ffn_down_exps.weight: expert 3 is missing. Download"):
        ql.open(src)


def test_more_experts_per_token_than_there_are(tmp_path):
    src = expert_models.write_model(tmp_path, "mixtral")
    config = json.loads((src / "config.json").read_text()) | {"num_experts_per_tok": 6}
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_experts_per_tok=6, must be at most 5, the number of experts"):
        ql.open(src)


@pytest.mark.parametrize("key, value", [("norm_topk_prob", None), ("mlp_only_layers", [1]), ("decoder_sparse_step", 2)])
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, key, value):
    src = expert_models.write_model(tmp_path, "qwen3moe")
    config = json.loads((src / "config.json").read_text())
    config = {name: given for name, given in (config | {key: value}).items() if given is not None}
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"{key}=.*, must be .*, as llama.cpp computes every qwen3moe model"):
        ql.open(src)


def test_scales_that_are_missing(tmp_path):
    src = expert_models.write_model(tmp_path, "gpt-oss")
    expert_models.pack_experts(src)
    path = src / "model.safetensors"
    path.write_bytes(
        path.read_bytes().replace(b"layers.2.mlp.experts.down_proj_scales", b"layers.2.mlp.experts.down_proj_scaleX")
    )
    with pytest.raises(ValueError, match="down_proj_blocks: must come with its scales, one byte for 16"):
        ql.open(src)
