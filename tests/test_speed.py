"""Timing restores what it sets; the memory's limit is of the right order."""

import numba
import numpy as np
import pytest
from ggml_library import needs_libggml

import quantlab as ql
from quantlab import quants
from quantlab.files.bundled import model_path
from quantlab.lab import ggml_library, speed


def test_threads_are_as_before_even_after_an_error():
    before = numba.get_num_threads()
    with pytest.raises(RuntimeError, match="stop"), speed.threads(1):
        assert numba.get_num_threads() == 1
        raise RuntimeError("stop")
    assert numba.get_num_threads() == before
    most = numba.config.NUMBA_NUM_THREADS
    for wrong in (0, most + 1):
        with pytest.raises(ValueError, match=f"speed: threads={wrong}, must be 1 to {most}. Start with NUMBA_NUM_TH"):
            with speed.threads(wrong):
                pass


def test_thread_counts():
    counts = speed.thread_counts()
    assert counts[0] == 1
    assert counts[-1] == numba.config.NUMBA_NUM_THREADS


def test_rows_start_anew_when_the_weights_do_not_suffice():
    model = ql.open(model_path("tiny"))
    n = 6_000_000 // 4096
    rows = speed.rows_of(model, n)
    assert rows.shape == (n, 4096)
    weights = sum(t.floats().size for t in model if len(t.shape) == 2)
    np.testing.assert_array_equal(rows.ravel()[weights:], rows.ravel()[: rows.size - weights])


def test_measure(rng):
    x = rng.standard_normal((64, 256)).astype(np.float32)
    frame = speed.measure(["Q8_0"], x, [1], repetitions=2, seconds=0.001)
    libraries = ["quantlab", "ggml"] if ggml_library.library() else ["quantlab"]
    assert frame["by"].tolist() == libraries * 2
    assert frame["what"].tolist() == ["encode"] * len(libraries) + ["decode"] * len(libraries)
    assert (frame["speed"] > 0).all()


def test_ours_are_measured_alone_without_libggml(rng, monkeypatch):
    monkeypatch.setattr(ggml_library, "library", lambda: None)
    assert ggml_library.version() == ""
    frame = speed.measure(
        ["Q8_0"], rng.standard_normal((64, 256)).astype(np.float32), [1], repetitions=1, seconds=0.001
    )
    assert frame["by"].tolist() == ["quantlab", "quantlab"]


@needs_libggml
def test_both_do_the_same_work(rng):
    x = rng.standard_normal((8, 256)).astype(np.float32)
    np.testing.assert_array_equal(ggml_library.quantize(x, "Q4_0"), quants.quantize(x, "Q4_0"))
    assert "ggml" in ggml_library.version()


def test_bandwidth():
    assert 1e8 < speed.bandwidth(1, mib=16, repeats=2) < 1e13
