"""Contents of a block: the owner of each bit, the values its weights can take, and their errors."""

import numpy as np
import pandas as pd

from quantlab.quants import block_size, codes, dequantize, grid, quantize
from quantlab.quants.codebook import code_values
from quantlab.quants.ggml_types import ggml_type


def bit_map(qtype: str) -> pd.DataFrame:
    """Find the owner of each bit of a block: flip it, and see which weights change, and how.

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
    """Return the number of weights that share a scale."""
    return ggml_type(qtype).sub_block or block_size(qtype)


def _owner(change: np.ndarray) -> tuple[str, int, int, int, float]:
    """Return field, sub-block, weight, number of sub-blocks and largest change for a flipped bit."""
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
    """List the code, value and error of each weight of a block, or of some adjacent blocks.

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
    """Measure the errors that an outlier causes in the other weights of its block.

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


def layout(qtype: str) -> pd.DataFrame:
    """List the fields of a block as runs of bits, for a drawing.

    Parameters
    ----------
    qtype : str
        Q4_K, IQ2_XXS or IQ2_XS.

    Returns
    -------
    pd.DataFrame
        A row per run: `line` of the drawing, `bit` (the first one, of the whole block), `n_bits`, `field`, `label`.

    Raises
    ------
    ValueError
        If the layout of `qtype` is not described here.

    Source: `block_q4_K`, `block_iq2_xxs` and `block_iq2_xs` in ggml-common.h of llama.cpp.

    Examples
    --------
    >>> int(layout("Q4_K")["n_bits"].sum()) // 8
    144
    """
    if qtype not in _LAYOUTS:
        raise ValueError(f"qtype={qtype!r}, must be one of {', '.join(_LAYOUTS)}. Choose one of them.")
    frame = pd.DataFrame(_LAYOUTS[qtype](), columns=["line", "n_bits", "field", "label"])
    frame.insert(1, "bit", frame["n_bits"].cumsum() - frame["n_bits"])
    return frame


def _layout_q4_k() -> list[tuple[int, int, str, str]]:
    """Return two floats, 12 bytes of scales and minima, and codes of two sub-blocks per 32 bytes."""
    head = [(0, 16, "d", "d"), (0, 16, "dmin", "dmin"), (0, 96, "scales", "8 scales and 8 minima, 6 bits each")]
    lines = (
        f"codes of weights {64 * j} to {64 * j + 31} (low 4 bits of each byte) and {64 * j + 32} to {64 * j + 63}"
        for j in range(4)
    )
    return head + [(j + 1, 256, "codes", line) for j, line in enumerate(lines)]


def _layout_iq2_xxs() -> list[tuple[int, int, str, str]]:
    """Return a float, and for 32 weights each: four indices, four times seven signs, a scale."""
    rows = [(0, 16, "d", "d")]
    for j in range(8):
        rows += [(j + 1, 8, "index", f"index of {32 * j + 8 * k}–{32 * j + 8 * k + 7}") for k in range(4)]
        rows += [(j + 1, 7, "signs", "7 signs") for _ in range(4)] + [(j + 1, 4, "scale", "scale")]
    return rows


def _layout_iq2_xs() -> list[tuple[int, int, str, str]]:
    """Return a float, 32 times an index with seven signs, and 16 scales."""
    rows = [(0, 16, "d", "d")]
    for j in range(32):
        rows += [(1 + j // 4, 9, "index", f"index of {8 * j}–{8 * j + 7}"), (1 + j // 4, 7, "signs", "7 signs")]
    return rows + [(9, 4, "scale", "scale") for _ in range(16)]


_LAYOUTS = {"Q4_K": _layout_q4_k, "IQ2_XXS": _layout_iq2_xxs, "IQ2_XS": _layout_iq2_xs}
