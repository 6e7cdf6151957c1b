"""Sixteen numbers side by side: the numba types in which the quantizers are written.

A *lanes* value holds 16 float32, 16 int32 or 16 booleans (a mask). Arithmetic on it reads like arithmetic on one
number, is done on all 16 at once, and rounds each of them exactly as the scalar operation would: no reordering, no
fused multiply-add. So a kernel that gives every lane a block of its own computes what the scalar C loop computes, and
LLVM lowers it to AVX-512, AVX2, SSE or NEON, whichever the machine has.

Every function here also runs as plain Python over ``np.ndarray[16]``: with ``NUMBA_DISABLE_JIT=1`` a kernel gives the
same bytes, slowly.

    values          floats  lanes(np.float32(1))    ints  lanes(3)    masks  a < b
    operators       + - * / and comparisons on floats; + - * & | ^ << >> and comparisons on ints; & | ^ ~ on masks;
                    a plain number on either side stands for 16 equal ones
    functions       select minimum maximum absolute sqrt multiply_add any_lane all_lanes lane_bits first_lane total
                    lowest highest ordered_sum
    conversions     to_float to_int nearest_int bits from_bits to_half from_half
    memory          load store gather look_up scatter transpose; item put, of one number
"""

import os
from importlib import import_module
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import signature

from quantlab.quants.compiled import njit
from quantlab.quants.lane_memory import gather, item, load, look_up, put, scatter, store, transpose  # noqa: F401
from quantlab.quants.lane_types import (
    ELEMENTS,
    FLOATS,
    INT32,
    INTS,
    MASK,
    WIDTH,
    common_kind,
    operand,
    teach,
    vector,
    widen,
)


def _load_openmp() -> None:
    """Load numba's OpenMP layer, so that its threads sleep while they wait.

    Threads that spin take the cores from those that read and write; on a machine with other work they make a
    quantization ten times slower. GNU's OpenMP reads the variable once, when it is loaded. What loads its own later,
    such as torch, finds the variable as the user left it.
    """
    wanted = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = wanted or "passive"
    try:
        import_module("numba.np.ufunc.omppool")
    except ImportError:  # this numba has no OpenMP
        pass
    finally:
        if wanted is None:
            del os.environ["OMP_WAIT_POLICY"]


_load_openmp()

kernel = njit(cache=True, error_model="numpy")  # how every function over lanes is compiled
inlined_kernel = njit(cache=True, error_model="numpy", forceinline=True)  # for steps of one caller's inner loops
parallel_kernel = njit(cache=True, error_model="numpy", parallel=True, nogil=True)

ROUNDER = np.float32(12582912)  # 1.5 * 2**23: adding it rounds a small float to a whole number, half to even


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


def lanes(x) -> Any:
    """Repeat a number 16 times: an int gives ints, a bool a mask, anything else floats."""
    kind = np.bool_ if isinstance(x, (bool, np.bool_)) else np.int32 if isinstance(x, (int, np.integer)) else np.float32
    return np.full(WIDTH, x, kind)


def _lanes_typing(x):
    kind = common_kind(x)
    return kind and signature(kind, kind.dtype)


teach(lanes, _lanes_typing, lambda context, builder, sig, args: widen(builder, args[0], sig.args[0]))


def select(mask, a, b) -> Any:
    """Take `a` where the mask holds and `b` elsewhere, as C's ``mask ? a : b``."""
    return np.where(mask, a, b)


def _select_typing(mask, a, b):
    kind = common_kind(a, b)
    return signature(kind, MASK, operand(a, kind), operand(b, kind)) if kind and mask == MASK else None


def _select_lower(context, builder, sig, args):
    mask, a, b = [widen(builder, value, kind) for value, kind in zip(args, sig.args, strict=True)]
    return builder.select(mask, a, b)


teach(select, _select_typing, _select_lower)


def minimum(a, b) -> Any:
    """Return ``a < b ? a : b``: `b` when they are equal or one is NaN, as C's MIN does."""
    return np.where(a < b, a, b)


def maximum(a, b) -> Any:
    """Return ``a > b ? a : b``: `b` when they are equal or one is NaN, as C's MAX does."""
    return np.where(a > b, a, b)


def _pair_typing(a, b):
    kind = common_kind(a, b)
    return signature(kind, operand(a, kind), operand(b, kind)) if kind in (FLOATS, INTS) else None


def _choose_lower(sign):
    def lower(context, builder, sig, args):
        a, b = [widen(builder, value, kind) for value, kind in zip(args, sig.args, strict=True)]
        compare = builder.fcmp_ordered if sig.return_type == FLOATS else builder.icmp_signed
        return builder.select(compare(sign, a, b), a, b)

    return lower


teach(minimum, _pair_typing, _choose_lower("<"))
teach(maximum, _pair_typing, _choose_lower(">"))


def absolute(v) -> Any:
    """Clear the sign of floats."""
    return np.abs(v)


def sqrt(v) -> Any:
    """Return the square roots of floats, correctly rounded."""
    return np.sqrt(v)


def _call_lower(intrinsic):
    def lower(context, builder, sig, args):
        vector = args[0].type
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector]), intrinsic)
        return builder.call(function, args)

    return lower


def _from_to(source, result):
    return lambda v: signature(result, source) if v == source else None


teach(absolute, _from_to(FLOATS, FLOATS), _call_lower("llvm.fabs.v16f32"))
teach(sqrt, _from_to(FLOATS, FLOATS), _call_lower("llvm.sqrt.v16f32"))


def multiply_add(a, b, c):
    """Return ``a * b + c`` of floats, rounded once or twice, whichever is faster: for estimates, never for bytes."""
    return a * b + c


def _multiply_add_typing(a, b, c):
    kind = common_kind(a, b, c)
    return signature(kind, *[operand(v, kind) for v in (a, b, c)]) if kind == FLOATS else None


def _multiply_add_lower(context, builder, sig, args):
    values, kind = [widen(builder, *pair) for pair in zip(args, sig.args, strict=True)], vector(FLOATS)
    shape = ir.FunctionType(kind, [kind] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, shape, "llvm.fmuladd.v16f32"), values)


teach(multiply_add, _multiply_add_typing, _multiply_add_lower)


def any_lane(mask):
    """Tell whether the mask holds anywhere."""
    return bool(np.any(mask))


def all_lanes(mask):
    """Tell whether the mask holds everywhere."""
    return bool(np.all(mask))


def _mask_lower(sign, pattern):
    def lower(context, builder, sig, args):
        word = builder.bitcast(args[0], ir.IntType(WIDTH))
        return builder.icmp_unsigned(sign, word, ir.Constant(word.type, pattern))

    return lower


teach(any_lane, _from_to(MASK, types.boolean), _mask_lower("!=", 0))
teach(all_lanes, _from_to(MASK, types.boolean), _mask_lower("==", 2**WIDTH - 1))


def lane_bits(mask) -> Any:
    """Return an int whose bit `i` tells whether the mask holds in lane `i`."""
    return int(np.packbits(mask, bitorder="little").view(np.uint16)[0])


def _lane_bits_lower(context, builder, sig, args):
    return builder.zext(builder.bitcast(args[0], ir.IntType(WIDTH)), INT32)


teach(lane_bits, _from_to(MASK, types.int32), _lane_bits_lower)


def first_lane(mask):
    """Return the number of the first lane where the mask holds; 16 if there is none."""
    return int(np.argmax(mask)) if np.any(mask) else WIDTH


def _first_lane_lower(context, builder, sig, args):
    word = builder.zext(builder.bitcast(args[0], ir.IntType(WIDTH)), INT32)
    return builder.cttz(builder.or_(word, ir.Constant(INT32, 1 << WIDTH)), ir.Constant(ir.IntType(1), 1))


teach(first_lane, _from_to(MASK, types.int32), _first_lane_lower)


def total(v) -> Any:
    """Add the 16 ints."""
    return int(np.sum(v, dtype=np.int32))


def lowest(v) -> Any:
    """Return the smallest of 16 ints, or of 16 floats of which none is NaN."""
    return np.min(v) if v.dtype == np.float32 else int(np.min(v))


def highest(v) -> Any:
    """Return the largest of the 16 ints."""
    return int(np.max(v))


def _reduce_lower(operation):
    def lower(context, builder, sig, args):
        shape = ir.FunctionType(INT32, [vector(INTS)])
        name = f"llvm.vector.reduce.{operation}.v16i32"
        return builder.call(cgutils.get_or_insert_function(builder.module, shape, name), args)

    return lower


def _lowest_typing(v):
    return signature(v.dtype, v) if v in (FLOATS, INTS) else None


def _lowest_lower(context, builder, sig, args):
    if sig.args[0] == INTS:
        return _reduce_lower("smin")(context, builder, sig, args)
    shape, name = ir.FunctionType(ELEMENTS[FLOATS], [vector(FLOATS)]), "llvm.vector.reduce.fmin.v16f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, shape, name), args, fastmath=("nnan",))


teach(total, _from_to(INTS, types.int32), _reduce_lower("add"))
teach(lowest, _lowest_typing, _lowest_lower)
teach(highest, _from_to(INTS, types.int32), _reduce_lower("smax"))


def ordered_sum(v) -> Any:
    """Add the 16 floats, the first one first."""
    return np.cumsum(v, dtype=np.float32)[-1]


def _ordered_sum_lower(context, builder, sig, args):
    shape = ir.FunctionType(ELEMENTS[FLOATS], [ELEMENTS[FLOATS], vector(FLOATS)])
    add = cgutils.get_or_insert_function(builder.module, shape, "llvm.vector.reduce.fadd.v16f32")
    return builder.call(add, [ir.Constant(ELEMENTS[FLOATS], -0.0), args[0]])


teach(ordered_sum, _from_to(FLOATS, types.float32), _ordered_sum_lower)


# ---------------------------------------------------------------------------------------------------------------------
# Conversions
# ---------------------------------------------------------------------------------------------------------------------


def to_float(v) -> Any:
    """Convert ints to floats, as C's implicit conversion does."""
    return v.astype(np.float32)


def to_int(v) -> Any:
    """Convert floats below 2**31 in magnitude to ints, dropping the fraction, as a C cast does."""
    return v.astype(np.int32)


def bits(v) -> Any:
    """Return the 32 bits of floats as ints."""
    return v.view(np.int32)


def from_bits(v) -> Any:
    """Return the floats that have the given 32 bits."""
    return v.view(np.float32)


teach(to_float, _from_to(INTS, FLOATS), lambda c, b, sig, args: b.sitofp(args[0], vector(FLOATS)))
teach(to_int, _from_to(FLOATS, INTS), lambda c, b, sig, args: b.fptosi(args[0], vector(INTS)))
teach(bits, _from_to(FLOATS, INTS), lambda c, b, sig, args: b.bitcast(args[0], vector(INTS)))
teach(from_bits, _from_to(INTS, FLOATS), lambda c, b, sig, args: b.bitcast(args[0], vector(FLOATS)))


@kernel
def nearest_int(v) -> Any:
    """Round floats to the nearest int, half to even.

    Beyond ±4194303, where C's function of this name asserts, the result wraps as it does there; NaN gives 0.
    """
    return (bits(v + ROUNDER) & 0x007FFFFF) - 0x00400000


@kernel
def to_half(v) -> Any:
    """Return the float16 bits of floats, rounded half to even, as ints; too large gives infinity."""
    magnitude = bits(v) & 0x7FFFFFFF
    rebiased = magnitude - (112 << 23)
    normal = (rebiased + 0xFFF + ((rebiased >> 13) & 1)) >> 13
    # Below 2**-14 half floats are multiples of 2**-24: so are floats in [0.5, 1), and adding 0.5 does the rounding.
    tiny = bits(from_bits(magnitude) + np.float32(0.5)) - 0x3F000000
    finite = minimum(select(magnitude < (113 << 23), tiny, normal), 0x7C00)
    return select(magnitude > 0x7F800000, 0x7E00, finite) | ((bits(v) >> 16) & 0x8000)


@kernel
def from_half(h) -> Any:
    """Return the floats whose float16 bits are given as ints."""
    shifted = (h & 0x7FFF) << 13
    finite = bits(from_bits(shifted) * np.float32(2.0**112))  # exact, subnormal numbers included
    special = shifted | 0x7F800000
    return from_bits(select((h & 0x7C00) == 0x7C00, special, finite) | ((h & 0x8000) << 16))
