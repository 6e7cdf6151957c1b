"""Lanes and memory: reading and writing flat arrays of float32, int32, (u)int16 or (u)int8.

Narrow numbers are widened to ints, and cut back to their low bits. Kernels import these functions from `lanes`.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.typing.templates import signature

from quantlab.quants.lane_types import FLOATS, INT32, INTS, WIDTH, teach, vector

_WHOLE = types.int32, types.uint16, types.int16, types.uint8, types.int8
_LOADED = {types.float32: FLOATS, **dict.fromkeys(_WHOLE, INTS)}


def load(array, i) -> Any:
    """Read ``array[i : i + 16]``."""
    return gather(array, i, 1)


def gather(array, i, step) -> Any:
    """Read the 16 elements ``array[i + step * lane]``."""
    values = array[i : i + step * (WIDTH - 1) + 1 : step]
    return values.astype(np.float32 if array.dtype == np.float32 else np.int32)


def look_up(table, v) -> Any:
    """Read ``table[v]`` of a table of 16 bytes, 0 ≤ v < 16 in each lane."""
    return table[v].astype(np.int32)


def item(array, i):
    """Read one number, ``array[i]`` with 0 ≤ i: numba's own indexing looks for a sign first."""
    return array[i] if array.dtype == np.float32 else int(array[i])


def put(array, i, v):
    """Write one number, ``array[i] = v`` with 0 ≤ i."""
    array[i] = v


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


def _item_typing(array, i):
    known = _is_flat(array, _LOADED) and isinstance(i, types.Integer)
    return signature(_LOADED[array.dtype].dtype, array, types.intp) if known else None


def _put_typing(array, i, v):
    known = _is_flat(array, [types.float32, types.int32]) and isinstance(i, types.Integer)
    return signature(types.none, array, types.intp, array.dtype) if known else None


def _item_lower(context, builder, sig, args):
    item, size = _item(sig.args[0])
    value = builder.load(_pointer(context, builder, sig.args[0], *args, item), align=size)  # pyright: ignore[reportCallIssue]
    if sig.args[0].dtype in (types.uint8, types.uint16):
        return builder.zext(value, INT32)
    return builder.sext(value, INT32) if sig.args[0].dtype in (types.int8, types.int16) else value


def _put_lower(context, builder, sig, args):
    item, size = _item(sig.args[0])
    builder.store(args[2], _pointer(context, builder, sig.args[0], args[0], args[1], item), align=size)
    return context.get_dummy_value()


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


teach(item, _item_typing, _item_lower)
teach(put, _put_typing, _put_lower)
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
