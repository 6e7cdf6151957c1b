"""Speed of the kernels, compared with ggml's own and with this machine's memory bandwidth."""

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import llvmlite.binding
import numba
import numpy as np
import pandas as pd

from quantlab import quants
from quantlab.files.model import Model
from quantlab.lab import ggml_library
from quantlab.quants.compiled import config
from quantlab.quants.ggml_types import GGML_TYPES


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Let the kernels use `n` threads inside the block, and the former number after it.

    Raises
    ------
    ValueError
        If numba was started with fewer.
    """
    most, before = config.NUMBA_NUM_THREADS, numba.get_num_threads()
    if not 1 <= n <= most:
        raise ValueError(f"speed: threads={n}, must be 1 to {most}. Start with NUMBA_NUM_THREADS={n} for more.")
    numba.set_num_threads(n)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def machine() -> str:
    """Name the processor that the kernels are compiled for."""
    return f"{platform.machine()}, {config.CPU_NAME or llvmlite.binding.get_host_cpu_name()}"


def thread_counts() -> list[int]:
    """Return 1, 2, 4, … up to and including the number of numba's threads."""
    most = config.NUMBA_NUM_THREADS
    return sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})


def rows_of(model: Model, nrows: int, n_per_row: int = 4096) -> np.ndarray:
    """Take rows from a model's matrices in turn, and start again if they do not suffice.

    Returns
    -------
    np.ndarray [shape=(nrows, n_per_row), dtype=float32]
    """
    flat, wanted = [], nrows * n_per_row
    for tensor in model:
        if len(tensor.shape) == 2:
            flat.append(tensor.floats().ravel())
            if sum(map(len, flat)) >= wanted:
                break
    return np.resize(np.concatenate(flat), (nrows, n_per_row))


def pair(
    what: str, qtype: str, x: np.ndarray, n_threads: int, imatrix: np.ndarray | None = None
) -> tuple[Callable[[], object], Callable[[], object] | None]:
    """Make two functions for the same work, this package's and ggml's (None: the library is missing).

    ggml's functions handle one thread's rows; they are shared out among Python threads, which those functions let run.

    Parameters
    ----------
    what : str
        `encode` or `decode`.
    qtype : str
        A type with kernels of ours.
    x : np.ndarray [shape=(nrows, n_per_row), dtype=float32]
        The weights.
    n_threads : int
        For ggml; ours take what `threads` says.
    imatrix : np.ndarray [shape=(n_per_row,), dtype=float32], optional
        Weights of the errors, when encoding.
    """
    needs = not GGML_TYPES[qtype].encoder
    data = quants.quantize(x, qtype, np.ones(x.shape[1], np.float32) if needs else None)
    floats = np.empty_like(x)
    parts = [slice(len(x) * i // n_threads, len(x) * (i + 1) // n_threads) for i in range(n_threads)]
    pool = ThreadPoolExecutor(n_threads)

    def ours():
        if what == "decode":
            quants.dequantize(data, qtype, x.shape, out=floats)
        else:
            quants.quantize(x, qtype, imatrix)

    def part_of_theirs(part):
        if what == "decode":
            ggml_library.dequantize(data[part], qtype, x.shape[1], floats[part])
        else:
            ggml_library.quantize(x[part], qtype, imatrix, data[part])

    def theirs():
        list(pool.map(part_of_theirs, parts))

    return ours, theirs if ggml_library.library() else None


def rate(function: Callable[[], object], n: int, *, clock: Callable[[], float], seconds: float = 0.1) -> float:
    """Return a function's speed in million weights per second, from calls with `n` for `seconds`."""
    calls, start = 0, clock()
    while calls == 0 or clock() - start < seconds:
        function()
        calls += 1
    return calls * n / (clock() - start) / 1e6


def measure(
    qtypes: Iterable[str], x: np.ndarray, n_threads: Iterable[int], *, repetitions: int = 5, seconds: float = 0.05
) -> pd.DataFrame:
    """Measure the speed of encoding and decoding types, in turns with ggml's.

    Parameters
    ----------
    qtypes : iterable of str
        Types with kernels of ours.
    x : np.ndarray [shape=(nrows, n_per_row), dtype=float32]
        The weights; of types whose encoder searches, only the first sixteenth is encoded at a time.
    n_threads : iterable of int
        Numbers of threads. With one, processor time is taken, so that other programs do not count; else elapsed time.
    repetitions : int
        How often each pair is measured.
    seconds : float
        How long each measurement lasts at least.

    Returns
    -------
    pd.DataFrame
        A row per type, direction, number of threads and library: `type`, `what` (`encode`, `decode`), `threads`, `by`
        (`quantlab`, `ggml`), `speed` (million weights per second, the median), `spread` (half the distance between the
        quartiles).

    Raises
    ------
    ValueError
        If there are more threads than numba was started with.
    """
    rows = []
    for n in n_threads:
        for qtype in qtypes:
            for what in ("encode", "decode"):
                part = x[: len(x) // 16] if what == "encode" and qtype.endswith("_K") else x
                with threads(n):
                    speeds = _in_turns(pair(what, qtype, part, n), part.size, repetitions, _clock(n), seconds)
                rows += [
                    {"type": qtype, "what": what, "threads": n, "by": by, **_middle(v)} for by, v in speeds.items()
                ]
    return pd.DataFrame(rows)


def _in_turns(functions, n: int, repetitions: int, clock, seconds: float) -> dict[str, list[float]]:
    """Return the speeds of both functions, measured in turns (None: skip that one)."""
    named = {by: function for by, function in zip(("quantlab", "ggml"), functions, strict=True) if function}
    for function in named.values():
        function()  # compiles, fills caches
    speeds = {by: [] for by in named}
    for _ in range(repetitions):
        for by, function in named.items():
            speeds[by].append(rate(function, n, clock=clock, seconds=seconds))
    return speeds


def _middle(values: list[float]) -> dict[str, float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return {"speed": middle, "spread": (high - low) / 2}


def bandwidth(n_threads: int, *, mib: int = 256, repeats: int = 5) -> float:
    """Measure the memory's bandwidth: bytes per second, read and written together, of copying large arrays.

    Parameters
    ----------
    n_threads : int
        Threads that copy at once, each a part.
    mib : int
        MiB of the array; many times the caches.
    repeats : int
        The best one counts.
    """
    source = np.ones(mib << 18, np.float32)
    target = np.zeros_like(source)
    parts = [slice(len(source) * i // n_threads, len(source) * (i + 1) // n_threads) for i in range(n_threads)]
    clock, times = _clock(n_threads), []
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(repeats):
            start = clock()
            list(pool.map(lambda part: np.copyto(target[part], source[part]), parts))
            times.append(clock() - start)
    return 2 * source.nbytes / min(times)


def _clock(n_threads: int) -> Callable[[], float]:
    """Return the clock: processor time for one thread, so that other programs do not count; else elapsed time."""
    return time.process_time if n_threads == 1 else time.perf_counter
