"""Figures say what they show: labelled axes, one label per point, error bars, colours that everybody can tell apart."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from quantlab.quants.ggml_types import FAMILIES
from quantlab.study import plots


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "ftype": ["F16", "Q8_0", "Q4_K_M", "Q4_K_S", "Q2_K", "COPY"],
            "bpw": [16.0, 8.5, 4.9, 4.89, 3.2, 16.0],
            "ppl": [6.0, 6.0, 6.1, 6.1, 7.0, 6.0],
            "ppl_se": [0.3, 0.3, 0.3, 0.3, 0.35, 0.3],
            "delta_ppl": [0.0, 0.0, 0.1, 0.1, 1.0, 0.0],
            "delta_ppl_se": [0.0, 0.01, 0.02, 0.02, 0.1, 0.0],
        }
    )


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_bpw_against_ppl_shows_every_quantized_row(frame):
    ax = plots.bpw_against_ppl(frame, title="a model on a text")
    assert ax.get_xlabel() == "size (bits per weight)"
    assert ax.get_ylabel() == "perplexity"
    assert ax.get_title() == "a model on a text"
    assert sorted(text.get_text() for text in ax.texts) == ["Q2_K", "Q4_K_M", "Q4_K_S", "Q8_0"]
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == [
        "unquantized: 6.00 ± 0.30",
        "k-quants (super-blocks of 256)",
        "legacy types (blocks of 32)",
    ]


def test_the_bars_are_the_paired_errors(frame):
    ax = plots.bpw_against_ppl(frame)
    heights = [segment[1, 1] - segment[0, 1] for bars in ax.containers for segment in bars.lines[2][0].get_segments()]
    assert sorted(heights) == pytest.approx([0.02, 0.04, 0.04, 0.2])


def test_labels_do_not_overlap(frame):
    ax = plots.bpw_against_ppl(frame)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_published_points_are_increases_in_percent(frame):
    published = pd.DataFrame({"ftype": ["F16", "Q4_0"], "bpw": [16.0, 4.5], "ppl": [5.0, 5.5], "delta_ppl": [0, 0.5]})
    ax = plots.bpw_against_ppl(frame, published=published)
    (points,) = [line for line in ax.lines if line.get_label().startswith("LLaMA-7B")]
    assert points.get_xydata().tolist() == [[4.5, pytest.approx(10)]]
    assert ax.get_ylabel() == "increase of the perplexity (%)"
    measured = sorted(float(y) for bars in ax.containers for y in bars.lines[0].get_ydata())
    assert measured == pytest.approx([0, 100 / 60, 100 / 60, 100 / 6])


def test_a_label_without_a_free_place_is_left_out():
    ax = plots.style.new_axes((3, 2))
    ax.plot([0, 1], [0, 1], "o")
    plots.style.label_points(ax, ["Q4_K_M"] * 300, [0.5] * 300, [0.5] * 300)
    boxes = [text.get_window_extent() for text in ax.texts if text.arrow_patch is None]
    assert 5 < len(ax.texts) < 300
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_given_axes_is_drawn_on(frame):
    _, ax = plt.subplots()
    assert plots.bpw_against_ppl(frame, ax=ax) is ax


def test_colours_differ_in_grey_too(frame):
    ax = plots.bpw_against_ppl(frame)
    drawn = [bars.lines[0].get_color() for bars in ax.containers]
    greys = sorted(0.3 * r + 0.59 * g + 0.11 * b for r, g, b in map(to_rgb, drawn))
    assert {to_rgb(colour) for colour in drawn} <= {to_rgb(family.colour) for family in FAMILIES.values()}
    assert len(greys) == 2
    assert greys[1] - greys[0] > 0.05


def test_a_picture_is_small_enough_for_the_web(frame, tmp_path):
    path = plots.save(plots.bpw_against_ppl(frame), tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 100_000


def test_nothing_to_show(frame):
    with pytest.raises(ValueError, match="needs a quantized row with a perplexity. Measure the model first."):
        plots.bpw_against_ppl(frame[frame["ftype"] == "F16"])


def test_size_against_kld_draws_a_front_per_rule_set_and_what_both_have_once():
    now = {"rules": "current", "ftype": ["F16", "Q8_0", "Q4_0", "Q2_K"], "bpw": [16.0, 8.5, 4.5, 3.0]}
    now = pd.DataFrame({**now, "kld_mean": [0.0, 0.001, 0.05, 0.3], "kld_se": 0.0001})
    then = now.assign(rules="2023-12")
    then.loc[3, ["bpw", "kld_mean"]] = 3.4, 0.2
    ax = plots.size_against_kld(pd.concat([now, then]), title="a model")
    assert sorted(text.get_text() for text in ax.texts) == ["Q2_K", "Q2_K", "Q4_0", "Q8_0"]
    fronts = {line.get_label(): list(line.get_xdata()) for line in ax.lines if line.get_label().startswith("Pareto")}
    assert fronts == {"Pareto front, rules current": [3, 4.5, 8.5], "Pareto front, rules 2023-12": [3.4, 4.5, 8.5]}
    assert (ax.get_yscale(), ax.get_ylabel()) == ("log", "KL divergence (nats per token)")
    by_encoder = plots.size_against_kld(now.assign(encoder="refined"), by="encoder")
    assert "Pareto front, encoder refined" in [line.get_label() for line in by_encoder.lines]
    with pytest.raises(ValueError, match="size_against_kld: needs a quantized row with a KL divergence"):
        plots.size_against_kld(now[:1])


def test_memory_stacks_the_parts_and_draws_what_there_is():
    frame = pd.DataFrame({"ftype": ["F16", "Q4_0"], "bytes": [8 << 30, 2 << 30], "kv_bytes": [1 << 30] * 2})
    frame = frame.assign(compute_bytes=1 << 29, output_bytes=1 << 28)
    ax = plots.memory(frame, vram=4 << 30, ram=6 << 30, title="a model")
    ends = {round(bar.get_y()): bar.get_x() + bar.get_width() for bar in ax.patches}
    assert sorted(ends.values()) == [3.75, 9.75]
    assert [line.get_xdata()[0] for line in ax.lines] == [4, 6, 10]
    assert "GiB" in ax.get_xlabel()


def test_surprise_is_drawn_over_the_context_with_the_scored_part_shaded():
    nll = np.tile(np.linspace(6, 3, 127), (4, 1))
    ax = plots.nll_by_position(nll, scored_from=64)
    (line,) = (bars.lines[0] for bars in ax.containers)
    context, mean = line.get_data()
    assert context[0] == 1 and context[-1] <= 127 and mean[0] == 6
    assert list(mean) == sorted(mean, reverse=True)
    assert ax.patches[0].get_x() == 65
    assert "nats per token" in ax.get_ylabel() and ax.get_xscale() == "log"


def test_effects_are_bars_whose_colour_tells_the_direction():
    frame = pd.DataFrame({"ppl_change": [0.05, -0.001, np.nan], "kld": [0.07, np.nan, -1e-7]}, index=["a", "b", "c"])
    change, kld = plots.effects(frame, n_damage=1)
    assert [text.get_text() for text in change.get_yticklabels()] == ["a", "b", "c"]
    higher, lower = ([bar.get_width() for bar in bars if bar.get_width() > 0] for bars in change.containers)
    assert (higher, lower) == ([5.0], pytest.approx([0.1]))
    assert [bar.get_width() for bar in kld.patches if bar.get_width() > 0] == [0.07, 1e-7]
    assert change.lines[0].get_ydata()[0] == 0.5
