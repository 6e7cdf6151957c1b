"""The 16-bit floats F16 and BF16, two bytes per weight, rounded half to even; and the check that floats are finite.

Source: `ggml_compute_fp32_to_fp16` and `ggml_compute_fp32_to_bf16` of llama.cpp's ggml-impl.h.
"""

import numpy as np
from numba import prange

from quantlab.quants.lanes import (
    bits,
    from_bits,
    from_half,
    highest,
    kernel,
    lanes,
    load,
    maximum,
    parallel_kernel,
    store,
    to_half,
)

SPAN = 1 << 14  # weights that one thread takes at a time


@parallel_kernel
def all_finite(words):
    """Tell whether all float32 of an array (nrows, n_per_row), seen as uint32 `words`, are finite."""
    bad = 0
    for row in prange(words.shape[0]):
        largest = np.uint32(0)
        for i in range(words.shape[1]):
            largest = max(largest, words[row, i] & np.uint32(0x7FFFFFFF))
        bad += largest >= np.uint32(0x7F800000)
    return bad == 0


@kernel
def _to_brain(v):
    """The bfloat16 bits of finite floats."""
    return (bits(v) + 0x7FFF + ((bits(v) >> 16) & 1)) >> 16


@kernel
def _narrow(x, start, stop, brain, out):
    """Round floats start..stop; the last few go through an array of 16."""
    halves, last, last_halves = out.view(np.uint16), np.zeros(16, np.float32), np.zeros(16, np.uint16)
    whole = start + (stop - start) // 16 * 16
    for i in range(start, whole, 16):
        v = load(x, i)
        store(halves, i, _to_brain(v) if brain else to_half(v))
    last[: stop - whole] = x[whole:stop]
    v = load(last, 0)
    store(last_halves, 0, _to_brain(v) if brain else to_half(v))
    halves[whole:stop] = last_halves[: stop - whole]


@kernel
def _widen(data, start, stop, brain, out):
    """Convert halves start..stop to float32, the last few in an array of 16; return the largest bits without sign."""
    halves, last, last_floats = data.view(np.uint16), np.zeros(16, np.uint16), np.zeros(16, np.float32)
    whole = start + (stop - start) // 16 * 16
    largest = lanes(0)
    for i in range(start, whole, 16):
        h = load(halves, i)
        store(out, i, from_bits(h << 16) if brain else from_half(h))
        largest = maximum(largest, h & 0x7FFF)
    last[: stop - whole] = halves[whole:stop]
    h = load(last, 0)
    store(last_floats, 0, from_bits(h << 16) if brain else from_half(h))
    out[whole:stop] = last_floats[: stop - whole]
    return highest(maximum(largest, h & 0x7FFF))


@parallel_kernel
def encode_f16(x, out):
    """Encode float32 rows (nrows, n_per_row) into uint8 rows (nrows, row_bytes); too large becomes infinite."""
    x, out = x.reshape(-1), out.reshape(-1)
    for span in prange((x.size + SPAN - 1) // SPAN):
        _narrow(x, span * SPAN, min(span * SPAN + SPAN, x.size), False, out)


@parallel_kernel
def decode_f16(data, out):
    """Decode uint8 rows (nrows, row_bytes) into float32 rows (nrows, n_per_row); return whether all are finite."""
    data, out = data.reshape(-1), out.reshape(-1)
    bad = 0
    for span in prange((out.size + SPAN - 1) // SPAN):
        bad += _widen(data, span * SPAN, min(span * SPAN + SPAN, out.size), False, out) >= 0x7C00
    return bad == 0


@parallel_kernel
def encode_bf16(x, out):
    """Encode float32 rows (nrows, n_per_row) into uint8 rows (nrows, row_bytes)."""
    x, out = x.reshape(-1), out.reshape(-1)
    for span in prange((x.size + SPAN - 1) // SPAN):
        _narrow(x, span * SPAN, min(span * SPAN + SPAN, x.size), True, out)


@parallel_kernel
def decode_bf16(data, out):
    """Decode uint8 rows (nrows, row_bytes) into float32 rows (nrows, n_per_row); return whether all are finite."""
    data, out = data.reshape(-1), out.reshape(-1)
    bad = 0
    for span in prange((out.size + SPAN - 1) // SPAN):
        bad += _widen(data, span * SPAN, min(span * SPAN + SPAN, out.size), True, out) >= 0x7F80
    return bad == 0
