"""Threads of the CPU engines.

Work is cut into blocks of rows. Each block is done by one thread from start to end, in compiled loops without the GIL;
BLAS, where it is at work, has one thread. No two thread pools compete for the cores, and the result does not depend on
how many there are.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import get_num_threads
from threadpoolctl import ThreadpoolController


class Workers:
    """Threads that process blocks of rows, each with single-threaded BLAS and its own scratch memory.

    Use as a context manager. The number of threads is numba's (`NUMBA_NUM_THREADS`, `numba.set_num_threads`).
    """

    def __init__(self):
        self.n_threads = get_num_threads()
        self._own = threading.local()

    def __enter__(self) -> "Workers":
        self._blas = ThreadpoolController().limit(limits=1, user_api="blas")
        self._blas.__enter__()
        self._pool = ThreadPoolExecutor(self.n_threads)
        return self

    def __exit__(self, *exc) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._blas.__exit__(*exc)

    def map(self, task: Callable, items: Iterable) -> list:
        """Call task(item) for every item on the threads, and raise the first error."""
        return list(self._pool.map(task, items))

    def scratch(self, name: str, *shape: int, dtype: type = np.float32) -> np.ndarray:
        """Return this thread's uninitialized array of `shape` for `name`, in place of the last one."""
        size = int(np.prod(shape))
        flat = getattr(self._own, name, None)
        if flat is None or flat.size < size or flat.dtype != dtype:
            flat = np.empty(size, dtype)
            setattr(self._own, name, flat)
        return flat[:size].reshape(shape)


def blocks(stop: int, size: int, start: int = 0) -> list[slice]:
    """Cut range(start, stop) into slices of `size`, the last one shorter."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]
