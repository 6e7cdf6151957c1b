"""transform/slabs.py: results in order, errors in their place, no thread left over, kernels where they may run."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import numba
import pytest

from quantlab.transform.slabs import SLAB, in_order, kernels_in_order

KERNELS_AT_ONCE = """
import numba, numpy as np
from quantlab.quants.floats import all_finite
from quantlab.transform.slabs import BATCH, kernels_in_order

x = np.zeros((64, 1 << 14), np.uint32)
found = [result and all_finite(x) for result in kernels_in_order(lambda _: all_finite(x), range(100), lambda _: BATCH)]
print(numba.threading_layer(), found.count(True))
"""


def in_batches(work, items):
    """As slabs and small tensors come: some of `items` are a slab, most are taken with their neighbours."""
    return kernels_in_order(work, items, lambda i: SLAB if i % 7 == 0 else SLAB // 5)


@pytest.mark.parametrize("take", [in_order, in_batches])
def test_results_come_in_order(take):
    assert list(take(lambda i: i * i, range(50))) == [i * i for i in range(50)]
    assert list(take(str, [])) == []


@pytest.mark.parametrize("take", [in_order, in_batches])
def test_an_error_comes_in_its_place_and_leaves_no_thread(take):
    before, seen = threading.active_count(), []
    with pytest.raises(ZeroDivisionError):
        for result in take(lambda i: 60 // (30 - i), range(1000)):
            seen.append(result)
    assert seen == [60 // (30 - i) for i in range(30)] and threading.active_count() == before


def test_who_stops_early_leaves_no_thread():
    before, results = threading.active_count(), in_order(str, range(1000), threads=3, ahead=9)
    assert next(results) == "0"
    results.close()
    assert threading.active_count() == before


def test_kernels_take_no_more_threads_than_the_caller_may():
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert set(in_batches(lambda _: numba.get_num_threads(), range(8))) == {1}
    finally:
        numba.set_num_threads(before)


@pytest.mark.parametrize("layer", ["workqueue", "omp"])
def test_under_every_threading_layer_the_caller_may_call_kernels_too(layer):
    environment = os.environ | {"NUMBA_THREADING_LAYER": layer, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, "-c", KERNELS_AT_ONCE], env=environment, capture_output=True, text=True, timeout=120
    )
    if "No threading layer could be loaded" in run.stderr:
        pytest.skip(f"numba has no layer {layer} here")
    assert run.stdout.split() == [layer, "100"], run.stderr
