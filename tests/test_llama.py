"""The forward pass: against another implementation, and piece by piece."""

from pathlib import Path

import llama_models
import numpy as np
import pytest

import quantlab as ql
from quantlab.evaluate.logits import logits

GOLDEN = Path(__file__).parent / "golden" / "transformers_logits.npz"


@pytest.mark.filterwarnings("ignore:.*pre-tokenizer")  # theirs are made up
@pytest.mark.parametrize("name", llama_models.NAMES)
def test_logits_agree_with_transformers(name, tmp_path):
    model = ql.open(llama_models.write_model(tmp_path, name))
    found = logits(model, llama_models.TOKENS)[llama_models.SEEN]
    expected = np.load(GOLDEN)[name]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
