"""ggml's own C functions from the package libggml-python, as reference for bytes and speed."""

import ctypes
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from quantlab import quants
from quantlab.quants.ggml_types import GGML_TYPES


class _Traits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]


@cache
def library() -> Any:
    """The library as ctypes opens it, or None."""
    spec = find_spec("libggml")
    if spec is None:
        return None
    found = sorted(Path(spec.submodule_search_locations[0]).glob("lib*/libggml-base.so"))  # pyright: ignore[reportOptionalSubscript]
    return open_library(found[0]) if found else None


def open_library(path: str | Path) -> ctypes.CDLL:
    """Open a libggml-base and describe its functions to ctypes."""
    ggml = ctypes.CDLL(str(path))
    ggml.ggml_version.restype = ctypes.c_char_p
    ggml.ggml_commit.restype = ctypes.c_char_p
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    ggml.ggml_fp16_to_fp32_row(np.zeros(1, np.uint16).ctypes, np.zeros(1, np.float32).ctypes, 1)  # makes its tables
    return ggml


def version() -> str:
    """Name the library: its package's version and ggml's own; empty if it is not installed."""
    if library() is None:
        return ""
    return f"libggml-python {metadata.version('libggml-python')} (ggml {library().ggml_version().decode()})"


def quantize(x, qtype, imatrix=None, out=None):
    """Encode float32 rows (nrows, n_per_row) with the C library; one thread."""
    # zeros: of a block of zeros quantize_row_q8_K_ref leaves the sums as they were
    out = np.zeros((len(x), quants.row_bytes(qtype, x.shape[1])), np.uint8) if out is None else out
    if GGML_TYPES[qtype].for_activations:  # not known to ggml_quantize_chunk
        function = getattr(library(), f"quantize_row_{qtype.replace('Q', 'q')}_ref")
        function(x.ctypes, out.ctypes, ctypes.c_int64(x.size))
    else:
        weights = None if imatrix is None else imatrix.ctypes.data
        number = GGML_TYPES[qtype].number
        library().ggml_quantize_chunk(number, x.ctypes.data, out.ctypes.data, 0, *x.shape, weights)
    return out


def dequantize(data, qtype, n_per_row, out=None):
    """Decode rows of bytes with the C library; one thread."""
    out = np.empty((len(data), n_per_row), np.float32) if out is None else out
    if qtype == "Q8_K":
        library().dequantize_row_q8_K(data.ctypes, out.ctypes, ctypes.c_int64(out.size))
    else:
        traits = library().ggml_get_type_traits(GGML_TYPES[qtype].number).contents
        traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out
