"""The figure behind sliders: redrawn when one is moved, a line of text where ipywidgets is missing."""

import sys

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

from quantlab.study import sliders


def test_without_ipywidgets_a_line_says_so(monkeypatch, rng):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    text = sliders.outlier(rng.standard_normal(256).astype(np.float32), ["Q4_K"])
    assert "ipywidgets" in text


def test_moving_the_slider_draws_again(monkeypatch, rng):
    pytest.importorskip("ipywidgets")
    drawn = []
    monkeypatch.setattr(sliders, "block_weights", lambda frame: drawn.append(frame))
    x = rng.standard_normal(256).astype(np.float32)
    widget = sliders.outlier(x, ["Q4_K", "Q8_0"], size=4)
    widget.update()
    size, qtype = widget.children[:2]
    size.value = 12
    qtype.value = "Q8_0"
    assert [frame.attrs["type"] for frame in drawn][-2:] == ["Q4_K", "Q8_0"]
    rms = np.sqrt(np.mean(x**2))
    assert drawn[-1]["x"][100] == pytest.approx(12 * rms, rel=1e-6)
