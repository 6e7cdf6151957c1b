"""Memory of the machine and of this process."""

import os
import resource

import numpy as np
import pytest

from quantlab.evaluate.states import HiddenStates
from quantlab.files.machine import peak_memory, physical_memory


def test_memory_of_the_machine_and_of_this_process():
    assert physical_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**24 < peak_memory() < physical_memory()
    assert peak_memory() >= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("missing", ["preadv", "pwrite"])
def test_hidden_states_where_a_system_cannot_read_at_a_place(tmp_path, monkeypatch, missing):
    monkeypatch.delattr(os, missing)
    states, x = HiddenStates(2, 3, 4, 5, tmp_path), np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for variant in (0, 1):
        states.write(variant, slice(0, 3), x + variant)
    states.advance()
    np.testing.assert_array_equal(states.read(1, slice(1, 3)), x[1:] + 1)
    states.close(delete=True)
