"""What an encoding loses on an array: error measures, and which codes it uses."""

import json
from dataclasses import dataclass, field
from math import log10
from typing import NamedTuple

import numpy as np

from quantlab.quants.arrays import (
    PIECE,
    WEIGHTED,
    block_bytes,
    block_size,
    check_input,
    dequantize,
    float_pieces,
    quantize,
)


class _Bits(NamedTuple):
    """Where a type keeps `width` bits of every code: bytes start..stop of the block, in runs of `run` bytes; the
    lowest bits of a run's bytes belong to `run` neighbouring weights, the next bits to the next `run` weights."""

    start: int
    stop: int
    run: int
    width: int

    def take(self, blocks: np.ndarray) -> np.ndarray:
        """These bits of every weight, in the weights' order: uint8 (n_blocks, weights)."""
        runs = blocks[:, self.start : self.stop].reshape(len(blocks), -1, 1, self.run)
        shifts = np.arange(0, 8, self.width, dtype=np.uint8)[:, None]
        return (runs >> shifts & np.uint8((1 << self.width) - 1)).reshape(len(blocks), -1)


# type -> the places of its codes' bits, lowest bits first
_CODES = {
    "Q4_0": (_Bits(2, 18, 16, 4),),
    "Q4_1": (_Bits(4, 20, 16, 4),),
    "Q5_0": (_Bits(6, 22, 16, 4), _Bits(2, 6, 1, 1)),
    "Q5_1": (_Bits(8, 24, 16, 4), _Bits(4, 8, 1, 1)),
    "Q8_0": (_Bits(2, 34, 32, 8),),
    "Q2_K": (_Bits(16, 80, 32, 2),),
    "Q3_K": (_Bits(32, 96, 32, 2), _Bits(0, 32, 32, 1)),
    "Q4_K": (_Bits(16, 144, 32, 4),),
    "Q5_K": (_Bits(48, 176, 32, 4), _Bits(16, 48, 32, 1)),
    "Q6_K": (_Bits(0, 128, 64, 4), _Bits(128, 192, 32, 2)),
}


def code_histogram(data, qtype: str) -> np.ndarray:
    """Count how often each code is used: a type that leaves levels empty wastes bits.

    Parameters
    ----------
    data : np.ndarray [dtype=uint8]
        Encoded blocks, in any shape with whole blocks.
    qtype : str
        Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K or Q6_K.

    Returns
    -------
    np.ndarray [shape=(2**bits,), dtype=int64]
        Counts in the order of the codes' values (Q8_0: from -128 to 127).

    Raises
    ------
    ValueError
        If `qtype` has no codes of one width, or `data` is not whole blocks of uint8.

    Examples
    --------
    >>> code_histogram(quantize(np.full(256, -1, np.float32), "Q2_K"), "Q2_K").sum()
    np.int64(256)
    """
    if qtype not in _CODES:
        raise ValueError(f"qtype={qtype!r}, has no table of codes. Choose one of {', '.join(_CODES)}.")
    data = np.ascontiguousarray(data)
    if data.dtype != np.uint8 or data.size % block_bytes(qtype):
        raise ValueError(
            f"data: {data.size} of {data.dtype}, must be whole {qtype} blocks of {block_bytes(qtype)} uint8. "
            "Check the type of the tensor."
        )
    places = _CODES[qtype]
    counts = np.zeros(1 << sum(place.width for place in places), np.int64)
    blocks = data.reshape(-1, block_bytes(qtype))
    step = PIECE // block_size(qtype)
    for start in range(0, len(blocks), step):
        codes, shift = 0, 0
        for place in places:
            codes = codes | place.take(blocks[start : start + step]) << shift
            shift += place.width
        counts += np.bincount(codes.ravel(), minlength=len(counts))
    return np.roll(counts, 128) if qtype == "Q8_0" else counts


@dataclass(frozen=True)
class Errors:
    """What one encoding lost on one array.

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

    def _row(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "codes"}

    def to_frame(self):
        """Return one row with a column per measure, without the histogram."""
        import pandas as pd

        return pd.DataFrame([self._row()])

    def to_json(self) -> str:
        """Return `{"schema": 1, "protocol": {…}, "rows": [{…}]}`; an infinite `snr_db` becomes null."""
        row = self._row() | {"codes": self.codes.tolist()}
        if not np.isfinite(row["snr_db"]):
            row["snr_db"] = None
        return json.dumps({"schema": 1, "protocol": {"measure": "dequantize(quantize(x)) - x"}, "rows": [row]})

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False)


def errors(x, qtype: str, imatrix=None, *, name: str = "x") -> Errors:
    """Measure what quantizing an array loses.

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
    x = np.asarray(x)
    imatrix = None if imatrix is None else np.ascontiguousarray(imatrix)
    check_input(x, qtype, imatrix, name)
    if x.size == 0:
        raise ValueError(f"{name}: shape={x.shape}, must not be empty. There is nothing to measure.")
    noise = signal = largest = 0.0
    codes = np.zeros(0, np.int64)
    for _, columns, piece in float_pieces(x, block_size(qtype), imatrix is not None, name):
        data = quantize(piece, qtype, None if imatrix is None else imatrix[columns])
        difference = np.abs(dequantize(data, qtype, piece.shape) - piece)
        noise += float(np.square(difference, dtype=np.float64).sum())
        signal += float(np.square(piece, dtype=np.float64).sum())
        largest = max(largest, float(difference.max()))
        if qtype in _CODES:
            codes = code_histogram(data, qtype) + (codes if codes.size else 0)
    relative = (noise / signal) ** 0.5 if signal else 0.0
    return Errors(
        qtype=qtype,
        imatrix=imatrix is not None and qtype in WEIGHTED,
        n_weights=x.size,
        bpw=8 * block_bytes(qtype) / block_size(qtype),
        rmse=(noise / x.size) ** 0.5,
        max_abs=largest,
        relative=relative,
        snr_db=-20 * log10(relative) if relative else float("inf"),
        codes=codes,
    )
