"""The engine for graphics cards, on the CPU: the CPU engine's figures, exact products, the plan held, refusals."""

import json
import os
import subprocess
import sys
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import llama_models
import numpy as np
import pytest
from sparse_models import sparse_gguf

import quantlab as ql
from quantlab import arch
from quantlab.arch.hparams import RopeScaling
from quantlab.evaluate.engine import ExpertInputs, Stored, find
from quantlab.evaluate.engine import torch as seam
from quantlab.evaluate.imatrix import imatrix
from quantlab.evaluate.perplexity import measure
from quantlab.evaluate.protocol import Windows, cut
from quantlab.evaluate.scores import ScoreTokens
from quantlab.evaluate.variants import Weights, as_is, resolve
from quantlab.files.bundled import read_text
from quantlab.files.bundled import shape as bundled_shape
from quantlab.study.tables import FTYPES

torch = pytest.importorskip("torch", reason="the extra gpu is not installed", exc_type=ImportError)
from quantlab.evaluate.engine.card import layers, plan, products  # noqa: E402

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


# ── layers of every kind ────────────────────────────────────────────────────────────────────────────────────────────

SMALL = arch.Hparams(
    arch="made", n_embd=64, n_ff=96, n_layer=1, n_head=4, n_head_kv=2, head_dim=16, n_vocab=100, n_ctx=40
)
EXPERTS = dict(router=("gate_inp",), experts_in=("gate_exps", "up_exps"), experts_down=("down_exps",))
ROUTED = dict(n_expert=6, n_expert_used=2, n_ff_exp=32)
KINDS = {
    "plain": ({}, {}),
    "pairs": (dict(rope="pairs"), dict(n_rot=8)),
    "no positions": ({}, dict(n_rot=0)),
    "norms of heads and after": (dict(q_norm="qn", k_norm="kn", attn_post_norm="apn", ffn_post_norm="fpn"), {}),
    "norms of rows": (dict(q_norm="qn_row", k_norm="kn_row"), {}),
    "no norm before": (dict(attn_norm="", ffn_norm="", attn_post_norm="apn", ffn_post_norm="fpn"), {}),
    "window": (dict(activation="gelu"), dict(window=7, attn_scale=0.1)),
    "softcap": ({}, dict(attn_softcap=5.0, window=9)),
    "sinks": (dict(sinks="sink"), dict(window=11)),
    "one matrix": (dict(attn_qkv=("qkv",), ffn_in=("gate_up",)), dict(residual_scale=0.5)),
    "temperature": ({}, dict(attn_temp_scale=0.1, rope_scaling=RopeScaling("yarn", 2.0, 16, 1.0))),
    "biases": (dict(attn_qkv=("q_b", "k_b", "v_b"), attn_output=("o_b",)), {}),
    "gated attention": (dict(query_width=2, q_norm="qn", k_norm="kn", attn_qkv=("q_gate", "k", "v")), dict(n_rot=8)),
    "delta net": (
        dict(attn_qkv=("q_k_v", "z", "beta", "alpha"), conv="conv", time_step="dt", decay="a", state_norm="sn"),
        dict(recurrent=1, ssm_conv=4, ssm_state=16, ssm_groups=2, ssm_heads=6, ssm_inner=72),
    ),
    "values from keys": (dict(attn_qkv=("q", "k"), v_norm=True, q_norm="qn", k_norm="kn"), dict(v_is_k=1)),
    "values that are keys": (dict(attn_qkv=("q", "k"), layer_scale="ls"), dict(v_is_k=1, attn_scale=1.0)),
    "experts apart": (
        EXPERTS
        | dict(experts_norm="en", shared_post_norm="spn", experts_post_norm="epn", ffn_post_norm="fpn")
        | dict(router_scale="rs", expert_scales="es", layer_scale="ls", sums_to_one=True, v_norm=True),
        ROUTED,
    ),
    "experts": (EXPERTS | dict(ffn_in=(), ffn_down=(), sums_to_one=True), ROUTED),
    "experts, sigmoid, all see one": (
        EXPERTS | dict(gating="sigmoid", choice_bias="choice", shared_gate=("shared",)),
        ROUTED | dict(expert_scale=2.5),
    ),
    "experts, oai": (
        EXPERTS | dict(ffn_in=(), ffn_down=(), activation="swiglu_oai", gating="softmax_chosen"),
        ROUTED,
    ),
}


def made_read(does, h):
    """Random tensors for a layer, F32 by name."""
    rng, n_qkv = np.random.default_rng(3), h.n_q + 2 * h.n_kv
    n_in = {"attn_output": h.ssm_inner or h.n_q, "ffn_down": h.n_ff, "experts_down": h.n_ff_exp}
    n_out = {"qkv": n_qkv, "gate_up": 2 * h.n_ff, "gate_inp": h.n_expert, "shared": 1}
    n_out |= {name: h.n_ff_exp for name in EXPERTS["experts_in"]}
    n_out |= {name: size for name, size in zip(does.attn_qkv, (h.n_q, h.n_kv, h.n_kv), strict=False) if name != "qkv"}
    n_out |= {name: h.n_ff for name in does.ffn_in if name != "gate_up"}
    n_out |= {"q_gate": 2 * h.n_q, "q_k_v": h.conv_width, "z": h.ssm_inner, "beta": h.ssm_heads, "alpha": h.ssm_heads}
    found = {}
    for field, names in does.products.items():
        for name in names:
            shape = (n_out.get(name, h.n_embd), n_in.get(field, h.n_embd))
            shape = (h.n_expert, *shape) if field.startswith("experts") else shape
            found[f"{name}.weight"] = 0.2 * rng.standard_normal(shape)
            if name.endswith("_b"):
                found[f"{name}.bias"] = rng.standard_normal(shape[:-1])
    sizes = {"qn": h.head_dim, "kn": h.head_dim, "qn_row": h.n_q, "kn_row": h.n_kv}
    for name in does.norms.values():
        found[f"{name}.weight"] = 1 + 0.2 * rng.standard_normal(sizes.get(name, h.n_embd))
    found |= {"sink.bias": rng.standard_normal(h.n_head), "choice.bias": rng.standard_normal(h.n_expert)}
    found |= {
        "conv.weight": rng.standard_normal((h.conv_width, h.ssm_conv)),
        "dt.bias": rng.standard_normal(h.ssm_heads),
    }
    found |= {"ls": np.array([0.7]), "rs": 1 + rng.random(h.n_embd), "es": 0.5 + rng.random(h.n_expert)}
    found |= {"a": -rng.random(h.ssm_heads), "sn.weight": 1 + 0.2 * rng.standard_normal(h.ssm_value)}
    stored = {name: Stored(x.astype(np.float32), "F32", x.shape) for name, x in found.items()}
    return stored.get


@pytest.fixture
def made(monkeypatch):
    """Return model and `read` of a made-up layer."""

    def make(kind):
        does, changed = KINDS[kind]
        h, does = replace(SMALL, **changed), arch.Layer(**does)
        monkeypatch.setattr(arch, "find", lambda name: arch.Architecture("made", (), (), does))
        return type("Made", (dict,), {"hparams": h, "path": Path("made")})(), made_read(does, h)

    return make


@pytest.mark.parametrize("choice", [find("float", "cpu-torch"), SPLIT], ids=["float32", "halves"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_kind_are_the_cpus(made, rng, kind, choice):
    model, read = made(kind)
    states, found, seen = rng.standard_normal((3, 40, 64), np.float32), {}, {}
    for name, of in (("cpu", find("float")), ("torch", choice)):
        found[name], part, seen[name] = states.copy(), states.copy(), {}
        with of(model, 40) as engine:
            layer = engine.load(read, 0)

            def observe(field, inputs, engine=engine, name=name):
                seen[name][field] = engine.column_squares(inputs)
                if isinstance(inputs, ExpertInputs):
                    seen[name][field + " counts"] = inputs.counts

            engine.forward(layer, found[name], observe=observe)
            engine.forward(layer, part, first=25)
        np.testing.assert_array_equal(part[:, :25], states[:, :25])
        np.testing.assert_allclose(part[:, 25:], found[name][:, 25:], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["torch"], found["cpu"], rtol=1e-4, atol=1e-4)
    assert list(seen["torch"]) == list(seen["cpu"])
    for field, squares in seen["cpu"].items():
        np.testing.assert_allclose(seen["torch"][field], squares, rtol=1e-3, atol=1e-6 * squares.max())


@pytest.mark.parametrize("kind", ["plain", "experts, sigmoid, all see one"])
def test_weights_that_an_observer_returns_are_used_at_once(made, rng, kind):
    model, read = made(kind)

    def halved(name):
        stored = read(name)
        is_matrix = stored is not None and len(stored.shape) > 1
        return replace(stored, data=stored.data / 2) if is_matrix else stored

    states = rng.standard_normal((2, 40, 64), np.float32)
    expected, found = states.copy(), states.copy()
    with find("float", "cpu-torch")(model, 40) as engine:
        engine.forward(engine.load(halved, 0), expected)
        engine.forward(engine.load(read, 0), found, observe=lambda field, inputs: halved)
    np.testing.assert_array_equal(found, expected)


def test_what_is_not_computed_here_is_refused(made, monkeypatch):
    model, _ = made("plain")
    monkeypatch.setattr(layers, "_LAYER", [name for name in layers._LAYER if name != "sums_to_one"])
    monkeypatch.setattr(layers, "_HPARAMS", [name for name in layers._HPARAMS if name != "attn_softcap"])
    find("float", "cpu-torch")(model, 40)  # neither is used
    model.hparams = replace(model.hparams, attn_softcap=50.0)
    with pytest.raises(
        ValueError, match="made: attn_softcap=50.0 is not supported on device=cpu-torch. Use device=cpu"
    ):
        find("float", "cpu-torch")(model, 40)
    model, _ = made("experts")
    with pytest.raises(ValueError, match="sums_to_one=True is not supported on device"):
        find("float", "cpu-torch")(model, 40)
    model, _ = made("plain")
    monkeypatch.setattr(layers, "ACTIVATIONS", {})
    with pytest.raises(ValueError, match="activation=silu is not supported on device"):
        find("float", "cpu-torch")(model, 40)


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


def test_an_unknown_size_of_weights_is_scaled(made, rng):
    """In mode half matrices have scales only where they need them."""
    model, _ = made("plain")
    weight = rng.standard_normal((8, 64)).astype(np.float32)
    with find("half", "cpu-torch")(model, 40) as engine:
        plain, scaled = (
            engine._matrix(Stored(s * weight, "F32", weight.shape)) for s in (np.float32(1), np.float32(1e-6))
        )
    assert plain.scale is None
    np.testing.assert_allclose((scaled.parts[0].float() * scaled.scale).numpy(), 1e-6 * weight, rtol=1e-3)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up the bytes of all tensors that are alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, torch.Tensor) and item.untyped_storage().data_ptr() not in self.alive:
                self._count(item.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, storage):
        place, size = storage.data_ptr(), storage.nbytes()
        if size:
            self.alive[place], self.now = size, self.now + size
            weakref.finalize(storage, self._drop, place)

    def _drop(self, place):
        self.now -= self.alive.pop(place, 0)


@pytest.mark.parametrize("precision", ["float32", "halves"])
def test_a_layer_takes_the_memory_that_was_planned(precision, monkeypatch):
    model, n_ctx = ql.open("tiny"), 512
    choice = replace(SPLIT, options={**SPLIT.options, "precision": precision})
    options = dict(n_ctx=n_ctx, chunks=8, name="llama.cpp", mode="float", rules="current")
    windows, _ = cut(read_text("primer"), model.vocab, **options)
    with choice(model, n_ctx) as engine:
        engine.products.is_native = True  # a card's products do not widen the weights
        monkeypatch.setattr(engine.products, "_mm", lambda a, b: torch.empty(len(a), len(b)))
        needs = plan._Needs(engine, [as_is(model)], windows)
        planned = needs._layer("disk", 8) - engine.products.weight_bytes * needs.weights  # only one of two layers
        states = np.zeros((8, n_ctx, model.hparams.n_embd), np.float32)
        with Counting() as counting:
            weights = Weights(model, [as_is(model)])
            layer = engine.load(lambda name: weights.get(as_is(model), f"blk.0.{name}"), 0)
            engine.forward(layer, states)
    assert counting.peak == pytest.approx(planned, rel=0.1)


def uncounted_product(a, b):
    """A card's product of halves: nothing but its result takes memory."""
    out = torch.empty(len(a), len(b))
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.mm(a.float(), b.float().T, out=out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["float32", "halves"])
def test_layers_of_every_kind_take_what_was_planned(made, rng, kind, precision):
    model, read = made(kind)
    states = rng.standard_normal((8, 256, 64), np.float32)  # so that experts see tokens of their own
    h = model.hparams = replace(model.hparams, n_ctx=256)
    with replace(SPLIT, options={**SPLIT.options, "precision": precision})(model, 256) as engine:
        engine.products.is_native = True
        engine.products._mm = uncounted_product
        with torch.inference_mode(), Counting() as counting:
            layer = engine.load(read, 0)
            engine.layers.apply(layer, torch.from_numpy(states).clone(), 0, None)
        planned = 8 * plan.token_bytes(layer.does, h, engine.products, 256) + plan.score_bytes(layer.does, h, 256, 8)
    weights = sum(tensor.nbytes for tensor in layer.tensors())
    assert counting.peak - weights == pytest.approx(planned, rel=0.1)


def needs_of(tmp_path, shape, precision, card, chunks=655):
    """The plan of a size/ppl table with 14 ftypes on a card of `card` GiB, of which the driver leaves 95 %."""
    names = ("n_vocab", "n_embd", "n_ff", "n_layer", "n_head", "n_head_kv")
    hparams = arch.Hparams(arch="llama", **{name: bundled_shape(shape)[name] for name in names})
    model = ql.open(sparse_gguf(tmp_path / "sparse.gguf", hparams, "F16"))
    ftypes = [name for name in FTYPES if name not in ("F16", "F32")]
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
