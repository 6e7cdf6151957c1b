"""The element-wise work of the forward pass, each step fused into one loop over rows.

Every function is compiled without the GIL and works on the rows it is given; `Workers` runs it on several blocks
of rows at once. The order of every sum is written down, in lanes. Where a compiler may choose it, a function that is
called from another compiled one can have two orders, one in the process that compiles and one in those that load it.
"""

import numpy as np

from quantlab.quants.compiled import njit
from quantlab.quants.lanes import WIDTH, lanes, load, ordered_sum

_FAST = {"contract"}  # a multiplication and an addition may become one instruction
_LOG2E = np.float32(1.44269504)
_LN2_HIGH = np.float32(0.693359375)  # ln 2 = high + low, high exact in few bits
_LN2_LOW = np.float32(-2.12194440e-4)
_C2, _C3, _C4 = np.float32(0.49999994), np.float32(0.16666666), np.float32(0.041665795)
_C5, _C6 = np.float32(0.0083334519), np.float32(0.0013981999)
_ONE, _TWO, _ZERO, _HALF = np.float32(1), np.float32(2), np.float32(0), np.float32(0.5)
_GELU_1, _GELU_3 = np.float32(1.5957691216), np.float32(1.5957691216 * 0.044715)
_OAI_ALPHA, _OAI_LIMIT = np.float32(1.702), np.float32(7)
_LOWEST = np.float32(-87.0)  # exp of it is still a normal number
_HIGHEST = np.float32(88.0)


@njit(inline="always", fastmath=_FAST)
def exp32(x):
    """e^x in float32 to 2 ulp, in operations that the compiler can vectorize."""
    x = min(max(x, _LOWEST), _HIGHEST)
    n = np.floor(x * _LOG2E + _HALF)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    poly = _ONE + r + r * r * (_C2 + r * (_C3 + r * (_C4 + r * (_C5 + r * _C6))))
    return poly * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always")
def _ordered(bits):
    """Turn the bits of a float32 into an integer that compares as the number does, or back."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@njit(nogil=True)
def row_max(x):
    """Return the maximum of a contiguous row, compared as integers, which is vectorized."""
    bits = x.view(np.int32)
    top = _ordered(bits[0])
    for i in range(bits.shape[0]):
        top = max(top, _ordered(bits[i]))
    return np.int32(_ordered(top)).view(np.float32)


@njit(nogil=True)
def _sum(x):
    """Return the sum of a contiguous row of float32."""
    sums, whole = lanes(_ZERO), x.shape[0] // WIDTH * WIDTH
    for i in range(0, whole, WIDTH):
        sums = sums + load(x, i)
    result = ordered_sum(sums)
    for i in range(whole, x.shape[0]):
        result += x[i]
    return result


@njit(nogil=True, fastmath=_FAST)
def _sum_of_products(x, y):
    """Return the sum of x[i] · y[i] over two contiguous rows of float32."""
    sums, whole = lanes(_ZERO), x.shape[0] // WIDTH * WIDTH
    for i in range(0, whole, WIDTH):
        sums = sums + load(x, i) * load(y, i)
    result = ordered_sum(sums)
    for i in range(whole, x.shape[0]):
        result += x[i] * y[i]
    return result


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def rms_norm(x, weight, eps, out):
    """out = x / sqrt(mean(x²) + eps) · weight, row by row; `out` may be `x`."""
    n = x.shape[1]
    row = np.empty(n, np.float32)  # contiguous, whatever `x` is a part of
    for r in range(x.shape[0]):
        row[:] = x[r]
        scale = np.float32(1.0 / np.sqrt(_sum_of_products(row, row) / np.float32(n) + eps))
        for i in range(n):
            out[r, i] = row[i] * scale * weight[i]


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def head_norm(x, weight, eps):
    """Normalize every head in place: x [rows, heads, head_dim], weight [head_dim]."""
    for r in range(x.shape[0]):
        rms_norm(x[r], weight, eps, x[r])


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def add(x, y):
    """x += y, row by row; `y` may be one row for all."""
    for r in range(x.shape[0]):
        row = y[r if y.shape[0] > 1 else 0]
        for i in range(x.shape[1]):
            x[r, i] += row[i]


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def rope_pairs(x, cos, sin):
    """Rotate neighbours (0, 1), (2, 3), … in place: x [rows, heads, head_dim], cos and sin [rows, n_rot / 2]."""
    for r in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(cos.shape[1]):
                a, b = x[r, h, 2 * i], x[r, h, 2 * i + 1]
                x[r, h, 2 * i] = a * cos[r, i] - b * sin[r, i]
                x[r, h, 2 * i + 1] = a * sin[r, i] + b * cos[r, i]


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def rope_halves(x, cos, sin):
    """Rotate (0, n_rot / 2), (1, n_rot / 2 + 1), … in place: the same in the other order ("neox")."""
    half = cos.shape[1]
    for r in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(half):
                a, b = x[r, h, i], x[r, h, i + half]
                x[r, h, i] = a * cos[r, i] - b * sin[r, i]
                x[r, h, i + half] = a * sin[r, i] + b * cos[r, i]


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def causal_softmax(scores, first, window, scale, sink):
    """Softmax of scores · scale, each row over the last `window` keys up to its own: row s belongs to key first + s.

    `sink` is one more score, whose weight is given to nothing; -inf for none.
    """
    for s in range(scores.shape[0]):
        seen = first + s + 1
        row = scores[s]
        low = max(0, seen - window)
        top = row_max(row[low:seen])
        for i in range(low, seen):
            row[i] = exp32((row[i] - top) * scale)
        total = _sum(row[low:seen])
        inverse = _ONE / total
        if sink > -np.inf:
            over = sink - top * scale
            kept = exp32(min(-over, _ZERO))
            inverse = kept / (kept * total + exp32(min(over, _ZERO)))
        for i in range(low, seen):
            row[i] *= inverse
        row[:low] = _ZERO
        row[seen:] = _ZERO


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def softcap(x, cap):
    """x = cap · tanh(x / cap), row by row."""
    for r in range(x.shape[0]):
        row = x[r]
        for i in range(row.shape[0]):
            row[i] = cap * (_ONE - _TWO / (_ONE + exp32(row[i] * (_TWO / cap))))


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def silu_mul(gate_up, out):
    """out = silu(gate) · up, where gate and up are the halves of each row."""
    n = out.shape[1]
    for r in range(out.shape[0]):
        gate, up, row = gate_up[r, :n], gate_up[r, n:], out[r]
        for i in range(n):
            row[i] = gate[i] / (_ONE + exp32(-gate[i])) * up[i]


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def swiglu_oai_mul(gate_up, out):
    """out = gate · sigmoid(1.702 · gate) · (up + 1), with gate at most 7 and up within ±7."""
    n = out.shape[1]
    for r in range(out.shape[0]):
        gate, up, row = gate_up[r, :n], gate_up[r, n:], out[r]
        for i in range(n):
            x = min(gate[i], _OAI_LIMIT)
            row[i] = x / (_ONE + exp32(-_OAI_ALPHA * x)) * (min(max(up[i], -_OAI_LIMIT), _OAI_LIMIT) + _ONE)


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def scale_by_sigmoid(x, gate):
    """x *= sigmoid(gate), row by row; gate [rows, 1], or as wide as x."""
    for r in range(x.shape[0]):
        if gate.shape[1] == 1:
            x[r] *= _ONE / (_ONE + exp32(-gate[r, 0]))
        else:
            for i in range(x.shape[1]):
                x[r, i] /= _ONE + exp32(-gate[r, i])


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def gelu_mul(gate_up, out):
    """out = gelu(gate) · up, where gelu(x) = x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))."""
    n = out.shape[1]
    for r in range(out.shape[0]):
        gate, up, row = gate_up[r, :n], gate_up[r, n:], out[r]
        for i in range(n):
            inner = gate[i] * (_GELU_1 + _GELU_3 * (gate[i] * gate[i]))  # 2 √(2/π) · (x + 0.044715 x³)
            row[i] = gate[i] / (_ONE + exp32(-inner)) * up[i]


@njit(nogil=True, cache=True)
def column_squares(x):
    """Σ x[:, j]² of each column, in float64."""
    total = np.zeros(x.shape[1])
    for r in range(x.shape[0]):
        for j in range(x.shape[1]):
            total[j] += np.float64(x[r, j]) * np.float64(x[r, j])
    return total


PIECE = 1024  # logits whose exponentials are summed in float32; the pieces' sums are added in float64
TOP = 10  # how many of a row's greatest logits are remembered


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _top(row, values, indices):
    """Find the TOP largest of a row and their positions, largest first, equal ones in order."""
    values[:] = np.float32(-np.inf)
    indices[:] = 0
    for start in range(0, row.shape[0], 256):
        stop = min(start + 256, row.shape[0])
        if not row_max(row[start:stop]) > values[TOP - 1]:
            continue
        for i in range(start, stop):
            if row[i] > values[TOP - 1]:
                j = TOP - 1
                while j > 0 and values[j - 1] < row[i]:
                    values[j], indices[j] = values[j - 1], indices[j - 1]
                    j -= 1
                values[j], indices[j] = row[i], i


@njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")
def _divergence(base, base_max, other, other_max):
    """Sums over a row: Σ e^(base - max), Σ e^(other - max), Σ e^(base - max) · (base - other)."""
    base_sum, other_sum, weighted = 0.0, 0.0, 0.0
    scratch = np.empty((3, PIECE), np.float32)
    for start in range(0, base.shape[0], PIECE):
        base_piece, other_piece = base[start : start + PIECE], other[start : start + PIECE]
        n = base_piece.shape[0]
        e, f, difference = scratch[0, :n], scratch[1, :n], scratch[2, :n]
        for i in range(n):
            e[i] = exp32(base_piece[i] - base_max)
            f[i] = exp32(other_piece[i] - other_max)
            difference[i] = base_piece[i] - other_piece[i]
        base_sum += _sum(e)
        other_sum += _sum(f)
        weighted += _sum_of_products(e, difference)
    return base_sum, other_sum, weighted


@njit(nogil=True, cache=True)
def score(base, other, targets, nll, kld, same_top, top5, top10, correct, top_p):
    """Score rows of logits of a variant against those of its base (which may be the same array).

    base, other : float32 [rows, n_vocab]; targets : int32 [rows]; the rest are results [rows].
    """
    base_values, base_indices = np.empty(TOP, np.float32), np.empty(TOP, np.int64)
    values, indices = np.empty(TOP, np.float32), np.empty(TOP, np.int64)
    for r in range(base.shape[0]):
        _top(base[r], base_values, base_indices)
        _top(other[r], values, indices)
        base_sum, other_sum, weighted = _divergence(base[r], base_values[0], other[r], values[0])
        log_z, base_log_z = values[0] + np.log(other_sum), base_values[0] + np.log(base_sum)
        nll[r] = log_z - other[r, targets[r]]
        kld[r] = weighted / base_sum + (log_z - base_log_z)
        same_top[r] = indices[0] == base_indices[0]
        correct[r] = indices[0] == targets[r]
        top_p[r] = 1.0 / other_sum
        top5[r], top10[r] = 0, 0
        for i in range(TOP):
            for j in range(TOP):
                if indices[i] == base_indices[j]:
                    top10[r] += 1
                    if i < 5 and j < 5:
                        top5[r] += 1
