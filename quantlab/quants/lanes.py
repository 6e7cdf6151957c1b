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
    functions       select minimum maximum absolute sqrt any_lane all_lanes lane_bits total lowest highest
                    ordered_sum
    conversions     to_float to_int nearest_int bits from_bits to_half from_half
    memory          load store gather look_up scatter transpose
"""

import os
from importlib import import_module

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import signature

from quantlab.quants.compiled import njit
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


def lanes(x):
    """Repeat a number 16 times: an int gives ints, a bool a mask, anything else floats."""
    kind = np.bool_ if isinstance(x, (bool, np.bool_)) else np.int32 if isinstance(x, (int, np.integer)) else np.float32
    return np.full(WIDTH, x, kind)


def _lanes_typing(x):
    kind = common_kind(x)
    return kind and signature(kind, kind.dtype)


teach(lanes, _lanes_typing, lambda context, builder, sig, args: widen(builder, args[0], sig.args[0]))


def select(mask, a, b):
    """Take `a` where the mask holds and `b` elsewhere, as C's ``mask ? a : b``."""
    return np.where(mask, a, b)


def _select_typing(mask, a, b):
    kind = common_kind(a, b)
    return signature(kind, MASK, operand(a, kind), operand(b, kind)) if kind and mask == MASK else None


def _select_lower(context, builder, sig, args):
    mask, a, b = [widen(builder, value, kind) for value, kind in zip(args, sig.args, strict=True)]
    return builder.select(mask, a, b)


teach(select, _select_typing, _select_lower)


def minimum(a, b):
    """Return ``a < b ? a : b``: `b` when they are equal or one is NaN, as C's MIN does."""
    return np.where(a < b, a, b)


def maximum(a, b):
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


def absolute(v):
    """Clear the sign of floats."""
    return np.abs(v)


def sqrt(v):
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


def lane_bits(mask):
    """Return an int whose bit `i` tells whether the mask holds in lane `i`."""
    return int(np.packbits(mask, bitorder="little").view(np.uint16)[0])


def _lane_bits_lower(context, builder, sig, args):
    return builder.zext(builder.bitcast(args[0], ir.IntType(WIDTH)), INT32)


teach(lane_bits, _from_to(MASK, types.int32), _lane_bits_lower)


def total(v):
    """Add the 16 ints."""
    return int(np.sum(v, dtype=np.int32))


def lowest(v):
    """Return the smallest of the 16 ints."""
    return int(np.min(v))


def highest(v):
    """Return the largest of the 16 ints."""
    return int(np.max(v))


def _reduce_lower(operation):
    def lower(context, builder, sig, args):
        shape = ir.FunctionType(INT32, [vector(INTS)])
        name = f"llvm.vector.reduce.{operation}.v16i32"
        return builder.call(cgutils.get_or_insert_function(builder.module, shape, name), args)

    return lower


teach(total, _from_to(INTS, types.int32), _reduce_lower("add"))
teach(lowest, _from_to(INTS, types.int32), _reduce_lower("smin"))
teach(highest, _from_to(INTS, types.int32), _reduce_lower("smax"))


def ordered_sum(v):
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


def to_float(v):
    """Convert ints to floats, as C's implicit conversion does."""
    return v.astype(np.float32)


def to_int(v):
    """Convert floats below 2**31 in magnitude to ints, dropping the fraction, as a C cast does."""
    return v.astype(np.int32)


def bits(v):
    """Return the 32 bits of floats as ints."""
    return v.view(np.int32)


def from_bits(v):
    """Return the floats that have the given 32 bits."""
    return v.view(np.float32)


teach(to_float, _from_to(INTS, FLOATS), lambda c, b, sig, args: b.sitofp(args[0], vector(FLOATS)))
teach(to_int, _from_to(FLOATS, INTS), lambda c, b, sig, args: b.fptosi(args[0], vector(INTS)))
teach(bits, _from_to(FLOATS, INTS), lambda c, b, sig, args: b.bitcast(args[0], vector(INTS)))
teach(from_bits, _from_to(INTS, FLOATS), lambda c, b, sig, args: b.bitcast(args[0], vector(FLOATS)))


@kernel
def nearest_int(v):
    """Round floats to the nearest int, half to even.

    Beyond ±4194303, where C's function of this name asserts, the result wraps as it does there; NaN gives 0.
    """
    return (bits(v + ROUNDER) & 0x007FFFFF) - 0x00400000


@kernel
def to_half(v):
    """Return the float16 bits of floats, rounded half to even, as ints; too large gives infinity."""
    magnitude = bits(v) & 0x7FFFFFFF
    rebiased = magnitude - (112 << 23)
    normal = (rebiased + 0xFFF + ((rebiased >> 13) & 1)) >> 13
    # Below 2**-14 half floats are multiples of 2**-24: so are floats in [0.5, 1), and adding 0.5 does the rounding.
    tiny = bits(from_bits(magnitude) + np.float32(0.5)) - 0x3F000000
    finite = minimum(select(magnitude < (113 << 23), tiny, normal), 0x7C00)
    return select(magnitude > 0x7F800000, 0x7E00, finite) | ((bits(v) >> 16) & 0x8000)


@kernel
def from_half(h):
    """Return the floats whose float16 bits are given as ints."""
    shifted = (h & 0x7FFF) << 13
    finite = bits(from_bits(shifted) * np.float32(2.0**112))  # exact, subnormal numbers included
    special = shifted | 0x7F800000
    return from_bits(select((h & 0x7C00) == 0x7C00, special, finite) | ((h & 0x8000) << 16))


# ---------------------------------------------------------------------------------------------------------------------
# Memory: flat arrays of float32, int32, (u)int16 or (u)int8; narrow ones are widened to ints and cut back to low bits
# ---------------------------------------------------------------------------------------------------------------------

_WHOLE = types.int32, types.uint16, types.int16, types.uint8, types.int8
_LOADED = {types.float32: FLOATS, **dict.fromkeys(_WHOLE, INTS)}


def load(array, i):
    """Read ``array[i : i + 16]``."""
    return gather(array, i, 1)


def gather(array, i, step):
    """Read the 16 elements ``array[i + step * lane]``."""
    values = array[i : i + step * (WIDTH - 1) + 1 : step]
    return values.astype(np.float32 if array.dtype == np.float32 else np.int32)


def look_up(table, v):
    """Read ``table[v]`` of a table of 16 bytes, 0 ≤ v < 16 in each lane."""
    return table[v].astype(np.int32)


def store(array, i, v):
    """Write 16 elements to ``array[i : i + 16]``."""
    scatter(array, i, 1, v)


def scatter(array, i, step, v):
    """Write 16 elements to ``array[i + step * lane]``."""
    array[i : i + step * (WIDTH - 1) + 1 : step] = v.astype(array.dtype)


def transpose(source, rows, i, target, j):
    """Read 16 floats from each of 16 rows and write them column by column.

    ``target[j + 16 * column + row] = source[rows[row] + i + column]``
    """
    columns = np.stack([source[row + i : row + i + WIDTH] for row in rows])
    target[j : j + WIDTH * WIDTH] = columns.T.reshape(-1)


def _is_flat(array, dtypes):
    return isinstance(array, types.Array) and array.ndim == 1 and array.layout == "C" and array.dtype in dtypes


def _read_typing(array, *where):
    known = _is_flat(array, _LOADED) and all(isinstance(arg, types.Integer) for arg in where)
    return signature(_LOADED[array.dtype], array, *[types.intp] * len(where)) if known else None


def _write_typing(array, *where_and_lanes):
    where, lanes_type = where_and_lanes[:-1], where_and_lanes[-1]
    known = _is_flat(array, _LOADED) and _LOADED[array.dtype] == lanes_type
    known = known and all(isinstance(arg, types.Integer) for arg in where)
    return signature(types.none, array, *[types.intp] * len(where), lanes_type) if known else None


def _pointer(context, builder, array_type, array, i, result):
    """The address of `array[i]`, seen as a pointer to `result`."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [i]), result.as_pointer())


def _item(array_type):
    """The LLVM type of an element and its size in bytes, which is all the alignment that NumPy promises."""
    size = array_type.dtype.bitwidth // 8
    return (ir.FloatType() if array_type.dtype == types.float32 else ir.IntType(8 * size)), size


def _widen_bytes(builder, value, array_type):
    if array_type.dtype in (types.uint8, types.uint16):
        return builder.zext(value, vector(INTS))
    return builder.sext(value, vector(INTS)) if array_type.dtype in (types.int8, types.int16) else value


def _load_lower(context, builder, sig, args):
    item, size = _item(sig.args[0])
    vector = ir.VectorType(item, WIDTH)
    pointer = _pointer(context, builder, sig.args[0], args[0], args[1], vector)
    return _widen_bytes(builder, builder.load(pointer, align=size), sig.args[0])


def _store_lower(context, builder, sig, args):
    item, size = _item(sig.args[0])
    vector = ir.VectorType(item, WIDTH)
    value = args[2] if args[2].type == vector else builder.trunc(args[2], vector)
    builder.store(value, _pointer(context, builder, sig.args[0], args[0], args[1], vector), align=size)
    return context.get_dummy_value()


def _each_lane(context, builder, sig, args):
    """Yield lane number and address of the elements ``array[i + step * lane]``."""
    item, _ = _item(sig.args[0])
    for lane in range(WIDTH):
        i = builder.add(args[1], builder.mul(args[2], ir.Constant(args[2].type, lane)))
        yield INT32(lane), _pointer(context, builder, sig.args[0], args[0], i, item)


def _gather_lower(context, builder, sig, args):
    value = ir.Constant(ir.VectorType(_item(sig.args[0])[0], WIDTH), ir.Undefined)
    for lane, pointer in _each_lane(context, builder, sig, args):
        value = builder.insert_element(value, builder.load(pointer), lane)
    return _widen_bytes(builder, value, sig.args[0])


def _scatter_lower(context, builder, sig, args):
    item, _ = _item(sig.args[0])
    for lane, pointer in _each_lane(context, builder, sig, args):
        element = builder.extract_element(args[3], lane)
        builder.store(element if element.type == item else builder.trunc(element, item), pointer)
    return context.get_dummy_value()


def _look_up_typing(table, v):
    return signature(INTS, table, INTS) if _is_flat(table, [types.int8, types.uint8]) and v == INTS else None


def _look_up_lower(context, builder, sig, args):
    """Pick bytes one by one, in the form that LLVM knows to be one shuffle of bytes."""
    small, place = ir.VectorType(ir.IntType(8), WIDTH), ir.IntType(64)
    start = _pointer(context, builder, sig.args[0], args[0], ir.Constant(place, 0), small)
    table, wanted, value = builder.load(start, align=1), builder.trunc(args[1], small), ir.Constant(small, ir.Undefined)
    for lane in range(WIDTH):
        which = builder.zext(builder.extract_element(wanted, INT32(lane)), place)
        value = builder.insert_element(value, builder.extract_element(table, which), INT32(lane))
    return _widen_bytes(builder, value, sig.args[0])


teach(load, _read_typing, _load_lower)
teach(look_up, _look_up_typing, _look_up_lower)
teach(gather, _read_typing, _gather_lower)
teach(store, _write_typing, _store_lower)
teach(scatter, _write_typing, _scatter_lower)


def _transpose_typing(source, rows, i, target, j):
    known = _is_flat(source, [types.float32]) and _is_flat(target, [types.float32]) and _is_flat(rows, [types.int64])
    return signature(types.none, source, rows, types.intp, target, types.intp) if known else None


def _transpose_lower(context, builder, sig, args):
    """Load 16 rows, then exchange halves in four rounds: lane bit and row bit trade places, one pair at a time."""
    source, rows, i, target, j = args
    block = []
    for row in range(WIDTH):
        start = _pointer(context, builder, sig.args[1], rows, ir.Constant(j.type, row), ir.IntType(64))
        start = builder.add(builder.load(start), i)
        block.append(builder.load(_pointer(context, builder, sig.args[0], source, start, vector(FLOATS)), align=4))
    for distance in (8, 4, 2, 1):
        low = [lane if not lane & distance else lane - distance + WIDTH for lane in range(WIDTH)]
        high = [lane + distance if not lane & distance else lane + WIDTH for lane in range(WIDTH)]
        for row in [row for row in range(WIDTH) if not row & distance]:
            a, b = block[row], block[row + distance]
            block[row] = _shuffle(builder, a, b, low)
            block[row + distance] = _shuffle(builder, a, b, high)
    for column, value in enumerate(block):
        place = builder.add(j, ir.Constant(j.type, column * WIDTH))
        builder.store(value, _pointer(context, builder, sig.args[3], target, place, vector(FLOATS)), align=4)
    return context.get_dummy_value()


def _shuffle(builder, a, b, order):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(INT32, WIDTH), order))


teach(transpose, _transpose_typing, _transpose_lower)
