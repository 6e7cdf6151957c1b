"""Speed of the evaluator: tokens per second, and the share of what BLAS reaches on this machine in the same run.

    python tests/bench_evaluator.py [MODEL [TEXT]] [--chunks N] [--llama-perplexity PATH]

With the path of a llama-perplexity it is run on the same files (GGUF only), and the ratio is printed.
"""

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

import quantlab as ql
from quantlab import quants
from quantlab.arch import Hparams
from quantlab.evaluate.engine import Stored, find
from quantlab.evaluate.engine.workers import Workers
from quantlab.evaluate.forward_pass import ForwardPass
from quantlab.evaluate.protocol import cut
from quantlab.evaluate.scores import ScoreTokens
from quantlab.evaluate.variants import as_is, resolve
from quantlab.files.bundled import model_path, read_text

EIGHT = ["Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"]
N_CTX = 512


def operations(hparams, tokens: int, scored: int) -> int:
    """Useful floating-point operations of a forward pass, attention to what comes before included."""
    q, kv = hparams.n_head * hparams.head_dim, hparams.n_head_kv * hparams.head_dim
    layer = hparams.n_embd * (2 * q + 2 * kv) + 3 * hparams.n_embd * hparams.n_ff + q * (N_CTX + 1)
    return 2 * (hparams.n_layer * layer * tokens + hparams.n_vocab * hparams.n_embd * scored)


def timed_pass(model, specs: list, text, chunks: int, mode: str) -> tuple[float, int, int]:
    """Seconds of one pass over a model and its variants, tokens, and operations of the base alone."""
    windows, _ = cut(text, model.vocab, n_ctx=N_CTX, chunks=chunks, name="llama.cpp", mode=mode, rules="current")
    variants = [as_is(model), *resolve(model, specs)]
    with find(mode)(model, N_CTX) as engine:
        plan = engine.plan(variants, windows, None, False)
        start = time.perf_counter()
        ForwardPass(variants, windows, engine, plan).run(ScoreTokens())
        return (
            time.perf_counter() - start,
            windows.tokens.size,
            operations(model.hparams, windows.tokens.size, windows.targets.size),
        )


def blas_peak(workers: Workers) -> float:
    """Operations per second that BLAS reaches at its best: a large product of its own for each thread."""
    a = [np.ones((512, 1024), np.float32) for _ in range(workers.n_threads)]
    b = np.ones((1024, 1024), np.float32)
    out = [np.empty((512, 1024), np.float32) for _ in a]
    best = np.inf
    for _ in range(10):
        start = time.perf_counter()
        workers.map(lambda i: [np.matmul(a[i], b.T, out=out[i]) for _ in range(4)], range(len(a)))
        best = min(best, time.perf_counter() - start)
    return 4 * len(a) * 2 * a[0].size * len(b) / best


class WideModel:
    """One layer of Llama-7B's shape, made up."""

    hparams = Hparams(arch="llama", n_vocab=32000, n_ctx=N_CTX, n_embd=4096, n_ff=11008, n_layer=1, n_head=32)

    def __init__(self, qtype: str):
        self._rng, self._qtype = np.random.default_rng(0), qtype

    def __contains__(self, name: str) -> bool:
        return False

    def read(self, name: str) -> Stored | None:
        """A tensor of the layer."""
        n_embd, n_ff = self.hparams.n_embd, self.hparams.n_ff
        if "norm" in name:
            return (
                Stored(np.ones(n_embd, np.float32), "F32", (n_embd,))
                if "_q_" not in name and "_k_" not in name
                else None
            )
        if name.endswith("bias"):
            return None
        shape = {"ffn_gate.weight": (n_ff, n_embd), "ffn_up.weight": (n_ff, n_embd), "ffn_down.weight": (n_embd, n_ff)}
        n_out, n_in = shape.get(name, (n_embd, n_embd))
        weights = self._rng.standard_normal((n_out, n_in), np.float32) / np.float32(n_in**0.5)
        if self._qtype == "F32":
            return Stored(weights, "F32", weights.shape)
        return Stored(quants.quantize(weights, self._qtype), self._qtype, weights.shape)


def wide_layer(mode: str, qtype: str = "F32") -> float:
    """Operations per second of one layer of Llama-7B's shape over four chunks."""
    model = WideModel(qtype)
    with find(mode)(model, N_CTX) as engine:
        layer, best = engine.load(model.read, 0), np.inf
        x = np.random.default_rng(1).standard_normal((4, N_CTX, model.hparams.n_embd), np.float32)
        for _ in range(3):
            start = time.perf_counter()
            engine.forward(layer, x)
            best = min(best, time.perf_counter() - start)
    return operations(model.hparams, 4 * N_CTX, 0) / best


def llama_perplexity(tool: str, model: Path, text, chunks: int, n_threads: int) -> float:
    """Tokens per second of llama-perplexity: what more chunks take beyond what a quarter of them takes."""
    few = max(1, chunks // 4)
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8", newline="") as file:
        file.write(text.text)
        file.flush()
        seconds = []
        for n in (few, chunks):
            command = [tool, "-m", model, "-f", file.name, "-c", N_CTX, "--chunks", n, "-t", n_threads]
            start = time.perf_counter()
            subprocess.run([str(part) for part in command], capture_output=True, check=True)
            seconds.append(time.perf_counter() - start)
    return (chunks - few) * N_CTX / (seconds[1] - seconds[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="tiny")
    parser.add_argument("text", nargs="?", default="primer")
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--mode", default="float")
    parser.add_argument("--llama-perplexity", metavar="PATH")
    parser.add_argument("--no-variants", action="store_true")
    options = parser.parse_args()
    path, text = model_path(options.model), read_text(options.text)
    model = ql.open(path)
    with Workers() as workers:
        timed_pass(model, [], text, 1, options.mode)  # compiles
        peak = blas_peak(workers)
        seconds, tokens, work = timed_pass(model, [], text, options.chunks, options.mode)
        peak = max(peak, blas_peak(workers))
        print(f"{workers.n_threads} threads, BLAS peak {peak / 1e9:.0f} GFLOP/s")
        speed = tokens / seconds
        reached = work / seconds
        print(f"{path.name}: {speed:.0f} tokens/s, {reached / 1e9:.0f} GFLOP/s, {reached / peak:.0%} of peak")
        wide = wide_layer(options.mode)
        print(f"4096-wide layer: {wide / 1e9:.0f} GFLOP/s, {wide / peak:.0%} of peak")
        if not options.no_variants:
            timed_pass(model, EIGHT, text, 1, options.mode)
            nine = timed_pass(model, EIGHT, text, options.chunks, options.mode)[0]
            print(
                f"base and {len(EIGHT)} variants: {nine:.1f} s, {nine / seconds:.2f} times the base's {seconds:.1f} s"
            )
    if options.llama_perplexity:
        theirs = llama_perplexity(options.llama_perplexity, path, text, options.chunks, workers.n_threads)
        print(f"llama-perplexity: {theirs:.0f} tokens/s; ours is {speed / theirs:.2f} times as fast")


if __name__ == "__main__":
    main()
