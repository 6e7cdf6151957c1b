"""Lanes as numba types, with their operators and functions.

`lanes` has the functions that kernels use, and says what a lanes value is.
"""

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.typing.templates import AbstractTemplate, signature
from numba.core.typing.templates import infer_global as numba_infer_global
from numba.extending import lower_builtin, models, register_model

WIDTH = 16


class Lanes(types.Type):
    """The numba type of 16 numbers of one kind."""

    def __init__(self, dtype):
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


FLOATS, INTS, MASK = Lanes(types.float32), Lanes(types.int32), Lanes(types.boolean)
ELEMENTS = {FLOATS: ir.FloatType(), INTS: ir.IntType(32), MASK: ir.IntType(1)}
INT32 = ir.IntType(32)


def vector(lanes_type):
    return ir.VectorType(ELEMENTS[lanes_type], WIDTH)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, lanes_type):
        super().__init__(manager, lanes_type, vector(lanes_type))


infer_global: Any = numba_infer_global  # numba gives it no types


# ---------------------------------------------------------------------------------------------------------------------
# How a Python function or operator is taught to numba
# ---------------------------------------------------------------------------------------------------------------------


def teach(function, typing, lower):
    """Let jitted code call `function`: `typing(*types)` gives a signature or None, `lower` builds its LLVM code."""

    class Template(AbstractTemplate):
        key = function

        def generic(self, args, kws):
            return None if kws else typing(*args)

    infer_global(function, types.Function(Template))
    lower_builtin(function, types.VarArg(types.Any))(lower)


def _teach_operator(symbol, operands, result, lower):
    """Let jitted code apply a binary operator to lanes of one kind, or to lanes and a plain number."""

    @infer_global(symbol)
    class _Operator(AbstractTemplate):
        def generic(self, args, kws):
            if len(args) == 2 and operands in args:
                accepted = [operand(arg, operands) for arg in args]
                if None not in accepted:
                    return signature(result, *accepted)

    def build(context, builder, sig, args):
        return lower(builder, *[widen(builder, value, kind) for value, kind in zip(args, sig.args, strict=True)])

    for pair in ((operands, operands), (operands, operands.dtype), (operands.dtype, operands)):
        lower_builtin(symbol, *pair)(build)


def operand(given, wanted):
    """The type as which an operand enters an operation on `wanted` lanes; None if it cannot."""
    plain = {FLOATS: types.Number, INTS: types.Integer, MASK: types.Boolean}[wanted]
    return wanted if given == wanted else wanted.dtype if isinstance(given, plain) else None


def widen(builder, value, kind):
    """Repeat a plain number 16 times; lanes pass."""
    if isinstance(kind, Lanes):
        return value
    if kind == types.boolean:
        value = builder.trunc(value, ir.IntType(1))
    vector = ir.VectorType(value.type, WIDTH)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, value, INT32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INT32, WIDTH), [0] * WIDTH))


def common_kind(*args):
    """The lanes type that plain numbers and lanes have in common."""
    for wanted in (FLOATS, INTS, MASK):
        if wanted in args:
            return wanted if all(operand(arg, wanted) for arg in args) else None
    for wanted, plain in ((MASK, types.Boolean), (INTS, types.Integer), (FLOATS, types.Float)):
        if all(isinstance(arg, plain) for arg in args):
            return wanted
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------------------------------

for _symbol, _float, _int in (
    (operator.add, "fadd", "add"),
    (operator.sub, "fsub", "sub"),
    (operator.mul, "fmul", "mul"),
    (operator.truediv, "fdiv", None),
    (operator.and_, None, "and_"),
    (operator.or_, None, "or_"),
    (operator.xor, None, "xor"),
    (operator.lshift, None, "shl"),
    (operator.rshift, None, "ashr"),
):
    if _float:
        _teach_operator(_symbol, FLOATS, FLOATS, lambda b, x, y, name=_float: getattr(b, name)(x, y))
    if _int:
        _teach_operator(_symbol, INTS, INTS, lambda b, x, y, name=_int: getattr(b, name)(x, y))
    if _int in ("and_", "or_", "xor"):
        _teach_operator(_symbol, MASK, MASK, lambda b, x, y, name=_int: getattr(b, name)(x, y))

for _symbol, _sign in (
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.eq, "=="),
    (operator.ne, "!="),
):
    _compare = "fcmp_unordered" if _sign == "!=" else "fcmp_ordered"  # as in C, NaN != NaN alone holds
    _teach_operator(_symbol, FLOATS, MASK, lambda b, x, y, name=_compare, sign=_sign: getattr(b, name)(sign, x, y))
    _teach_operator(_symbol, INTS, MASK, lambda b, x, y, sign=_sign: b.icmp_signed(sign, x, y))


def _teach_unary(symbol, operands, lower):
    @infer_global(symbol)
    class _Unary(AbstractTemplate):
        def generic(self, args, kws):
            return signature(operands, operands) if args == (operands,) else None

    lower_builtin(symbol, operands)(lambda context, builder, sig, args: lower(builder, args[0]))


_teach_unary(operator.neg, FLOATS, lambda b, x: b.fneg(x))
_teach_unary(operator.neg, INTS, lambda b, x: b.neg(x))
_teach_unary(operator.invert, MASK, lambda b, x: b.not_(x))
