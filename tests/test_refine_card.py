"""Refining with a graphics card's engine, in torch on the CPU: as much gain, reproducible, in pieces of any size."""

import re

import expert_models
import llama_models
import numpy as np
import pytest
from test_card_memory import Failing, limited

import quantlab as ql
from quantlab.evaluate import refine as module
from quantlab.evaluate import refinement as refinement_on_cpu
from quantlab.evaluate.engine import torch as seam
from quantlab.evaluate.refine_rows import refine_rows
from quantlab.files.model import open as open_model
from quantlab.study.front import by_chunk

torch = pytest.importorskip("torch", reason="the extra gpu is not installed", exc_type=ImportError)
from quantlab.evaluate.engine.card import layers, refinement  # noqa: E402
from quantlab.evaluate.engine.card.engine import CardEngine  # noqa: E402

TORCH = {"device": "cpu-torch", "progress": False}


@pytest.fixture
def small(tmp_path):
    """A made model, and a function that refines it on 512 tokens into a file of its own."""
    folder, counter = llama_models.write_model(tmp_path / "llama2", "llama2"), iter(range(99))

    def refined(**options):
        options = dict(ftype="Q4_0", n_ctx=64, chunks=8) | TORCH | options
        return open_model(ql.refine(folder, tmp_path / f"{next(counter)}.gguf", **options))

    return folder, refined


def floats(model) -> dict[str, np.ndarray]:
    """All of a file's matrices, decoded."""
    return {tensor.name: tensor.floats() for tensor in model if len(tensor.shape) > 1}


def test_a_card_gains_what_the_cpu_gains(tmp_path):
    paths = [
        ql.refine("tiny", tmp_path / f"{device}.gguf", ftype="Q2_K", chunks=2, sweeps=1, device=device, progress=False)
        for device in ("cpu", "cpu-torch")
    ]
    measured = by_chunk(ql.compare("tiny", ["Q2_K", *paths], chunks=6, **TORCH))
    _, ordinary, cpu, card = measured.values()
    assert cpu.mean() < 0.7 * ordinary.mean()
    error = (card - cpu).std(ddof=1) / len(cpu) ** 0.5  # codes that differ in few places move both KLDs by about this
    assert abs((card - cpu).mean()) < max(0.01 * ordinary.mean(), 3 * error)
    said = {key.removeprefix(module.PREFIX): value for key, value in open_model(paths[1]).metadata.items()}
    assert said["device"] == f"cpu-torch, torch {torch.__version__}" and said["precision"] == "float32"
    assert ql.verify(paths[1], source="tiny").verdict == "refined"


def test_moments_of_a_card_are_the_cpus(small):
    """The first layer's matrices, before differences of few codes change the inputs of those after them."""
    _, refined = small
    cpu, card = (floats(refined(device=device, sweeps=0)) for device in ("cpu", "cpu-torch"))
    for name in (name for name in cpu if name.startswith("blk.0.")):
        assert (cpu[name] == card[name]).mean() > 0.9, name


def test_a_stopped_run_resumes_to_the_same_bytes(small, tmp_path, monkeypatch):
    _, refined = small
    whole, choose, count = refined(), refinement.CardRefinement._layer, []

    def stopping(self, index):
        count.append(index)
        if len(count) == 2:
            raise KeyboardInterrupt
        choose(self, index)

    monkeypatch.setattr(refinement.CardRefinement, "_layer", stopping)
    with pytest.raises(KeyboardInterrupt):
        refined(scratch=tmp_path / "scratch")
    resumed = refined(scratch=tmp_path / "scratch")
    assert count == [0, 1, *range(1, whole.hparams.n_layer)]
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        count[:] = [0]
        refined(scratch=tmp_path / "scratch")
    with pytest.raises(ValueError, match=r"states: holds the states of another run. Give another scratch folder"):
        refined(scratch=tmp_path / "scratch", device="cpu")


def test_what_does_not_fit_is_done_in_smaller_pieces(small, monkeypatch):
    _, refined = small
    whole, taken = floats(refined()), []

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(layers.functional, "scaled_dot_product_attention", limited(attention, 3, taken))
    monkeypatch.setattr(refinement_on_cpu, "refine_rows", limited(refine_rows, 24, taken))
    pieces = floats(refined())
    assert {8, 4, 2} < set(taken) and max(size for size in taken if size <= 24) == 24
    for name, x in whole.items():
        assert np.linalg.norm(pieces[name] - x) < 0.05 * np.linalg.norm(x), name


@pytest.mark.parametrize("seed", range(2))
def test_a_layer_may_run_out_of_memory_anywhere(small, monkeypatch, seed):
    """Wherever an allocation fails while a layer is applied, nothing is added up twice."""
    _, refined = small
    forward, mode = CardEngine.forward, Failing()

    def failing(*args, **kwargs):
        with mode:
            forward(*args, **kwargs)

    monkeypatch.setattr(CardEngine, "forward", failing)
    whole = floats(refined())
    mode = Failing(np.random.default_rng(seed).choice(mode.count, 3, replace=False))
    found = floats(refined())
    assert mode.failed == 3
    for name, x in whole.items():
        assert np.linalg.norm(found[name] - x) < 0.05 * np.linalg.norm(x), name


def test_moments_that_do_not_fit_end_in_one_line(small, monkeypatch):
    _, refined = small

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(refinement, "damp", full)
    with pytest.raises(MemoryError, match="device=cpu-torch: a layer's second moments do not fit into its memory. Use"):
        refined()


def test_the_plan_says_the_device(small, capsys):
    _, refined = small
    refined(progress=True)
    assert "refining over 512 tokens on cpu-torch, float32: 0." in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*pre-tokenizer")
def test_experts_get_ordinary_bytes_and_are_counted(tmp_path, capsys):
    folder = expert_models.write_model(tmp_path / "moe", "qwen3moe")
    options = {"ftype": "Q4_0", "n_ctx": 64, "chunks": 8}
    ordinary = open_model(ql.quantize(folder, tmp_path / "a.gguf", ftype="Q4_0", report=lambda _: None))
    model = open_model(ql.refine(folder, tmp_path / "b.gguf", device="cpu-torch", **options))
    stacks = [tensor for tensor in model if len(tensor.shape) == 3 and tensor.qtype == "Q4_0"]
    said = re.search(r"; (\d+) matrices get ordinary bytes: ", capsys.readouterr().err)
    assert stacks and said and int(said[1]) == len(stacks) + 1  # the output's rows are too short for its type
    assert all(np.array_equal(tensor.load(), ordinary.tensor(tensor.name).load()) for tensor in stacks)
    name = "blk.0.attn_output.weight"
    assert not np.array_equal(model.tensor(name).load(), ordinary.tensor(name).load())


@pytest.mark.filterwarnings("ignore:.*pre-tokenizer")
def test_auto_takes_the_cpu_where_a_card_would_leave_experts(small, tmp_path, monkeypatch):
    monkeypatch.setattr(seam.TorchEngine, "automatic", lambda: "cpu-torch")
    folder, _ = small
    mixture = expert_models.write_model(tmp_path / "moe", "qwen3moe")
    assert [module._choice(open_model(path), "auto", None).device for path in (folder, mixture)] == ["cpu-torch", "cpu"]


@pytest.mark.filterwarnings("ignore:.*pre-tokenizer")
def test_a_card_that_can_refine_nothing_is_refused(small, tmp_path, monkeypatch):
    folder, refined = small
    mixture = expert_models.write_model(tmp_path / "moe", "qwen3moe")
    options = {"ftype": "Q8_0", "tensor_types": [("ffn_down_exps", "Q4_0")], "n_ctx": 64, "chunks": 8}
    with pytest.raises(ValueError, match="device=cpu-torch: refines no tensor of .* at these types. Give device=cpu"):
        ql.refine(mixture, tmp_path / "a.gguf", **options, **TORCH)
    monkeypatch.setattr(refinement, "card_bytes", lambda engine: 1000)
    with pytest.raises(ValueError, match="device_memory=1000, must be at least 0.00 GiB for a layer. Use device=cpu"):
        refined()
    assert not list(tmp_path.glob("*.gguf"))


def test_a_device_that_is_not_there_is_named(small, monkeypatch):
    _, refined = small
    with pytest.raises(ValueError, match=r"device=tpu, must be one of cpu, cuda, mps, cpu-torch in mode float"):
        refined(device="tpu")
    monkeypatch.setattr(seam, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"device=cuda: needs the package torch. Run: .*gpu"):
        refined(device="cuda")
