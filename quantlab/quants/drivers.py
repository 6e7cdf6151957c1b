"""Drivers over arrays: encoders and decoders made from a type's kernel for a few blocks.

Blocks never cross the end of a row, so an array is one sequence of blocks. A *span* of them is what one task of a
parallel loop takes: a multiple of 16 blocks, so that only the last span of an array can leave lanes empty.
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
from numba import prange

from quantlab.quants.grids import grid, words
from quantlab.quants.lanes import parallel_kernel

QK_K = 256  # weights of a super-block
SPAN = 1 << 15  # weights that one task of a parallel loop handles
NO_WEIGHTS = np.empty(0, np.float32)  # stands for no importance matrix


# ---- templates: `_span` is a type's own kernel, `_block` its weights per block; `_driver` sets both

_span: Any
_block: int


def _encode(x, importance, out):
    x, out = x.reshape(-1), out.reshape(-1)
    n, span = x.size // _block, SPAN // _block  # noqa: F821
    for k in prange((n + span - 1) // span):
        _span(x, importance, out, k * span, min(k * span + span, n))  # noqa: F821


def _decode(data, out):
    data, out = data.reshape(-1), out.reshape(-1)
    n, span = out.size // _block, SPAN // _block  # noqa: F821
    for k in prange((n + span - 1) // span):
        _span(data, out, k * span, min(k * span + span, n))  # noqa: F821


def _encode_on_grid(x, importance, grid, kind, out):
    x, out = x.reshape(-1), out.reshape(-1)
    n, span = x.size // _block, SPAN // _block  # noqa: F821
    for k in prange((n + span - 1) // span):
        _span(x, importance, grid, kind, out, k * span, min(k * span + span, n))  # noqa: F821


def _decode_on_grid(data, words, kind, out):
    data, out = data.reshape(-1), out.reshape(-1)
    n, span = out.size // _block, SPAN // _block  # noqa: F821
    for k in prange((n + span - 1) // span):
        _span(data, words, kind, out, k * span, min(k * span + span, n))  # noqa: F821


def _driver(template: FunctionType, span, block: int = QK_K) -> Callable:
    """Compile a template around a type's kernel.

    The kernel is a global of the copy, not a closure's cell, which numba's cache could not know again in another
    process. The copy is filed under the kernel's module, so that an edit there is noticed.
    """
    of = getattr(span, "py_func", span)  # without the compiler, a kernel is its function
    code = template.__code__.replace(co_filename=of.__code__.co_filename, co_firstlineno=of.__code__.co_firstlineno)
    copy = FunctionType(code, template.__globals__ | {"_span": span, "_block": block}, of.__name__)
    copy.__qualname__ = f"{template.__name__}{of.__name__}"
    copy.__module__ = of.__module__
    return parallel_kernel(copy)


# ---- what types are made with


def encoders(span, *, block: int = QK_K, unweighted: np.ndarray | None = None) -> tuple[Callable, Callable]:
    """Make a type's encoders from its kernel.

    Parameters
    ----------
    span : kernel (x, importance, out, start, stop)
        Encodes blocks start..stop of a flat array.
    block : int
        Weights of a block.
    unweighted : np.ndarray, optional
        Passed as `importance` where there is no matrix. With None the kernel is compiled apart for that case.

    Returns
    -------
    encode : function (x, out)
        Fills uint8 rows (nrows, row_bytes) from float32 rows (nrows, n_per_row).
    encode_imatrix : function (x, importance, out)
        The same, errors of column j weighted with `importance[j]`.
    """
    encode = _driver(_encode, span, block)

    def encode_plain(x, out):
        encode(x, unweighted, out)

    return encode_plain, encode


def decoder(span, *, block: int = QK_K) -> Callable:
    """Make a type's decoder (data, out) from a kernel (data, out, start, stop) for a span of blocks."""
    return _driver(_decode, span, block)


def on_grid(encode_span, decode_span) -> Callable:
    """Make a maker of encoder, weighted encoder and decoder for types that share kernels and differ in their grid.

    Parameters
    ----------
    encode_span : kernel (x, importance, grid, kind, out, start, stop)
        Encodes super-blocks start..stop; importance may be empty.
    decode_span : kernel (data, words, kind, out, start, stop)

    Returns
    -------
    function (qtype, kind)
        `qtype` names the grid, `kind` tells the kernels which of their types it is.
    """
    encode, decode = _driver(_encode_on_grid, encode_span), _driver(_decode_on_grid, decode_span)

    def functions(qtype: str, kind: int) -> tuple[Callable, Callable, Callable]:
        return (
            lambda x, out: encode(x, NO_WEIGHTS, grid(qtype), kind, out),
            lambda x, importance, out: encode(x, importance, grid(qtype), kind, out),
            lambda data, out: decode(data, words(qtype), kind, out),
        )

    return functions
