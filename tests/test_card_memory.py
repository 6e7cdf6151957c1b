"""The engine for graphics cards where memory runs out: smaller pieces, the same figures, nothing observed twice."""

import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import llama_models
import numpy as np
import pytest

import quantlab as ql
from quantlab.evaluate.engine import Stored, find
from quantlab.evaluate.imatrix import imatrix

torch = pytest.importorskip("torch", reason="the extra gpu is not installed", exc_type=ImportError)
from quantlab.evaluate.engine.card import layers, plan, products, scores  # noqa: E402
from quantlab.evaluate.engine.card.transfers import Transfers  # noqa: E402

TORCH = {"device": "cpu-torch", "progress": False}


def limited(of, most: int, taken: list):
    """Return `of`, out of memory where its first argument has more than `most` rows; `taken` gets their numbers."""

    def call(*args, **kwargs):
        taken.append(len(args[0]))
        if len(args[0]) > most:
            raise torch.OutOfMemoryError
        return of(*args, **kwargs)

    return call


def test_what_does_not_fit_is_done_in_smaller_pieces(monkeypatch, tmp_path):
    folder, options = llama_models.write_model(tmp_path / "llama2", "llama2"), dict(n_ctx=64, chunks=6, **TORCH)
    whole, taken = ql.compare(folder, ["Q4_0"], "primer", **options), []

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(layers.functional, "scaled_dot_product_attention", limited(attention, 2, taken))
    monkeypatch.setattr(scores.Prediction, "of", limited(scores.Prediction.of, 10, taken))
    pieces = ql.compare(folder, ["Q4_0"], "primer", **options)
    assert {6, 3, 1} < set(taken) and 10 > min(size for size in taken if size > 6) - 3
    for a, b in zip(whole.rows, pieces.rows, strict=True):
        assert a["ppl"] == pytest.approx(b["ppl"], rel=1e-6)
    monkeypatch.setattr(layers.functional, "scaled_dot_product_attention", limited(attention, 0, taken))
    with pytest.raises(MemoryError, match="device=cpu-torch: 1 chunks of 64 tokens do not fit into its memory. Give"):
        ql.compare(folder, ["Q4_0"], "primer", **options)


class Failing(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails to allocate at some of this thread's operations, in the words of one allocator or another."""

    WORDS = (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 7.64 GiB, other allocations: 68.91 GiB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.AcceleratorError("CUDA error: out of memory"),
    )

    def __init__(self, at=()):
        super().__init__()
        self.at, self.count, self.failed = set(at), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
            self.count += 1
            if self.count in self.at:
                self.failed += 1
                raise self.WORDS[self.failed % len(self.WORDS)]
        return out


@pytest.mark.parametrize("seed", range(4))
def test_memory_may_run_out_anywhere(monkeypatch, tmp_path, seed):
    """Wherever an allocation fails, in either thread, the figures are those of enough memory."""
    folder, options = llama_models.write_model(tmp_path / "llama2", "llama2"), dict(n_ctx=64, chunks=8, **TORCH)
    with Failing() as counting:
        whole = ql.compare(folder, ["Q4_0"], "primer", **options)
    rng, bring, brought = np.random.default_rng(seed), Transfers._bring, []

    def fails_at_times(self, *args):
        brought.append(args)
        if len(brought) in (3, 17 + seed):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return bring(self, *args)

    monkeypatch.setattr(Transfers, "_bring", fails_at_times)
    with Failing(rng.choice(counting.count, 3, replace=False)) as failing:
        found = ql.compare(folder, ["Q4_0"], "primer", **options)
    assert failing.failed == 3 and len(brought) > 17 + seed
    for a, b in zip(whole.rows, found.rows, strict=True):
        assert b["ppl"] == pytest.approx(a["ppl"], rel=1e-6)
        assert b.get("kld_mean", 0) == pytest.approx(a.get("kld_mean", 0), abs=1e-6)


class Full(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails as a card does whose memory is limited: as soon as tensors take more than `limit` bytes."""

    def __init__(self, limit=np.inf):
        super().__init__()
        self.limit, self.alive, self.peak, self.failed = limit, {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, torch.Tensor) and (storage := item.untyped_storage()).nbytes():
                if storage.data_ptr() not in self.alive:
                    weakref.finalize(storage, self.alive.pop, storage.data_ptr(), None)
                self.alive[storage.data_ptr()] = storage.nbytes()
        now = sum(self.alive.values())
        if now > self.limit:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.peak = max(self.peak, now)
        return out


def test_a_limit_is_met_by_smaller_pieces(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "measure", lambda *args: 1e9)  # takes more than this model
    folder, options = llama_models.write_model(tmp_path / "llama2", "llama2"), dict(n_ctx=64, chunks=8, **TORCH)
    with Full() as free:
        whole = ql.compare(folder, ["Q4_0"], "primer", **options)
    with Full(free.peak * 0.6) as full:
        found = ql.compare(folder, ["Q4_0"], "primer", **options)
    assert full.failed and full.peak <= 0.6 * free.peak
    for a, b in zip(whole.rows, found.rows, strict=True):
        assert b["ppl"] == pytest.approx(a["ppl"], rel=1e-6)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_memory_of_a_card_is_limited(monkeypatch, device):
    of, given, device = getattr(torch, device), [], torch.device(device)
    monkeypatch.setattr(of, "set_per_process_memory_fraction", given.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 80 << 30)
    monkeypatch.delenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", raising=False)
    before = 1.0 if device.type == "cuda" else 1.7
    with products.memory_limited(device, 20 << 30):
        assert given == [0.25]
    assert given.pop() == before and len(given) == 1
    with pytest.raises(KeyError), products.memory_limited(device, 200 << 30):
        raise KeyError
    assert given[1:] == [before, before]
    with products.memory_limited(device, None), products.memory_limited(torch.device("cpu"), 1):
        pass
    assert len(given) == 3
    monkeypatch.setenv("PYTORCH_MPS_HIGH_WATERMARK_RATIO", "0")  # no limit
    with products.memory_limited(device, 240 << 30):
        pass
    assert given[3:] == ([2.0, 0.0] if device.type == "mps" else [1.0, 1.0])


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_observed_twice_when_memory_runs_out(tmp_path, seed):
    folder = llama_models.write_model(tmp_path / "llama2", "llama2")
    options = dict(n_ctx=64, chunks=8, process_output=True, **TORCH)
    with Failing() as counting:
        whole = imatrix(folder, "primer", **options)
    with Failing(np.random.default_rng(seed).choice(counting.count, 2, replace=False)) as failing:
        found = imatrix(folder, "primer", **options)
    assert failing.failed == 2 and counting.count < failing.count
    for name, sums in whole.sums.items():
        np.testing.assert_allclose(found.sums[name], sums, rtol=1e-5)
        np.testing.assert_array_equal(found.counts[name], whole.counts[name])


def test_weights_that_do_not_fit_and_other_errors_end_in_one_line(monkeypatch):
    norm, matrix = (Stored(np.ones(shape, np.float32), "F32", shape) for shape in ((256,), (8, 256)))
    with find("float", "cpu-torch")(ql.open("tiny"), 40) as engine:
        for error, kind, match in (
            (
                torch.OutOfMemoryError("CUDA out of memory."),
                MemoryError,
                "cpu-torch: 1 layer's weights do not fit into",
            ),
            (RuntimeError("CUDA error: an illegal memory access"), RuntimeError, "an illegal memory access"),
        ):

            def fail(*args, error=error):
                raise error

            monkeypatch.setattr(engine.transfers, "_bring", fail)
            with pytest.raises(kind, match=match):
                engine.load_output(norm, matrix)
            assert not engine._lock.locked() and not engine._piece.locked()


def test_memory_that_cannot_be_pinned_is_used_unpinned(monkeypatch):
    """The failure would be reported again by the next kernel; that must not be one of the computation."""
    moved = Transfers(torch.device("cpu"))
    moved.is_cuda, reported = True, []
    cudart = SimpleNamespace(cudaHostRegister=lambda *args: 2, cudaHostUnregister=lambda *args: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)

    def reports(*args, **kwargs):
        reported.append(args)
        raise torch.AcceleratorError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "ones", reports)
    assert moved.pinned((3, 4)).shape == (3, 4) and reported and not moved._pinned
    cudart.cudaHostRegister = lambda *args: 0
    assert moved.pinned((3, 4)).shape == (3, 4) and len(moved._pinned) == 1
    moved.close()
    assert not moved._pinned


def test_settings_of_the_caller_come_back():
    """Also those of torch's newer way to allow tf32, which the older one refuses to read."""
    model = ql.open("tiny")
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        with find("float", "cpu-torch")(model, 40):
            assert settings.fp32_precision == "ieee"
        assert settings.fp32_precision == "tf32"
    finally:
        settings.fp32_precision = before


def test_cards_of_amd_widen_halves(monkeypatch):
    """torch multiplies halves into float32 only on NVIDIA's."""
    assert products.Products("half", torch.device("cuda")).is_native
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not products.Products("half", torch.device("cuda")).is_native


@pytest.mark.long
def test_the_table_of_a_card_is_printed_to_its_end():
    options = "--device cpu-torch --small --layers 2 --chunks 2 --variants 3 --model-chunks 1".split()
    command = [sys.executable, Path(__file__).parent / "bench_card.py", *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    for words in (
        "largest Δnll of a token",
        "mode float: float32",
        "mode half: half",
        "tokens/s",
        "share of the matrix",
    ):
        assert words in done.stdout
