"""Checkpoints open by the names that transformers gives their tensors, whatever wrapped the model when it was saved."""

import json
import warnings

import numpy as np
import pytest
from checkpoints import tensors, write_checkpoint, write_safetensors

import quantlab as ql
from quantlab.files.tensor_names import plain_names
from quantlab.files.weights import index_weights

NAMES = list(tensors("llama1"))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_plain_names_stay_without_a_word(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(plain_names(tmp_path, dict.fromkeys(NAMES))) == NAMES


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"module.module.{name}",
        lambda name: name.replace("model.", "model._orig_mod."),
        lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
        lambda name: f"_fsdp_wrapped_module.{name.replace('.self_attn', '._fsdp_wrapped_module.self_attn')}",
        lambda name: name.removeprefix("model."),
        lambda name: f"_orig_mod.{name.removeprefix('model.')}",
    ],
)
def test_wrappers_are_dropped_and_spoken_of(tmp_path, wrapped):
    with pytest.warns(UserWarning, match=r": .* is read as .*, \d+ names in all: "):
        plain = plain_names(tmp_path, {wrapped(name): name for name in NAMES})
    assert all(name == stored for name, stored in plain.items()) and list(plain) == NAMES


def test_a_model_opens_through_its_wrapper(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1", "F32")
    expected = ql.open(src).tensor("blk.1.attn_q.weight").load()
    write_safetensors(src / "model.safetensors", {f"module.{name}": x for name, x in tensors("llama1").items()})
    with pytest.warns(UserWarning, match="a wrapper of the training"):
        assert np.array_equal(ql.open(src).tensor("blk.1.attn_q.weight").load(), expected)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="lm_head.weight: two tensors have this name once prefixes are removed"):
        with pytest.warns(UserWarning):
            plain_names(tmp_path, {"lm_head.weight": 1, "module.lm_head.weight": 2})


def test_a_model_without_its_head_by_its_own_class(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1", "F32")
    edit(src / "config.json", architectures=["LlamaModel"], tie_word_embeddings=False)
    weights = {name.removeprefix("model."): x for name, x in tensors("llama1").items() if name != "lm_head.weight"}
    write_safetensors(src / "model.safetensors", weights)
    with (
        pytest.warns(UserWarning, match="embed_tokens.weight is read as model.embed_tokens.weight, 20 names in all"),
        pytest.warns(UserWarning, match="lm_head.weight is missing. llama.cpp uses the embedding"),
    ):
        assert ql.open(src).hparams.tied_embeddings


@pytest.mark.parametrize("is_copy", [False, True])
def test_a_head_beside_tied_embeddings_is_kept_and_spoken_of(tmp_path, is_copy):
    src = write_checkpoint(tmp_path / "m", "llama1", "F32")
    edit(src / "config.json", tie_word_embeddings=True)
    weights = tensors("llama1")
    if is_copy:
        write_safetensors(src / "model.safetensors", weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "output.weight" in ql.open(src)
    told = [str(warning.message) for warning in caught if "lm_head.weight differs from the embedding" in str(warning)]
    assert len(told) == (not is_copy)


# ---- a whole file among what an earlier saving left


def left_over(tmp_path, with_shards: bool):
    """A folder with one whole file, an index that names shards, and perhaps the shards."""
    src = write_checkpoint(tmp_path / "m", "llama1", "F32", n_shards=3)
    if not with_shards:
        for path in src.glob("model-*.safetensors"):
            path.unlink()
    write_safetensors(src / "model.safetensors", {name: x + 1 for name, x in tensors("llama1").items()})
    return src


@pytest.mark.parametrize("with_shards", [False, True])
@pytest.mark.parametrize("index", ["whole", "broken", "gone"])
def test_the_whole_file_is_read_alone(tmp_path, with_shards, index):
    src = left_over(tmp_path, with_shards)
    path = src / "model.safetensors.index.json"
    if index == "broken":
        path.write_text("{")
    if index == "gone":
        path.unlink()
    if index == "gone" and not with_shards:
        assert len(index_weights(src)) == len(NAMES)
        return
    with pytest.warns(UserWarning, match="only this file is read, as transformers does; .* can be deleted"):
        model = ql.open(src)
    assert np.array_equal(model.tensor("output_norm.weight").load(), tensors("llama1")["model.norm.weight"] + 1)


def test_an_index_that_names_the_whole_file_is_used(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1", "F32")
    weight_map = dict.fromkeys(NAMES, "model.safetensors")
    (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(index_weights(src)) == len(NAMES)
