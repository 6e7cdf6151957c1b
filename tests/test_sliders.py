"""The figure behind sliders: redrawn when one is moved, a line of text where ipywidgets is missing."""

import sys

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

matplotlib.use("Agg")

from quantlab.lab import sliders
from quantlab.study.plots.types import block_weights


def test_without_ipywidgets_a_line_says_so(monkeypatch, rng):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    text = sliders.outlier(rng.standard_normal(256).astype(np.float32), ["Q4_K"])
    assert "ipywidgets" in text


def test_moving_the_slider_draws_again(monkeypatch, rng):
    pytest.importorskip("ipywidgets")
    drawn = []
    monkeypatch.setattr(sliders, "block_weights", lambda frame: drawn.append(frame) or block_weights(frame))
    x = rng.standard_normal(256).astype(np.float32)
    size, qtype, picture = sliders.outlier(x, ["Q4_K", "Q8_0"], size=4).children
    pictures = [bytes(picture.value)]
    for control, value in ((size, 12), (qtype, "Q8_0")):
        control.value = value
        pictures.append(bytes(picture.value))
    assert [frame.attrs["type"] for frame in drawn] == ["Q4_K", "Q4_K", "Q8_0"]
    rms = np.sqrt(np.mean(x**2))
    assert [frame["x"][100] for frame in drawn] == pytest.approx([4 * rms, 12 * rms, 12 * rms], rel=1e-6)
    assert len(set(pictures)) == 3 and all(png.startswith(b"\x89PNG") for png in pictures)
    assert not plt.get_fignums()  # an open figure would be shown below the cell as well
