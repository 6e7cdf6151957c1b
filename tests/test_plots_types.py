"""Figures of blocks, errors and speed: what must be seen on them is on them."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import quantlab as ql
from quantlab.files.bundled import model_path
from quantlab.lab import blocks, errors


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def tensor():
    return ql.open(model_path("tiny")).tensor("blk.0.attn_v.weight")


def texts(ax):
    return [text.get_text() for text in ax.texts]


def test_the_bit_map_names_every_bit():
    bits = blocks.bit_map("Q4_K")
    ax = ql.plots.bit_map(bits[bits["byte"] < 16], per_row=16)
    names = texts(ax)
    assert len(ax.patches) == 128
    assert {"sc4₅", "m7₀", "d₁₅", "dmin₀"} <= set(names)
    assert len(names) == 128 + 16  # the bits and the numbers of the bytes


def test_the_search_marks_the_chosen_try():
    tries = pd.DataFrame({"steps": [15.0, 14.0, 14.5, 15.0], "error": [4.0, 5.0, 2.0, 3.0]})
    ax = ql.plots.scale_search(tries, tries)
    marked = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert marked["chosen"] == [[14.5, 2.0]]
    assert marked["plain rounding, nothing fitted"] == [[15.0, 4.0]]
    assert marked["better than all before"] == [[14.5, 2.0]]
    assert texts(ax) == ["1", "2", "3"]


def test_a_block_shows_its_weights_and_what_was_lost(tensor):
    x = tensor.floats()[0]
    top, bottom = ql.plots.block_weights(blocks.weights(x, "Q4_0"))
    np.testing.assert_array_equal(top.lines[0].get_ydata(), x)
    assert f"{ql.quants.errors(x, 'Q4_0').snr_db:.1f} dB" in top.get_title()
    assert len(bottom.patches) == 256


def test_types_that_lose_nothing_have_no_place_beside_the_bound():
    frame = pd.DataFrame({"type": ["Q4_K", "Q4_0", "Q4_1"], "bpw": [4.5, 4.5, 5], "snr_db": [23.0, 21.5, np.inf]})
    line = pd.DataFrame({"bpw": [4.0, 5], "snr_db": [24.0, 30]})
    ax = ql.plots.snr_against_bits(frame, {"bound": line})
    assert texts(ax) == ["Q4_K", "Q4_0"]
    assert "bound" in ax.get_legend_handles_labels()[1]


def test_bars_add_up_to_the_size():
    ax = ql.plots.bit_budget(blocks.budget(["Q4_K", "Q8_0"]))
    assert texts(ax) == ["4.5", "8.5"]


def test_errors(tensor):
    tensors = [tensor]
    ax = ql.plots.histograms(errors.histograms(tensor, ["Q4_K"]))
    assert ax.get_yscale() == "log"
    assert ax.get_legend_handles_labels()[1] == ["weights", "errors of Q4_K"]
    axes = ql.plots.code_shares(errors.code_counts(tensor, ["Q2_K", "Q4_K"]))
    assert [ax.get_title() for ax in axes] == ["Q2_K: 4 codes", "Q4_K: 16 codes"]
    assert "0" in texts(ql.plots.percentile_bands(errors.percentiles(tensors, "Q4_K")))
    ax = ql.plots.error_map(errors.error_map(tensor, "Q4_K", cells=8))
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # row 0 on top
    tails = errors.tails(tensors)
    assert ql.plots.by_layer(tails, "kurtosis", ylabel="k").get_legend_handles_labels()[1] == ["attn_v"]
    kept = errors.by_type(tensors, ["Q4_K"]).merge(tails[["tensor", "kurtosis", "crest"]], on="tensor")
    assert len(ql.plots.against_tails(kept)) == 2
    assert len(ql.plots.by_outlier(blocks.outliers(tensor.floats()[0], ["Q4_0"], [1, 8]))) == 2


def test_speed():
    rows = [
        {"type": "Q4_K", "what": what, "threads": n, "by": by, "speed": 100.0 * n, "spread": 1.0}
        for what in ("encode", "decode")
        for n in (1, 2)
        for by in ("quantlab", "ggml")
    ]
    frame = pd.DataFrame(rows)
    axes = ql.plots.throughput(frame)
    assert axes.shape == (2, 2)
    assert axes[0][0].get_legend_handles_labels()[1] == ["quantlab", "ggml"]
    ax = ql.plots.scaling(frame)
    assert [patch.get_height() for patch in ax.patches] == [2, 2]
    alone = ql.plots.throughput(frame[frame["by"] == "quantlab"])
    assert alone[0][0].get_legend_handles_labels()[1] == ["quantlab"]
