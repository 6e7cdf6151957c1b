"""The 16 bits that llama-perplexity keeps of each log probability, beside a slow derivation and closed forms."""

import math

import numpy as np
import pytest

import quantlab as ql
from quantlab.evaluate.base_file import BaseFile, decode, stored_kld, stored_log_p


def naive(logits):
    """One row, a number at a time, every operation in float32 but the sum."""
    f32 = np.float32
    top = max(logits)
    low = max(min(logits), f32(top - f32(16)))
    log_sum = f32(math.log(sum(float(np.exp(f32(x - top))) for x in logits)))
    scale = f32(f32(top - low) / f32(65535))
    inverse = f32(f32(1) / scale)
    codes = [int(np.rint(f32(inverse * f32(x - low)))) if x > low else 0 for x in logits]
    assert 0 <= min(codes) and max(codes) <= 65535
    return [f32(f32(scale * f32(code)) + f32(f32(low - top) - log_sum)) for code in codes]


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 6, (2, 3, 500)).astype(np.float32)


def log_p(logits):
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))


def test_the_same_numbers_as_derived_one_at_a_time(logits):
    stored = stored_log_p(logits)
    assert stored.dtype == np.float32
    for found, row in zip(stored.reshape(-1, 500), logits.reshape(-1, 500), strict=True):
        np.testing.assert_array_equal(found, np.array(naive(row)))


def test_half_a_step_is_lost_at_most_and_all_below_16_nats(logits):
    exact, stored = log_p(logits), stored_log_p(logits)
    depth = logits.max(axis=-1, keepdims=True) - logits
    step = 16 / 65535
    assert np.abs(stored - exact)[depth < 16].max() < 0.51 * step
    floor = np.broadcast_to(stored.min(axis=-1, keepdims=True), stored.shape)
    np.testing.assert_array_equal(stored[depth > 16], floor[depth > 16])
    assert (depth > 16).any()


def test_equal_logits_have_no_scale():
    np.testing.assert_allclose(stored_log_p(np.full((1, 8), 3, np.float32)), -math.log(8), rtol=1e-6)


def test_the_divergence_of_a_model_from_its_own_file_is_nearly_nothing(logits):
    found = stored_kld(stored_log_p(logits), log_p(logits))
    assert found.shape == (2, 3)
    assert 0 < np.abs(found).max() < 1e-3


def test_the_divergence_from_the_file_is_near_the_exact_one(logits):
    p, q = log_p(logits), log_p(logits + np.random.default_rng(1).normal(0, 0.3, logits.shape))
    exact = (np.exp(p) * (p - q)).sum(axis=-1)
    np.testing.assert_allclose(stored_kld(stored_log_p(logits), q), exact, atol=1e-3)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bundled model's predictions on two short chunks, as a file and as `perplexity` tells them."""
    path = tmp_path_factory.mktemp("base") / "tiny.kld"
    return path, ql.perplexity("tiny", n_ctx=64, chunks=2, kl_divergence_base=path, progress=False)


def test_a_file_is_laid_out_as_llama_perplexity_does(written):
    path, result = written
    raw = path.read_bytes()
    assert raw[:8] == b"_logits_" and np.frombuffer(raw[8:20], "<i4").tolist() == [64, 2048, 2]
    assert len(raw) == 20 + 4 * 2 * 64 + 2 * 31 * 2 * (2048 + 4)
    file = BaseFile.open(path)
    stored = decode(np.array(file.records()), file.n_vocab)
    nll = -np.take_along_axis(stored, file.tokens[:, 33:, None].astype(int), axis=-1)
    assert np.exp(nll.mean()) == pytest.approx(result.ppl, rel=1e-3)
    assert result.ppl == ql.perplexity("tiny", n_ctx=64, chunks=2, progress=False).ppl


def test_figures_from_a_file_are_near_those_side_by_side(written, tmp_path):
    path, _ = written
    ql.quantize("tiny", tmp_path / "q.gguf", ftype="Q4_0", report=lambda _: None)
    from_file = ql.kl_divergence(tmp_path / "q.gguf", path, "primer", progress=False)
    exact = ql.compare("tiny", [tmp_path / "q.gguf"], n_ctx=64, chunks=2, progress=False)
    for key in ("ppl", "kld_mean", "ln_ratio", "dp_rms", "same_top_p"):
        assert from_file.rows[1][key] == pytest.approx(exact.rows[1][key], abs=2e-3, rel=2e-3)
    assert from_file.protocol.tokens_sha256 == exact.protocol.tokens_sha256


def test_files_of_something_else_are_refused(written, tmp_path):
    path, _ = written
    bad = tmp_path / "bad.kld"
    for content, rule in (
        (b"PK", "must begin with"),
        (path.read_bytes()[:-2], "must have"),
        (b"_logits_" + bytes(12), "are impossible"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=rule):
            ql.kl_divergence("tiny", bad, progress=False)
    raw = np.frombuffer(path.read_bytes(), np.uint8).copy()
    raw[20:24] = 255
    raw.tofile(bad)
    with pytest.raises(ValueError, match="tokens reach from -1"):
        ql.kl_divergence("tiny", bad, progress=False)
    for options, rule in (
        ({"n_ctx": 32}, "n_ctx=64 must be the same as n_ctx=32"),
        ({"chunks": 3}, "chunks=3, must be 1 to 2"),
    ):
        with pytest.raises(ValueError, match=rule):
            ql.kl_divergence("tiny", path, progress=False, **options)
    with pytest.raises(ValueError, match="was written on another text than sampled"):
        ql.kl_divergence("tiny", path, "sampled", progress=False)
    with pytest.raises(FileExistsError, match="tiny.kld: exists already"):
        ql.perplexity("tiny", n_ctx=64, chunks=2, kl_divergence_base=path, progress=False)
    with pytest.raises(ValueError, match="protocol=full"):
        ql.perplexity("tiny", n_ctx=64, chunks=2, protocol="full", kl_divergence_base=bad, progress=False)
