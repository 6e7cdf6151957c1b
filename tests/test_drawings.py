"""Drawings show what their names say: every weight, every tensor of a layer, every field of a block."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

import quantlab as ql
from quantlab.lab import blocks
from quantlab.study import plots


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_every_weight_falls_on_its_level(rng):
    frame = blocks.weights(rng.standard_normal(32).astype(np.float32), "Q4_0")
    ax = plots.number_line(frame, title="a block")
    falls = [line.get_xdata() for line in ax.lines if len(line.get_xdata()) == 3]
    assert sorted(float(x[0]) for x in falls) == sorted(frame["x"].tolist())
    assert sorted(float(x[2]) for x in falls) == sorted(frame["decoded"].tolist())
    assert [text.get_text() for text in ax.texts] == [str(code) for code in range(16)]
    below = [line for line in ax.lines if len(line.get_xdata()) == 1 and line.get_ydata()[0] < 0]
    assert len(below) == 32


def test_weights_of_several_blocks_have_no_common_line(rng):
    frame = blocks.weights(rng.standard_normal(64).astype(np.float32), "Q4_0")
    with pytest.raises(ValueError, match="number_line: weights must share levels with a step above 0. Give one sub-bl"):
        plots.number_line(frame)


def test_a_layer_names_its_tensors():
    tensors = ql.open("tiny").tensors
    drawn = [text.get_text() for text in plots.transformer_block(tensors, layer=2).texts]
    names = [name for name in tensors["name"] if name.startswith("blk.2.")]
    assert len(names) == 9
    for name in names:
        assert sum(text.startswith(f"{name}\n") for text in drawn) == 1
    with pytest.raises(ValueError, match="transformer_block: blk.99.attn_norm.weight is missing. Give a Llama's"):
        plots.transformer_block(tensors, layer=99)


def test_a_block_shows_every_field():
    fields = blocks.layout("IQ2_XXS")
    ax = plots.block_layout(fields, title="IQ2_XXS")
    assert [text.get_text() for text in ax.texts] == fields["label"].tolist()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["d", "index", "signs", "scale"]
    assert ax.get_yticklabels()[1].get_text() == "byte 2"
