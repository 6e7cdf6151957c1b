"""The bundled primer: every figure that can be recomputed is recomputed and looked up in the text."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest

PRIMER = Path(__file__).parents[1] / "data" / "text" / "primer.md"
BLOCK_SENTENCE = re.compile(r"(Q\d_[01K]) takes (\d+) bytes for (\d+) weights, ([\d.]+) bits per weight\.")
NOISE_SENTENCE = re.compile(r"(Q\d_[01K]) reaches ([\d.]+) decibels\.")
BLOCK_TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.fixture(scope="module")
def primer() -> str:
    """The text, decoded strictly."""
    return PRIMER.read_bytes().decode("utf-8")


@pytest.fixture
def weights() -> np.ndarray:
    """The eight weights of the worked example."""
    return np.array([0.10, -0.70, 0.52, 1.40, -0.31, 0.85, -0.03, 0.31])


def listed(values, fmt="{:.2f}") -> str:
    """Write numbers as the text lists them: `a, b and c`; no negative zero."""
    words = [fmt.format(value + 0.0) for value in values]
    return ", ".join(words[:-1]) + " and " + words[-1]


def affine(x, bits):
    """Codes and restored weights of the affine way."""
    scale = (x.max() - x.min()) / (2**bits - 1)
    codes = np.round((x - x.min()) / scale).astype(int)
    return codes, x.min() + scale * codes


def symmetric(x, bits):
    """Codes and restored weights of the symmetric way; each row of `x` is a block."""
    half = 2 ** (bits - 1)
    largest = np.take_along_axis(x, np.abs(x).argmax(-1, keepdims=True), -1)
    scale = largest / -half
    codes = np.clip(np.round(x / scale), -half, half - 1).astype(int)
    return codes, scale * codes


def worked_example(primer) -> str:
    return primer.split("## A worked example by hand")[1].split("\n## ")[0]


def test_primer_is_long_plain_utf8(primer):
    assert len(primer.encode()) >= 25_000
    assert primer.isascii() and primer.endswith("\n") and "\r" not in primer


def test_bits_per_weight_agree_with_gguf(primer):
    sentences = BLOCK_SENTENCE.findall(primer)
    assert [name for name, *_ in sentences] == BLOCK_TYPES
    for name, n_bytes, n_weights, bpw in sentences:
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert (int(n_bytes), int(n_weights), float(bpw)) == (size, block, 8 * size / block)


def test_model_size_arithmetic(primer):
    attention, feed_forward, vocabulary = 4 * 4096 * 4096, 3 * 4096 * 11008, 32000 * 4096
    norms = (2 * 32 + 1) * 4096
    total = 32 * (attention + feed_forward) + 2 * vocabulary + norms
    promoted = 16 * (4096 * 4096 + 4096 * 11008) + vocabulary
    n_bytes = (4.5 * (total - promoted) + 6.5625 * promoted) / 8
    for figure in (
        f"{attention}. ",
        f"{feed_forward}. ",
        f"{vocabulary} weights",
        f"{total} weights",
        f"{2 * total / 1e9:.2f} billion bytes, or {2 * total / 2**30:.2f} GiB",
        f"{32 * attention / total:.0%}".replace("%", " percent"),
        f"{32 * feed_forward / total:.0%}".replace("%", " percent"),
        f"{100 * promoted / total:.1f} percent of the model",
        f"{8 * n_bytes / total:.2f} bits per weight",
        f"{n_bytes / 1e9:.2f} billion bytes or {n_bytes / 2**30:.2f} GiB",
        f"{50e9 / (2 * total):.1f} times per second",
        f"{50 / 4.08:.1f} times per second",
        f"{32 * 2 * 4096 * 2} bytes",
        f"{32 * 2 * 1024 * 2} bytes",
    ):
        assert figure in primer, figure


def test_worked_example_affine(primer, weights):
    codes, restored = affine(weights, bits=3)
    error = restored - weights
    example = worked_example(primer)
    assert f"The weights are {listed(weights)}." in example
    assert f"The sum of their squares is {np.sum(weights**2):.4f}." in example
    assert f"The affine codes are {listed(codes, '{:.0f}')}." in example
    assert f"The restored weights are {listed(restored)}." in example
    assert f"restored minus original, are {listed(np.round(error, 9))}." in example
    assert f"squared errors is {np.sum(error**2):.4f}, the rmse is {np.sqrt(np.mean(error**2)):.4f}, " in example
    assert f"ratio is {10 * np.log10(np.sum(weights**2) / np.sum(error**2)):.1f} decibels" in example


def test_worked_example_symmetric(primer, weights):
    codes, restored = symmetric(weights, bits=3)
    error = restored - weights
    example = worked_example(primer)
    assert f"The symmetric codes are {listed(codes, '{:.0f}')}." in example
    assert f"The restored weights are {listed(np.round(restored, 9))}." in example
    assert f"squared errors is {np.sum(error**2):.4f}, the rmse is {np.sqrt(np.mean(error**2)):.4f}, " in example
    assert f"ratio is {10 * np.log10(np.sum(weights**2) / np.sum(error**2)):.1f} decibels" in example


def test_worked_example_best_scale_and_importance(primer, weights):
    codes, _ = symmetric(weights, bits=3)
    importance = np.where(np.arange(8) == 2, 9.0, 1.0)
    example = worked_example(primer)
    plain, weighted = ((np.sum(w * weights * codes), np.sum(w * codes**2)) for w in (np.ones(8), importance))
    assert f"weights and codes is {plain[0]:.2f}, and the sum of the squared codes is {plain[1]:.0f}." in example
    assert f"weights and codes is {weighted[0]:.2f}, " in example
    assert f"the weighted sum of the squared codes is {weighted[1]:.0f}," in example
    for top, bottom in (plain, weighted):
        assert f"quotient is {top / bottom:.4f}." in example
    before, after = ((top / bottom * codes - weights) ** 2 for top, bottom in (plain, weighted))
    assert f"squared errors is {before.sum():.4f}, and the rmse is {np.sqrt(before.mean()):.4f}." in example
    assert f"falls from {np.sum(importance * before):.4f} to {np.sum(importance * after):.4f}." in example
    assert f"rises from {before.sum():.4f} to {after.sum():.4f}." in example


def test_worked_example_outlier(primer, weights):
    weights[3] = 4.90
    codes, restored = affine(weights, bits=3)
    error = restored - weights
    example = worked_example(primer)
    assert f"The codes with the outlier are {listed(codes, '{:.0f}')}." in example
    assert f"squared errors is {np.sum(error**2):.4f}, and the rmse is {np.sqrt(np.mean(error**2)):.4f}," in example


def test_outlier_experiment(primer, rng):
    x = rng.standard_normal((100_000, 32))
    calm = np.sqrt(np.mean((symmetric(x, 4)[1] - x) ** 2))
    largest = np.abs(x).max(1).mean()
    x[:, 0] = np.copysign(10, x[:, 0])
    disturbed = np.sqrt(np.mean((symmetric(x, 4)[1] - x)[:, 1:] ** 2))
    wide = np.abs(rng.standard_normal((20_000, 256))).max(1).mean()
    assert f"the root of the mean squared error is about {calm:.3f}." in primer.replace("The root", "the root")
    assert f"largest magnitude in such a block is about {largest:.2f} " in primer
    assert f"grows to about {disturbed:.2f}," in primer
    assert f"largest magnitude is about {wide:.2f} instead of {largest:.2f}" in primer
    assert f"by a factor of {wide / largest:.1f}," in primer


def test_decibels_per_type(primer, rng):
    from quantlab import quants

    x = rng.standard_normal((4000, 256)).astype(np.float32)
    sentences = NOISE_SENTENCE.findall(primer)
    assert sorted(name for name, _ in sentences) == sorted(BLOCK_TYPES)
    for name, decibels in sentences:
        error = quants.roundtrip(x, name).astype(np.float64) - x
        assert f"{10 * np.log10(np.sum(x.astype(np.float64) ** 2) / np.sum(error**2)):.1f}" == decibels, name


def test_perplexity_and_divergence_examples(primer):
    nll = -np.log([1 / 2, 1 / 4, 1 / 4, 1 / 8])
    assert np.exp(nll.mean()) == pytest.approx(4, rel=1e-12)  # float64 rounding only
    assert "so the perplexity is 4." in primer
    base, quantized = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.5, 0.25])
    terms = base * np.log(base / quantized)
    assert f"logarithm of 2, which is {terms[0]:.4f}." in primer
    assert f"logarithm of one half, which is {terms[1]:.4f}." in primer
    assert f"The divergence is {terms.sum():.4f} nats." in primer
