"""The forward pass: against another implementation, and piece by piece."""

from pathlib import Path

import llama_models
import numpy as np
import pytest

import quantlab as ql
from quantlab.evaluate.check import check_model
from quantlab.evaluate.logits import logits
from quantlab.files.bundled import data_dir

GOLDEN = Path(__file__).parent / "golden" / "transformers_logits.npz"


@pytest.mark.filterwarnings("ignore:.*pre-tokenizer")  # theirs are made up
@pytest.mark.parametrize("name", llama_models.NAMES)
def test_logits_agree_with_transformers(name, tmp_path):
    model = ql.open(llama_models.write_model(tmp_path, name))
    found = logits(model, llama_models.TOKENS)[llama_models.SEEN]
    expected = np.load(GOLDEN)[name]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_bundled_model_agrees_with_transformers():
    model = ql.open(data_dir() / "models" / "tiny")
    found = logits(model, llama_models.TOKENS)[llama_models.SEEN]
    expected = np.load(GOLDEN)["tiny"]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_windows_know_nothing_of_each_other():
    model = ql.open(data_dir() / "models" / "tiny")
    windows = np.random.default_rng(0).integers(3, 2000, (3, 40))
    together = logits(model, windows)
    assert together.shape == (3, 40, 2048)
    alone = np.stack([logits(model, window) for window in windows])
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([], {}, "tokens: shape=\\(0,\\), must be a row or windows of ids"),
        ([1, 10**6], {}, "tokens: shape=\\(2,\\), must be a row or windows of ids within 0:"),
        ([[[1]]], {}, "tokens: shape=\\(1, 1, 1\\), must be a row or windows of ids"),
        ([1], {"mode": "exact"}, "mode=exact, must be one of"),
    ],
)
def test_logits_of_nothing_sensible_are_refused(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        logits(ql.open(data_dir() / "models" / "tiny"), tokens, **options)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("block_count", 1, "blk.1.*, the metadata gives .* in each of 1 layers"),
        ("attention.head_count", 3, "n_head=3, .* do not fit together"),
        ("attention.head_count_kv", 3, "n_head_kv=3, .* do not fit together"),
        ("rope.dimension_count", 7, "n_rot=7 do not fit together"),
        ("embedding_length", 60, r"output.weight: shape=\(2048, 256\), the metadata gives \(2048, 60\)"),
        ("feed_forward_length", 7, "blk.0.ffn_.*, the metadata gives"),
    ],
)
def test_metadata_that_the_tensors_do_not_bear_out_gets_one_line(key, value, text):
    model = ql.open("tiny")
    model.metadata[f"llama.{key}"] = np.uint32(value)
    with pytest.raises(ValueError, match=f"^{model.path}: .*{text}"):
        check_model(model)
