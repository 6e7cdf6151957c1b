"""The golden figures of mode float, computed by the engine for graphics cards on the CPU (`cpu-torch`).

`float32` is what `cpu-torch` computes with, `halves` what a card does: sums of products of split operands.
"""

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from llama_models import SEEN, TOKENS

import quantlab as ql
from quantlab.evaluate.engine import find
from quantlab.evaluate.imatrix import imatrix
from quantlab.evaluate.logits import _logits

pytest.importorskip("torch", reason="the extra gpu is not installed", exc_type=ImportError)

GOLDEN = Path(__file__).parent / "golden"
FLOAT32 = find("float", "cpu-torch")
SPLIT = replace(FLOAT32, precision="halves", options={**FLOAT32.options, "precision": "halves"})
FILES = {"llama": "transformers", "dense": "dense", "expert": "experts", "hybrid": "hybrid"}
FILES |= {"gemma": "gemma4", "latent": "latent"}
OTHERS = ("tiny",)  # tested below
NAMES = {
    kind: [name for name in np.load(GOLDEN / f"{file}_logits.npz") if name not in OTHERS]
    for kind, file in FILES.items()
}
SENSITIVE = [("gemma4-e", SPLIT)]  # its golden logits differ from the CPU's ten times as much as those of the others
MODELS = [(kind, name) for kind, names in NAMES.items() for name in names]
ROWS = np.stack([TOKENS, TOKENS[::-1]])
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pre-tokenizer|.*vocabulary differs|.*became zero in F16|.*multi-token"
)


def nlls(logits):
    """Nats of each next token [n_rows, n_tokens - 1]."""
    x, after = logits[:, :-1].astype(np.float64), ROWS[:, 1:, None]
    top = x.max(-1)
    return top + np.log(np.exp(x - top[..., None]).sum(-1)) - np.take_along_axis(x, after, -1)[..., 0]


@pytest.mark.parametrize(("kind", "name"), MODELS, ids=[name for _, name in MODELS])
def test_every_architecture_has_the_golden_logits(tmp_path, kind, name):
    model = ql.open(importlib.import_module(f"{kind}_models").write_model(tmp_path / name, name))
    expected = np.load(GOLDEN / f"{FILES[kind]}_logits.npz")[name]
    on_cpu = nlls(_logits(model, ROWS, find("float")))
    for choice in (FLOAT32, SPLIT):
        found = _logits(model, ROWS, choice)
        assert np.abs(found[0, SEEN] - expected).max() <= 1e-4 * np.ptp(expected)
        difference = nlls(found) - on_cpu
        assert np.abs(difference).max() < (2e-4 if (name, choice) in SENSITIVE else 1e-4)
        assert abs(difference.mean()) < 2e-6  # of only 298 tokens of models whose logits reach 100


def test_layers_that_guess_ahead_are_not_computed(tmp_path):
    hybrid = importlib.import_module("hybrid_models")
    model = ql.open(ql.convert(hybrid.write_model(tmp_path / "made", "qwen35", mtp=True), mtp=True, progress=False))
    assert model.hparams.n_layer_nextn == 1
    found, expected = (_logits(model, ROWS, choice) for choice in (FLOAT32, find("float")))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.ptp(expected))
    ql.perplexity(model, "primer", n_ctx=64, chunks=1, device="cpu-torch", progress=False)


def test_the_bundled_model_has_the_golden_logits():
    expected = np.load(GOLDEN / "transformers_logits.npz")["tiny"]
    found = _logits(ql.open("tiny"), TOKENS[None], FLOAT32)[0, SEEN]
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_importance_is_llama_imatrix_own():
    golden = json.loads((GOLDEN / "imatrix_collected.json").read_text())
    matrix = imatrix("tiny", "primer", chunks=4, device="cpu-torch", progress=False)
    errors = [np.abs(matrix.sums[name][0, ::16] / np.array(sums) - 1) for name, sums in golden["sums"].items()]
    errors = np.concatenate(errors)  # theirs have activations rounded to the weights' own type
    assert np.median(errors) < 1e-3 and np.percentile(errors, 99) < 1e-2
    assert all(matrix.counts[name] == golden["count"] for name in golden["sums"])


def assert_same_figures(found, expected):
    """Every column of two tables, one of each device: nats within 1e-4, means within 1e-6, shares within near ties."""
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if not isinstance(value, float) or math.isnan(value):
                assert ours[name] == value or math.isnan(ours[name]), name
                continue
            counted = name.startswith(("same_top", "top5", "top10", "flips"))
            is_mean = name in ("kld_mean", "ln_ratio")
            bound = 2e-3 if counted else 1e-6 if is_mean else 1e-6 * value if name == "ppl" else 1e-4
            bound *= theirs["ppl"] if name.startswith(("delta_ppl", "ppl_")) else 1
            assert abs(ours[name] - value) <= bound, (theirs["variant"], name)
    for name in ("ppl", "ln_ratio", "kld_mean"):
        ours, theirs = (table.running[name].to_numpy() for table in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6 if name == "ppl" else 0, atol=2e-6)


@pytest.mark.parametrize(
    ("ftypes", "chunks"),
    [(["Q4_K_M", "Q2_K"], 2), pytest.param(None, 8, marks=pytest.mark.long)],
    ids=["some", "all"],
)
def test_every_column_of_the_golden_table_is_that_of_the_cpu(tmp_path, ftypes, chunks):
    """Golden are llama-perplexity's figures of the F16 file; those of its variants belong to another arithmetic."""
    golden = json.loads((GOLDEN / "llama_perplexity_tiny.json").read_text())
    ftypes = ftypes or [name for name in golden["results"] if name != "F16"]
    base = ql.convert("tiny", tmp_path / "F16.gguf", outtype="f16", progress=False)
    options = dict(chunks=chunks, progress=False)
    found, expected = (ql.compare(base, ftypes, "primer", device=d, **options) for d in ("cpu-torch", "cpu"))
    assert_same_figures(found, expected)
    running = found.running
    running = running[running["variant"] == "F16"]["ppl"].tolist()
    assert running == pytest.approx(golden["results"]["F16"]["running_ppl"][:chunks], rel=1e-3)
    if chunks == golden["about"]["chunks"]:
        assert found.rows[0]["ppl"] == pytest.approx(golden["results"]["F16"]["ppl"], rel=5e-4)
        assert found.rows[0]["ppl_se"] == pytest.approx(golden["results"]["F16"]["ppl_se"], rel=2e-3)


SOON = ("gemma4-e", "deepseek-v3")  # with every field that others lack; the others take minutes


@pytest.mark.parametrize(
    ("kind", "name"),
    [pytest.param(*of, id=of[1], marks=() if of[1] in SOON else pytest.mark.long) for of in MODELS],
)
def test_importance_and_sensitivity_of_every_architecture_are_the_cpus(tmp_path, kind, name):
    folder = importlib.import_module(f"{kind}_models").write_model(tmp_path / name, name)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    options = dict(n_ctx=64, chunks=2, progress=False)
    devices = ("cpu-torch", "cpu")
    found, expected = (imatrix(folder, tmp_path / "text.txt", device=d, **options) for d in devices)
    assert found.sums.keys() == expected.sums.keys()
    for key, sums in expected.sums.items():
        np.testing.assert_allclose(found.sums[key], sums, rtol=2e-4, atol=1e-6 * sums.max())
        np.testing.assert_array_equal(found.counts[key], expected.counts[key])
    options |= dict(types=["Q4_0"], groups="kind", cache=False)
    found, expected = (ql.sensitivity(folder, tmp_path / "text.txt", device=d, **options) for d in devices)
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        assert ours["group"] == theirs["group"] and ours["error"] == theirs["error"]
        assert ours["kld_mean"] == pytest.approx(theirs["kld_mean"], abs=1e-6, rel=1e-3)
