"""Tiles of products of integers, summed in groups that are scaled and added in ggml's order.

    codes[p, i, c] = a word of 32 bits: columns DEPTH · i, … of row LANES · p + c of the weights
    x[r, i]        = the same columns of row r of the activations

A word holds four columns of 8 bits where the processor multiplies and adds them in one instruction (VNNI), and two of
16 bits elsewhere. That instruction takes unsigned weights: they are stored plus 128, and every sum begins at minus 128
times the sum of its activations. The integers are exact, so their order is free; the floats keep theirs.

A tile is some rows of activations times LANES rows of weights. Its sums stay in registers from the first column to the
last, so that weights are read once per tile.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target

from quantlab.evaluate.engine.tiles import LANES
from quantlab.quants.compiled import intrinsic

_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2]  # pyright: ignore[reportAttributeAccessIssue]
VNNI = "+avx512vnni" in _FEATURES
DEPTH = 4 if VNNI else 2  # columns of a word
# as many sums as there are registers for: 32 of AVX-512; 16 half as long, or quarters, elsewhere
GROUP_ROWS = 8 if "+avx512f" in _FEATURES else 4
LANE_ROWS, _LANE_SUMS = (3, 8) if "+avx512f" in _FEATURES else (1, 4)
_UNROLLED = 4  # words

_INT, _PLACE = ir.IntType(32), ir.IntType(64)
_INTS, _FLOATS = ir.VectorType(_INT, LANES), ir.VectorType(ir.FloatType(), LANES)


@intrinsic
def add_lanes(typing, x, d, starts, sums, codes, d_weight, minima, row, panel, out):
    """Sum groups of four columns into eight partial sums in turn, and put the halves onto each other.

    x : int32 [rows, words]; d, sums : float32 [rows, blocks]; starts : int32 [rows, groups of four columns]
    codes : int32 [panels, words, LANES]; d_weight, minima : float32 [panels, blocks, LANES], minima perhaps empty
    row, panel : where the tile begins, LANE_ROWS rows or what is left of them; out : float32 [rows, n_out]
    """
    return types.void(x, d, starts, sums, codes, d_weight, minima, types.intp, types.intp, out), _build_lanes


def _build_lanes(context, builder, signature, args):
    """Write the LLVM code of `add_lanes`."""
    names = "x d starts sums codes d_weight minima".split()
    code = _Code(context, builder, signature, args, names, args[7], args[8], LANE_ROWS)
    parts = [code.zeros(_FLOATS) for _ in range(8)]
    n_blocks, n_words = code.shape("d", 1), 4 // DEPTH
    for first in range(0, 8, _LANE_SUMS):
        with cgutils.for_range(builder, n_blocks, intp=_PLACE) as loop:
            scales = code.scales("d_weight", loop.index)
            for lane in range(first, first + _LANE_SUMS):
                group = builder.add(builder.mul(loop.index, _PLACE(8)), _PLACE(lane))
                words = [builder.add(builder.mul(group, _PLACE(n_words)), _PLACE(i)) for i in range(n_words)]
                weights = [code.vector("codes", word, _INTS) for word in words]
                for r, total in enumerate(parts[lane]):
                    integers = code.start(r, group)
                    for word, weight in zip(words, weights, strict=True):
                        integers = _add_products(builder, integers, weight, code.repeated("x", r, word))
                    code.add(scales[r], code.floats(integers), total)
    low = code.zeros(_FLOATS)
    with builder.if_then(code.has("minima")), cgutils.for_range(builder, n_blocks, intp=_PLACE) as loop:
        minimum = code.vector("minima", loop.index, _FLOATS)
        for r in range(LANE_ROWS):
            code.add(minimum, code.repeated("sums", r, loop.index), low[r])
    for r in range(LANE_ROWS):
        v = [builder.load(part[r]) for part in parts]
        while len(v) > 1:  # halves onto each other
            v = [builder.fadd(b, a) for a, b in zip(v[: len(v) // 2], v[len(v) // 2 :], strict=True)]
        code.put(builder.fadd(v[0], builder.load(low[r])), args[9], signature.args[9], r)
    return context.get_dummy_value()


@intrinsic
def add_groups(typing, x, d, starts, sums, codes, factors, d_weight, mins, dmin, row, panel, shape, tiled, out):
    """Sum each group's integers, and the groups in order; with minima, their sums are taken away.

    x : int32 [rows, words]; d : float32 [rows, blocks]; starts : int32 [rows, runs]
    sums : int32 [rows, pairs], the activations' sums over runs in pairs of int16
    codes : int32 [panels, words, LANES]; factors : int32 [panels, runs, LANES] of the runs' integers, or empty
    d_weight, dmin : float32 [panels, blocks, LANES]; mins : int32 [panels, pairs, LANES]; the last two perhaps empty
    row, panel : where the tile begins, GROUP_ROWS rows or what is left of them; out : float32 [rows, n_out]
    shape : words of a run, runs of a group, pairs of minima of a group, groups of a block
    tiled : whether the two scales are applied one after the other
    """
    kinds = x, d, starts, sums, codes, factors, d_weight, mins, dmin
    return types.void(*kinds, types.intp, types.intp, shape, types.boolean, out), _build_groups


def _build_groups(context, builder, signature, args):
    """Write the LLVM code of `add_groups`."""
    names = "x d starts sums codes factors d_weight mins dmin".split()
    code = _Code(context, builder, signature, args, names, args[9], args[10], GROUP_ROWS)
    n_words, n_runs, n_pairs, per_block = cgutils.unpack_tuple(builder, args[11])
    run, group = code.zeros(_INTS), code.zeros(_INTS)
    total, taken = code.zeros(_FLOATS), code.zeros(_FLOATS)
    with cgutils.for_range(builder, builder.mul(code.shape("d", 1), per_block), intp=_PLACE) as loop:
        code.set(group, _INTS(None))
        with cgutils.for_range(builder, n_runs, intp=_PLACE) as runs:
            at = builder.add(builder.mul(loop.index, n_runs), runs.index)
            for r, place in enumerate(run):
                builder.store(code.start(r, at), place)
            with cgutils.for_range(builder, builder.udiv(n_words, _PLACE(_UNROLLED)), intp=_PLACE) as few:
                first = builder.add(builder.mul(at, n_words), builder.mul(few.index, _PLACE(_UNROLLED)))
                for i in range(_UNROLLED):
                    code.add_products(run, "codes", "x", builder.add(first, _PLACE(i)))
            with builder.if_else(code.has("factors")) as (scaled, plain):
                with scaled:
                    factor = code.vector("factors", at, _INTS)
                    for so_far, integers in zip(group, run, strict=True):
                        product = builder.mul(builder.load(integers), factor)
                        builder.store(builder.add(builder.load(so_far), product), so_far)
                with plain:
                    for so_far, integers in zip(group, run, strict=True):
                        builder.store(builder.load(integers), so_far)
        block = builder.udiv(loop.index, per_block)
        with builder.if_then(code.has("mins")):
            code.set(run, _INTS(None))
            with cgutils.for_range(builder, n_pairs, intp=_PLACE) as pairs:
                at = builder.add(builder.mul(loop.index, n_pairs), pairs.index)
                code.add_products(run, "mins", "sums", at, in_pairs=True)
        with builder.if_else(args[12]) as (one_by_one, at_once):
            with one_by_one:
                _add_tiled(code, block, group, run, total)
            with at_once:
                for r, scale in enumerate(code.scales("d_weight", block)):
                    code.add(scale, code.floats(builder.load(group[r])), total[r])
                with builder.if_then(code.has("mins")):
                    for r, scale in enumerate(code.scales("dmin", block)):
                        code.add(scale, code.floats(builder.load(run[r])), taken[r])
    for r in range(GROUP_ROWS):
        code.put(builder.fsub(builder.load(total[r]), builder.load(taken[r])), args[13], signature.args[13], r)
    return context.get_dummy_value()


def _add_tiled(code, block, group, low, total) -> None:
    """total += d · (d_weight · group - dmin · low) of a block, the minima only where there are any."""
    builder, terms = code.builder, code.zeros(_FLOATS)
    scale = code.vector("d_weight", block, _FLOATS)
    for term, integers in zip(terms, group, strict=True):
        builder.store(builder.fmul(scale, code.floats(builder.load(integers))), term)
    with builder.if_then(code.has("mins")):
        scale = builder.fneg(code.vector("dmin", block, _FLOATS))
        for term, integers in zip(terms, low, strict=True):
            code.add(scale, code.floats(builder.load(integers)), term)
    for r, term in enumerate(terms):
        code.add(builder.load(term), code.repeated("d", r, block), total[r])


def _add_products(builder, total, weights, x, in_pairs: bool = not VNNI):
    """total + Σ x · weight over the columns of a word, in every lane (vpdpbusd; vpdpwssd, or vpmaddwd and vpaddd)."""
    if not in_pairs:
        quads = ir.VectorType(ir.IntType(8), 4 * LANES)
        operands = [total, builder.bitcast(weights, quads), builder.bitcast(x, quads)]
        shape = ir.FunctionType(_INTS, [operand.type for operand in operands])
        name = "llvm.x86.avx512.vpdpbusd.512"
        return builder.call(cgutils.get_or_insert_function(builder.module, shape, name), operands)
    pairs, wide = ir.VectorType(ir.IntType(16), 2 * LANES), ir.VectorType(_INT, 2 * LANES)
    products = builder.mul(*(builder.sext(builder.bitcast(value, pairs), wide) for value in (x, weights)))
    first, second = (
        builder.shuffle_vector(products, wide(ir.Undefined), _INTS(list(range(start, 2 * LANES, 2))))
        for start in (0, 1)
    )
    return builder.add(total, builder.add(first, second))


class _Code:
    """Writes LLVM code over the rows of some arrays and a panel of others, which are known by name."""

    def __init__(self, context, builder, signature, args, names, row, panel, n_rows: int):
        self.builder, self._context, self._row, self._panel, self._n_rows = builder, context, row, panel, n_rows
        kinds = zip(names, signature.args, args, strict=False)
        self._arrays = {name: context.make_array(kind)(context, builder, arg) for name, kind, arg in kinds}
        self._last = builder.sub(self.shape("x", 0), _PLACE(1))
        self._rows = {name: self._starts(a) for name, a in self._arrays.items() if name in ("x", "d", "starts", "sums")}

    def _starts(self, array) -> list:
        """Return the start of each row; missing rows repeat the last one."""
        stride, pointers = cgutils.unpack_tuple(self.builder, array.strides)[0], []
        for r in range(self._n_rows):
            row = self.builder.add(self._row, _PLACE(r))
            row = self.builder.select(self.builder.icmp_signed("<", row, self._last), row, self._last)
            pointers.append(cgutils.pointer_add(self.builder, array.data, self.builder.mul(row, stride)))
        return pointers

    def shape(self, name: str, axis: int):
        """The size of an array along an axis."""
        return cgutils.unpack_tuple(self.builder, self._arrays[name].shape)[axis]

    def has(self, name: str):
        """Tell whether an array of panels is not empty."""
        return self.builder.icmp_signed(">", self.shape(name, 0), _PLACE(0))

    def zeros(self, kind) -> list:
        """A vector of zeros for each row; LLVM keeps them in registers where it can."""
        return [cgutils.alloca_once_value(self.builder, kind(None)) for _ in range(self._n_rows)]

    def set(self, places: list, value) -> None:
        """Give every row the same value."""
        for place in places:
            self.builder.store(value, place)

    def vector(self, name: str, index, kind):
        """LANES numbers of the panel."""
        array = self._arrays[name]
        stride = cgutils.unpack_tuple(self.builder, array.strides)[0]
        panel = cgutils.pointer_add(self.builder, array.data, self.builder.mul(self._panel, stride))
        first = self.builder.gep(panel, [self.builder.mul(index, _PLACE(LANES))])
        return self.builder.load(self.builder.bitcast(first, kind.as_pointer()), align=4)

    def repeated(self, name: str, r: int, index):
        """A number of row r in every lane."""
        number = self.builder.load(self.builder.gep(self._rows[name][r], [index]))
        kind = ir.VectorType(number.type, LANES)
        first = self.builder.insert_element(kind(ir.Undefined), number, _INT(0))
        return self.builder.shuffle_vector(first, kind(ir.Undefined), _INTS(None))

    def start(self, r: int, index):
        """Return the start value for the sum of a run of words."""
        return self.repeated("starts", r, index) if VNNI else _INTS(None)

    def scales(self, name: str, block) -> list:
        """The weights' scale of a block times that of each row's activations."""
        weights = self.vector(name, block, _FLOATS)
        return [self.builder.fmul(weights, self.repeated("d", r, block)) for r in range(self._n_rows)]

    def floats(self, integers):
        """Integers as floats."""
        return self.builder.sitofp(integers, _FLOATS)

    def add(self, a, b, total) -> None:
        """total += a · b, rounded once."""
        shape = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        fma = cgutils.get_or_insert_function(self.builder.module, shape, f"llvm.fma.v{LANES}f32")
        self.builder.store(self.builder.call(fma, [a, b, self.builder.load(total)]), total)

    def add_products(self, totals: list, weights: str, x: str, word, in_pairs: bool = not VNNI) -> None:
        """Add the products of a word of the panel and of each row."""
        weight = self.vector(weights, word, _INTS)
        for r, total in enumerate(totals):
            found = _add_products(self.builder, self.builder.load(total), weight, self.repeated(x, r, word), in_pairs)
            self.builder.store(found, total)

    def put(self, vector, out, kind, r: int) -> None:
        """Store a row of the tile, at the right edge as many numbers as there are."""
        builder, array = self.builder, self._context.make_array(kind)(self._context, self.builder, out)
        first = builder.mul(self._panel, _PLACE(LANES))
        left = builder.sub(cgutils.unpack_tuple(builder, array.shape)[1], first)
        target = builder.gep(self._starts(array)[r], [first])
        with builder.if_else(builder.icmp_signed(">=", left, _PLACE(LANES))) as (whole, edge):
            with whole:
                builder.store(vector, builder.bitcast(target, _FLOATS.as_pointer()), align=4)
            with edge:
                for c in range(LANES):
                    with builder.if_then(builder.icmp_signed("<", _PLACE(c), left)):
                        builder.store(builder.extract_element(vector, _INT(c)), builder.gep(target, [_PLACE(c)]))
