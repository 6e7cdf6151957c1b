"""Products with weights in three precisions, on any of torch's devices. All sums are in float32.

    float32   x · wᵀ
    half      operands rounded to halves, 11 bits
    halves    x = s (x₁ + x₂), w = t (w₁ + w₂), each xᵢ and wᵢ a half:  x · wᵀ = s t (x₁w₁ᵀ + (x₁w₂ᵀ + x₂w₁ᵀ))

A card multiplies halves many times faster than float32. What `halves` leaves out is 2⁻²² of a product. s and t are
powers of two, one for each row, that put the greatest number of a row below 2¹⁵: a half ends at 65504, and has fewer
bits below 6.1e-5.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

PRECISIONS = {"float32": (torch.float32, 1), "half": (torch.float16, 1), "halves": (torch.float16, 2)}  # dtype, parts
_SAFE = (2.0**-8, 2.0**15)  # the greatest number of a row that is rounded to halves without a scale
SIDE = 4096  # of the square products that are measured; 1024 on a CPU
_MPS_LIMIT = "1.7"  # torch's own for a Mac's card, of the memory that is recommended
_OUT_OF_MEMORY = ("out of memory", "Invalid buffer size", "can't allocate memory", "ALLOC_FAILED")  # MPS, CPU, cuBLAS


@dataclass(frozen=True)
class Operand:
    """Rows [n, n_in], ready for a product."""

    parts: tuple[torch.Tensor, ...]  # what adds up to the rows
    scale: torch.Tensor | None = None  # [n, 1]: what each row is multiplied by after the product; None for 1

    def rows(self, which) -> "Operand":
        """Return some of the rows."""
        return Operand(tuple(part[which] for part in self.parts), None if self.scale is None else self.scale[which])

    def tensors(self) -> list[torch.Tensor]:
        """Return parts and scale."""
        return [*self.parts, *([] if self.scale is None else [self.scale])]


class Products:
    """Products of operands in one precision.

    Parameters
    ----------
    precision : str
        One of `PRECISIONS`.
    device : torch.device
    """

    def __init__(self, precision: str, device: torch.device):
        self.precision = precision
        self.dtype, self.n_parts = PRECISIONS[precision]
        self.weight_bytes = self.dtype.itemsize * self.n_parts
        # elsewhere halves are widened again, for the same numbers; torch for AMD's cards lacks this product, too
        self.is_native = device.type == "cuda" and torch.version.hip is None

    def operand(self, x: torch.Tensor, is_safe: bool = False) -> Operand:
        """Return rows [n, n_in] of float32 as an operand; `is_safe`: halves hold them without a scale."""
        if self.precision == "float32":
            return Operand((x.float(),))
        if x.dtype == torch.float16 and self.precision == "half":
            return Operand((x,))
        if is_safe and self.precision == "half":
            return Operand((x.to(torch.float16),))
        scale, inverse = _row_scales(x)
        if self.precision == "half":
            return Operand((torch.mul(x, scale, out=torch.empty_like(x, dtype=torch.float16)),), inverse)
        scaled = x * scale
        high = scaled.to(torch.float16)
        return Operand((high, scaled.sub_(high).to(torch.float16)), inverse)

    def is_safe(self, x: torch.Tensor) -> bool:
        """Tell whether halves hold rows without a scale (waits for the device)."""
        if self.precision != "half":
            return False
        top = torch.linalg.vector_norm(x, torch.inf, dim=-1)
        return not bool(((top > 0) & (top < _SAFE[0]) | (top > _SAFE[1])).any())

    def multiply(self, x: Operand, weight: Operand) -> torch.Tensor:
        """Return x · weightᵀ [n, n_out, dtype=float32]."""
        a, b = x.parts, weight.parts
        if self.n_parts == 1:
            out = self._mm(a[0], b[0])
        else:
            out = self._mm(a[0], b[1])
            out += self._mm(a[1], b[0])
            out += self._mm(a[0], b[0])
        if weight.scale is not None:
            out *= weight.scale.T
        if x.scale is not None:
            out *= x.scale
        return out

    def _mm(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if self.dtype == torch.float32 or not self.is_native:
            return a.float() @ b.float().T
        return torch.mm(a, b.T, out_dtype=torch.float32)


def _row_scales(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return powers of two [n, 1] that scale each row's largest number to 2¹⁴ … 2¹⁵, and their inverses."""
    top = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
    exponent = (top.view(torch.int32) >> 23).clamp(15, 254)  # biased by 127; both results stay normal numbers
    return ((268 - exponent) << 23).view(torch.float32), ((exponent - 14) << 23).view(torch.float32)


def measure(precision: str, device: torch.device, side: int = 0) -> float:
    """Return the operations per second of a large square product, counting split products once."""
    products, side = Products(precision, device), side or (SIDE if device.type == "cuda" else 1024)
    best = float("inf")
    try:
        x = products.operand(torch.ones(side, side, device=device))
        for _ in range(4):  # the first one starts the library
            synchronize(device)
            start = time.perf_counter()
            products.multiply(x, x)
            synchronize(device)
            best = min(best, time.perf_counter() - start)
    except RuntimeError as error:
        if not is_out_of_memory(error) or side <= 512:
            raise
        return measure(precision, device, side // 2)
    return 2 * side**3 / best


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether torch's memory did not suffice: only one of its allocators has a class for that."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


@contextmanager
def memory_limited(device: torch.device, n_bytes: int | None) -> Iterator[None]:
    """Have torch treat a card as full once this process holds `n_bytes` of it (None: no limit; not on a CPU)."""
    if n_bytes is None or device.type == "cpu":
        yield
        return
    if device.type == "cuda":
        of, total, before = torch.cuda, torch.cuda.mem_get_info()[1], torch.cuda.get_per_process_memory_fraction()
    else:
        of, total = torch.mps, torch.mps.recommended_max_memory()
        before = float(os.environ.get("PYTORCH_MPS_HIGH_WATERMARK_RATIO", _MPS_LIMIT))  # torch does not tell it
    of.set_per_process_memory_fraction(min(before or 2.0, n_bytes / total))  # 0: no limit
    try:
        yield
    finally:
        of.set_per_process_memory_fraction(before)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
