"""Quantize and dequantize NumPy arrays.

An array is seen as rows, `(nrows, n_per_row)`; each row is a sequence of blocks, and a block of a type always takes
the same number of bytes. Work goes through the kernels piece by piece, a few MiB each, so that an array of any size
costs little more memory than its input and its output.
"""

import threading
from collections.abc import Iterator, Sequence
from math import prod
from typing import NoReturn

import ml_dtypes  # noqa: F401
import numpy as np
from numpy.typing import ArrayLike

from quantlab.quants.ggml_types import ENCODED, GGML_TYPES, GgmlType, can_decode, ggml_type, load, row_bytes, type_name

# dtype that an array may have -> its record; ml_dtypes makes bfloat16 known to NumPy
_FLOATS = {np.dtype(record.dtype): record for record in GGML_TYPES.values() if record.dtype and record.can_encode}
PIECE = 1 << 20  # weights that go through a kernel at once: 4 MiB of float32, which stay in the cache


# ---- arrays in pieces


def _as_rows(x: np.ndarray, n_per_row: int) -> Iterator[np.ndarray]:
    """`x` as views of shape (nrows, n_per_row), one view where strides allow it, else one per leading index."""
    if x.size == 0:
        return
    try:
        yield x.reshape(-1, n_per_row, copy=False)
    except ValueError:
        for part in x:
            yield from _as_rows(part, n_per_row)


def _pieces(nrows: int, n_per_row: int, block: int, whole_rows: bool) -> Iterator[tuple[slice, slice]]:
    """Row and column ranges of at most `PIECE` weights; columns are cut at blocks, and only in longer rows."""
    columns = n_per_row if whole_rows or n_per_row <= PIECE else PIECE // block * block
    rows = max(1, PIECE // max(1, columns))
    for r in range(0, nrows, rows):
        for c in range(0, n_per_row, columns):
            yield slice(r, min(r + rows, nrows)), slice(c, min(c + columns, n_per_row))


def _in_bytes(columns: slice, record: GgmlType) -> slice:
    """The bytes that a row keeps a range of columns in."""
    return slice(columns.start // record.block * record.nbytes, columns.stop // record.block * record.nbytes)


def check_input(x: np.ndarray, qtype: str, imatrix: np.ndarray | None, name: str) -> None:
    """Refuse a dtype, shape, type or importance matrix that does not fit the others."""
    record = ggml_type(qtype)
    if not record.can_encode:
        raise ValueError(f"{name}: qtype={qtype}, has no encoder. Choose one of {', '.join(ENCODED)}.")
    if imatrix is None and not record.encoder:
        raise ValueError(f"{name}: qtype={qtype}, needs an importance matrix. Pass one as imatrix.")
    if x.dtype not in _FLOATS:
        raise ValueError(
            f"{name}: dtype={x.dtype}, must be float32, float16 or bfloat16. Convert it with .astype(np.float32)."
        )
    if x.ndim == 0:
        raise ValueError(f"{name}: shape={x.shape}, must have at least one axis. Give whole rows.")
    row_bytes(qtype, x.shape[-1], name=name)
    if imatrix is None:
        return
    if imatrix.dtype != np.float32 or imatrix.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: imatrix is {imatrix.dtype} of shape {imatrix.shape}, must be float32 of shape {x.shape[-1:]}. "
            "Give one weight per column of this tensor."
        )
    bad = np.flatnonzero(~(np.isfinite(imatrix) & (imatrix >= 0)))
    if bad.size:
        raise ValueError(
            f"{name}: imatrix[{bad[0]}]={imatrix[bad[0]]}, must be finite and not negative. "
            "Collect the importance matrix again."
        )


def float_pieces(
    x: np.ndarray, block: int, whole_rows: bool, name: str, first_row: int = 0, check: bool = True
) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Row range, column range and contiguous float32 values of each piece of `x`, checked to be finite.

    The values of an array of halves are good until the next piece.
    """
    start = 0
    for rows_of_x in _as_rows(x, x.shape[-1]):
        for rows, columns in _pieces(len(rows_of_x), x.shape[-1], block, whole_rows):
            piece, is_finite = _floats(np.ascontiguousarray(rows_of_x[rows, columns]), check)
            rows = slice(start + rows.start, start + rows.stop)
            if check and not is_finite:
                _refuse(piece, name, first_row + rows.start, columns.start)
            yield rows, columns, piece
        start += len(rows_of_x)


def _floats(piece: np.ndarray, check: bool) -> tuple[np.ndarray, bool]:
    """Return a piece as float32, and whether it is finite (if checked); halves are decoded into `_scratch`."""
    if piece.dtype == np.float32:
        from quantlab.quants.floats import all_finite

        return piece, check and all_finite(piece.view(np.uint32))
    floats = _scratch(piece.shape)
    return floats, load(_FLOATS[piece.dtype].decoder)(piece.view(np.uint8), floats)


_own = threading.local()


def _scratch(shape: tuple[int, int]) -> np.ndarray:
    """Return this thread's reusable float32 memory: fresh pages cost more than decoding into them."""
    size = prod(shape)
    if size > PIECE:
        return np.empty(shape, np.float32)
    if not hasattr(_own, "floats"):
        _own.floats = np.empty(PIECE, np.float32)
    return _own.floats[:size].reshape(shape)


def _refuse(piece: np.ndarray, name: str, row: int, column: int) -> NoReturn:
    """Raise ValueError that names the first NaN or infinity of a piece beginning at `row`, `column`."""
    r, c = np.argwhere(~np.isfinite(piece))[0]
    raise ValueError(
        f"{name}: value={piece[r, c]} in row {row + r}, column {column + c}, must be finite. "
        "Check the checkpoint that it came from."
    )


def _output(out: np.ndarray | None, shape: tuple, dtype: type) -> np.ndarray:
    """Return a new array, or `out` if it fits."""
    if out is None:
        return np.empty(shape, dtype)
    if out.dtype != dtype or out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(
            f"out: {out.dtype} of shape {out.shape}, must be a writeable C-contiguous {np.dtype(dtype)} of shape "
            f"{shape}. Leave it out to get a new array."
        )
    return out


# ---- numbers ↔ bytes


def quantize(
    x: ArrayLike,
    qtype: str,
    imatrix: ArrayLike | None = None,
    *,
    name: str = "x",
    first_row: int = 0,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Encode the rows of an array in a ggml type, byte for byte as llama.cpp does.

    Parameters
    ----------
    x : np.ndarray [shape=(*lead, n_per_row), dtype=float32 | float16 | bfloat16, finite]
        The weights. Any strides.
    qtype : str
        ggml type, in any case; `can_encode` in `types()` tells which have an encoder.
    imatrix : np.ndarray [shape=(n_per_row,), dtype=float32, >= 0], optional
        Mean squared activation per column. As in llama.cpp, the types whose `uses_imatrix` in `types()` is False
        are encoded the same with and without. IQ2_XXS, IQ2_XS and IQ1_S cannot do without.
    name : str
        The tensor's name, for error messages.
    first_row : int
        Number of the first row in the tensor, for error messages.
    out : np.ndarray [shape=(*lead, row_bytes), dtype=uint8, C-contiguous], optional
        Where to write the result; untouched if a weight is not finite.

    Returns
    -------
    np.ndarray [shape=(*lead, row_bytes), dtype=uint8]

    Raises
    ------
    ValueError
        If `qtype` cannot be encoded here, or not without importance, `x` is of another dtype, has NaN or infinite
        values, values so large that the scale of a block becomes infinite, or rows that are not a multiple of the block
        size, `imatrix` has another length or dtype, or negative or non-finite values, or `out` does not fit. Values
        beyond F16's range become infinite in F16 without an error.

    Examples
    --------
    >>> quantize(np.ones((2, 256), np.float32), "Q4_K").shape
    (2, 144)

    Source: `ggml_quantize_chunk` of llama.cpp.
    """
    x, qtype = np.asarray(x), type_name(qtype)
    imatrix = None if imatrix is None else np.ascontiguousarray(imatrix)
    check_input(x, qtype, imatrix, name)
    record = GGML_TYPES[qtype]
    result = _output(out, (*x.shape[:-1], row_bytes(qtype, x.shape[-1])), np.uint8)
    whole_rows = imatrix is not None and bool(record.weighted_encoder)
    if out is not None:
        for _ in float_pieces(x, record.block, whole_rows, name, first_row):
            pass  # only checks: `out` stays as it is unless everything is finite
    data = result.reshape(prod(x.shape[:-1]), result.shape[-1])
    for rows, columns, piece in float_pieces(x, record.block, whole_rows, name, first_row, check=out is None):
        target = data[rows, _in_bytes(columns, record)]
        encode(piece, qtype, imatrix, target)
        _check_encoded(target, piece, qtype, name, first_row + rows.start, columns.start)
    return result


def _check_encoded(data: np.ndarray, x: np.ndarray, qtype: str, name: str, row: int, column: int) -> None:
    """Refuse blocks that overflowed; F16 becomes infinite as in NumPy."""
    if qtype not in ("F32", "F16"):
        from quantlab.quants.validate import check_encoded

        check_encoded(data, x, qtype, name=name, first_row=row, first_column=column)


def encode(x: np.ndarray, qtype: str, imatrix: np.ndarray | None, out: np.ndarray) -> None:
    """Encode contiguous rows of checked float32 into contiguous rows of bytes."""
    record = GGML_TYPES[qtype]
    if imatrix is not None and record.weighted_encoder:
        load(record.weighted_encoder)(x, imatrix, out)
    else:
        load(record.encoder)(x, out)


def _decode(data: np.ndarray, qtype: str, out: np.ndarray) -> None:
    """Decode contiguous rows of bytes into contiguous rows of float32."""
    if GGML_TYPES[qtype].decoder:
        load(GGML_TYPES[qtype].decoder)(data, out)
    else:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize as gguf_dequantize

        out[:] = gguf_dequantize(data, GGMLQuantizationType[qtype])


def encode_f32(x: np.ndarray, out: np.ndarray) -> None:
    """Copy rows of float32 (nrows, n_per_row) into uint8 rows (nrows, row_bytes)."""
    out[:] = x.view(np.uint8)


def decode_f32(data: np.ndarray, out: np.ndarray) -> None:
    """Copy uint8 rows (nrows, row_bytes) into float32 rows (nrows, n_per_row)."""
    out[:] = data.view(np.float32)


def dequantize(data: ArrayLike, qtype: str, shape: Sequence[int], *, out: np.ndarray | None = None) -> np.ndarray:
    """Decode bytes of a ggml type to float32.

    Parameters
    ----------
    data : np.ndarray [dtype=uint8]
        Encoded rows, in any shape with the right number of bytes.
    qtype : str
        ggml type.
    shape : tuple of int
        Shape of the result; the last axis is the row.
    out : np.ndarray [shape=shape, dtype=float32, C-contiguous], optional
        Where to write the result.

    Returns
    -------
    np.ndarray [shape=shape, dtype=float32]

    Raises
    ------
    ValueError
        If `qtype` cannot be decoded, `data` is not uint8 or has another number of bytes than `shape` needs, or `out`
        does not fit.

    Examples
    --------
    >>> dequantize(quantize(np.full(32, -8, np.float32), "Q4_0"), "Q4_0", (32,)).max()
    np.float32(-8.0)

    Source: `dequantize_row_*` of llama.cpp's ggml-quants.c.
    """
    data, qtype = np.asarray(data), type_name(qtype)
    shape = tuple(shape)
    record = ggml_type(qtype)
    if not can_decode(qtype):
        raise ValueError(f"data: qtype={qtype}, cannot be decoded. See quantlab.quants.types(), column can_decode.")
    if data.dtype != np.uint8:
        raise ValueError(f"data: dtype={data.dtype}, must be uint8. Pass array.view(np.uint8).")
    if not shape:
        raise ValueError(f"data: shape={shape}, must have at least one axis. Give whole rows.")
    n_bytes = row_bytes(qtype, shape[-1], name="data")
    nrows = prod(shape[:-1])
    if data.size != nrows * n_bytes:
        raise ValueError(
            f"data: size={data.size} bytes, must be {nrows * n_bytes} for shape {shape} in {qtype}. "
            "Check type and shape of the tensor."
        )
    result = _output(out, shape, np.float32)
    data = np.ascontiguousarray(data).reshape(nrows, n_bytes)
    values = result.reshape(nrows, shape[-1])
    for rows, columns in _pieces(nrows, shape[-1], record.block, whole_rows=False):
        source = data[rows, _in_bytes(columns, record)]
        _decode(source, qtype, values[rows, columns])
    return result


def roundtrip(
    x: ArrayLike, qtype: str, imatrix: ArrayLike | None = None, *, name: str = "x", out: np.ndarray | None = None
) -> np.ndarray:
    """Quantize an array and decode it again: `dequantize(quantize(x))`, without keeping the bytes.

    Parameters
    ----------
    x, qtype, imatrix, name
        As for `quantize`.
    out : np.ndarray [shape=x.shape, dtype=float32, C-contiguous], optional
        Where to write the result; `x` itself is allowed. Untouched if a weight is not finite.

    Returns
    -------
    np.ndarray [shape=x.shape, dtype=float32]

    Raises
    ------
    ValueError
        As `quantize`.

    Examples
    --------
    >>> roundtrip(np.linspace(-1, 1, 32, dtype=np.float32), "Q8_0").shape
    (32,)
    """
    x, qtype = np.asarray(x), type_name(qtype)
    imatrix = None if imatrix is None else np.ascontiguousarray(imatrix)
    check_input(x, qtype, imatrix, name)
    result = _output(out, x.shape, np.float32)
    record = GGML_TYPES[qtype]
    whole_rows = imatrix is not None and bool(record.weighted_encoder)
    if out is not None:
        for _ in float_pieces(x, record.block, whole_rows, name):
            pass  # only checks
    values = result.reshape(prod(x.shape[:-1]), x.shape[-1])
    for rows, columns, piece in float_pieces(x, record.block, whole_rows, name, check=out is None):
        data = np.empty((len(piece), row_bytes(qtype, piece.shape[1])), np.uint8)
        encode(piece, qtype, imatrix, data)
        _check_encoded(data, piece, qtype, name, rows.start, columns.start)
        _decode(data, qtype, values[rows, columns])
    return result
