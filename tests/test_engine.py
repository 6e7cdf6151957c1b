"""The seam of the engines: how they are found, what observers see, and an added one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import quantlab as ql
from quantlab import quants
from quantlab.evaluate.engine import Stored, engines, find, joined, needed
from quantlab.evaluate.engine import torch as seam
from quantlab.evaluate.metrics import TokenScores
from quantlab.files.bundled import data_dir

PACKAGE = Path(ql.__file__).parent
MODES = ("float", "ggml-cpu")


@pytest.fixture(scope="module")
def model():
    return ql.open("tiny")


def reader(model, index=0):
    """`read` of a layer as it is in the model."""

    def read(name):
        full = f"blk.{index}.{name}"
        if full not in model:
            return None
        tensor = model.tensor(full)
        return Stored(tensor.load(), tensor.qtype, tensor.shape)

    return read


@pytest.fixture
def states(model, rng):
    return rng.standard_normal((3, 70, model.hparams.n_embd), np.float32)


@pytest.mark.parametrize("mode", MODES)
def test_observers_change_nothing_and_see_every_product(model, states, mode):
    seen = {}
    with find(mode)(model, 70) as engine:
        alone, observed = states.copy(), states.copy()
        layer = engine.load(reader(model), 0)
        engine.forward(layer, alone)
        engine.forward(layer, observed, observe=lambda field, inputs: seen.update({field: inputs.copy()}))
        squares = engine.column_squares(seen["ffn_down"])
    np.testing.assert_array_equal(alone, observed)
    widths = {field: inputs.shape for field, inputs in seen.items()}
    n_embd, n_ff = model.hparams.n_embd, model.hparams.n_ff
    assert widths == {
        "attn_qkv": (210, n_embd),
        "attn_output": (210, n_embd),
        "ffn_in": (210, n_embd),
        "ffn_down": (210, n_ff),
    }
    np.testing.assert_allclose(
        squares, (seen["ffn_down"].astype(np.float64) ** 2).sum(axis=0, keepdims=True), rtol=1e-12
    )


@pytest.mark.parametrize("mode", MODES)
def test_weights_that_an_observer_returns_are_used_at_once(model, states, mode):
    """Each product's new weights are known only when its inputs are."""
    plain = reader(model)

    def encoded(name):
        stored = plain(name)
        if stored is None or len(stored.shape) == 1:
            return stored
        return Stored(quants.quantize(stored.floats(), "Q4_0"), "Q4_0", stored.shape)

    with find(mode)(model, 70) as engine:
        expected, found = states.copy(), states.copy()
        engine.forward(engine.load(encoded, 0), expected)
        engine.forward(engine.load(plain, 0), found, observe=lambda field, inputs: encoded)
    np.testing.assert_array_equal(expected, found)


@pytest.mark.parametrize("mode", MODES)
def test_positions_before_the_first_wanted_one_stay(model, states, mode):
    with find(mode)(model, 70) as engine:
        layer, whole, part = engine.load(reader(model), 0), states.copy(), states.copy()
        engine.forward(layer, whole)
        engine.forward(layer, part, first=40)
    np.testing.assert_array_equal(part[:, :40], states[:, :40])
    np.testing.assert_allclose(part[:, 40:], whole[:, 40:], rtol=1e-5, atol=1e-5)


def test_scores_are_filled_by_name():
    scores = TokenScores.empty(2, 3)
    for number, values in enumerate(scores.at((1, slice(0, 2))).values()):
        values[:] = number
    assert [int(getattr(scores, name)[1, 0]) for name in ("nll", "kld", "top5")] == [0, 1, 5 - 1]
    assert not scores.top10[0].any() and not scores.top10[1, 2]


@pytest.mark.slow  # a copy of the package compiles its kernels again
def test_an_added_engine_evaluates(tmp_path):
    """One added file: the CPU engine under another mode."""
    shutil.copytree(PACKAGE, tmp_path / "quantlab", ignore=shutil.ignore_patterns("__pycache__"))
    folder = tmp_path / "quantlab" / "evaluate" / "engine"
    text = (folder / "cpu.py").read_text().replace("CpuEngine", "AddedEngine").replace('("float",)', '("added",)')
    (folder / "added.py").write_text(text)
    model, primer = ql.open("tiny").path, data_dir() / "text" / "primer.md"
    code = f"""
import quantlab as ql
assert ql.__file__.startswith({str(tmp_path)!r})
options = dict(chunks=1, n_ctx=64, progress=False)
a, b = (ql.perplexity({str(model)!r}, {str(primer)!r}, mode=mode, **options).ppl for mode in ("float", "added"))
assert a == b
print(a)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert done.returncode == 0, done.stderr
    assert 1 < float(done.stdout) < 2048


def test_every_engine_says_what_it_serves():
    served = [(mode, device) for engine in engines() for mode in engine.modes for device in engine.devices]
    assert len(served) == len(set(served)) >= 2
    assert {choice.device for mode, device in served if device == "cpu" for choice in [find(mode, device)]} == {"cpu"}


def test_an_unknown_mode_or_device_is_refused():
    with pytest.raises(ValueError, match="mode=exact, must be one of float, ggml-cpu, half"):
        find("exact")
    with pytest.raises(ValueError, match="device=abacus, must be one of cpu, cuda, mps, cpu-torch in mode float"):
        find("float", "abacus")


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(seam, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"device=cuda: needs the package torch. Run: .* -m pip install .*\[gpu\]'"):
        find("float", "cuda")
    assert find("float", "auto").device == "cpu"
    with pytest.raises(ValueError, match="mode=half, needs a graphics card, none is usable here. Choose mode=float"):
        find("half", "auto")


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="device=cpu, must be one of cuda, mps, cpu-torch in mode half. Or choose"):
        find("half", "cpu")
    with pytest.raises(
        ValueError, match="device_memory=8GiB, is for graphics cards, but the device is cpu. Give memory"
    ):
        find("float", "cpu", "8GiB")


def test_a_matrix_without_a_bias_gets_zeros_beside_one_that_has():
    matrices = [Stored(np.ones((n, 4), np.float32), "F32", (n, 4)) for n in (2, 3)]
    bias = Stored(np.array([1, 2], np.float32), "F32", (2,))
    np.testing.assert_array_equal(joined([bias, None], matrices), [1, 2, 0, 0, 0])


def test_a_missing_weight_is_named():
    with pytest.raises(ValueError, match=r"^ffn_up.weight: missing, the layer needs it\. Convert the model again"):
        needed(lambda name: None, "ffn_up.weight")
