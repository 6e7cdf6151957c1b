"""Count what the kernels do for a weight: run them without the compiler, on arrays that keep count.

With NUMBA_DISABLE_JIT=1 every operation on sixteen lanes is a NumPy call on an array of sixteen, and an array of a
class of our own sees each of them. So the counts are those of the kernels as they are written, not a formula's.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

N_WEIGHTS = 4096  # 16 super-blocks, one in each lane


def count(qtypes: list[str]) -> pd.DataFrame:
    """Count operations per weight of encoding and decoding normal numbers.

    Parameters
    ----------
    qtypes : list of str
        Types with kernels of ours.

    Returns
    -------
    pd.DataFrame
        A row per type and direction: `type`, `what` (`encode`, `decode`), and operations per weight: `float`
        (additions, multiplications, divisions, roots), `other` (comparisons, selections, shifts and masks,
        conversions), `all`.

    Raises
    ------
    RuntimeError
        If the process that counts fails.
    """
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "quantlab.lab.operations", *qtypes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"operations: counting failed. {done.stderr.strip().splitlines()[-1]}")
    frame = pd.DataFrame(json.loads(done.stdout))
    return frame.assign(all=frame["float"] + frame["other"])


_FLOAT = {"add", "subtract", "multiply", "divide", "sqrt", "negative"}


class Counted(np.ndarray):
    """An array that counts the operations done on it, element by element."""

    counts = Counter()

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        plain = [np.asarray(value) if isinstance(value, Counted) else value for value in inputs]
        result = getattr(ufunc, method)(*plain, **options)
        is_float = np.asarray(plain[0]).dtype.kind == "f" and ufunc.__name__ in _FLOAT
        Counted.counts["float" if is_float else "other"] += (
            np.asarray(plain[-1]).size if method == "reduce" else result.size
        )
        return result.view(Counted) if isinstance(result, np.ndarray) else result

    def __array_function__(self, function, types, args, kwargs):
        result = super().__array_function__(function, types, args, kwargs)
        if function is np.where:
            Counted.counts["other"] += result.size
        return result

    def astype(self, dtype, **options):
        Counted.counts["other"] += self.size
        return super().astype(dtype, **options)


def _watch_the_lanes() -> None:
    """Let everything that makes lanes make counted ones; before any kernel's module is imported."""
    from quantlab.quants import lanes

    for name in ("gather", "lanes"):
        original = getattr(lanes, name)
        setattr(lanes, name, lambda *args, original=original: original(*args).view(Counted))


def _main() -> None:
    _watch_the_lanes()
    from quantlab import quants

    x = np.random.default_rng(1).standard_normal((1, N_WEIGHTS)).astype(np.float32)
    rows = []
    for qtype in sys.argv[1:]:
        data = None
        for what in ("encode", "decode"):
            Counted.counts.clear()
            if what == "encode":
                data = quants.quantize(x, qtype)
            else:
                quants.dequantize(data, qtype, x.shape)
            rows.append(
                {"type": qtype, "what": what, **{key: Counted.counts[key] / x.size for key in ("float", "other")}}
            )
    sys.stdout.write(json.dumps(rows))


if __name__ == "__main__":
    _main()
