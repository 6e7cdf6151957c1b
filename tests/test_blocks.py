"""Whose each bit of a block is, found by flipping it, against the layouts that the kernels document."""

import numpy as np
import pytest

from quantlab import quants
from quantlab.lab import blocks
from quantlab.quants.codebook import CODES


def owners(frame, byte):
    """Field and sub-block of each bit of a byte, lowest bit first."""
    rows = frame[frame["byte"] == byte]
    return [f"{field}{sub}" for field, sub in zip(rows["field"], rows["sub_block"], strict=True)]


def test_the_head_of_q4_k():
    bits = blocks.bit_map("Q4_K")
    assert len(bits) == 8 * 144
    assert owners(bits, 0) == owners(bits, 1) == ["d-1"] * 8
    assert owners(bits, 2) == ["dmin-1"] * 8
    assert owners(bits, 4) == ["sc0"] * 6 + ["sc4"] * 2
    assert owners(bits, 11) == ["m3"] * 6 + ["m7"] * 2
    assert owners(bits, 15) == ["sc7"] * 4 + ["m7"] * 4
    high = bits[(bits["byte"] == 4) & (bits["bit"] >= 6)]
    assert high["place"].tolist() == [4, 5]


@pytest.mark.parametrize("qtype", CODES)
def test_every_bit_has_an_owner(qtype):
    bits = blocks.bit_map(qtype)
    codes = bits[bits["field"] == "code"]
    width = len(codes) // quants.block_size(qtype)
    assert codes.groupby("weight").size().eq(width).all()
    assert sorted(codes["weight"].unique()) == list(range(quants.block_size(qtype)))
    assert (codes.sort_values("place").groupby("weight")["place"].agg(list).map(len) == width).all()
    assert bits["field"].isin(["code", "sc", "m", "d", "dmin"]).all()
    for _, part in bits[bits["field"].isin(["sc", "m"])].groupby(["field", "sub_block"]):
        assert sorted(part["place"]) == list(range(len(part)))


def test_the_budget_adds_up_to_the_size():
    budget = blocks.budget(list(CODES))
    for qtype, bpw in budget["bpw"].items():
        assert bpw == 8 * quants.block_bytes(qtype) / quants.block_size(qtype)
    assert budget.loc["Q4_1", ["m", "d"]].tolist() == [0.5, 0.5]
    assert budget.loc["Q6_K", "sc"] == 0.5


@pytest.mark.parametrize("qtype", CODES)
def test_weights_lie_between_their_levels(qtype, rng):
    x = rng.standard_normal(512).astype(np.float32)
    frame = blocks.weights(x, qtype)
    np.testing.assert_array_equal(frame["decoded"], quants.roundtrip(x, qtype))
    np.testing.assert_allclose(frame["error"], frame["decoded"] - frame["x"], atol=1e-7)
    slack = 1e-5
    assert (frame["decoded"] >= frame["lowest"] - slack).all() and (frame["decoded"] <= frame["highest"] + slack).all()


def test_an_outlier_hurts_its_neighbours_and_through_shared_scales_the_rest(rng):
    x = rng.standard_normal(256).astype(np.float32)
    assert blocks.with_outlier(x, 8)[100] == pytest.approx(8 * np.sqrt(np.mean(x**2)), rel=1e-6)
    frame = blocks.outliers(x, ["Q4_0", "Q2_K"], [1, 64]).set_index(["type", "size"])
    assert (frame["near"].xs(64, level="size") > 2 * frame["near"].xs(1, level="size")).all()
    assert frame.loc[("Q4_0", 64), "far"] == frame.loc[("Q4_0", 1), "far"]
    assert frame.loc[("Q2_K", 64), "far"] > frame.loc[("Q2_K", 1), "far"]


def test_a_type_without_codes_is_refused():
    with pytest.raises(ValueError, match="qtype='Q8_K', has no table of codes"):
        blocks.bit_map("Q8_K")


@pytest.mark.parametrize("qtype", ["Q4_K", "IQ2_XXS", "IQ2_XS"])
def test_fields_of_a_layout_are_those_that_the_decoder_reads(qtype, rng):
    """Flip the first bit of every field: the weights that change are those that the field is about."""
    fields = blocks.layout(qtype)
    assert fields["n_bits"].sum() == 8 * quants.block_bytes(qtype)
    assert (fields["bit"] + fields["n_bits"]).tolist()[:-1] == fields["bit"].tolist()[1:]
    x = (rng.standard_normal(256) + 3).astype(np.float32)
    importance = np.ones(256, np.float32) if qtype.startswith("IQ") else None
    block = quants.quantize(x, qtype, importance)
    before = quants.dequantize(block, qtype, (256,))
    for row in fields.itertuples():
        bits = np.unpackbits(block, bitorder="little")
        bits[row.bit] ^= 1
        change = np.flatnonzero(quants.dequantize(np.packbits(bits, bitorder="little"), qtype, (256,)) != before)
        if row.field == "index":
            first = int(row.label.split()[-1].split("–")[0])
            assert set(change) <= set(range(first, first + 8)) and len(change)
        elif row.field == "signs":
            assert len(change) == 2  # the eighth sign follows from the others
        elif row.field == "scale":
            assert 0 < len(change) <= 32 and np.ptp(change) < 32
        elif row.field == "codes":
            assert len(change) == 1 and f"weights {64 * (row.line - 1)} to" in row.label


def test_layouts_that_are_not_described_are_refused():
    with pytest.raises(ValueError, match="qtype='F16', must be one of Q4_K, IQ2_XXS, IQ2_XS. Choose one of them."):
        blocks.layout("F16")
