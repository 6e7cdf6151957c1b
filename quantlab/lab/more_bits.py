"""Tensors that llama.cpp's rule for more bits picks, compared with a measurement's choice of the same bytes.

Q4_K_M and Q5_K_M give Q6_K to `attn_v` and `ffn_down` in the first and the last eighth of the layers and in every third
one between. The rule was found on one model; a sensitivity says what each such widening gains on this one.
"""

import pandas as pd

from quantlab.study.changes import fitting, kind_of
from quantlab.study.sensitivity import Sensitivity
from quantlab.transform.mixture import choose_types, find_ftype, layer_of
from quantlab.transform.plan import tensor_bytes

_WITH_RULE = ("Q4_K_M", "Q5_K_M")
_WIDE = "Q6_K"


def more_bits(model, found: Sensitivity, ftype: str = "Q4_K_M") -> pd.DataFrame:
    """List the gain of widening each tensor of the layers, and whether rule and measurement pick it.

    Parameters
    ----------
    model : Model
    found : Sensitivity
        Of single tensors, at the mixture's base type and at Q6_K (or at what stands in for them).
    ftype : str
        Q4_K_M or Q5_K_M.

    Returns
    -------
    pd.DataFrame
        `tensor`, `layer`, `kind`, `narrow` and `wide` (types), `bytes` (that widening adds), `gain` (nats per token of
        divergence that it takes away), `gain_per_kib`, `rule` and `measured` (whether it is picked). The measurement
        picks by gain per byte, as long as there are bytes left of those that the rule spends.

    Raises
    ------
    ValueError
        If the ftype has no such rule, or a tensor was not measured at one of its types.
    """
    if find_ftype(ftype).name not in _WITH_RULE:
        raise ValueError(
            f"ftype={ftype}, must be {' or '.join(_WITH_RULE)}, which have the rule for more bits. Choose one of them."
        )
    plain = choose_types(model.hparams, model.shapes, ftype, pure=True)
    rule = choose_types(model.hparams, model.shapes, ftype)
    kld = {(row["group"], row["qtype"]): row["delta_kld"] for row in found.rows}
    rows = []
    for name in (name for name in dict.fromkeys(row["group"] for row in found.rows) if layer_of(name) >= 0):
        shape = model.shapes[name]
        narrow, wide = plain[name].qtype, fitting(_WIDE, shape[-1])
        for qtype in (narrow, wide):
            if (name, qtype) not in kld:
                raise ValueError(f"{name}: {qtype} was not measured. Measure the types of {ftype}.")
        added = tensor_bytes(shape, wide) - tensor_bytes(shape, narrow)  # pyright: ignore[reportArgumentType]
        gain = kld[name, narrow] - kld[name, wide]
        picked = rule[name].qtype == wide != narrow
        rows.append((name, layer_of(name), kind_of(name), narrow, wide, added, gain, 1024 * gain / added, picked))
    columns = ["tensor", "layer", "kind", "narrow", "wide", "bytes", "gain", "gain_per_kib", "rule"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.assign(measured=_greedy(frame, int(frame.loc[frame["rule"], "bytes"].sum())))


def _greedy(frame: pd.DataFrame, left: int) -> pd.Series:
    """Pick rows by gain per byte until `left` bytes are spent."""
    picked, sizes = pd.Series(False, index=frame.index), frame["bytes"].to_dict()
    for i in frame["gain_per_kib"].sort_values(ascending=False, kind="stable").index:
        if sizes[i] <= left:
            picked[i] = True
            left -= sizes[i]
    return picked
