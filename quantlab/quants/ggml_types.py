"""ggml types: one record per type, from which every list of types in the project follows.

To add a type, write its kernels into a module of this package and a record into `_RECORDS`. Sizes of rows, what can be
written, the table of types, plots, candidates of recipes and the command line's lists read the records. A record names
its kernels as "module:function", imported at first use: this module imports neither numba nor anything of files.

Source: ggml-common.h and `type_traits` of ggml.c for sizes, `tensor_type_fallback` and `tensor_requires_imatrix` of
llama-quant.cpp; llama.cpp, commit 0c1e57098.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import pandas as pd


class Family(NamedTuple):
    """Types built alike: their label, colour and marker in plots."""

    label: str
    colour: str
    marker: str


FAMILIES = {
    "k-quant": Family("k-quants (super-blocks of 256)", "#0072B2", "o"),
    "legacy": Family("legacy types (blocks of 32)", "#E69F00", "s"),
    "i-quant": Family("I-quants (codebooks)", "#009E73", "D"),
    "microscaling": Family("microscaling types (4-bit floats)", "#56B4E9", "^"),
    "low-bit": Family("types of one and two bits (one scale per block)", "#CC79A7", "v"),
    "float": Family("floats", "0.4", "P"),
    "integer": Family("integers", "0.6", "X"),
}


class Bits(NamedTuple):
    """The place of `width` bits of every code: bytes start..stop of the block, in runs of `run` bytes.

    The lowest bits of a run's bytes belong to `run` neighbouring weights, the next bits to the next `run` weights.
    """

    start: int
    stop: int
    run: int
    width: int


@dataclass(frozen=True)
class GgmlType:
    """One ggml type.

    Attributes
    ----------
    name : str
        ggml's name, such as "Q4_K".
    number : int
        ggml's number, as in GGUF files.
    block, nbytes : int
        Weights and bytes per block.
    family : str
        A key of `FAMILIES`.
    encoder, weighted_encoder : str
        Kernels (x, out) and (x, imatrix, out) for rows of float32; empty where there is none.
    decoder : str
        Kernel (data, out); empty: decoded by the gguf package, if that can.
    validator : str
        Function of `validate` that finds the blocks which llama.cpp refuses; empty: those with a half of `halves` that
        is not finite.
    needs_imatrix : bool
        Whether llama-quantize refuses the type without an importance matrix.
    fallback : str
        Type for rows that are not whole blocks; empty: F16.
    dtype : str
        NumPy's name for the numbers of a type without blocks.
    for_activations : bool
        Whether the type is only used for activations, never in files.
    halves : tuple of int
        Byte offsets of the block's float16 fields: scale, then minimum or scale of the minima.
    sub_block : int
        Weights that share a scale, where these are fewer than a block.
    codes : tuple of Bits
        Places of the codes' bits, lowest bits first; empty where codes differ in width or stand for several weights.
    levels : range or tuple of int
        What the codes stand for, in steps of a scale. A range: evenly spaced, with its offset. A tuple: a table.
    is_candidate : bool
        Whether `sensitivity` and `recipe` try the type unless told otherwise; types without blocks they never try.
    """

    name: str
    number: int
    block: int
    nbytes: int
    family: str
    encoder: str = ""
    weighted_encoder: str = ""
    decoder: str = ""
    validator: str = ""
    needs_imatrix: bool = False
    fallback: str = ""
    dtype: str = ""
    for_activations: bool = False
    halves: tuple[int, ...] = ()
    sub_block: int = 0
    codes: tuple[Bits, ...] = ()
    levels: Sequence[int] = ()
    is_candidate: bool = True

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.block

    @property
    def can_encode(self) -> bool:
        """True if the type has an encoder, with or without an importance matrix."""
        return bool(self.encoder or self.weighted_encoder)


def _kernels(module: str, name: str, *, plain: bool = True, weighted: bool = True) -> dict[str, Any]:
    """Name the kernels of a type whose functions have its name in theirs."""
    names = {"decoder": f"{module}:decode_{name}"}
    names |= {"encoder": f"{module}:encode_{name}"} if plain else {}
    return names | ({"weighted_encoder": f"{module}:encode_{name}_imatrix"} if weighted else {})


_TO_NIBBLES: dict[str, Any] = {"halves": (0,), "fallback": "IQ4_NL"}
_NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values
_RECORDS = (
    # plain numbers
    GgmlType(
        "F32", 0, 1, 4, "float", **_kernels("arrays", "f32", weighted=False), dtype="float32",
        validator="validate:float_not_finite",
    ),
    GgmlType(
        "F16", 1, 1, 2, "float", **_kernels("floats", "f16", weighted=False), dtype="float16",
        validator="validate:half_not_finite",
    ),
    GgmlType(
        "BF16", 30, 1, 2, "float", **_kernels("floats", "bf16", weighted=False), dtype="bfloat16",
        validator="validate:brain_not_finite",
    ),
    GgmlType("F64", 28, 1, 8, "float", dtype="float64", validator="validate:double_not_finite"),
    GgmlType("I8", 24, 1, 1, "integer", dtype="int8"),
    GgmlType("I16", 25, 1, 2, "integer", dtype="int16"),
    GgmlType("I32", 26, 1, 4, "integer", dtype="int32"),
    GgmlType("I64", 27, 1, 8, "integer", dtype="int64"),
    # blocks of 32
    GgmlType(
        "Q4_0", 2, 32, 18, "legacy", **_kernels("legacy", "q4_0"),
        halves=(0,), codes=(Bits(2, 18, 16, 4),), levels=range(-8, 8),
    ),
    GgmlType(
        "Q4_1", 3, 32, 20, "legacy", **_kernels("legacy", "q4_1"),
        halves=(0, 2), codes=(Bits(4, 20, 16, 4),), levels=range(16),
    ),
    GgmlType(
        "Q5_0", 6, 32, 22, "legacy", **_kernels("legacy", "q5_0"),
        halves=(0,), codes=(Bits(6, 22, 16, 4), Bits(2, 6, 1, 1)), levels=range(-16, 16),
    ),
    GgmlType(
        "Q5_1", 7, 32, 24, "legacy", **_kernels("legacy", "q5_1"),
        halves=(0, 2), codes=(Bits(8, 24, 16, 4), Bits(4, 8, 1, 1)), levels=range(32),
    ),
    GgmlType(
        "Q8_0", 8, 32, 34, "legacy", **_kernels("legacy", "q8_0", weighted=False),
        halves=(0,), codes=(Bits(2, 34, 32, 8),), levels=(*range(128), *range(-128, 0)),
    ),
    GgmlType(
        "Q8_1", 9, 32, 36, "legacy", **_kernels("legacy", "q8_1", weighted=False),
        for_activations=True, halves=(0, 2),
    ),
    # super-blocks of 256
    GgmlType(
        "Q2_K", 10, 256, 84, "k-quant", **_kernels("kquants", "q2_k"),
        fallback="Q4_0", halves=(80, 82), sub_block=16, codes=(Bits(16, 80, 32, 2),), levels=range(4),
    ),
    GgmlType(
        "Q3_K", 11, 256, 110, "k-quant", **_kernels("kquants", "q3_k"),
        fallback="Q4_0", halves=(108,), sub_block=16, codes=(Bits(32, 96, 32, 2), Bits(0, 32, 32, 1)),
        levels=range(-4, 4),
    ),
    GgmlType(
        "Q4_K", 12, 256, 144, "k-quant", **_kernels("q45_k", "q4_k"),
        fallback="Q5_0", halves=(0, 2), sub_block=32, codes=(Bits(16, 144, 32, 4),), levels=range(16),
    ),
    GgmlType(
        "Q5_K", 13, 256, 176, "k-quant", **_kernels("q45_k", "q5_k"),
        fallback="Q5_1", halves=(0, 2), sub_block=32, codes=(Bits(48, 176, 32, 4), Bits(16, 48, 32, 1)),
        levels=range(32),
    ),
    GgmlType(
        "Q6_K", 14, 256, 210, "k-quant", **_kernels("kquants", "q6_k"),
        fallback="Q8_0", halves=(208,), sub_block=16, codes=(Bits(0, 128, 64, 4), Bits(128, 192, 32, 2)),
        levels=range(-32, 32),
    ),
    GgmlType(
        "Q8_K", 15, 256, 292, "k-quant", **_kernels("kquants", "q8_k", weighted=False),
        validator="validate:float_not_finite", for_activations=True,
    ),
    # codebooks
    GgmlType(
        "IQ2_XXS", 16, 256, 66, "i-quant", **_kernels("iq2", "iq2_xxs", plain=False),
        needs_imatrix=True, sub_block=32, **_TO_NIBBLES,
    ),
    GgmlType(
        "IQ2_XS", 17, 256, 74, "i-quant", **_kernels("iq2", "iq2_xs", plain=False),
        needs_imatrix=True, sub_block=16, **_TO_NIBBLES,
    ),
    GgmlType(
        "IQ3_XXS", 18, 256, 98, "i-quant", **_kernels("iq3", "iq3_xxs"),
        needs_imatrix=True, sub_block=32, **_TO_NIBBLES,
    ),
    GgmlType(
        "IQ1_S", 19, 256, 50, "i-quant", **_kernels("iq1", "iq1_s", plain=False),
        needs_imatrix=True, sub_block=32, **_TO_NIBBLES,
    ),
    GgmlType(
        "IQ4_NL", 20, 32, 18, "i-quant", **_kernels("iq4", "iq4_nl"),
        halves=(0,), codes=(Bits(2, 18, 16, 4),), levels=_NONLINEAR,
    ),
    GgmlType("IQ3_S", 21, 256, 110, "i-quant", **_kernels("iq3", "iq3_s"), sub_block=32, **_TO_NIBBLES),
    GgmlType(
        "IQ2_S", 22, 256, 82, "i-quant", **_kernels("iq2", "iq2_s"), needs_imatrix=True, sub_block=16, **_TO_NIBBLES
    ),
    GgmlType(
        "IQ4_XS", 23, 256, 136, "i-quant", **_kernels("iq4", "iq4_xs"),
        sub_block=32, codes=(Bits(8, 136, 16, 4),), levels=_NONLINEAR, **_TO_NIBBLES,
    ),
    GgmlType(
        "IQ1_M", 29, 256, 56, "i-quant", **_kernels("iq1", "iq1_m"), validator="validate:spread_half_not_finite",
        needs_imatrix=True, fallback="IQ4_NL", sub_block=16,
    ),
    # three and fewer levels, 4-bit floats
    GgmlType(
        "TQ1_0", 34, 256, 54, "low-bit", **_kernels("ternary", "tq1_0", weighted=False), fallback="Q4_0", halves=(52,)
    ),
    GgmlType(
        "TQ2_0", 35, 256, 66, "low-bit", **_kernels("ternary", "tq2_0", weighted=False),
        fallback="Q4_0", halves=(64,), codes=(Bits(0, 64, 32, 2),), levels=range(-1, 3),
    ),
    GgmlType(
        "MXFP4", 39, 32, 17, "microscaling", **_kernels("microscaling", "mxfp4", weighted=False),
        validator="validate:power_is_nan",
        codes=(Bits(1, 17, 16, 4),), levels=_E2M1,
    ),
    GgmlType(
        "NVFP4", 40, 64, 36, "microscaling", **_kernels("microscaling", "nvfp4", weighted=False),
        sub_block=16, codes=(Bits(4, 36, 8, 4),), levels=_E2M1,
    ),
    GgmlType(
        "Q1_0", 41, 128, 18, "low-bit", **_kernels("ternary", "q1_0", weighted=False),
        halves=(0,), codes=(Bits(2, 18, 1, 1),), levels=(-1, 1),
    ),
    GgmlType(
        "Q2_0", 42, 64, 18, "low-bit", **_kernels("ternary", "q2_0", weighted=False),
        fallback="Q4_0", halves=(0,), codes=(Bits(2, 18, 1, 2),), levels=range(-1, 3),
    ),
)  # fmt: skip
GGML_TYPES = {record.name: record for record in _RECORDS}

# types with an encoder; those that files may have; those whose encoder minimizes an error that a matrix can weight
ENCODED = tuple(record.name for record in _RECORDS if record.can_encode)
WRITABLE = tuple(record.name for record in _RECORDS if record.can_encode and not record.for_activations)
WEIGHTED = tuple(record.name for record in _RECORDS if record.weighted_encoder)
FALLBACK = {record.name: record.fallback for record in _RECORDS if record.fallback}
CANDIDATES = tuple(
    record.name
    for record in sorted(_RECORDS, key=lambda record: record.bpw)
    if record.is_candidate and record.name in WRITABLE and record.block > 1
)


def ggml_type(qtype: str) -> GgmlType:
    """Look up the record of a type.

    Raises
    ------
    ValueError
        If `qtype` is not the name of a ggml type.
    """
    if qtype not in GGML_TYPES:
        base, _, size = str(qtype).upper().rpartition("_")
        remedy = "See quantlab.quants.types() for their names."
        if base in GGML_TYPES and size in ("S", "M", "L", "MOE"):
            remedy = f"That is a mixture of types for a whole file: name {base} here, or call quantlab.quantize."
        raise ValueError(f"qtype={qtype!r}, must be a ggml type. {remedy}")
    return GGML_TYPES[qtype]


def type_name(qtype: str) -> str:
    """Return ggml's name of a type that is given in any case.

    Raises
    ------
    ValueError
        If there is no such type.

    Examples
    --------
    >>> type_name("q4_k")
    'Q4_K'
    """
    name = str(qtype).upper()
    return name if name in GGML_TYPES else ggml_type(qtype).name


@cache
def load(function: str) -> Callable:
    """Import a function that a record names, "module:function"; the module, and numba with it, at first use."""
    module, name = function.split(":")
    return getattr(import_module(f"quantlab.quants.{module}"), name)


def block_size(qtype: str) -> int:
    """Return the number of weights per block of `qtype`: 256 for K types, 32 for legacy types, 1 for floats.

    Raises
    ------
    ValueError
        If `qtype` is not the name of a ggml type.
    """
    return ggml_type(type_name(qtype)).block


def block_bytes(qtype: str) -> int:
    """Return the number of bytes per block of `qtype`.

    Raises
    ------
    ValueError
        If `qtype` is not the name of a ggml type.
    """
    return ggml_type(type_name(qtype)).nbytes


def row_bytes(qtype: str, n_per_row: int, *, name: str = "x") -> int:
    """Return the number of bytes that a row of `n_per_row` weights takes in `qtype`.

    Raises
    ------
    ValueError
        If `qtype` is not the name of a ggml type, or a row is not a whole number of its blocks. The text starts
        with `name`.

    Examples
    --------
    >>> row_bytes("Q4_K", 4096)
    2304
    """
    record = ggml_type(type_name(qtype))
    if n_per_row % record.block:
        smaller = "a type with blocks of 32 (Q4_0, Q5_0, Q8_0), " if record.block > 32 and n_per_row % 32 == 0 else ""
        raise ValueError(
            f"{name}: n_per_row={n_per_row} is not a multiple of the {record.name} block size {record.block}. "
            f"Choose {smaller}F16 or BF16 for this tensor."
        )
    return n_per_row // record.block * record.nbytes


def can_decode(qtype: str) -> bool:
    """Tell whether `dequantize` knows a type: by a kernel of its own, or by the gguf package."""
    if ggml_type(qtype).decoder:
        return True
    from gguf.quants import _type_traits

    return qtype in {known.name for known in _type_traits}


def types() -> "pd.DataFrame":
    """Return the table of ggml types, one row per type.

    Returns
    -------
    pandas.DataFrame
        Index `type` (ggml name). Columns: `id` (number in GGUF files), `bpw` (bits per weight), `block` (weights per
        block), `bytes` (bytes per block), `can_encode`, `can_decode`, `uses_imatrix` (bool).

    Examples
    --------
    >>> float(types().loc["Q4_K", "bpw"])
    4.5
    """
    import pandas as pd

    rows = [
        {
            "type": record.name,
            "id": record.number,
            "bpw": record.bpw,
            "block": record.block,
            "bytes": record.nbytes,
            "can_encode": record.can_encode,
            "can_decode": can_decode(record.name),
            "uses_imatrix": bool(record.weighted_encoder),
        }
        for record in sorted(_RECORDS, key=lambda record: record.number)
    ]
    return pd.DataFrame(rows).set_index("type")
