"""llama-quantize's list of ftypes: a mixture's name, its number in llama.cpp, and its base type."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from quantlab.quants.ggml_types import WRITABLE, block_size

RULES = ("current", "2023-12")


@dataclass(frozen=True)
class Ftype:
    """One line of llama-quantize's list."""

    name: str
    number: int | None  # None for COPY: the output keeps the number of the input
    qtype: str | None
    alias: str | None = None
    rules: tuple[str, ...] = RULES  # the rule sets that know it

    @property
    def is_quantized(self) -> bool:
        """True if the base type packs weights into blocks."""
        return self.qtype is not None and block_size(self.qtype) > 1

    @property
    def is_writable(self) -> bool:
        """True if the base type has an encoder here; for the others only the rules are known."""
        return self.qtype is None or self.qtype in WRITABLE


_NEW = ("current",)  # no llama.cpp of December 2023 knows them
ALL_FTYPES = {
    ftype.name: ftype
    for ftype in (
        Ftype("F32", 0, "F32"),
        Ftype("F16", 1, "F16"),
        Ftype("BF16", 32, "BF16"),
        Ftype("Q8_0", 7, "Q8_0"),
        Ftype("Q6_K", 18, "Q6_K"),
        Ftype("Q5_1", 9, "Q5_1"),
        Ftype("Q5_K_M", 17, "Q5_K", alias="Q5_K"),
        Ftype("Q5_K_S", 16, "Q5_K"),
        Ftype("Q5_0", 8, "Q5_0"),
        Ftype("Q4_1", 3, "Q4_1"),
        Ftype("Q4_K_M", 15, "Q4_K", alias="Q4_K"),
        Ftype("Q4_K_S", 14, "Q4_K"),
        Ftype("Q4_0", 2, "Q4_0"),
        Ftype("IQ4_NL", 25, "IQ4_NL", rules=_NEW),
        Ftype("IQ4_XS", 30, "IQ4_XS", rules=_NEW),
        Ftype("MXFP4_MOE", 38, "MXFP4", rules=_NEW),
        Ftype("Q3_K_L", 13, "Q3_K"),
        Ftype("Q3_K_M", 12, "Q3_K", alias="Q3_K"),
        Ftype("IQ3_M", 27, "IQ3_S", rules=_NEW),
        Ftype("IQ3_S", 26, "IQ3_S", rules=_NEW),
        Ftype("Q3_K_S", 11, "Q3_K"),
        Ftype("IQ3_XS", 22, "IQ3_S", rules=_NEW),
        Ftype("IQ3_XXS", 23, "IQ3_XXS", rules=_NEW),
        Ftype("Q2_K", 10, "Q2_K"),
        Ftype("Q2_K_S", 21, "Q2_K", rules=_NEW),
        Ftype("IQ2_M", 29, "IQ2_S", rules=_NEW),
        Ftype("IQ2_S", 28, "IQ2_XS", rules=_NEW),
        Ftype("IQ2_XS", 20, "IQ2_XS", rules=_NEW),
        Ftype("Q2_0", 41, "Q2_0", rules=_NEW),
        Ftype("IQ2_XXS", 19, "IQ2_XXS", rules=_NEW),
        Ftype("TQ2_0", 37, "TQ2_0", rules=_NEW),
        Ftype("IQ1_M", 31, "IQ1_M", rules=_NEW),
        Ftype("TQ1_0", 36, "TQ1_0", rules=_NEW),
        Ftype("IQ1_S", 24, "IQ1_S", rules=_NEW),
        Ftype("Q1_0", 40, "Q1_0", rules=_NEW),
        Ftype("COPY", None, None),
    )
}
FTYPES = {name: ftype for name, ftype in ALL_FTYPES.items() if ftype.is_writable}
_BY_ALIAS = {ftype.alias: ftype for ftype in FTYPES.values() if ftype.alias}
_BY_NUMBER = {ftype.number: ftype for ftype in FTYPES.values() if ftype.number is not None}


def find_ftype(ftype: str | int) -> Ftype:
    """Look up a ftype by name (any case), alias or llama.cpp's number.

    Raises
    ------
    ValueError
        If there is no such ftype; the text names the nearest one, or the numbers.

    Examples
    --------
    >>> find_ftype("q4_k").name, find_ftype(17).name
    ('Q4_K_M', 'Q5_K_M')
    """
    name = str(ftype).upper()
    found = FTYPES.get(name) or _BY_ALIAS.get(name) or (_BY_NUMBER.get(int(name)) if name.isdecimal() else None)
    if found is None:
        if name.isdecimal():
            raise ValueError(
                f"ftype={ftype}, must be one of {' '.join(map(str, _BY_NUMBER))}, or a name such as Q4_K_M."
            )
        near = f"{name}_K_M" if f"{name}_K_M" in FTYPES else ""  # of Q4, the mixture that most people take
        hint = f" Did you mean {near}?" if near else did_you_mean(name, [*FTYPES, *_BY_ALIAS])
        raise ValueError(f"ftype={ftype}, must be one of {' '.join(FTYPES)}.{hint or ' If in doubt, take Q4_K_M.'}")
    return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the known name that resembles an unknown one (empty text: none does)."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""
