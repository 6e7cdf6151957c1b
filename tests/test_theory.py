"""Bounds and plain quantizers, against published figures and against numbers that are really rounded."""

import numpy as np
import pytest

from quantlab import quants
from quantlab.lab import theory

# J. Max 1960, table II: squared error of the best uniform quantizer of normal numbers with 2**bits levels
MAX_1960 = {1: 0.3634, 2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.00349}


@pytest.mark.parametrize(("bits", "error"), MAX_1960.items())
def test_the_best_uniform_quantizer(bits, error):
    assert 10 ** (-theory.uniform(bits) / 10) == pytest.approx(error, rel=2e-3)  # four published digits


def test_the_bound_is_above_everything():
    assert theory.gaussian_bound(1) == pytest.approx(6.0206, abs=1e-4)
    for bits in range(1, 9):
        assert theory.uniform(bits) < theory.gaussian_bound(bits)
    for step in (0.01, 0.5, 2):
        bits, snr = theory.uniform_with_entropy_code(step)
        assert snr < theory.gaussian_bound(bits)


def test_the_entropy_coded_quantizer_against_rounding(rng):
    x = rng.standard_normal(400_000)
    rounded = np.rint(x / 0.5)
    _, counts = np.unique(rounded, return_counts=True)
    share = counts / counts.sum()
    bits, snr = theory.uniform_with_entropy_code(0.5)
    assert -(share * np.log2(share)).sum() == pytest.approx(bits, abs=0.01)  # statistical
    assert theory.snr(x, 0.5 * rounded) == pytest.approx(snr, abs=0.05)


def test_rounding_in_groups_of_32_is_what_legacy_types_do(rng):
    x = rng.standard_normal(32 * 500).astype(np.float32)
    for qtype, minimum in (("Q4_0", False), ("Q4_1", True)):
        kept = quants.errors(x, qtype).snr_db
        assert theory.snr(x, theory.round_in_groups(x, 4, 32, minimum=minimum)) == pytest.approx(kept, abs=0.05)


def test_zeros_are_kept():
    zeros = np.zeros(64, np.float32)
    for minimum in (False, True):
        assert not theory.round_in_groups(zeros, 4, 32, minimum=minimum).any()
    assert theory.snr(np.ones(4), np.ones(4)) == float("inf")
