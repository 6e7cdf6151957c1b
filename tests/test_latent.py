"""Latent attention: what is converted equals llama.cpp's converter, what is computed equals transformers."""

import hashlib
import json
from pathlib import Path

import latent_models
import numpy as np
import pytest
from llama_models import SEEN, TOKENS

import quantlab as ql
from quantlab.evaluate.engine.routing import choose
from quantlab.evaluate.logits import logits

GOLDEN = Path(__file__).parent / "golden"
DIGESTS = json.loads((GOLDEN / "latent.json").read_text())["files"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pre-tokenizer .* is not in llama.cpp's list"),
    pytest.mark.filterwarnings("ignore:.*tensors of multi-token prediction layers are left out"),
]
OPTIONS = {"as_llama_cpp": True, "progress": False}


def changed(folder, name, **more):
    src = latent_models.write_model(folder, name)
    config = json.loads((src / "config.json").read_text()) | more
    (src / "config.json").write_text(json.dumps(config))
    return src


@pytest.mark.parametrize("kind", DIGESTS)
def test_files_equal_the_converters(tmp_path, kind):
    name, dtype, n_shards = kind.rsplit("-", 2)
    src = latent_models.write_model(tmp_path / "made", name, "F32" if dtype == "FP8" else dtype, int(n_shards))
    if dtype == "FP8":
        latent_models.pack_fp8(src)
    file = ql.convert(src, outtype="bf16" if dtype == "FP8" else dtype.lower(), **OPTIONS)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == DIGESTS[kind]


@pytest.mark.parametrize("name", latent_models.FAMILIES)
def test_logits_agree_with_transformers(name, tmp_path):
    found = logits(ql.open(latent_models.write_model(tmp_path, name)), TOKENS)[SEEN]
    expected = np.load(GOLDEN / "latent_logits.npz")[name]
    assert np.abs(found - expected).max() <= 1e-5 * np.ptp(expected)


def test_importance_of_heads_changes_what_is_quantized(tmp_path):
    src = latent_models.write_model(tmp_path / "made", "deepseek-v3")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    options = {"n_ctx": 64, "chunks": 2, "progress": False}
    matrix = ql.imatrix(src, tmp_path / "text.txt", **options)
    for name, width in (("attn_k_b", latent_models.N_NOPE), ("attn_v_b", latent_models.N_LORA_KV)):
        assert matrix.sums[f"blk.1.{name}.weight"].shape == (latent_models.N_HEAD, width)
        assert matrix.counts[f"blk.1.{name}.weight"].tolist() == [128] * latent_models.N_HEAD
    found = ql.compare(src, ["Q8_0", "Q4_0"], tmp_path / "text.txt", imatrix=matrix, **options)
    kld = [row["kld_mean"] for row in found.rows if row["variant"].startswith("Q")]
    assert 0 < kld[0] < kld[1]


def test_experts_are_chosen_within_the_best_groups():
    rng = np.random.default_rng(0)
    scores, bias = rng.standard_normal((50, 12), np.float32), rng.standard_normal(12, np.float32)
    ids, weights = np.empty((50, 3), np.int32), np.empty((50, 3), np.float32)
    choose(scores.copy(), bias, 1, True, np.float32(1), (4, 2), ids, weights)
    wanted = 1 / (1 + np.exp(-scores.astype(np.float64))) + bias
    sums = np.sort(wanted.reshape(50, 4, 3))[:, :, 1:].sum(axis=2)
    is_kept = np.argsort(np.argsort(-sums)) < 2
    wanted[~np.repeat(is_kept, 3, axis=1)] = -np.inf
    np.testing.assert_array_equal(ids, np.argsort(-wanted)[:, :3])


# ---- bad input


def test_layers_that_guess_ahead_cannot_be_written(tmp_path):
    src = latent_models.write_model(tmp_path, "deepseek-v3")
    with pytest.warns(UserWarning, match=r"tensors of multi-token prediction layers are left out.* with --no-mtp\.$"):
        ql.open(src)
    with pytest.raises(ValueError, match="mtp=True, no layers here guess several tokens at once. Leave mtp out"):
        ql.convert(src, mtp=True, **OPTIONS)


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("deepseek-v3", "scoring_func", None),
        ("deepseek-v3", "rope_interleave", False),
        ("deepseek-v2", "n_group", 4),
        ("deepseek-v2", "moe_layer_freq", 2),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path, name, key, value):
    src = changed(tmp_path, name, **{key: value})
    with pytest.raises(ValueError, match="=.*, must be .*, as llama.cpp computes every deepseek2 model"):
        ql.open(src)


def test_another_magnitude_of_positions_is_refused(tmp_path):
    rope = latent_models.FAMILIES["deepseek-v3"][2]["rope_scaling"] | {"mscale": 0.7}
    with pytest.raises(ValueError, match="mscale=0.7, must be 1.0, as llama.cpp computes every deepseek2 model"):
        ql.open(changed(tmp_path, "deepseek-v3", rope_scaling=rope))


def test_bad_sizes(tmp_path):
    with pytest.raises(ValueError, match="scoring_func='tanh', must be softmax or sigmoid. Use llama.cpp's converter"):
        ql.open(changed(tmp_path / "a", "deepseek-v3", scoring_func="tanh"))
    with pytest.raises(ValueError, match="kv_b_proj.weight: 224 rows are not 4 heads of 64. Check its configuration"):
        ql.open(changed(tmp_path / "b", "deepseek-v3", v_head_dim=32))


def test_llama_cpps_arithmetic_refuses_it(tmp_path):
    model = ql.open(latent_models.write_model(tmp_path, "deepseek-v2"))
    with pytest.raises(ValueError, match="mode=ggml-cpu does not compute latent attention of deepseek2"):
        logits(model, [1, 2, 3], mode="ggml-cpu")


def test_queries_that_grow_with_the_position_are_refused(tmp_path):
    src = latent_models.write_model(tmp_path / "made", "deepseek-v2")
    file = ql.convert(src, outtype="f32", **OPTIONS)
    model = ql.open(file)
    model.metadata["deepseek2.attention.temperature_scale"] = np.float32(0.1)
    with pytest.raises(ValueError, match="attn_temp_scale=0.1.*, must be 0 with latent attention. Evaluate it in"):
        logits(model, [1, 2, 3])


@pytest.mark.parametrize(
    "key, value, text",
    [
        ("expert_gating_func", 3, "expert_gating=3, must be 0 to 2. Evaluate it in llama.cpp"),
        ("expert_used_count", 5, "n_expert=8, n_expert_used=5, expert_groups=4, .* do not fit together. Convert"),
        ("expert_group_count", 3, "expert_groups=3, expert_groups_used=2 do not fit together"),
        ("expert_group_count", 8, "expert_groups=8, expert_groups_used=2 do not fit together"),
        ("expert_group_used_count", 5, "expert_groups=4, expert_groups_used=5 do not fit together"),
    ],
)
def test_experts_that_do_not_fit_together_are_refused(tmp_path, key, value, text):
    model = ql.open(latent_models.write_model(tmp_path, "deepseek-v3"))
    model.metadata[f"deepseek2.{key}"] = np.uint32(value)
    with pytest.raises(ValueError, match=text):
        logits(model, [1, 2, 3])
