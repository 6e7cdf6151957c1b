"""A graphics card's table: differences from the CPU, speed at a published shape, share of the card's peak, memory.

    python tests/bench_card.py [--device cuda] [--shape llama-7b] [--model tiny smollm2] [--chunks 32] [--layers N]

Weights of the shape are made as they are read, on one thread: nothing is downloaded, and the disk stays empty. The time
of 655 chunks and all layers follows from a few layers and chunks; this is said where it is printed. To see that
everything runs, without a card: `--device cpu-torch --small`.
"""

import argparse
import tempfile
import time
import warnings
from pathlib import Path

import numba
import numpy as np
import torch
from bench_evaluator import N_CTX, operations
from scale import stand_in, write_config

import quantlab as ql
from quantlab.evaluate.engine import find
from quantlab.evaluate.engine.card.products import PRECISIONS, synchronize
from quantlab.evaluate.forward_pass import ForwardPass
from quantlab.evaluate.perplexity import measure
from quantlab.evaluate.protocol import Windows, cut
from quantlab.evaluate.scores import ScoreTokens
from quantlab.evaluate.variants import Weights, as_is, resolve
from quantlab.files import bundled
from quantlab.study.tables import FTYPES
from quantlab.transform.plan import parse_bytes

WHOLE = 655  # chunks of WikiText-2's test split in Llama's tokens
SMALL = dict(n_embd=256, n_ff=512, n_head=4, n_head_kv=4)  # of a shape that a CPU computes
GIB = 1 << 30


def scores(model, choice, specs, chunks: int) -> list:
    """Scores of a model and some ftypes on the primer."""
    options = dict(n_ctx=N_CTX, chunks=chunks, name="llama.cpp", mode=choice.mode, rules="current")
    windows, record = cut(bundled.read_text("primer"), model.vocab, **options)
    return measure([as_is(model), *resolve(model, specs)], windows, record, choice, None, None, False, ScoreTokens())


def differences(name: str, device: str, chunks: int, device_memory: str | None) -> None:
    """Print what the precisions of a device change of a real model's figures, compared with the CPU's float."""
    model = ql.open(bundled.model_path(name))
    exact, chosen = scores(model, find("float"), ["Q8_0"], chunks), find("float", device).precision
    kld = exact[1].kld.mean()
    print(f"\n{name}, {exact[0].nll.size} tokens; mode float is {chosen} here; kld_mean on the CPU {kld:.3e}")
    print("products   largest Δnll of a token   Δln(ppl)   Q8_0: kld_mean")
    for precision in PRECISIONS:
        choice = find("half" if precision == "half" else "float", device)
        choice = type(choice)(**vars(choice) | {"options": {**choice.options, "precision": precision}})
        found = scores(model, choice, ["Q8_0"], chunks)
        change = found[0].nll - exact[0].nll
        print(f"{precision:10} {abs(change).max():24.1e} {abs(change.mean()):10.1e} {found[1].kld.mean():16.3e}")
    if device_memory is not None:
        whole, less = (
            scores(model, find("float", device, memory), ["Q8_0"], chunks) for memory in (None, device_memory)
        )
        change = max(abs(a.nll - b.nll).max() for a, b in zip(whole, less, strict=True))
        print(f"--device-memory {device_memory}: largest Δnll {change:.1e}")


def peak(device: torch.device, precision: str) -> float:
    """Operations per second of a card's own large product, the best of some sizes; halves are multiplied once."""
    best, dtype = 0.0, torch.float32 if precision == "float32" or device.type != "cuda" else torch.float16
    for side in (4096, 8192) if device.type == "cuda" else (512, 1024):
        x = torch.ones(side, side, device=device, dtype=dtype)
        more = {} if dtype == torch.float32 else {"out_dtype": torch.float32}
        for _ in range(6):  # the first one starts the library
            synchronize(device)
            start = time.perf_counter()
            torch.mm(x, x.T, **more)
            synchronize(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def layer_seconds(model, variants, choice, chunks: int) -> tuple[float, float]:
    """Seconds in which one variant's layer 0 is computed for some chunks, and in which all variants' are made."""
    states = np.random.default_rng(0).standard_normal((chunks, N_CTX, model.hparams.n_embd), np.float32)
    with choice(model, N_CTX) as engine:
        weights, best = Weights(model, variants), np.inf
        for _ in range(2):  # the first time kernels are compiled or loaded
            weights.forget()
            start = time.perf_counter()
            for variant in variants:
                layer = engine.load(lambda name, v=variant: weights.get(v, f"blk.0.{name}"), 0)
            making = time.perf_counter() - start
        on_device = engine.transfers.fetch(states)
        for _ in range(3):
            synchronize(engine.device)
            start = time.perf_counter()
            engine.forward(layer, on_device)
            synchronize(engine.device)
            best = min(best, time.perf_counter() - start)
    return best, making


def timed_pass(model, variants, windows, choice) -> tuple[list, list[float], object]:
    """Token scores of a pass, the seconds of embedding, of each layer and of the output, and its plan."""
    with choice(model, N_CTX) as engine:
        plan = engine.plan(variants, windows, None, False)
        if engine.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        moments = [time.perf_counter()]
        running = ForwardPass(variants, windows, engine, plan)
        advance = running.states.advance
        running.states.advance = lambda: (advance(), moments.append(time.perf_counter()))
        found = running.run(ScoreTokens())
        return found, np.diff([*moments, time.perf_counter()]).tolist(), plan


def speed(options, mode: str) -> None:
    """Print the speed of a shape's table in one mode, and what a limit of the card's memory changes."""
    shape = bundled.shape(options.shape)
    n_layer, shape = shape["n_layer"], shape | dict(n_layer=options.layers) | (SMALL if options.small else {})
    stand_in(shape)
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, 259, (options.chunks, N_CTX)).astype(np.int32)
    windows = Windows(tokens, tokens[:, N_CTX // 2 + 1 :], N_CTX // 2)
    choice = find(mode, options.device)
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), shape)
        model = ql.open(folder)
        ftypes = [name for name in FTYPES if name not in ("F16", "F32")][: options.variants - 1]
        variants = [as_is(model), *resolve(model, ftypes, rules="2023-12")]
        computing, making = layer_seconds(model, variants, choice, options.chunks)
        found, seconds, plan = timed_pass(model, variants, windows, choice)
        best = peak(torch.device(options.device.removesuffix("-torch")), choice.precision)
        work = operations(model.hparams, tokens.size, 0) / options.layers
        each = len(variants) * computing * WHOLE / options.chunks
        ends = (seconds[0] + seconds[-1]) * WHOLE / options.chunks
        whole = n_layer * max(each, making) + ends + making
        once = WHOLE * N_CTX / (n_layer * computing * WHOLE / options.chunks + ends / len(variants))
        products = 3 if choice.precision == "halves" else 1
        print(f"\n{options.shape}{', small' if options.small else ''}, mode {mode}: {choice.precision}, {plan}")
        print(
            f"base and {len(ftypes)} ftypes, {options.layers} of {n_layer} layers, {options.chunks} of {WHOLE} chunks"
        )
        print("seconds: embedding, layers, output  " + " ".join(f"{s:.2f}" for s in seconds))
        print(f"a layer: {computing:.3f} s computed for one variant, {making:.2f} s made for all variants")
        print(f"extrapolated to all layers and chunks: {once:.0f} tokens/s of one variant, {whole / 60:.1f} minutes")
        print(f"share of the matrix peak ({best / 1e12:.2f} TFLOP/s): {products * work / computing / best:.0%}")
        if options.device == "cuda":
            limited_pass(model, variants, windows, options, mode, found, plan)


def limited_pass(model, variants, windows, options, mode: str, found: list, plan) -> None:
    """Print what a pass allocated, and what one does that has less of the card's memory."""
    print(f"allocated: {torch.cuda.max_memory_allocated() / GIB:.2f} of {plan.device_memory / GIB:.2f} GiB planned")
    share = parse_bytes(options.device_memory) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    choice = find(mode, options.device, options.device_memory)
    less, seconds, plan = timed_pass(model, variants, windows, choice)
    torch.cuda.set_per_process_memory_fraction(1.0)
    change = max(abs(a.nll - b.nll).max() for a, b in zip(found, less, strict=True))
    print(f"--device-memory {options.device_memory}, with no more to be had: {plan}")
    print(f"largest Δnll {change:.1e}, {sum(seconds):.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", nargs="*", default=["tiny"], help="models whose figures are compared with the CPU's")
    parser.add_argument("--model-chunks", type=int, default=29)
    parser.add_argument("--shape", default="llama-7b")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--variants", type=int, default=17, help="the base included")
    parser.add_argument("--modes", nargs="*", default=["float", "half"])
    parser.add_argument("--device-memory", default="22GiB")
    parser.add_argument("--small", action="store_true", help="narrow layers, for a CPU")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*the vocabulary differs")  # from that of a made checkpoint
    choice = find("float", options.device)
    print(f"{choice.hardware or options.device}, torch {torch.__version__}, {numba.get_num_threads()} threads")
    for name in options.model:
        memory = options.device_memory if options.device == "cuda" else None
        differences(name, options.device, options.model_chunks, memory)
    for mode in options.modes:
        speed(options, mode)


if __name__ == "__main__":
    main()
