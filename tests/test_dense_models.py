"""Dense families: converted as llama.cpp's converter does, byte for byte; computed as transformers does."""

import hashlib
import json
from pathlib import Path

import checkpoints
import dense_models
import llama_models
import numpy as np
import pytest

import quantlab as ql
from quantlab.evaluate.logits import logits

GOLDEN = Path(__file__).parent / "golden"
_, FILES, FP8 = json.loads((GOLDEN / "dense.json").read_text()).values()
pytestmark = pytest.mark.filterwarnings("ignore:.*pre-tokenizer .* is not in llama.cpp's list")


@pytest.mark.parametrize("kind", FILES)
def test_files_equal_the_converters(tmp_path, kind):
    name, dtype, n_shards = kind.split("-")
    src = dense_models.write_model(tmp_path / "made", name, dtype, int(n_shards))
    path = ql.convert(src, outtype=dtype.lower(), as_llama_cpp=True, progress=False)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == FILES[kind]


@pytest.mark.parametrize("kind", FP8)
def test_fp8_is_dequantized_as_the_converter_does(tmp_path, kind):
    name, outtype = kind.split("-")
    path = ql.convert(
        dense_models.write_fp8(tmp_path / "made", name), outtype=outtype, as_llama_cpp=True, progress=False
    )
    assert hashlib.sha256(path.read_bytes()).hexdigest() == FP8[kind]


def test_phi_says_above_its_rope_how_long_its_context_was(tmp_path):
    folder = dense_models.write_model(tmp_path / "phi4", "phi4")
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_parameters"].pop("original_max_position_embeddings") == 4096
    (folder / "config.json").write_text(json.dumps(config))
    assert ql.open(folder).metadata["phi3.rope.scaling.original_context_length"] == 4096


def test_autofp8_has_other_names_for_the_same(tmp_path):
    src = dense_models.write_fp8(tmp_path / "made", "whole")
    expected = ql.convert(src, tmp_path / "first.gguf", outtype="f32", progress=False).read_bytes()
    path = src / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'.weight_scale_inv": ', b'.weight_scale":     '))
    path.write_bytes(path.read_bytes().replace(b'.weight_scale_inv":', b'.weight_scale":    '))
    assert ql.convert(src, tmp_path / "again.gguf", outtype="f32", progress=False).read_bytes() == expected


def test_fp8_that_does_not_fit_is_refused(tmp_path):
    src = dense_models.write_fp8(tmp_path / "made", "blocks")
    config = json.loads((src / "config.json").read_text())
    refusals = {"weight_block_size=\\[0, 8\\], must be two whole numbers": [0, 8], "shape=.*, must be one of": [8, 8]}
    for text, size in refusals.items():
        config["quantization_config"]["weight_block_size"] = size
        (src / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=text):
            ql.open(src)
    del config["quantization_config"]
    (src / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="weight_scale_inv: no tensor of a llama model"):
        ql.open(src)


@pytest.mark.parametrize("key", [None, "rope_scaling"])
def test_ministral_has_yarn_where_its_configuration_is_silent(tmp_path, key):
    """As transformers' default, which the converter reads too; the older name of the table has precedence."""
    src = dense_models.write_model(tmp_path / "made", "mistral3")
    table = json.loads((src / "config.json").read_text())
    given = table.pop("rope_parameters")
    table |= {key: given} if key else {}
    (src / "config.json").write_text(json.dumps(table))
    scaling = ql.open(src).hparams.rope_scaling
    assert (scaling.type, scaling.factor, scaling.orig_ctx) == (("yarn", 8, 32) if key else ("yarn", 16, 16384))


def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path):
    for name, change, text in (
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "no_rope_layers=.*, must be .*as llama.cpp computes"),
        ("gemma3", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar=64, must be 32"),
        (
            "gemma3",
            {"layer_types": ["sliding_attention"] * 7},
            "every 6th layer must be without a window",
        ),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation='silu', must be gelu_pytorch_tanh"),
    ):
        src = dense_models.write_model(tmp_path / name, name)
        config = json.loads((src / "config.json").read_text())
        (src / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=text):
            ql.open(src)


def test_the_text_model_of_a_seeing_checkpoint_is_converted(tmp_path):
    """The same file as from the text model alone, but for the name; what is left is named."""
    plain = dense_models.write_model(tmp_path / "made", "gemma3")
    seeing = dense_models.write_model(tmp_path / "seeing" / "made", "gemma3")
    config = json.loads((plain / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config}
    (seeing / "config.json").write_text(json.dumps(outer))
    given = {f"language_model.{key}": value for key, value in dense_models.weights("gemma3").items()}
    given["vision_tower.vision_model.embeddings.patch_embedding.bias"] = np.ones(4, np.float32)
    checkpoints.write_weights(seeing, given, 1, "safetensors")
    with pytest.warns(UserWarning, match="the text model is converted; 1 tensors of vision_tower are left out"):
        path = ql.convert(seeing, outtype="f32", progress=False)
    assert path.read_bytes() == ql.convert(plain, outtype="f32", progress=False).read_bytes()


@pytest.mark.parametrize("name", dense_models.FAMILIES)
def test_logits_agree_with_transformers(name, tmp_path):
    model = ql.open(dense_models.write_model(tmp_path, name))
    found = logits(model, llama_models.TOKENS)[llama_models.SEEN]
    expected = np.load(GOLDEN / "dense_logits.npz")[name]
    assert np.abs(found - expected).max() <= 1e-4 * expected.std()
