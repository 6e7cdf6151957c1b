"""Numbers ↔ bytes: ggml's tensor encodings on NumPy arrays, byte for byte as llama.cpp writes them.

`ggml_types` holds a record per type; `arrays`, `codebook` and `losses` hold the functions below. `floats`, `legacy`,
`kquants`, `iq1` to `iq4`, `ternary` and `microscaling` hold one encoder and one decoder per type, written over the
vectors of `lanes`. `search` holds the searches for the best scale, `lattice` the search on the `grids` of the I-quants.
Nothing here knows of files.
"""

from quantlab.quants.arrays import dequantize, quantize, roundtrip
from quantlab.quants.codebook import code_histogram, codes, grid
from quantlab.quants.ggml_types import block_bytes, block_size, row_bytes, types
from quantlab.quants.losses import Errors, errors

__all__ = [
    "Errors",
    "block_bytes",
    "block_size",
    "code_histogram",
    "codes",
    "dequantize",
    "errors",
    "grid",
    "quantize",
    "roundtrip",
    "row_bytes",
    "types",
]


def __dir__() -> list[str]:
    return __all__
