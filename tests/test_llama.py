"""The forward pass: against another implementation, and piece by piece."""

from pathlib import Path

import llama_models
import numpy as np
import pytest

import quantlab as ql
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
