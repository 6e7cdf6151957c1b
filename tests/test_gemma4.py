"""Gemma 4: converted as llama.cpp's converter does, byte for byte; computed as transformers does."""

import hashlib
import json
from pathlib import Path

import gemma_models
import numpy as np
import pytest
from llama_models import SEEN, TOKENS

import quantlab as ql
from quantlab.evaluate.logits import activation_noise, logits
from quantlab.evaluate.variants import resolve

GOLDEN = Path(__file__).parent / "golden"
DIGESTS = json.loads((GOLDEN / "gemma4.json").read_text())["files"]


@pytest.mark.parametrize("kind", DIGESTS)
def test_files_equal_the_converters(tmp_path, kind):
    name, dtype, n_shards = kind.rsplit("-", 2)
    src = gemma_models.write_model(tmp_path / "made", name, dtype, int(n_shards))
    file = ql.convert(src, outtype=dtype.lower(), as_llama_cpp=True, progress=False)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == DIGESTS[kind]


@pytest.mark.filterwarnings("ignore:.*the vocabulary differs")
@pytest.mark.parametrize("name", gemma_models.FAMILIES)
def test_logits_agree_with_transformers(name, tmp_path):
    model = ql.open(gemma_models.write_model(tmp_path, name))
    found = logits(model, TOKENS)[SEEN]
    expected = np.load(GOLDEN / "gemma4_logits.npz")[name]
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


@pytest.mark.filterwarnings("ignore:.*the vocabulary differs")
def test_embeddings_of_layers_are_kept_between_them(tmp_path):
    src = gemma_models.write_model(tmp_path / "made", "gemma4-e")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    options = {"n_ctx": 64, "chunks": 2, "progress": False}
    matrix = ql.imatrix(src, tmp_path / "text.txt", **options)
    assert matrix.sums["blk.3.inp_gate.weight"].shape == (1, gemma_models.N_EMBD)
    assert matrix.sums["blk.3.proj.weight"].shape == (1, gemma_models.PER_LAYER)
    found = ql.compare(src, ["Q8_0", "Q4_0"], tmp_path / "text.txt", imatrix=matrix, **options)
    kld = [row["kld_mean"] for row in found.rows if row["variant"].startswith("Q")]
    assert 0 < kld[0] < kld[1]
    base = next(row["ppl"] for row in found.rows if not row["variant"].startswith("Q"))
    assert ql.perplexity(src, tmp_path / "text.txt", scratch=tmp_path / "scratch", **options).ppl == base


@pytest.mark.filterwarnings("ignore:.*the vocabulary differs")
def test_rounding_activations_alone_changes_little(tmp_path):
    model = ql.open(gemma_models.write_model(tmp_path, "gemma4-e"))
    exact, coarse = activation_noise(model, resolve(model, [tmp_path, "Q8_0"]), TOKENS[:64])
    assert exact < coarse < 0.05


@pytest.mark.parametrize("name", gemma_models.FAMILIES)
def test_sizes_need_no_weights(name, tmp_path):
    """Keys and values are counted in the layers that have their own."""
    src = gemma_models.write_model(tmp_path, name)
    whole = [ql.sizes(src).rows, ql.fit(src, ftype="Q8_0").rows[0].compute_bytes]
    (src / "model.safetensors").unlink()
    alone = ql.sizes(src).rows
    scales = 4 * gemma_models.N_LAYER  # layer_output_scale, which a model may lack
    assert {row.ftype: row.bytes for row in alone}.items() <= {r.ftype: r.bytes - scales for r in whole[0]}.items()
    assert ql.fit(src, ftype="Q8_0").rows[0].compute_bytes == whole[1] > 0


def changed(folder, name, **more):
    src = gemma_models.write_model(folder, name)
    config = json.loads((src / "config.json").read_text()) | more
    (src / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return src


@pytest.mark.filterwarnings("ignore:.*the vocabulary differs")
def test_sizes_of_layers_without_a_window_may_be_given_one_by_one(tmp_path):
    own = {"1": {"head_dim": 64, "num_key_value_heads": 1}, "3": {"head_dim": 64, "num_key_value_heads": 1}}
    src = changed(tmp_path, "gemma4", global_head_dim=None, num_global_key_value_heads=None, per_layer_config=own)
    h = ql.open(src).hparams
    assert (h.head_dim, h.n_head_kv, h.v_is_k) == ((32, 64, 32, 64), (2, 1, 2, 1), (0, 1, 0, 1))


# ---- bad input


@pytest.mark.filterwarnings("ignore:.*the vocabulary differs")
@pytest.mark.parametrize(
    "key, value, text",
    [
        ("attention.shared_kv_layers", 4, "n_kv_shared=4, must be less than n_layer=4. Convert the checkpoint again"),
        ("attention.shared_kv_layers", 3, "n_kv_shared=3, must leave an earlier layer with keys and values for layer"),
        ("expert_count", 4, "n_expert=4, must be 0 where layers have embeddings of their own or use keys of others"),
    ],
)
def test_layers_that_lack_keys_or_have_experts_too_are_refused(tmp_path, key, value, text):
    model = ql.open(gemma_models.write_model(tmp_path, "gemma4-e"))
    model.metadata[f"gemma4.{key}"] = np.uint32(value)
    model.metadata["gemma4.expert_used_count"] = np.uint32(2)
    with pytest.raises(ValueError, match=text):
        logits(model, [1, 2, 3])


@pytest.mark.filterwarnings("ignore:.*the vocabulary differs")
def test_keys_of_others_are_not_refined(tmp_path):
    src = gemma_models.write_model(tmp_path / "made", "gemma4-e")
    options = {"ftype": "Q4_0", "text": "primer", "n_ctx": 64, "chunks": 4, "progress": False}
    with pytest.raises(ValueError, match="n_kv_shared=2, n_embd_layer=16, must be 0 to be refined. Quantize without"):
        ql.refine(src, tmp_path / "a.gguf", **options)
    assert not (tmp_path / "a.gguf").exists()


def test_other_positions_are_refused(tmp_path):
    rope = {"full_attention": {"rope_type": "yarn", "factor": 2.0}, "sliding_attention": {"rope_type": "default"}}
    with pytest.raises(ValueError, match="rope_type='yarn', must be proportional. Use llama.cpp's converter"):
        ql.open(changed(tmp_path, "gemma4", rope_parameters=rope))


def test_a_window_and_a_number_of_layers_must_be_numbers(tmp_path):
    for key, value in (("sliding_window", 0), ("num_kv_shared_layers", "2")):
        with pytest.raises(
            ValueError, match=f"{key}={value!r}, must be 1 to 2147483647. Use the config.json that came"
        ):
            ql.open(changed(tmp_path / key, "gemma4-e", **{key: value}))


def test_attention_to_what_follows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use_bidirectional_attention='all', must be vision, as llama.cpp computes"):
        ql.open(changed(tmp_path, "gemma4", use_bidirectional_attention="all"))


@pytest.mark.filterwarnings("ignore:.*the vocabulary differs")
def test_llama_cpps_arithmetic_refuses_it(tmp_path):
    model = ql.open(gemma_models.write_model(tmp_path, "gemma4"))
    with pytest.raises(ValueError, match="mode=ggml-cpu does not compute layer_scale.* of gemma4. Evaluate it"):
        logits(model, [1, 2, 3], mode="ggml-cpu")
