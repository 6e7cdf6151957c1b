"""The encoders as a compiler that fuses products with sums would build them.

C lets a compiler turn ``a * b + c`` into one operation that rounds once (a fused multiply-add), and many builds of
llama.cpp were made so. Their blocks are not those of `quantize`: where a level lies exactly between two codes, as the
largest weight's does in the first try of Q5_K's search (30.5 of 31), the last bit decides, and the search goes another
way. So nearly all of Q5_K's blocks differ, a third of Q2_K's, few of the other types'.

Here the same kernels are compiled once more with LLVM's permission to contract. On a processor without fused
multiply-add they give the bytes of `quantize`.
"""

from functools import cache
from types import CellType, FunctionType

import numpy as np
from numba.core.dispatcher import Dispatcher

from quantlab.quants.compiled import njit
from quantlab.quants.ggml_types import ggml_type, load, row_bytes

_KEPT = ("error_model", "forceinline", "parallel")  # options of a kernel that its fused twin has too


def quantize_fused(x: np.ndarray, qtype: str, imatrix: np.ndarray | None = None) -> np.ndarray:
    """Encode rows as a build of llama.cpp with fused multiply-adds would.

    Compilers differ in which product of ``a * b - c * d`` they fuse: up to two of a thousand blocks of GCC's build
    are not the ones given here.

    Parameters
    ----------
    x : np.ndarray [shape=(nrows, n_per_row), dtype=float32, C-contiguous, finite]
    qtype : str
        A type of `quantlab.quants.codebook.CODES`.
    imatrix : np.ndarray [shape=(n_per_row,), dtype=float32], optional

    Returns
    -------
    np.ndarray [shape=(nrows, row_bytes), dtype=uint8]

    Examples
    --------
    >>> quantize_fused(np.zeros((2, 256), np.float32), "Q4_K").shape
    (2, 144)
    """
    out = np.empty((len(x), row_bytes(qtype, x.shape[1])), np.uint8)
    record = ggml_type(qtype)
    if imatrix is not None and record.weighted_encoder:
        fused(load(record.weighted_encoder))(x, imatrix, out)
    else:
        fused(load(record.encoder))(x, out)
    return out


@cache
def fused(function):
    """Return `function`, and all kernels that it calls, compiled so that products and sums may be fused."""
    is_kernel = isinstance(function, Dispatcher)
    plain = function.py_func if is_kernel else function
    names = dict(plain.__globals__)
    for name in plain.__code__.co_names:
        names |= {name: _fused_kernel(names[name])} if name in names else {}
    cells = tuple(CellType(_fused_kernel(cell.cell_contents)) for cell in plain.__closure__ or ())
    twin = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, cells)
    twin.__qualname__ = f"fused_{plain.__qualname__}"  # names its file in numba's cache
    if not is_kernel:
        return twin
    options = {key: value for key, value in function.targetoptions.items() if key in _KEPT}
    return njit(cache=True, fastmath={"contract"}, **options)(twin)


def _fused_kernel(value):
    """Return a kernel's fused twin, or any other value unchanged."""
    return fused(value) if isinstance(value, Dispatcher) else value
