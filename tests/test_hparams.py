"""files/hparams.py: hyper-parameters are those of the metadata, and such as a model can have."""

import numpy as np
import pytest
from made_models import NARROW, metadata_of, shape_of

from quantlab.files.hparams import read_hparams

KEYS = metadata_of(shape_of(**NARROW))


def test_what_is_not_given_follows_from_the_rest():
    hparams = read_hparams(KEYS, ["output.weight"])
    assert (hparams.head_dim, hparams.n_rot, hparams.rope_base) == (24, 24, 10000.0)
    assert hparams.rope_scaling is None and not hparams.tied_embeddings
    assert read_hparams(KEYS, []).tied_embeddings


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"type": "linear", "factor": np.float32(4)}, 4),
        ({"type": "linear", "factor": np.float32(0)}, 1),  # as in llama.cpp
        ({"type": "yarn"}, 1),
    ],
)
def test_rope_scaling(changes, factor):
    keys = {f"llama.rope.scaling.{key}": value for key, value in changes.items()}
    assert read_hparams(KEYS | keys, []).rope_scaling.factor == factor


BAD = [
    ("block_count", np.uint32(0), "need a whole number from 1 to 1024"),
    ("block_count", np.uint32((1 << 32) - 1), "llama.block_count=4294967295, need a whole number from 1 to 1024"),
    ("block_count", np.float32(2), "need a whole number"),
    ("block_count", np.array([2, 2], np.uint32), "need one number"),
    ("attention.head_count", np.uint32(0), "llama.attention.head_count=0, need a whole number from 1"),
    ("attention.head_count", True, "need one number"),
    ("attention.head_count", "4", "llama.attention.head_count='4', need one number"),
    ("embedding_length", np.int32(-1), "need a whole number from 1"),
    ("context_length", np.uint64(1 << 63), "need a whole number from 1 to 2147483647"),
    ("attention.layer_norm_rms_epsilon", np.float32(np.nan), "epsilon=nan, need a positive number"),
    ("attention.layer_norm_rms_epsilon", np.float32(np.inf), "epsilon=inf, need a positive number"),
    ("attention.layer_norm_rms_epsilon", np.float32(-1), "epsilon=-1.0, need a positive number"),
    ("rope.freq_base", np.float32(0), "llama.rope.freq_base=0.0, need a positive number"),
    ("rope.freq_base", np.float32(np.nan), "llama.rope.freq_base=nan, need a positive number"),
    ("rope.scale_linear", np.array([], np.float32), "llama.rope.scale_linear=.*need one number"),
    ("rope.scale_linear", np.float32(-2), "llama.rope.scale_linear=-2.0, need a positive number"),
]


@pytest.mark.parametrize(("key", "value", "text"), BAD, ids=range(len(BAD)))
def test_what_no_model_has_gets_one_line(key, value, text):
    with pytest.raises(ValueError, match=f"^a.gguf: .*{text}"):
        read_hparams(KEYS | {f"llama.{key}": value}, [], source="a.gguf")


@pytest.mark.parametrize("arch", [None, np.uint32(1), "\x1b[2J", "x" * 999, ["llama"]], ids=range(5))
def test_strange_architectures_get_one_line(arch):
    with pytest.raises(ValueError, match="^a.gguf: general.architecture=.*, must be a name") as caught:
        read_hparams(KEYS | {"general.architecture": arch}, [], source="a.gguf")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_an_adapter_is_called_one():
    keys = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    with pytest.raises(ValueError, match="^a.gguf: is an adapter .*, must be a whole model. Merge it into its base"):
        read_hparams(keys, [], source="a.gguf")
