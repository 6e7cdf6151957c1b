"""Numbers ↔ bytes: ggml's tensor encodings on NumPy arrays, byte for byte as llama.cpp writes them.

`arrays` and `losses` hold the functions below; `floats`, `legacy` and `kquants` hold one encoder and one decoder per
type, written over the vectors of `lanes`; `search` holds the searches for the best scale. Nothing here knows of files.
"""

from quantlab.quants.arrays import block_bytes, block_size, dequantize, quantize, roundtrip, row_bytes, types
from quantlab.quants.losses import Errors, code_histogram, errors

__all__ = [
    "Errors",
    "block_bytes",
    "block_size",
    "code_histogram",
    "dequantize",
    "errors",
    "quantize",
    "roundtrip",
    "row_bytes",
    "types",
]
