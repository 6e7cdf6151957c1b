"""Error measures of an encoding on an array."""

from dataclasses import dataclass, field
from math import log10

import numpy as np
from numpy.typing import ArrayLike

from quantlab.quants.arrays import check_input, dequantize, float_pieces, quantize
from quantlab.quants.codebook import CODES, code_histogram
from quantlab.quants.ggml_types import WEIGHTED, ggml_type, type_name
from quantlab.result import Result


@dataclass(frozen=True)
class Errors(Result):
    """The errors of one encoding on one array.

    Attributes
    ----------
    qtype : str
        ggml type.
    imatrix : bool
        Whether an importance matrix weighted the encoding.
    n_weights : int
        Number of weights.
    bpw : float
        Bits per weight.
    rmse, max_abs : float
        Root mean square and largest absolute difference, in the weights' unit.
    relative : float
        rmse divided by the weights' root mean square; 0 for an array of zeros.
    snr_db : float
        Signal to noise ratio, -20 log10(relative), in dB; infinite where nothing was lost.
    codes : np.ndarray [dtype=int64]
        `code_histogram` of the encoded array; empty for types without one.
    """

    qtype: str
    imatrix: bool
    n_weights: int
    bpw: float
    rmse: float
    max_abs: float
    relative: float
    snr_db: float
    codes: np.ndarray = field(compare=False, repr=False)

    @property
    def rows(self) -> tuple[dict]:
        """Table of one row with all measures except the histogram."""
        return ({key: value for key, value in vars(self).items() if key != "codes"},)

    def _document(self) -> dict:
        return {"protocol": {"measure": "dequantize(quantize(x)) - x"}, "rows": [self]}


def errors(x: ArrayLike, qtype: str, imatrix: ArrayLike | None = None, *, name: str = "x") -> Errors:
    """Measure the errors of quantizing an array.

    Parameters
    ----------
    x, qtype, imatrix, name
        As for `quantize`.

    Returns
    -------
    Errors
        rmse, largest difference, relative error, signal to noise ratio in dB and code histogram.

    Raises
    ------
    ValueError
        As `quantize`, and if `x` is empty.

    Examples
    --------
    >>> errors(np.zeros(256, np.float32), "Q4_K").rmse
    0.0
    """
    x, qtype = np.asarray(x), type_name(qtype)
    imatrix = None if imatrix is None else np.ascontiguousarray(imatrix)
    check_input(x, qtype, imatrix, name)
    if x.size == 0:
        raise ValueError(f"{name}: shape={x.shape}, must not be empty. Give an array with values.")
    noise = signal = largest = 0.0
    codes = np.zeros(0, np.int64)
    for rows, columns, piece in float_pieces(x, ggml_type(qtype).block, imatrix is not None, name):
        weights = None if imatrix is None else imatrix[columns]
        data = quantize(piece, qtype, weights, name=name, first_row=rows.start)
        difference = np.abs(dequantize(data, qtype, piece.shape) - piece)
        noise += float(np.square(difference, dtype=np.float64).sum())
        signal += float(np.square(piece, dtype=np.float64).sum())
        largest = max(largest, float(difference.max()))
        if qtype in CODES:
            codes = code_histogram(data, qtype) + (codes if codes.size else 0)
    relative = (noise / signal) ** 0.5 if signal else 0.0
    return Errors(
        qtype=qtype,
        imatrix=imatrix is not None and qtype in WEIGHTED,
        n_weights=x.size,
        bpw=ggml_type(qtype).bpw,
        rmse=(noise / x.size) ** 0.5,
        max_abs=largest,
        relative=relative,
        snr_db=-20 * log10(relative) if relative else float("inf"),
        codes=codes,
    )
