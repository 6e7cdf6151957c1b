"""Figures of sensitivities: every field, ratio, ring and point is the frame's."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from quantlab.study import plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_a_map_has_a_field_per_pair_in_the_frame_s_order():
    frame = pd.DataFrame(
        {"group": ["b", "b", "a"], "qtype": ["Q4_K", "Q2_K", "Q2_K"], "delta_kld": [1e-4, 2e-3, -1e-9]}
    )
    ax = plots.damage_map(frame, index="group", columns="qtype", title="t")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["Q4_K", "Q2_K"]
    assert {tuple(map(int, text.get_position())): text.get_text() for text in ax.texts} == {
        (0, 0): "1.0e-4",
        (1, 0): "2.0e-3",
    }  # what was not measured, or is not above zero, stays white
    assert ax.images[0].get_array().mask.tolist() == [[False, False], [True, True]]
    assert ax.figure.axes[1].get_ylabel() == "KL divergence (nats per token)"


def test_additivity_is_the_sum_over_the_joint_damage():
    frame = pd.DataFrame({"tensors": [0.9, 0.1], "kinds": [1.0, 0.11], "joint": [1.0, 0.1]}, index=["Q2_K", "Q4_K"])
    ax = plots.additivity(frame)
    assert [line.get_ydata().tolist() for line in ax.lines[:2]] == [[0.9, 1.0], pytest.approx([1.0, 1.1])]
    assert [text.get_text() for text in ax.texts] == ["Q2_K", "Q4_K"]
    assert "nats per token" in ax.get_xlabel()


def test_rings_are_around_what_is_picked():
    frame = pd.DataFrame(
        {
            "kind": ["attn_v", "attn_v", "ffn_down"],
            "layer": [0, 1, 1],
            "gain_per_kib": [1e-5, 1e-6, 1e-7],
            "rule": [True, False, True],
            "measured": [True, True, False],
        }
    )
    ax = plots.more_bits(frame)
    rings = [y for collection in ax.collections for y in collection.get_offsets()[:, 1]]
    assert sorted(rings) == [1e-7, 1e-6, 1e-5, 1e-5]
    assert ax.get_yscale() == "log" and "per KiB" in ax.get_ylabel()


def test_error_against_damage_shows_a_colour_per_kind_and_no_zero():
    frame = pd.DataFrame(
        {"kind": ["attn_q", "output", "output"], "error": [1.0, 2.0, 0.0], "delta_kld": [1e-3, 1e-2, 0.0]}
    )
    ax = plots.error_against_damage(frame)
    assert np.concatenate([line.get_xdata() for line in ax.lines]).tolist() == [1.0, 2.0]
    assert len({line.get_color() for line in ax.lines}) == 2
