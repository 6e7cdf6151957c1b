"""Blocks of 32 weights: Q4_0 Q4_1 Q5_0 Q5_1 Q8_0, Q8_1 for activations, and the 16-bit floats."""

import numpy as np
from numba import njit, prange

_INFINITY = np.uint32(0x7F800000)


@njit(parallel=True, cache=True)
def all_finite(bits):
    """Whether no float32 of an array (nrows, n_per_row) is NaN or infinite; `bits` is the array viewed as uint32."""
    bad = 0
    for row in prange(bits.shape[0]):
        largest = np.uint32(0)
        for i in range(bits.shape[1]):
            largest = max(largest, bits[row, i] & np.uint32(0x7FFFFFFF))
        bad += largest >= _INFINITY
    return bad == 0
