"""Texts become chunks as llama-perplexity and llama-imatrix cut them, down to the last newline."""

import llama_models
import pytest

import quantlab as ql
from quantlab.evaluate.protocol import cut
from quantlab.files.bundled import Text

N_CTX = 16
BODY = "The quick brown fox reads a row of numbers, and rounds them to four bits.\nAnother line follows. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama_models.write_model(tmp_path_factory.mktemp("model") / "llama2", "llama2")


@pytest.fixture(scope="module")
def vocab(folder):
    return ql.open(folder).vocab


def n_tokens(text: str, vocab, name="llama.cpp") -> int:
    """Tokens that a protocol counts in a text."""
    options = {"n_ctx": 4, "chunks": None, "mode": "float", "rules": "current"}
    return cut(Text.from_bytes("text", text.encode()), vocab, name=name, **options)[1].n_tokens


# end of a file → what llama-perplexity -f leaves of it
KEPT = {"": "", "\n": "", "\n\n": "\n", "\r\n": "\r", "\n\r\n": "\n\r", "\r": "\r", " \n": " ", "\n ": "\n "}


@pytest.mark.parametrize(("ending", "kept"), KEPT.items())
def test_one_newline_at_the_end_is_dropped(vocab, ending, kept):
    assert n_tokens(BODY + ending, vocab) == len(vocab.encode(BODY + kept))
    assert n_tokens(BODY + ending, vocab, "full") == len(vocab.encode(BODY + ending))


def test_the_last_newline_fills_no_chunk(folder, vocab, tmp_path):
    body = BODY
    while len(vocab.encode(body)) > 3 * N_CTX - 1:
        body = body[:-1]
    body += "\n" * (3 * N_CTX - 1 - len(vocab.encode(body)))  # a newline is one token of this vocabulary
    assert len(vocab.encode(body + "\n")) == 3 * N_CTX
    (tmp_path / "a.txt").write_text(body + "\n", newline="")
    assert ql.perplexity(folder, tmp_path / "a.txt", n_ctx=N_CTX, progress=False).protocol.chunks == 2
    assert ql.perplexity(folder, tmp_path / "a.txt", n_ctx=N_CTX, protocol="full", progress=False).protocol.chunks == 3
    assert ql.imatrix(folder, tmp_path / "a.txt", n_ctx=N_CTX, progress=False).chunk_count == 2


@pytest.mark.parametrize("text", ["", "\n", "\r\n", "\n\n"])
def test_texts_without_words_are_too_short(vocab, text):
    with pytest.raises(ValueError, match=r"text: n_tokens=\d, must be at least 2 \* n_ctx = 8"):
        n_tokens(text, vocab)
