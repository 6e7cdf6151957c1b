"""Measure the kernels beside ggml's own: `make bench`.

Both run in this process, taking turns, on the same rows with the same number of threads; ggml's rows are shared out
among Python threads, which its functions let run. Figures are million weights per second, the median over the
repetitions ± half the distance between the quartiles: of processor time with one thread, so that other programs do not
count, and of elapsed time with more. Where libggml-python is not installed, ours stand alone. It
has another search for IQ1_M than llama.cpp today, so the mean over the I-quants leaves that type out.
`NUMBA_NUM_THREADS` limits the threads, `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` the instructions:

    NUMBA_CPU_NAME=x86-64-v3 NUMBA_CPU_FEATURES= NUMBA_CACHE_DIR=$(mktemp -d) python tests/bench_kernels.py
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import llvmlite.binding
import numba
import numpy as np

import quantlab as ql
from quantlab.files import bundled
from quantlab.lab import ggml_library, speed
from quantlab.quants.ggml_types import GGML_TYPES

WIDTH = 4096
LEGACY = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
K_TYPES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
I_TYPES = ["IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M"]
OTHERS = ["TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0"]
SEARCHED = {**dict.fromkeys(K_TYPES, 256), **dict.fromkeys(I_TYPES, 64)}  # rows of types that are searched for
MODES = ["plain", "imatrix", "decode"]
MANY = 4096  # rows of everything else


def normal_rows():
    """Rows of normal numbers, as large as weights are."""
    return (0.02 * np.random.default_rng(1).standard_normal((MANY, WIDTH))).astype(np.float32)


def real_rows():
    """Rows cut from the weights of SmolLM2 if it has been fetched, else of the bundled model; repeated to fill up."""
    try:
        model = ql.open(bundled.model_path("smollm2"))
    except FileNotFoundError:
        model = ql.open(bundled.model_path("tiny"))
    return f"Weights of {model.path.stem}", speed.rows_of(model, MANY, WIDTH)


def measure(mode, qtype, rows, imatrix, threads, repetitions):
    """Speeds of ours and of ggml's: two arrays, one value per repetition; the second is empty without the library."""
    x = rows[: SEARCHED.get(qtype, 256 if mode == "imatrix" else MANY) if mode != "decode" else MANY]
    ours, theirs = speed.pair(mode, qtype, x, threads, imatrix if mode == "imatrix" else None)
    ours()  # compiles
    if theirs and qtype in I_TYPES:
        theirs()  # makes tables, for some types in many seconds
    clock = time.process_time if threads == 1 else time.perf_counter
    speeds = [], []
    for _ in range(repetitions):
        speeds[0].append(speed.rate(ours, x.size, clock=clock))
        if theirs:
            speeds[1].append(speed.rate(theirs, x.size, clock=clock))
    return [np.array(s) for s in speeds]


def cell(speeds):
    low, middle, high = np.percentile(speeds, [25, 50, 75])
    digits = 0 if middle >= 100 else 1
    return f"{middle:.{digits}f} ± {(high - low) / 2:.{digits}f}"


def table(title, rows, imatrix, types, threads, repetitions):
    """Print one Markdown table and return {(mode, type): ratio of the medians}."""
    print(f"\n### {title}, {threads} thread{'s' * (threads > 1)}, million weights per second\n")
    head = [f"{mode}: ours | ggml | ratio" if ggml_library.library() else mode for mode in MODES]
    print(f"| type | {' | '.join(head)} |")
    print("|---" * (1 + len(" | ".join(head).split("|"))) + "|")
    ratios = {}
    for qtype in types:
        cells = [qtype]
        for mode in MODES:
            record = GGML_TYPES[qtype]
            if (mode == "plain" and not record.encoder) or (mode == "imatrix" and not record.weighted_encoder):
                cells += ["–"] * (3 if ggml_library.library() else 1)
                continue
            ours, theirs = measure(mode, qtype, rows, imatrix, threads, repetitions)
            cells.append(cell(ours))
            if len(theirs):
                ratios[mode, qtype] = np.median(ours) / np.median(theirs)
                cells += [cell(theirs), f"{ratios[mode, qtype]:.1f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    for name, group in (("Q2_K … Q6_K", K_TYPES), ("legacy", LEGACY), ("I-quants but IQ1_M", I_TYPES[:-1])):
        for mode in MODES:
            found = [ratio for (m, qtype), ratio in ratios.items() if m == mode and qtype in group]
            if found:
                mean = np.exp(np.mean(np.log(found)))
                print(f"\n{name}, {mode}: geometric mean {mean:.1f} times ggml, least {min(found):.1f}")
    return ratios


START = """
import sys, time
import numpy as np
start = time.perf_counter()
from quantlab import quants
x = np.ones((16, 256), np.float32)
for qtype in sys.argv[1:]:
    quants.dequantize(quants.quantize(x, qtype, x[0] if qtype.startswith("IQ") else None), qtype, x.shape)
print(time.perf_counter() - start)
"""


def start(types):
    """Print how long the first calls of a fresh process take, with and without compiled kernels on disk."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}

        def run(types):
            command = [sys.executable, "-c", START, *types]
            return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)

        print(f"\nEncoders and decoders of {len(types)} types, compiled and called: {run(types):.1f} s")
        first = {qtype: run([qtype]) for qtype in types}
        slowest = max(first, key=first.get)
        print(
            f"\nImport and first call of a type in a fresh process, compiled before: at most {first[slowest]:.2f} s",
            end="",
        )
        print(f" ({slowest})")


def main():
    parser = argparse.ArgumentParser(description="Measure the kernels beside ggml's own.")
    every = LEGACY + K_TYPES + I_TYPES + OTHERS
    parser.add_argument("--types", nargs="+", default=every, choices=every)
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, numba.config.NUMBA_NUM_THREADS}))
    parser.add_argument("--rows", nargs="+", default=["real", "normal"], choices=["real", "normal"])
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--start", action="store_true", help="measure compiling and first calls, too")
    arguments = parser.parse_args()

    theirs = ggml_library.version() or "no ggml"
    cpu = numba.config.CPU_NAME or llvmlite.binding.get_host_cpu_name()
    print(f"quantlab {ql.__version__}, numba {numba.__version__} for {cpu}; {theirs}; median ± half the quartiles'")
    print(f"distance of {arguments.repetitions} repetitions, rows of {WIDTH} weights, ours and ggml's in turns")
    imatrix = (np.random.default_rng(2).standard_normal(WIDTH) ** 2).astype(np.float32)
    for kind in arguments.rows:
        title, rows = real_rows() if kind == "real" else ("Normal numbers", normal_rows())
        for threads in arguments.threads:
            numba.set_num_threads(threads)
            table(title, rows, imatrix, arguments.types, threads, arguments.repetitions)
    if arguments.start:
        start(arguments.types)


if __name__ == "__main__":
    main()
