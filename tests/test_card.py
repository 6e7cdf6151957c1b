"""The engine for graphics cards, on the CPU: the CPU engine's figures, exact products, the plan held, refusals."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import llama_models
import numpy as np
import pytest
from sparse_models import sparse_gguf

import quantlab as ql
from quantlab import arch
from quantlab.evaluate.engine import find
from quantlab.evaluate.engine import torch as seam
from quantlab.evaluate.imatrix import imatrix
from quantlab.evaluate.perplexity import measure
from quantlab.evaluate.protocol import Windows, cut
from quantlab.evaluate.scores import ScoreTokens
from quantlab.evaluate.variants import as_is, resolve
from quantlab.files.bundled import read_text
from quantlab.files.bundled import shape as bundled_shape
from quantlab.study.tables import FTYPES

torch = pytest.importorskip("torch", reason="the extra gpu is not installed", exc_type=ImportError)
from quantlab.evaluate.engine.card import plan, products  # noqa: E402

CPU = torch.device("cpu")
TORCH = {"device": "cpu-torch", "progress": False}
SPLIT = replace(find("float", "cpu-torch"), precision="halves")
SPLIT = replace(SPLIT, options={**SPLIT.options, "precision": "halves"})  # what a card does in mode float


# ── the figures of the CPU engine ───────────────────────────────────────────────────────────────────────────────────


def token_scores(choice, ftypes=("Q8_0", "Q4_K_M", "Q2_K"), chunks=3):
    """Scores of the bundled model and some ftypes."""
    model = ql.open("tiny")
    options = dict(n_ctx=512, chunks=chunks, name="llama.cpp", mode=choice.mode, rules="current")
    windows, record = cut(read_text("primer"), model.vocab, **options)
    variants = [as_is(model), *resolve(model, ftypes)]
    return measure(variants, windows, record, choice, None, None, False, ScoreTokens())


@pytest.fixture(scope="module")
def on_cpu():
    return token_scores(find("float"))


@pytest.mark.parametrize("choice", [find("float", "cpu-torch"), SPLIT], ids=["float32", "halves"])
def test_every_token_of_the_bundled_model_scores_as_on_the_cpu(on_cpu, choice):
    for a, b in zip(on_cpu, token_scores(choice), strict=True):
        for field in ("nll", "kld", "top_p"):
            difference = getattr(a, field) - getattr(b, field)
            assert np.abs(difference).max() < 1e-4 and abs(difference.mean()) < 1e-6
        for field in ("same_top", "correct", "top5", "top10"):  # near ties may fall either way
            assert (getattr(a, field) != getattr(b, field)).mean() < 2e-3
    assert not token_scores(choice, ["COPY"], 1)[1].kld.any()


def test_mode_half_says_what_halves_alone_do(on_cpu):
    found = ql.compare("tiny", ["Q8_0"], chunks=3, mode="half", **TORCH)
    noise = {row["kld_noise"] for row in found.rows}
    assert len(noise) == 1 and 1e-8 < noise.pop() < 5e-6
    assert found.rows[1]["kld_mean"] == pytest.approx(on_cpu[1].kld.mean(), rel=0.05)
    assert "kld_noise" in str(found) and found.protocol.precision == "half"
    assert "kld_noise" not in ql.compare("tiny", ["Q8_0"], chunks=2, n_ctx=64, **TORCH).rows[0]


def test_the_protocol_says_where_and_how(on_cpu):
    found = ql.perplexity("tiny", chunks=3, **TORCH)
    assert (found.protocol.device, found.protocol.precision) == ("cpu-torch", "float32")
    assert found.protocol.versions["torch"] == torch.__version__
    assert "cpu-torch, float32" in str(found)
    assert found.ppl == pytest.approx(np.exp(on_cpu[0].nll.mean()), rel=1e-6)


def test_results_of_two_devices_are_joined(on_cpu):
    options = dict(chunks=2, n_ctx=64, progress=False)
    a, b = (ql.compare("tiny", [q], device=d, **options) for q, d in (("Q8_0", "cpu"), ("Q4_0", "cpu-torch")))
    with pytest.raises(ValueError, match="base=tiny and base=tiny"):  # their bases differ in the last bits
        a.join(b)
    assert len(a.join(replace(b, rows=(a.rows[0], b.rows[1]))).rows) == 3


def test_importance_matrices_are_the_cpus():
    options = dict(chunks=2, n_ctx=128, progress=False, process_output=True)
    expected, found = (imatrix("tiny", device=device, **options) for device in ("cpu", "cpu-torch"))
    assert expected.sums.keys() == found.sums.keys()
    for name, sums in expected.sums.items():
        np.testing.assert_allclose(found.sums[name], sums, rtol=1e-4)
        np.testing.assert_array_equal(found.counts[name], expected.counts[name])


def test_sensitivity_is_the_cpus(tmp_path):
    folder = llama_models.write_model(tmp_path / "llama2", "llama2")
    options = dict(types=["Q4_0"], groups="kind", n_ctx=64, chunks=2, cache=False, progress=False)
    expected, found = (ql.sensitivity(folder, "primer", device=d, **options) for d in ("cpu", "cpu-torch"))
    assert found.protocol["device"] == "cpu-torch" and "torch" in found.protocol["arithmetic"][0]
    for a, b in zip(expected.rows, found.rows, strict=True):
        assert b["kld_mean"] == pytest.approx(a["kld_mean"], abs=1e-6) and b["error"] == a["error"]


KILLED = """
import os, sys
import quantlab as ql
from quantlab.evaluate.states import HiddenStates
advance = HiddenStates.advance
def advance_and_die(self):
    advance(self)
    if self.layer == 1:
        os.kill(os.getpid(), 9)
HiddenStates.advance = advance_and_die
ql.compare(sys.argv[1], ["Q4_0"], "primer", n_ctx=64, chunks=4, device="cpu-torch", scratch=sys.argv[2], progress=False)
"""


def test_a_killed_run_resumes_to_the_same_bits(tmp_path):
    folder, scratch = llama_models.write_model(tmp_path / "llama2", "llama2"), tmp_path / "scratch"
    killed = subprocess.run([sys.executable, "-c", KILLED, folder, scratch], check=False, env=os.environ)
    assert killed.returncode == -9 and json.loads((scratch / "progress.json").read_text())["layer"] == 1
    options = dict(n_ctx=64, chunks=4, **TORCH)
    with pytest.raises(ValueError, match="holds the states of another run"):
        ql.compare(folder, ["Q4_0"], "primer", scratch=scratch, **options | {"device": "cpu"})
    resumed = ql.compare(folder, ["Q4_0"], "primer", scratch=scratch, **options)
    assert resumed.rows == ql.compare(folder, ["Q4_0"], "primer", **options).rows


# ── products of halves ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1, 1e6, 1e30])
def test_split_products_lose_nothing_at_any_size(rng, size):
    """Activations of 1e6 end a half's range, weights below 6e-5 its precision."""
    x = (size * rng.standard_normal((50, 300))).astype(np.float32)
    x *= 10.0 ** rng.integers(-3, 3, (50, 1)).astype(np.float32)  # each row has a scale of its own
    weight = (6e-5 / max(size, 1) ** 0.5 * rng.uniform(-1, 1, (40, 300))).astype(np.float32)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    bound = np.abs(x).astype(np.float64) @ np.abs(weight).T.astype(np.float64)  # of what is added up
    errors = {}
    for name in ("float32", "halves", "half"):
        of = products.Products(name, CPU)
        operands = [of.operand(torch.from_numpy(part)) for part in (x, weight)]
        errors[name] = (np.abs(of.multiply(*operands).numpy() - exact) / bound).max()
    assert errors["halves"] < 4e-7 and errors["halves"] < 4 * errors["float32"] + 1e-7
    assert errors["half"] < 2e-3


def test_rows_of_zeros_and_of_infinities_stay_what_they_are():
    x = torch.tensor([[0.0, 0.0], [1.0, torch.inf], [3e38, 1.0]])
    found = products.Products("half", CPU).operand(x)
    widened = found.parts[0].float() * found.scale
    assert widened[0].tolist() == [0, 0] and widened[1, 1] == torch.inf
    assert widened[2, 0] == pytest.approx(3e38, rel=1e-3)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def needs_of(tmp_path, shape, precision, card, chunks=655):
    """The plan of a size/ppl table with 16 ftypes on a card of `card` GiB, of which the driver leaves 95 %."""
    names = ("n_vocab", "n_embd", "n_ff", "n_layer", "n_head", "n_head_kv")
    hparams = arch.Hparams(arch="llama", **{name: bundled_shape(shape)[name] for name in names})
    model = ql.open(sparse_gguf(tmp_path / "sparse.gguf", hparams, "F16"))
    ftypes = [name for name in FTYPES if name != "F16"]
    variants = [as_is(model), *resolve(model, ftypes, rules="2023-12")]
    tokens = np.zeros((chunks, 512), np.int32)
    device = torch.device("cuda")
    engine = SimpleNamespace(
        device=device, name="cuda", precision=precision, products=products.Products(precision, device), n_ctx=512,
        hparams=model.hparams, ahead=1, device_memory=int(card * 0.95 * 2**30),
    )  # fmt: skip
    return engine, variants, Windows(tokens, tokens[:, :255], 256)


@pytest.mark.parametrize(
    ("shape", "precision", "card", "host", "where", "chunks"),
    [
        ("llama-7b", "halves", 24, "128GiB", "in memory", 32),
        ("llama-7b", "half", 24, "32GiB", "on disk", 32),
        ("llama-7b", "halves", 139, "32GiB", "on the card", 32),
        ("yi-34b", "halves", 24, "32GiB", "on disk", 16),
        ("yi-34b", "half", 80, "200GiB", "in memory", 32),
    ],
)
def test_large_models_fit_by_layers(tmp_path, monkeypatch, shape, precision, card, host, where, chunks):
    monkeypatch.setattr(plan, "measure", lambda *args: 1e14)
    budget = plan.fit(*needs_of(tmp_path, shape, precision, card), host, False)
    assert budget.chunks_at_once == chunks and f"hidden states {where}" in str(budget)
    assert budget.device_memory < card * 2**30 and str(budget).startswith(f"cuda, {precision}: ")


@pytest.mark.parametrize(
    ("shape", "chunks", "stated"),
    [("llama-7b", 16, ["10.7 GiB"]), ("yi-34b", 655, ["15.9 GiB; 8 variants", "29.6 GiB; 16 variants"])],
)
def test_parameters_of_real_tables_state_the_plan(tmp_path, monkeypatch, shape, chunks, stated):
    monkeypatch.setattr(plan, "measure", lambda *args: 1e14)
    text = (Path(__file__).parents[1] / f"notebooks/params/size_ppl_table-{shape}.yaml").read_text()
    for card, figure in zip((24, 80), stated, strict=False):
        budget = plan.fit(*needs_of(tmp_path, shape, "halves", card, chunks), "24GiB", False)
        said = f"{budget.device_memory / 2**30:.1f} GiB; {budget.outputs_at_once} variants"
        assert said.startswith(figure) and figure in text


def test_a_card_that_is_too_small_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"device_memory=\d+, must be at least .* GiB for this model. Give more"):
        plan.fit(*needs_of(tmp_path, "llama-7b", "halves", 0.5, 4), "64GiB", False)
    with pytest.raises(ValueError, match=r"memory=1GiB, must be at least .* GiB for this model. .* or device=cpu"):
        plan.fit(*needs_of(tmp_path, "llama-7b", "halves", 24, 4), "1GiB", True)


# ── what is missing ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(seam, "version", lambda name: "2.4.1+cu121")
    with pytest.raises(ImportError, match=r"device=cuda: torch=2.4.1\+cu121, must be at least 2.9"):
        find("float", "cuda")


def test_a_card_that_cannot_be_used_is_named(monkeypatch):
    if not torch.backends.mps.is_available():
        with pytest.raises(OSError, match="device=mps: torch finds no Apple GPU. Use device=cpu"):
            find("float", "mps")
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(OSError, match="device=cuda: torch=.* is built only for the CPU. Install torch for your card"):
        find("float", "cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: warnings.warn("The driver is too old.", stacklevel=1))
    with pytest.raises(OSError, match="device=cuda: The driver is too old.. Check with nvidia-smi, or use device=cpu"):
        find("float", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OSError, match="device=cuda: no card with a working driver. Check with nvidia-smi"):
        find("float", "cuda")


def test_memory_of_a_card_is_for_cards():
    with pytest.raises(ValueError, match="device_memory=8GiB, is for graphics cards, but the device is cpu-torch"):
        find("float", "cpu-torch", "8GiB")
    with pytest.raises(ValueError, match="device_memory=8XB, must be a positive number of bytes. Give for example"):
        find("float", "cuda", "8XB")
