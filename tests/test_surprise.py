"""Surprise at each token: the figures of `compare`, and text that is coloured by them."""

import numpy as np
import pytest

import quantlab as ql
from quantlab.evaluate.logits import logits
from quantlab.files.bundled import read_text
from quantlab.lab.surprise import surprise


def test_surprise_is_the_negative_log_probability_of_the_token_that_came():
    found = surprise("tiny", ["Q2_K"], chunk=0, first=3, n_tokens=20, n_ctx=128)
    model = ql.open("tiny")
    tokens = model.vocab.encode(read_text("primer").text)[:128]
    text = "".join(found.tokens)
    assert text in read_text("primer").text and len(found.tokens) == 20
    assert list(found.nll) == ["tiny", "Q2_K"]
    tokens[0] = model.vocab.bos_id
    scores = logits(model, tokens)[64 + 3 : 64 + 23].astype(np.float64)
    came = tokens[64 + 4 : 64 + 24]
    nll = np.log(np.exp(scores - scores.max(1, keepdims=True)).sum(1)) + scores.max(1) - scores[np.arange(20), came]
    np.testing.assert_allclose(found.nll["tiny"], nll, atol=1e-4)
    assert found.to_frame().shape == (20, 3)


def test_text_is_coloured_and_escaped():
    found = surprise("tiny", ["Q2_K"], n_tokens=5, n_ctx=128)
    found = type(found)(("<b>", " is"), {"base": (8.0, 0.0), "Q2_K": (99.0, 4.0)})
    page = found._repr_html_()
    assert "&lt;b&gt;" in page and "<b>base</b>, 4.00 nats" in page
    assert page.count("rgba(213,94,0,1.00)") == 2 and "rgba(213,94,0,0.50)" in page
    assert repr(found).splitlines() == ["<b> is", "base: 4.000 nats per token", "Q2_K: 51.500 nats per token"]


@pytest.mark.parametrize("passage", [{"chunk": 10**6}, {"first": 60}, {"n_tokens": 0}, {"first": -1}])
def test_a_passage_outside_the_text_is_refused(passage):
    with pytest.raises(ValueError, match="surprise: chunk=.*must lie within .* chunks of 63 scored tokens. Choose an"):
        surprise("tiny", ["Q2_K"], **({"n_tokens": 20, "n_ctx": 128} | passage))
