"""What is in a block: whose each bit is, which values its weights could take, and what became of them."""

import numpy as np
import pandas as pd

from quantlab.quants import block_size, codes, dequantize, grid, quantize
from quantlab.quants.codebook import code_values
from quantlab.quants.ggml_types import ggml_type


def bit_map(qtype: str) -> pd.DataFrame:
    """Find out whose each bit of a block is, by flipping it and looking at which weights change, and how.

    A bit that changes one weight belongs to its code. One that changes a sub-block belongs to its scale, if it moves
    large codes more than small ones, or to its minimum, if it moves all alike; one that changes more belongs to a
    field of the whole block.

    Parameters
    ----------
    qtype : str
        A type whose codes have one width, such as Q4_K.

    Returns
    -------
    pd.DataFrame
        A row per bit: `byte`, `bit` (0 is the lowest), `field` by its name in C (`code`, `sc`, `m`, `d` or `dmin`),
        `sub_block` (-1 for fields of the whole block), `weight` (-1 but for codes), `place` of the bit within its
        field (0 is the lowest), `reach` (how many sub-blocks it changes).

    Raises
    ------
    ValueError
        If `qtype` has no codes of one width.

    Examples
    --------
    >>> bit_map("Q4_0")["field"].value_counts().to_dict()
    {'code': 128, 'd': 16}
    """
    x = 0.01 * np.random.default_rng(1).standard_normal(block_size(qtype)).astype(np.float32)
    x += np.copysign(np.float32(0.004), x)  # the sign bit of a zero would change nothing
    block = quantize(x, qtype)
    codes(block, qtype)  # checks the type
    n_bits, size = 8 * len(block), _sub_block(qtype)
    flipped = np.unpackbits(np.repeat(block[None], n_bits, axis=0), axis=1, bitorder="little")
    flipped[np.arange(n_bits), np.arange(n_bits)] ^= 1
    after = dequantize(np.packbits(flipped, axis=1, bitorder="little"), qtype, (n_bits, len(x)))
    change = (after - dequantize(block, qtype, x.shape)).reshape(n_bits, -1, size)
    rows = [_owner(change[i]) for i in range(n_bits)]
    frame = pd.DataFrame(rows, columns=["field", "sub_block", "weight", "reach", "by"])
    frame.insert(0, "byte", np.arange(n_bits) // 8)
    frame.insert(1, "bit", np.arange(n_bits) % 8)
    whole = frame["field"].isin(["code", "sc", "m"])  # whole numbers: a higher bit changes more
    order = np.where(whole, frame["by"], np.arange(n_bits))
    frame["place"] = pd.Series(order).groupby([frame["field"], frame["sub_block"], frame["weight"]]).rank().astype(int)
    frame["place"] -= 1
    return frame.drop(columns="by")


def _sub_block(qtype: str) -> int:
    """Weights that share a scale."""
    return ggml_type(qtype).sub_block or block_size(qtype)


def _owner(change: np.ndarray) -> tuple[str, int, int, int, float]:
    """Field, sub-block, weight, number of sub-blocks, largest change: what flipping a bit says of it."""
    changed = np.flatnonzero(change)
    touched = np.flatnonzero(change.any(axis=1))
    by = float(np.abs(change).max())
    if len(changed) == 1:
        return "code", int(touched[0]), int(changed[0]), 1, by
    alike = np.ptp(change, axis=1).max() < 0.01 * by
    if len(touched) == 1 and len(change) > 1:
        return "m" if alike else "sc", int(touched[0]), -1, 1, by
    minimum = "dmin" if len(change) > 1 else "m"
    return minimum if alike else "d", -1, -1, len(touched), by


def budget(qtypes: list[str]) -> pd.DataFrame:
    """Count the bits per weight that types spend on codes, on the sub-blocks' scales and minima, and on the blocks'.

    Parameters
    ----------
    qtypes : list of str
        Types that `bit_map` knows.

    Returns
    -------
    pd.DataFrame
        Index `type`; columns `code`, `sc`, `m`, `d`, `dmin` and `bpw`, their sum: bits per weight.

    Examples
    --------
    >>> budget(["Q4_K"]).loc["Q4_K", ["code", "sc", "m", "d", "dmin", "bpw"]].tolist()
    [4.0, 0.1875, 0.1875, 0.0625, 0.0625, 4.5]
    """
    fields = ["code", "sc", "m", "d", "dmin"]
    counts = {qtype: bit_map(qtype)["field"].value_counts() / block_size(qtype) for qtype in qtypes}
    frame = pd.DataFrame(counts).T.reindex(columns=fields).fillna(0.0).rename_axis("type")
    return frame.assign(bpw=frame.sum(axis=1))


def with_outlier(x: np.ndarray, size: float, at: int = 100) -> np.ndarray:
    """Copy a block and make one weight `size` times the block's root mean square."""
    result = x.copy()
    result[at] = size * np.sqrt(np.mean(np.square(x)))
    return result


def weights(x: np.ndarray, qtype: str) -> pd.DataFrame:
    """List what becomes of each weight of a block, or of some blocks in a row.

    Parameters
    ----------
    x : np.ndarray [shape=(n,), dtype=float32, finite]
        Weights; `n` a multiple of the type's block size.
    qtype : str
        A type that `quantlab.quants.codes` knows.

    Returns
    -------
    pd.DataFrame
        A row per weight: `sub_block`, `x`, `code`, `decoded`, `error` (decoded - x), `step` (between neighbouring
        levels), `lowest` and `highest` level; attribute `type`. In the weights' unit.

    Raises
    ------
    ValueError
        As `quantlab.quants.quantize` and `codes`.
    """
    data = quantize(x, qtype)
    code = codes(data, qtype)
    values = code_values(qtype)
    first, step = (part.ravel() for part in grid(data, qtype))
    decoded = dequantize(data, qtype, x.shape)
    frame = pd.DataFrame({"sub_block": np.arange(len(x)) // _sub_block(qtype), "x": x})
    frame = frame.assign(code=values[code].ravel(), decoded=decoded, error=decoded - x, step=np.abs(step))
    limits = np.sort([first + step * values.min(), first + step * values.max()], axis=0)
    frame = frame.assign(lowest=limits[0], highest=limits[1])
    frame.attrs["type"] = qtype
    return frame


def outliers(x: np.ndarray, qtypes: list[str], sizes: list[float], at: int = 100) -> pd.DataFrame:
    """Measure what an outlier does to the other weights of its block.

    Parameters
    ----------
    x : np.ndarray [shape=(256,), dtype=float32, finite]
        A block without outlier.
    qtypes : list of str
        Types that `weights` knows.
    sizes : list of float
        Sizes of the outlier, in rms of the block.
    at : int
        Its place.

    Returns
    -------
    pd.DataFrame
        A row per type and size: `type`, `size`, and the rms errors, over the rms of the block, `near` (of the other
        weights of its sub-block) and `far` (of the other sub-blocks).
    """
    rms, rows = np.sqrt(np.mean(np.square(x))), []
    for qtype in qtypes:
        for size in sizes:
            frame = weights(with_outlier(x, size, at), qtype)
            same = frame["sub_block"] == frame.loc[at, "sub_block"]
            near, far = frame[same].drop(index=at)["error"], frame[~same]["error"]
            errors = {where: np.sqrt(np.mean(np.square(part))) / rms for where, part in (("near", near), ("far", far))}
            rows.append({"type": qtype, "size": size, **errors})
    return pd.DataFrame(rows)
