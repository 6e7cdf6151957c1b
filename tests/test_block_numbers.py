"""The numbers in the blocks: out of the bytes, and back to the same bytes."""

import numpy as np
import pytest

from quantlab import quants
from quantlab.quants.block_numbers import GRIDS, pack, unpack
from quantlab.quants.ggml_types import block_bytes, block_size


@pytest.mark.parametrize("qtype", GRIDS)
def test_random_bytes_come_back_and_mean_what_the_decoder_says(qtype, rng):
    data = rng.integers(0, 256, (8, 512 // block_size(qtype) * block_bytes(qtype)), dtype=np.uint8)
    blocks = unpack(data, qtype)
    assert np.array_equal(pack(blocks), data)
    with np.errstate(invalid="ignore", over="ignore"):
        decoded, values = quants.dequantize(data, qtype, (8, 512)), blocks.values()
    finite = np.isfinite(decoded)
    assert finite.mean() > 0.8
    assert np.array_equal(values[finite], decoded[finite])


def test_levels_of_a_table_have_edges_between_them():
    grid = GRIDS["IQ4_NL"]
    assert len(grid.edges) == 15 and (np.diff(grid.edges) > 0).all()
    assert (grid.levels[:-1] < grid.edges).all() and (grid.edges < grid.levels[1:]).all()
    assert GRIDS["Q4_K"].edges.size == 0
