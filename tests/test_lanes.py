"""Every lanes primitive, jitted and as plain Python, does what NumPy does, at the edges of float32 and int32 too."""

import operator
import os
import subprocess
import sys

import numpy as np
import pytest
from numba import njit

from quantlab.quants import lanes as L

EDGES = np.array(
    [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 3.1415927, -1e-3, 2**-14, -(2**-24), 2**-25, 1.5 * 2**-25, 6.1e-5]
    + [1e-45, -1e-45, 1e-39, 1.17549435e-38, 3e38, -3.4028235e38, 65504, 65519.996, 65520, -65536, 4194303, -4194303]
    + [4194302.5, 1e10, np.inf, -np.inf, np.nan],
    np.float32,
)
INTS = np.array([0, 1, -1, 2, 3, 7, 15, 16, 127, 128, -128, 255, 65535, 2**31 - 1, -(2**31), 1234567], np.int32)


@pytest.fixture
def floats(rng):
    """Every edge beside every other, and random bits: float32 (n,), n a multiple of 16."""
    noise = rng.integers(0, 2**32, 1024, dtype=np.uint32).view(np.float32)
    a, b = np.meshgrid(EDGES, EDGES)
    return np.concatenate([a.reshape(-1), noise]), np.concatenate([b.reshape(-1), rng.permutation(noise)])


@pytest.fixture
def ints(rng):
    noise = rng.integers(-(2**31), 2**31, 512).astype(np.int32)
    a, b = np.meshgrid(INTS, INTS)
    return np.concatenate([a.reshape(-1), noise]), np.concatenate([b.reshape(-1), rng.permutation(noise)])


def plain(function):
    """The Python function below a jitted one; with NUMBA_DISABLE_JIT=1 there is only that."""
    return getattr(function, "py_func", function)


def both_ways(operation, dtype, a, b, slow=None):
    """Apply an operation on lanes to two arrays, jitted and not; `slow` stands for one that calls a jitted function."""
    jitted = njit(operation)

    @njit
    def run(a, b, out):
        for i in range(0, out.size, 16):
            L.store(out, i, jitted(L.load(a, i), L.load(b, i)))

    out = np.empty(a.size, dtype)
    run(a, b, out)
    slow = slow or operation
    blocks = [slow(a[i : i + 16], b[i : i + 16]) for i in range(0, a.size, 16)]
    return out, np.concatenate(blocks).astype(dtype)


def assert_same_bits(out, expected):
    """NaN equals NaN, whatever its payload; zeros must have the same sign."""
    if expected.dtype == np.float32:
        assert np.array_equal(np.isnan(out), np.isnan(expected))
        known = ~np.isnan(expected)
        out, expected = out[known].view(np.int32), expected[known].view(np.int32)
    np.testing.assert_array_equal(out, expected)


FLOAT_OPERATIONS = {
    "add": (lambda a, b: a + b, operator.add),
    "sub": (lambda a, b: a - b, operator.sub),
    "mul": (lambda a, b: a * b, operator.mul),
    "div": (lambda a, b: a / b, operator.truediv),
    "neg": (lambda a, b: -a, lambda a, b: -a),
    "number left": (lambda a, b: 2 - a, lambda a, b: np.float32(2) - a),
    "number right": (lambda a, b: a / np.float32(3), lambda a, b: a / np.float32(3)),
    "absolute": (lambda a, b: L.absolute(a), lambda a, b: np.abs(a)),
    "ordered sum": (
        lambda a, b: L.lanes(L.ordered_sum(a)),
        lambda a, b: np.cumsum(groups(a), axis=1, dtype=np.float32)[:, -1].repeat(16),
    ),
    "sqrt": (lambda a, b: L.sqrt(a), lambda a, b: np.sqrt(a)),
    "minimum": (lambda a, b: L.minimum(a, b), lambda a, b: np.where(a < b, a, b)),
    "maximum": (lambda a, b: L.maximum(a, b), lambda a, b: np.where(a > b, a, b)),
    "minimum with a number": (lambda a, b: L.minimum(a, 3), lambda a, b: np.where(a < 3, a, np.float32(3))),
    "select": (lambda a, b: L.select(a < b, a, np.float32(7)), lambda a, b: np.where(a < b, a, np.float32(7))),
    "not contracted": (lambda a, b: a * b + a, lambda a, b: a * b + a),
    "lanes": (lambda a, b: L.lanes(np.float32(0.1)) + a, lambda a, b: np.float32(0.1) + a),
    "lowest": (
        lambda a, b: L.lanes(L.lowest(L.select(a == a, a, 0))),
        lambda a, b: groups(np.where(np.isnan(a), np.float32(0), a)).min(1).repeat(16) + np.float32(0),
    ),
    "from bits": (
        lambda a, b: L.from_bits(L.bits(a) ^ L.bits(b)),
        lambda a, b: (a.view("i4") ^ b.view("i4")).view("f4"),
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FLOAT_OPERATIONS)
def test_float_operations(name, floats):
    operation, expected = FLOAT_OPERATIONS[name]
    for out in both_ways(operation, np.float32, *floats):
        assert_same_bits(out, expected(*floats))


COMPARISONS = {
    "<": (lambda a, b: L.select(a < b, 1, 0), operator.lt),
    "<=": (lambda a, b: L.select(a <= b, 1, 0), operator.le),
    ">": (lambda a, b: L.select(a > b, 1, 0), operator.gt),
    ">=": (lambda a, b: L.select(a >= b, 1, 0), operator.ge),
    "==": (lambda a, b: L.select(a == b, 1, 0), operator.eq),
    "!=": (lambda a, b: L.select(a != b, 1, 0), operator.ne),
    "&": (lambda a, b: L.select((a < b) & (a > 0), 1, 0), lambda a, b: (a < b) & (a > 0)),
    "|": (lambda a, b: L.select((a < b) | (a > 0), 1, 0), lambda a, b: (a < b) | (a > 0)),
    "^": (lambda a, b: L.select((a < b) ^ (a > 0), 1, 0), lambda a, b: (a < b) ^ (a > 0)),
    "~": (lambda a, b: L.select(~(a < b), 1, 0), lambda a, b: ~(a < b)),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name, floats, ints):
    operation, expected = COMPARISONS[name]
    for values in (floats, ints):
        for out in both_ways(operation, np.int32, *values):
            assert_same_bits(out, expected(*values).astype(np.int32))


INT_OPERATIONS = {
    "add": (lambda a, b: a + b, operator.add),
    "sub": (lambda a, b: a - b, operator.sub),
    "mul": (lambda a, b: a * b, operator.mul),
    "neg": (lambda a, b: -a, lambda a, b: -a),
    "and": (lambda a, b: a & b, operator.and_),
    "or": (lambda a, b: a | b, operator.or_),
    "xor": (lambda a, b: a ^ b, operator.xor),
    "shifts": (lambda a, b: (a << 3) ^ (b >> 5), lambda a, b: (a << 3) ^ (b >> 5)),
    "minimum": (lambda a, b: L.minimum(a, b), np.minimum),
    "maximum": (lambda a, b: L.maximum(15, b), lambda a, b: np.maximum(15, b)),
    "to float and back": (lambda a, b: L.to_int(L.to_float(a >> 8)), lambda a, b: a >> 8),
    "lanes": (lambda a, b: L.lanes(5) - a, lambda a, b: 5 - a),
    "total": (lambda a, b: L.lanes(L.total(a)), lambda a, b: groups(a).sum(1, dtype=np.int32).repeat(16)),
    "lowest": (lambda a, b: L.lanes(L.lowest(a)), lambda a, b: groups(a).min(1).repeat(16)),
    "highest": (lambda a, b: L.lanes(L.highest(a)), lambda a, b: groups(a).max(1).repeat(16)),
    "any lane": (lambda a, b: L.lanes(int(L.any_lane(a > 2**30))), lambda a, b: groups(a > 2**30).any(1).repeat(16)),
    "all lanes": (lambda a, b: L.lanes(int(L.all_lanes(b > 0))), lambda a, b: groups(b > 0).all(1).repeat(16)),
    "first lane": (
        lambda a, b: L.lanes(L.first_lane(a > b)),
        lambda a, b: np.where(groups(a > b).any(1), groups(a > b).argmax(1), 16).repeat(16),
    ),
    "lane bits": (lambda a, b: L.lanes(L.lane_bits(a > b)), lambda a, b: groups(a > b) @ (1 << np.arange(16))),
}


def groups(values):
    return values.reshape(-1, 16)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", INT_OPERATIONS)
def test_int_operations(name, ints):
    operation, expected = INT_OPERATIONS[name]
    result = np.asarray(expected(*ints), np.int32)
    for out in both_ways(operation, np.int32, *ints):
        assert_same_bits(out, np.repeat(result, out.size // result.size))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nearest_int_rounds_half_to_even_and_wraps_as_c_does(rng):
    whole = rng.integers(-4194303, 4194303, 4096)
    v = np.concatenate([whole, whole + 0.5, [4194303, -4194303, np.nan, np.inf, -np.inf, 5e6, -5e6, 1e9]])
    v = np.resize(v.astype(np.float32), 16 * 520)
    out, slow = both_ways(lambda a, b: L.nearest_int(a), np.int32, v, v, lambda a, b: plain(L.nearest_int)(a))
    in_range = np.abs(v) <= 4194303
    np.testing.assert_array_equal(out[in_range], np.rint(v[in_range]).astype(np.int32))
    np.testing.assert_array_equal(out, ((v + np.float32(12582912)).view(np.int32) & 0x7FFFFF) - 0x400000)
    np.testing.assert_array_equal(out, slow)
    assert out[np.isnan(v)].tolist() == [0] * int(np.isnan(v).sum())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_half_floats_are_ieee(floats):
    v, _ = floats
    expected = v.astype(np.float16).view(np.uint16).astype(np.int32)
    expected[np.isnan(v)] = np.where(np.signbit(v[np.isnan(v)]), 0xFE00, 0x7E00)
    for out in both_ways(lambda a, b: L.to_half(a), np.int32, v, v, lambda a, b: plain(L.to_half)(a)):
        np.testing.assert_array_equal(out, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_half_float_widens_exactly_and_comes_back():
    h = np.arange(2**16).astype(np.int32)
    expected = h.astype(np.uint16).view(np.float16).astype(np.float32)
    for out in both_ways(lambda a, b: L.from_half(a), np.float32, h, h, lambda a, b: plain(L.from_half)(a)):
        assert_same_bits(out, expected)
    halves = plain(L.from_half), plain(L.to_half)
    back, _ = both_ways(lambda a, b: L.to_half(L.from_half(a)), np.int32, h, h, lambda a, b: halves[1](halves[0](a)))
    known = ~np.isnan(expected)
    np.testing.assert_array_equal(back[known], h[known])


@njit
def copy(source, target, i, step):
    L.store(target, 3, L.load(source, i))
    L.scatter(target, 40, 2, L.gather(source, i, step))


@pytest.mark.parametrize("copy", [copy, plain(copy)], ids=["jitted", "plain"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8, np.int8])
def test_loads_and_stores_need_no_alignment(copy, dtype, rng):
    source = rng.integers(-128, 128, 128).astype(dtype)
    target = np.zeros(72, dtype)
    copy(source, target, 5, 7)
    expected = np.zeros(72, dtype)
    expected[3:19] = source[5:21]
    expected[40:72:2] = source[5 : 5 + 7 * 16 : 7]
    np.testing.assert_array_equal(target, expected)


@njit
def copy_item(source, target, i):
    L.put(target, 2, L.item(source, i))


@pytest.mark.parametrize("copy_item", [copy_item, plain(copy_item)], ids=["jitted", "plain"])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint16, np.uint8, np.int8])
def test_items(copy_item, dtype):
    source = np.array([1, 250, 3]).astype(dtype)
    target = np.zeros(4, np.float32 if dtype == np.float32 else np.int32)
    copy_item(source, target, 1)
    assert target.tolist() == [0, 0, source[1], 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_multiply_add_rounds_once_or_twice(floats):
    a, b = floats
    exact, parts = a.astype(np.float64) * b + a, np.abs(a.astype(np.float64) * b) + np.abs(a)
    known = parts < 3e38  # neither NaN nor infinite, however rounded
    for out in both_ways(lambda a, b: L.multiply_add(a, b, a), np.float32, a, b):
        assert (np.abs(out[known] - exact[known]) <= 2.0**-23 * parts[known] + 2.0**-149).all()


@njit
def through_bytes(v, signed, unsigned, out):
    L.store(signed, 0, L.load(v, 0))
    L.store(unsigned, 0, L.load(v, 0))
    L.store(out, 0, L.load(signed, 0))
    L.store(out, 16, L.load(unsigned, 0))


@pytest.mark.parametrize("through_bytes", [through_bytes, plain(through_bytes)], ids=["jitted", "plain"])
def test_bytes_keep_the_low_8_bits(through_bytes):
    out = np.empty(32, np.int32)
    through_bytes(INTS, np.empty(16, np.int8), np.empty(16, np.uint8), out)
    np.testing.assert_array_equal(out[:16], ((INTS & 255) ^ 128) - 128)
    np.testing.assert_array_equal(out[16:], INTS & 255)


@njit
def turned(source, rows, target):
    L.transpose(source, rows, 3, target, 16)


@pytest.mark.parametrize("turned", [turned, plain(turned)], ids=["jitted", "plain"])
def test_transpose_puts_rows_side_by_side(turned, rng):
    source = rng.standard_normal(1000).astype(np.float32)
    rows = rng.integers(0, 980, 16)
    target = np.zeros(16 + 256, np.float32)
    turned(source, rows, target)
    for lane, row in enumerate(rows):
        np.testing.assert_array_equal(target[16 + lane :: 16], source[row + 3 : row + 19])
    assert not target[:16].any()


def test_only_numbas_openmp_is_told_to_sleep():
    """`import quantlab` leaves the process as it is: OpenMP of a later torch reads the variable itself."""
    code = (
        "import os, quantlab; before = os.environ.get('OMP_WAIT_POLICY'); import quantlab.quants.lanes; "
        "print(before, os.environ.get('OMP_WAIT_POLICY'))"
    )
    plain = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, seen in (({}, "None None"), ({"OMP_WAIT_POLICY": "active"}, "active active")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=plain | given | {"OMP_DISPLAY_ENV": "true"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == seen
        shown = [line for line in done.stderr.splitlines() if "OMP_WAIT_POLICY" in line]
        wanted = given.get("OMP_WAIT_POLICY", "passive").upper()
        assert not shown or f"'{wanted}'" in shown[0]  # not every OpenMP shows its variables
