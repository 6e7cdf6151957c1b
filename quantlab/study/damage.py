"""Damage of single changes of a model, measured in bundles: each is one pass, in any process.

A bundle holds changes that begin in neighbouring layers. Its pass computes the base and the starting point once, and
every change from its first layer on. A bundle is plain data, so that it can be measured in this process, in another, or
on another machine that sees the model's file.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
from threadpoolctl import ThreadpoolController
from tqdm.auto import tqdm

from quantlab.evaluate.engine import Choice
from quantlab.evaluate.forward_pass import ForwardPass
from quantlab.evaluate.metrics import TokenScores, mean_and_error
from quantlab.evaluate.protocol import Windows
from quantlab.evaluate.scores import ScoreTokens
from quantlab.evaluate.variants import Variant, as_is, steps
from quantlab.files.model import open as open_model
from quantlab.quants.compiled import config
from quantlab.study.damage_cache import DamageCache

PASSES = 8  # a bundle's changes cost as much as so many passes over the model: few enough to lose, many enough to share
CHANGES = 32  # of a bundle at most: each has hidden states of its own
ATTEMPTS = 3  # at a task whose worker was lost


@dataclass(frozen=True)
class Bundle:
    """The changes that are measured in one pass."""

    model: Path  # the base
    windows: Windows
    choice: Choice  # what it is computed with
    memory: str | int | None
    start: dict[str, str]  # tensor → type of the starting point that each change is a change of
    imatrix: Mapping[str, np.ndarray]  # weights per column
    refined: Path | None  # as for `Variant`
    changes: tuple[dict[str, str], ...]  # tensor → new type
    keys: tuple[dict, ...]  # what each change's damage is kept under
    cache: Path | None
    threads: int | None  # None takes numba's number

    def variants(self) -> list[Variant]:
        """Return the base, the starting point (if different), and one variant per change."""
        model = open_model(self.model)
        base = as_is(model)
        how = {"imatrix": self.imatrix, "refined": self.refined}
        starts = [Variant("start", model, self.start, **how)] if self.start != base.types else []
        changed = [Variant(str(i), model, self.start | c, **how) for i, c in enumerate(self.changes)]
        return [base, *starts, *changed]

    def measure(self, bar: tqdm | None = None) -> list[dict]:
        """Return the damage of each change, and store it in the cache."""
        variants, cache = self.variants(), DamageCache(self.cache)
        with threads(self.threads), self.choice(variants[0].model, self.windows.tokens.shape[1]) as engine:
            budget = engine.plan(variants, self.windows, self.memory, keep_states=False)
            base, *others = ForwardPass(variants, self.windows, engine, budget, bar).run(ScoreTokens())
            arithmetic = engine.arithmetic()
        start = others.pop(0) if len(others) > len(self.changes) else base
        found = [_damage(scores, start, base) | {"arithmetic": arithmetic} for scores in others]
        for key, damage in zip(self.keys, found, strict=True):
            cache.put(key, damage)
        return found


def _damage(scores: TokenScores, start: TokenScores, base: TokenScores) -> dict:
    """Return the figures of one change, with differences paired by token."""
    kld, kld_se = mean_and_error(scores.kld)
    ln_ratio, ln_ratio_se = mean_and_error(scores.nll - base.nll)
    delta, delta_se = mean_and_error(scores.kld - start.kld)
    start_kld, start_se = mean_and_error(start.kld)
    row = {"kld_mean": kld, "kld_se": kld_se, "ln_ratio": ln_ratio, "ln_ratio_se": ln_ratio_se}
    return row | {"delta_kld": delta, "delta_kld_se": delta_se, "start_kld_mean": start_kld, "start_kld_se": start_se}


@contextmanager
def threads(wanted: int | None):
    """Let numba use `wanted` threads for work from this thread (None: no change)."""
    before = numba.get_num_threads()
    numba.set_num_threads(min(wanted or before, config.NUMBA_NUM_THREADS))
    try:
        yield
    finally:
        numba.set_num_threads(before)


def cut(n_layer: int, first_layers: Sequence[int]) -> list[list[int]]:
    """Cut changes into bundles: their indices, those of the first layers first, as they take longest.

    `first_layers` is where each change begins to differ: 0 for the embeddings too, `n_layer` for the output alone.
    """
    bundles, work = [], 0
    for i in sorted(range(len(first_layers)), key=lambda i: (first_layers[i], i)):
        if not bundles or work >= PASSES * (n_layer + 1) or len(bundles[-1]) >= CHANGES:
            bundles, work = [*bundles, []], 0
        bundles[-1].append(i)
        work += n_layer + 1 - first_layers[i]
    return bundles


def perform(task, bar: tqdm | None = None) -> list[dict]:
    """Measure a task, as the function for an executor.

    BLAS is held to one thread: tasks may run side by side in a worker's process.
    """
    ThreadpoolController().limit(limits=1, user_api="blas")
    return task.measure(bar)


def run(tasks: Sequence, work: Sequence[int], executor: Executor | None, bar: tqdm) -> list[list[dict]]:
    """Measure tasks (anything with `measure`) here, or through an executor, and return the results in their order.

    `work` is how far each task moves the bar. A task whose worker was lost is given to another one.

    Raises
    ------
    OSError
        If the executor cannot go on, or a task lost its worker three times.
    """
    if executor is None:
        return [perform(task, bar) for task in tasks]
    found: list[Any] = [None] * len(tasks)
    pending = {}
    try:
        for i in range(len(tasks)):
            pending[executor.submit(perform, tasks[i])] = (i, 1)
        while pending:
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                i, attempt = pending.pop(future)
                try:
                    found[i] = future.result()
                    bar.update(work[i])
                except Exception as error:
                    if not _worker_was_lost(error) or attempt == ATTEMPTS:
                        raise
                    pending[executor.submit(perform, tasks[i])] = (i, attempt + 1)
    except Exception as error:
        if not _worker_was_lost(error):
            raise
        raise OSError(
            f"executor: {type(error).__name__}, a worker was lost and the executor cannot replace it. "
            "Finished measurements are cached; call again with a new executor."
        ) from error
    finally:
        for future in pending:
            future.cancel()
    return found


def _worker_was_lost(error: BaseException) -> bool:
    """Tell whether a task failed because its worker died (Dask's error is known by name)."""
    return isinstance(error, BrokenExecutor | CancelledError) or type(error).__name__ == "KilledWorker"


def work_of(bundle: Bundle) -> int:
    """Return a bundle's share of the progress bar: tokens times layers and outputs."""
    return steps(bundle.variants()) * bundle.windows.tokens.size
