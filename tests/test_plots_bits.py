"""The figures of recipes and matrices show what is in their tables."""

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


def test_importance_has_a_falling_line_per_layer():
    ax = plots.importance({3: np.array([1.0, 9.0, 2.0]), 0: np.ones(3)}, title="ffn_down")
    first, second, _ = ax.lines
    assert (first.get_label(), second.get_label()) == ("layer 0", "layer 3")
    np.testing.assert_allclose(second.get_ydata(), [9 / 4, 2 / 4, 1 / 4])
    assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title() == "ffn_down"


def test_matrix_gain_is_in_percent_with_errors():
    ax = plots.matrix_gain(pd.DataFrame({"ftype": ["Q2_K", "Q6_K"], "less": [0.25, -0.01], "less_se": [0.02, 0.03]}))
    assert [bar.get_height() for bar in ax.patches] == [25, -1]
    assert len(ax.collections) == 1 and "%" in ax.get_ylabel()  # the error bars


def test_recipe_front_draws_what_was_predicted_and_what_was_measured():
    frame = pd.DataFrame(
        {
            "variant": ["recipe", "Q2_K", "recipe", "Q4_0", "recipe"],
            "bpw": [3.0, 3.3, 4.0, 4.7, 16.0],
            "predicted_kld": [0.1, 0.12, 0.01, np.nan, 0.0],
        }
    )
    judged = pd.DataFrame(
        {"variant": ["tiny", "Q2_K", "recipe"], "bpw": [16, 3.3, 3.3], "kld_mean": [0, 0.11, 0.06]}
        | {"kld_se": [0, 0.01, 0.01], "against": [None, None, "Q2_K"]}
    )
    ax = plots.recipe_front(frame, judged, title="t")
    assert ax.lines[0].get_xdata().tolist() == [3.0, 4.0]  # no damage has no place on a logarithmic axis
    assert [text.get_text() for text in ax.texts] == ["Q2_K"]
    assert len(ax.get_legend().get_texts()) == 4 and ax.get_yscale() == "log"


def test_recipe_front_without_a_ftype_shows_all_recipes():
    frame = pd.DataFrame({"variant": ["recipe", "recipe"], "bpw": [3.0, 4.0], "predicted_kld": [0.1, 0.01]})
    low, high = plots.recipe_front(frame).get_xlim()
    assert low < 3 and high > 4


def test_type_map_has_a_cell_per_tensor():
    types = {"blk.0.attn_q.weight": "Q2_K", "blk.0.ffn_down.weight": "Q6_K", "blk.1.attn_q.weight": "Q4_K"}
    ax = plots.type_map(types | {"output.weight": "Q8_0"}, title="mine")
    assert sorted(text.get_text() for text in ax.texts) == ["Q2_K", "Q4_K", "Q6_K"]
    assert ax.get_title() == "mine\noutput Q8_0"
    assert [label.get_text() for label in ax.get_xticklabels()] == ["attn_q", "ffn_down"]


def test_block_search_shows_both_errors():
    x = np.array([0.5, -1.0, 0.25])
    top, bottom = plots.block_search(x, np.ones(3), {"without": x / 10, "with": x / 20})
    assert [bar.get_height() for bar in bottom.patches] == [*(x / 10), *(x / 20)]
    assert len(top.patches) == 3 and bottom.get_xlabel() == "weight of the block"


def test_bad_input():
    with pytest.raises(ValueError, match="needs at least one layer"):
        plots.importance({})
    with pytest.raises(ValueError, match="needs tensors of layers"):
        plots.type_map({"output.weight": "Q8_0"})
