"""Matrix products at the processor's full speed, with bit-identical results for any division.

    out[rows, n_out] = x[rows, n_in] · weightᵀ            panels[p, i, c] = weight[COLUMNS · p + c, i]

A tile is ROWS × COLUMNS numbers of `out`. They stay in registers while a loop goes down n_in; each step takes one row
of a panel and one number of each row of x:

                     panel[i]   ████████████████  COLUMNS
                        x[0, i] ████████████████
                        x[1, i] ████████████████  += x[r, i] · panel[i]
                        x[2, i] ████████████████

So every number of `out` is one sum in the order of i, whatever the blocks of rows and the number of threads.
"""

import platform

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target

from quantlab.quants.compiled import config, intrinsic, njit

LANES = 16  # numbers in a vector; LLVM takes several registers for it where one is too small
ROWS = 6
# 6 × 4 vectors leave 8 of the 32 registers of AVX-512 free; 6 × 1, in halves or quarters, fit those of AVX2 and NEON
VECTORS = 4 if "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2] else 1  # pyright: ignore[reportAttributeAccessIssue]
# On a Mac BLAS has a matrix unit that other code cannot reach. Without compiled code, too, BLAS is the fast one.
BLAS = bool(config.DISABLE_JIT) or platform.system() == "Darwin"
WIDTH = LANES * VECTORS  # columns of a tile
COLUMNS = 512 if BLAS else WIDTH
DEPTH = 2048  # steps after which a tile is put down, so that the panel stays in the cache
compiled = (lambda function: function) if BLAS else njit(nogil=True, cache=True)  # `multiply` and what calls it

_FLOATS = ir.VectorType(ir.FloatType(), LANES)


def n_panels(n_out: int) -> int:
    """Return the number of panels for `n_out` rows of weights, including a partly filled last one."""
    return -(-n_out // COLUMNS)


def panels_size(shape: tuple[int, ...]) -> int:
    """Return the size of the panels of a matrix of this shape, in numbers."""
    return n_panels(shape[0]) * shape[1] * COLUMNS


def fill_panels(weight: np.ndarray, panels: np.ndarray, first: int, lanes: int = 1) -> None:
    """Put some rows of weights [rows, n_in] of any float type into panels, as rows `first`, … of the matrix.

    With `lanes`, every `lanes`-th column first, from 0 on, then those from 1 on, ….
    """
    weight = np.asarray(weight, np.float32)
    pack(weight if lanes == 1 else sort_columns(weight, lanes, np.empty_like(weight)), panels, first)


@njit(nogil=True, cache=True)
def sort_columns(x, lanes, out):
    """Put every `lanes`-th column of x [rows, n] first, from 0 on, then those from 1 on, …."""
    n = x.shape[1] // lanes
    for r in range(x.shape[0]):
        for i in range(n):
            for lane in range(lanes):
                out[r, lane * n + i] = x[r, i * lanes + lane]
    return out


@njit(nogil=True, cache=True)
def pack(weight, panels, first):
    """`fill_panels` from float32, columns in order."""
    columns = panels.shape[2]
    for start in range(0, weight.shape[1], 16):
        stop = min(start + 16, weight.shape[1])
        for r in range(weight.shape[0]):
            p, c = divmod(first + r, columns)
            for i in range(start, stop):
                panels[p, i, c] = weight[r, i]


@compiled
def multiply(x, panels, out):
    """Compute out = x · weightᵀ on this thread.

    Parameters
    ----------
    x : np.ndarray [shape=(nrows, n_in), dtype=float32, rows contiguous]
    panels : np.ndarray [shape=(n_panels(n_out), n_in, COLUMNS), dtype=float32, rows contiguous]
    out : np.ndarray [shape=(nrows, n_out), dtype=float32, rows contiguous]
    """
    if BLAS:
        for p in range(panels.shape[0]):
            columns = out[:, p * COLUMNS : (p + 1) * COLUMNS]
            np.matmul(x, panels[p, :, : columns.shape[1]], columns)
        return
    edge = np.empty((ROWS, COLUMNS), np.float32)
    for start in range(0, x.shape[1], DEPTH):
        stop = min(start + DEPTH, x.shape[1])
        for p in range(panels.shape[0]):
            for r in range(0, x.shape[0], ROWS):
                rows = slice(r, min(r + ROWS, x.shape[0]))
                target = out[rows, p * COLUMNS : (p + 1) * COLUMNS]
                n, columns = target.shape
                if columns == COLUMNS:
                    tile(x[rows], panels[p], start, stop, target, start > 0)
                else:
                    edge[:n, :columns] = target
                    tile(x[rows], panels[p], start, stop, edge[:n], start > 0)
                    target[:] = edge[:n, :columns]


@njit(nogil=True, cache=True)
def multiply_in_lanes(x, panels, lanes, out):
    """Compute out = x · weightᵀ in partial sums, one for each of `lanes` columns in turn.

    In the end halves of the sums are put onto each other. x and panels have their columns sorted (`sort_columns`).
    """
    n, parts = x.shape[1] // lanes, np.empty((lanes, ROWS, WIDTH), np.float32)
    sums = parts.reshape(lanes, ROWS * WIDTH)
    for p in range(panels.shape[0]):
        for r in range(0, x.shape[0], ROWS):
            rows = slice(r, min(r + ROWS, x.shape[0]))
            target = out[rows, p * WIDTH : (p + 1) * WIDTH]
            for lane in range(lanes):
                tile(x[rows], panels[p], lane * n, (lane + 1) * n, parts[lane, : target.shape[0]], False)
            half = lanes // 2
            while half > 0:
                for lane in range(half):
                    one, other = sums[lane], sums[lane + half]
                    for i in range(one.size):
                        one[i] += other[i]
                half //= 2
            target[:] = parts[0, : target.shape[0], : target.shape[1]]


@intrinsic
def tile(typing_context, x, panel, start, stop, out, more):
    """out[r, :] = Σ x[r, i] · panel[i, :] over start <= i < stop, for up to ROWS rows; with `more`, added to `out`.

    x [rows, n], panel [n, WIDTH], out [rows, WIDTH]: float32.
    """
    return types.void(x, panel, types.intp, types.intp, out, more), _build_tile


def _build_tile(context, builder, signature, args):
    """Write the LLVM code of `tile`: the loop over i, all its sums in registers."""
    x, panel, out = (context.make_array(signature.args[i])(context, builder, args[i]) for i in (0, 1, 4))
    x_rows, out_rows = _row_pointers(context, builder, x), _row_pointers(context, builder, out)
    sums = [[cgutils.alloca_once_value(builder, _FLOATS(None)) for _ in range(VECTORS)] for _ in range(ROWS)]
    with builder.if_then(args[5]):
        for r in range(ROWS):
            for v in range(VECTORS):
                builder.store(builder.load(_vector(context, builder, out_rows[r], v), align=4), sums[r][v])
    width = context.get_constant(types.intp, WIDTH)
    with cgutils.for_range(builder, args[3], start=args[2]) as step:
        panel_row = builder.gep(panel.data, [builder.mul(step.index, width)])
        weights = [builder.load(_vector(context, builder, panel_row, v), align=4) for v in range(VECTORS)]
        for r in range(ROWS):
            value = _repeated(builder, builder.load(builder.gep(x_rows[r], [step.index])))
            for total, weight in zip(sums[r], weights, strict=True):
                builder.store(_add_product(builder, builder.load(total), value, weight), total)
    for r in range(ROWS):
        for v in range(VECTORS):
            builder.store(builder.load(sums[r][v]), _vector(context, builder, out_rows[r], v), align=4)
    return context.get_dummy_value()


def _add_product(builder, total, x, weight):
    """total + x · weight, in one instruction where the processor has it."""
    return builder.fadd(total, builder.fmul(x, weight, flags=("contract",)), flags=("contract",))


def _row_pointers(context, builder, array) -> list:
    """Return the start of each of ROWS rows; missing rows repeat the last one."""
    last = builder.sub(cgutils.unpack_tuple(builder, array.shape)[0], context.get_constant(types.intp, 1))
    stride = cgutils.unpack_tuple(builder, array.strides)[0]
    pointers = []
    for r in range(ROWS):
        index = context.get_constant(types.intp, r)
        index = builder.select(builder.icmp_signed("<", index, last), index, last)
        pointers.append(cgutils.pointer_add(builder, array.data, builder.mul(index, stride)))
    return pointers


def _vector(context, builder, pointer, v: int):
    """Return a pointer to the v-th vector from `pointer` on."""
    first = builder.gep(pointer, [context.get_constant(types.intp, LANES * v)])
    return builder.bitcast(first, ir.VectorType(pointer.type.pointee, LANES).as_pointer())


def _repeated(builder, number):
    """Return a vector with `number` in every lane."""
    undefined, zeros = _FLOATS(ir.Undefined), ir.VectorType(ir.IntType(32), LANES)(None)
    return builder.shuffle_vector(builder.insert_element(undefined, number, ir.IntType(32)(0)), undefined, zeros)
