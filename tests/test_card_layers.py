"""The layers of the engine for graphics cards, on the CPU: the CPU engine's figures, the plan held, refusals."""

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import quantlab as ql
from quantlab import arch
from quantlab.arch.hparams import RopeScaling
from quantlab.evaluate.engine import ExpertInputs, Stored, find
from quantlab.evaluate.protocol import cut
from quantlab.evaluate.variants import Weights, as_is
from quantlab.files.bundled import read_text

torch = pytest.importorskip("torch", reason="the extra gpu is not installed", exc_type=ImportError)
from quantlab.evaluate.engine.card import layers, plan  # noqa: E402

SPLIT = replace(find("float", "cpu-torch"), precision="halves")
SPLIT = replace(SPLIT, options={**SPLIT.options, "precision": "halves"})  # what a card does in mode float


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


LATENT = dict(attn_qkv=("q", "kv_a"), latent_norm="ln", latent_k=("k_b",), latent_v=("v_b",), rope="pairs")
OF_LATENTS = dict(
    n_head_kv=1, head_dim=40, head_dim_mla=24, head_dim_v=20, n_lora_kv=32, n_rot=8, attn_scale=0.2, n_ff=16
)
KINDS |= {
    "latents": (LATENT, OF_LATENTS),
    "latents, short queries": (LATENT | dict(latent_q=("q_b",), latent_q_norm="lqn"), OF_LATENTS | dict(n_lora_q=48)),
    "experts of groups": (
        EXPERTS | dict(gating="sigmoid", choice_bias="choice", sums_to_one=True),
        ROUTED | dict(expert_groups=3, expert_groups_used=2),
    ),
    "own of tokens": (
        dict(layer_gate=("own_gate",), layer_out=("own_out",), layer_post_norm="lpn", layer_scale="ls"),
        dict(n_embd_layer=192, n_ff=16),
    ),
    "keys for others": ({}, dict(n_layer=2, n_kv_shared=1, n_ff=16)),
    "keys of others": (dict(attn_qkv=("q",), q_norm="qn"), dict(n_layer=2, n_kv_shared=1, kv_shared=1, n_ff=16)),
}


def made_read(does, h):
    """Random tensors for a layer, F32 by name."""
    rng, n_qkv = np.random.default_rng(3), h.n_q + 2 * h.n_kv
    n_in = {"attn_output": h.ssm_inner or h.n_q, "ffn_down": h.n_ff, "experts_down": h.n_ff_exp}
    n_in |= {"layer_out": h.n_embd_layer}
    n_out = {"qkv": n_qkv, "gate_up": 2 * h.n_ff, "gate_inp": h.n_expert, "shared": 1}
    n_out |= {name: h.n_ff_exp for name in EXPERTS["experts_in"]}
    n_out |= {name: size for name, size in zip(does.attn_qkv, (h.n_q, h.n_kv, h.n_kv), strict=False) if name != "qkv"}
    n_out |= {name: h.n_ff for name in does.ffn_in if name != "gate_up"}
    if h.n_lora_kv:
        n_in |= {"attn_output": h.n_v, "latent_q": h.n_lora_q, "latent_k": h.n_nope, "latent_v": h.n_lora_kv}
        n_out |= {"q": h.n_lora_q or h.n_q_mla, "kv_a": h.head_dim, "q_b": h.n_q_mla, "k_b": h.n_lora_kv}
        n_out["v_b"] = h.head_dim_v
    n_out |= {
        "own_gate": h.n_embd_layer,
        "q_gate": 2 * h.n_q,
        "q_k_v": h.conv_width,
        "z": h.ssm_inner,
        "beta": h.ssm_heads,
        "alpha": h.ssm_heads,
    }
    found = {}
    for field, names in does.products.items():
        for name in names:
            shape = (n_out.get(name, h.n_embd), n_in.get(field, h.n_embd))
            shape = (h.n_expert, *shape) if field.startswith("experts") else shape
            shape = (h.n_head, *shape) if name in ("k_b", "v_b") and h.n_lora_kv else shape
            found[f"{name}.weight"] = 0.2 * rng.standard_normal(shape)
            if name in ("q_b", "k_b", "v_b", "o_b") and not h.n_lora_kv:
                found[f"{name}.bias"] = rng.standard_normal(shape[:-1])
    sizes = {
        "qn": h.head_dim,
        "kn": h.head_dim,
        "ln": h.n_lora_kv,
        "lqn": h.n_lora_q,
        "qn_row": h.n_q,
        "kn_row": h.n_kv,
    }
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
    states, found, seen = rng.standard_normal((3, 40, model.hparams.n_state), np.float32), {}, {}
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
        np.testing.assert_array_equal(part[:, :25, :64], states[:, :25, :64])
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
    states = rng.standard_normal((8, 256, model.hparams.n_state), np.float32)  # so that experts see tokens of their own
    h = model.hparams = replace(model.hparams, n_ctx=256)
    with replace(SPLIT, options={**SPLIT.options, "precision": precision})(model, 256) as engine:
        engine.products.is_native = True
        engine.products._mm = uncounted_product
        with torch.inference_mode(), Counting() as counting:
            layer = engine.load(read, 0)
            engine.layers.apply(layer, torch.from_numpy(states).clone(), 0, None)
        of = engine.products, 256, h.n_state if h.n_state > h.n_embd else None
        planned = 8 * plan.token_bytes(layer.does, h, *of) + plan.score_bytes(layer.does, h, 256, 8)
    weights = sum(tensor.nbytes for tensor in layer.tensors())
    assert counting.peak - weights == pytest.approx(planned, rel=0.1)
