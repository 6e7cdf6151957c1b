"""Statistics of an importance matrix: figures about each tensor's inputs.

Source: llama-imatrix --show-statistics (tools/imatrix/imatrix.cpp of llama.cpp), whose columns these are; computed in
float64. They describe the activations; which tensor deserves more bits they do not tell.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

    from quantlab.files.imatrix_file import ImportanceMatrix

INACTIVE = 1e-5  # a mean square up to here counts as no input


def statistics(matrix: ImportanceMatrix) -> pd.DataFrame:
    """Describe each tensor's mean squared inputs.

    Returns
    -------
    pd.DataFrame
        A row per tensor, by kind and from the greatest `total` down: `name`, `layer` (-1: of no layer), `kind`, `n`
        columns, `rows` counted; `total`, `min`, `max`, `mean`, `std` of the mean squares; `active` fraction above 1e-5;
        `entropy` in bits, and its share of the greatest possible, `entropy_norm`; `zd`, the fraction of columns more
        than one `std` above the mean; `cos_previous`, the cosine to the same tensor of the layer before, 0 without one.
        Tensors for which nothing was counted are left out.
    """
    import pandas as pd  # only here: to quantize with a matrix needs no table

    rows = [_row(matrix, name) for name in matrix.sums if matrix.counts[name].any()]
    return pd.DataFrame(rows).sort_values(["kind", "total"], ascending=[True, False], ignore_index=True)


def _row(matrix: ImportanceMatrix, name: str) -> dict:
    found = re.match(r"blk\.(\d+)\.(.+)\.weight$", name)
    layer, kind = (int(found[1]), found[2]) if found else (-1, name.removesuffix(".weight"))
    counted = matrix.counts[name] > 0
    x = (matrix.sums[name][counted].astype(np.float64) / matrix.counts[name][counted, None]).reshape(-1)
    share = x[x > 0] / x.sum() if x.any() else np.ones(1)
    entropy = abs(float((share * np.log2(share)).sum()))
    std = float(x.std())
    return {
        "name": name,
        "layer": layer,
        "kind": kind,
        "n": x.size,
        "rows": int(matrix.counts[name].sum()),
        "total": float(x.sum()),
        "min": float(x.min()),
        "max": float(x.max()),
        "mean": float(x.mean()),
        "std": std,
        "active": float((x > INACTIVE).mean()),
        "entropy": entropy,
        "entropy_norm": entropy / np.log2(x.size) if x.size > 1 else 0.0,
        "zd": float((x > x.mean() + std).mean()) if std > 0 else 0.0,
        "cos_previous": _cosine(matrix, name, f"blk.{layer - 1}.{kind}.weight"),
    }


def _cosine(matrix: ImportanceMatrix, name: str, other: str) -> float:
    """Return the cosine of the angle between two tensors' sums."""
    if other not in matrix.sums or matrix.sums[other].shape != matrix.sums[name].shape:
        return 0.0
    a, b = (matrix.sums[n].astype(np.float64).reshape(-1) for n in (name, other))
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm else 0.0
