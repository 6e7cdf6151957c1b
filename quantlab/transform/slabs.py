"""Slabs: rows of a tensor that other threads read and process together, ahead of the consumer."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

from quantlab.files.model import LazyTensor
from quantlab.quants.arrays import PIECE

SLAB = 1 << 19  # weights: few enough to stay near the processor between reading, decoding and encoding
BATCH = 2 * SLAB  # weights, or more, that a thread takes at once


def row_ranges(tensor: LazyTensor) -> Iterator[tuple[int, int]]:
    """Yield the first row and end of each slab: rows of one expert, or several whole experts."""
    expert = tensor.shape[-2] if len(tensor.shape) > 2 else tensor.nrows
    n = max(1, SLAB // tensor.shape[-1])  # pyright: ignore[reportGeneralTypeIssues]
    if expert <= n:
        expert = n = n // expert * expert
    for first in range(0, tensor.nrows, expert):
        end = min(first + expert, tensor.nrows)
        for start in range(first, end, n):
            yield start, min(start + n, end)


def in_order(
    work: Callable[[Any], Any],
    items: Iterable,
    *,
    threads: int = 1,
    kernel_threads: int | None = None,
    ahead: int = 2,
) -> Generator:
    """Yield ``work(item)`` for each item in order, while other threads process the next ones.

    `work` is called in `threads` threads, and each kernel that it calls uses `kernel_threads` (default: all). Items are
    taken in the caller's thread, `ahead` more than results were yielded.

    Raises
    ------
    Exception
        What `work` raised, in the place of its result; what is under way ends first, the rest is dropped.
    """
    limit = None if kernel_threads is None else partial(_limit_kernels, kernel_threads)
    with ThreadPoolExecutor(threads, initializer=limit) as pool:
        pending: deque[Future] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def kernels_in_order(work: Callable[[Any], Any], items: Iterable, n_weights: Callable[[Any], int]) -> Generator:
    """Yield ``work(item)`` as `in_order` does, with numba's number of threads, for kernel-bound `work`.

    One thread that takes a slab from reading to encoding waits for nobody; threads that share a kernel wait for the
    slowest of them, slab after slab. To hand an item to a thread and its result back takes as long as a small tensor
    does, so they go in batches: `n_weights` says how large an item is. Under numba's simplest threading layer only one
    thread may call kernels: the caller's, which may have its own to call between two results.
    """
    import numba
    import numpy as np

    from quantlab.quants.floats import all_finite

    all_finite(np.zeros((1, 1), np.uint32))  # the first parallel kernel makes numba choose its layer
    if numba.threading_layer() == "workqueue":  # pyright: ignore[reportPrivateImportUsage]
        yield from map(work, items)
        return
    threads = numba.get_num_threads()
    batches = _batches(items, n_weights)
    taken = in_order(partial(_until_error, work), batches, threads=threads, kernel_threads=1, ahead=threads + 1)
    with closing(taken):
        for results, error in taken:
            yield from results
            if error is not None:
                raise error


def weights_in_flight(slab: int, threads: int) -> int:
    """Return the largest number of weights that `kernels_in_order` holds with slabs of `slab` weights."""
    batches = threads + 4  # in work or done, taken, the one before, and as much that is free but not given back
    return batches * (BATCH + slab) + threads * (slab + max(slab, PIECE))


def _batches(items: Iterable, n_weights: Callable[[Any], int]) -> Iterator[list]:
    """Yield batches of adjacent slabs with BATCH weights or more, at most three slabs each."""
    batch, n = [], 0
    for item in items:
        batch.append(item)
        n += n_weights(item)
        if n >= BATCH:
            yield batch
            batch, n = [], 0
    if batch:
        yield batch


def _until_error(work: Callable[[Any], Any], batch: list) -> tuple[list, Exception | None]:
    """Return the results of a batch up to the first error, and the error."""
    results: list = []
    try:
        for item in batch:
            results.append(work(item))
    except Exception as error:
        return results, error
    return results, None


def _limit_kernels(n: int) -> None:
    """Let kernels called from this thread use `n` threads."""
    import numba  # only here: reading alone needs no kernels

    numba.set_num_threads(n)
