"""What types lose on a model's tensors, against the same sums done plainly."""

import numpy as np
import pytest

import quantlab as ql
from quantlab import quants
from quantlab.files.bundled import model_path
from quantlab.lab import errors


@pytest.fixture(scope="module")
def model():
    return ql.open(model_path("tiny"))


@pytest.fixture(scope="module")
def pair(model):
    return errors.matrices(model, r"blk\.[01]\.attn_v", block=256)


def test_matrices_come_by_layer_and_fit(model, pair):
    assert [t.name for t in pair] == ["blk.0.attn_v.weight", "blk.1.attn_v.weight"]
    everything = errors.matrices(model)
    assert len(everything) == 58  # 8 layers of 7, the embedding and the output
    assert {t.name for t in everything[:2]} == {"output.weight", "token_embd.weight"}
    with pytest.raises(
        ValueError, match=r"tiny: pattern='attn_v' matches no matrix whose rows are whole blocks of 1024"
    ):
        errors.matrices(model, "attn_v", block=1024)


def test_tails(pair, rng):
    row = errors.tails(pair[:1]).iloc[0]
    x = pair[0].floats().astype(np.float64)
    centred = x - x.mean()
    assert row["rms"] == pytest.approx(np.sqrt((x**2).mean()))
    assert row["kurtosis"] == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2 - 3, abs=1e-6)
    assert row["crest"] == pytest.approx(np.sqrt((np.abs(x).reshape(-1, 32).max(axis=1) ** 2).mean()) / row["rms"])
    assert errors._kurtosis(np.zeros(8, np.float32)) == 0
    assert errors._kurtosis(rng.standard_normal(10**6)) == pytest.approx(0, abs=0.02)  # statistical
    assert errors._kurtosis(rng.laplace(size=10**6)) == pytest.approx(3, abs=0.2)


def test_tensors_add_up_as_if_they_were_one(pair):
    rows = errors.together(errors.by_type(pair, ["Q4_K", "Q8_0"])).set_index("type")
    flat = np.concatenate([t.floats().reshape(-1) for t in pair])
    whole = quants.errors(flat, "Q4_K")
    assert list(rows.index) == ["Q8_0", "Q4_K"]
    for key in ("n_weights", "rmse", "relative", "snr_db", "max_abs", "bpw"):
        assert rows.loc["Q4_K", key] == pytest.approx(getattr(whole, key), rel=1e-6)


def test_a_type_that_does_not_fit_is_left_out(model):
    narrow = errors.matrices(model, "blk.0.attn_v")[0]
    assert set(errors.by_type([narrow], ["Q4_0", "Q4_K", "BF16"])["type"]) == {"Q4_0", "Q4_K", "BF16"}
    lossless = errors.together(errors.by_type([narrow], ["BF16"]))
    assert lossless["rmse"].item() == 0  # the model is BF16


def test_distributions_count_every_weight(pair):
    tensor, n = pair[0], pair[0].floats().size
    counts = errors.histograms(tensor, ["Q4_K", "Q2_K"], reach=1).groupby("of")["count"].sum()
    assert counts.to_dict() == {"weights": n, "Q4_K": n, "Q2_K": n}
    codes = errors.code_counts(tensor, ["Q4_K", "Q8_0"])
    assert codes.groupby("type")["count"].sum().to_dict() == {"Q4_K": n, "Q8_0": n}
    entropy = errors.entropy(codes)
    assert entropy.loc["Q4_K", "bits"] == 4
    assert 3 < entropy.loc["Q4_K", "entropy"] < 4
    assert codes[codes["type"] == "Q8_0"].set_index("code")["count"][-128] == 0


def test_percentiles_and_map_and_largest(pair):
    x = pair[0].floats()
    rms = np.sqrt(np.mean(np.square(x, dtype=np.float64)))
    error = np.abs(quants.roundtrip(x, "Q4_K") - x)
    row = errors.percentiles(pair[:1], "Q4_K").iloc[0]
    assert row["p100"] == pytest.approx(error.max() / rms, rel=1e-6)
    assert row["p50"] == pytest.approx(np.median(error) / rms, rel=1e-5)
    cells = errors.error_map(pair[0], "Q4_K", cells=16)
    assert cells.shape == (16, 16)
    assert cells.iloc[0, 0] == pytest.approx(np.sqrt((error[:8, :16] ** 2).mean()) / rms, rel=1e-5)
    worst = errors.largest(pair[0], "Q4_K", 3)
    assert np.abs(worst["error"][0]) == pytest.approx(error.max())
    assert (worst["weight"] + worst["error"]).tolist() == pytest.approx(worst["decoded"].tolist())
    assert (worst["neighbours"] >= worst["weight"].abs()).all()
