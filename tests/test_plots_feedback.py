"""The figure of rounding with feedback shows what is in its numbers."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from quantlab.study import plots


def test_every_point_lies_on_its_ellipse():
    h, wanted = np.array([[1.0, 0.9], [0.9, 2.0]]), np.array([0.35, 0.4])
    ax = plots.rounding_plane(h, wanted, {"a": np.array([0.0, 0.0]), "b": np.array([0.0, 1.0])}, title="two weights")
    assert ax.get_title() == "two weights" and ax.get_xlabel() and ax.get_ylabel()
    for ellipse, point in zip(ax.patches, ([0.0, 0.0], [0.0, 1.0]), strict=True):
        unit = ellipse.get_patch_transform().inverted().transform(point)
        assert np.hypot(*unit) == pytest.approx(1)
    texts = [text.get_text() for text in ax.get_legend().get_texts()]
    assert texts[0] == "wanted" and texts[1].startswith("a: error 0.69")
    plt.close("all")
