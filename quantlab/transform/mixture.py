"""Which type each tensor gets: ftype, tensor name and shape in, a ggml type per tensor out.

A *ftype* such as ``Q4_K_M`` is a mixture: most matrices get its base type, a few that matter more get more bits.
The rules changed over time; two sets are kept by name, ``"2023-12"`` (llama.cpp 948ff137, which the published tables
for LLaMA-7B belong to) and ``"current"``. Nothing here reads or writes weights.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantlab.quants.ggml_types import FALLBACK, WRITABLE, block_size

RULES = ("current", "2023-12")
ARCHITECTURES = ("llama", "qwen2", "qwen3")
FALLBACK_2023 = FALLBACK | {"Q3_K": "Q4_1"}  # what types became in 2023 where a row is not a whole number of blocks


@dataclass(frozen=True)
class Ftype:
    """One line of llama-quantize's list: a mixture's name, llama.cpp's number for it, and its base type."""

    name: str
    number: int | None  # None for COPY: the output keeps the number of the input
    qtype: str | None
    alias: str | None = None
    rules: tuple[str, ...] = RULES  # the rule sets that know it

    @property
    def is_quantized(self) -> bool:
        """Whether the base type packs weights into blocks."""
        return self.qtype is not None and block_size(self.qtype) > 1


FTYPES = {
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
        Ftype("Q3_K_L", 13, "Q3_K"),
        Ftype("Q3_K_M", 12, "Q3_K", alias="Q3_K"),
        Ftype("Q3_K_S", 11, "Q3_K"),
        Ftype("Q2_K", 10, "Q2_K"),
        Ftype("Q2_K_S", 21, "Q2_K", rules=("current",)),
        Ftype("COPY", None, None),
    )
}
_BY_ALIAS = {ftype.alias: ftype for ftype in FTYPES.values() if ftype.alias}
_BY_NUMBER = {ftype.number: ftype for ftype in FTYPES.values() if ftype.number is not None}


@dataclass(frozen=True)
class Choice:
    """The type of one tensor, and the reason for it.

    Attributes
    ----------
    qtype : str
        The type that the tensor gets.
    wanted : str
        The type that the rules or the user asked for; differs from `qtype` where the row length forced a fallback.
    why : str
        "kept" (never quantized), "base" (the ftype's own type), "mixture" (a rule of the mixture), "asked" (an
        override); " + fallback" is added where the row length did not fit.
    """

    qtype: str
    wanted: str
    why: str


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
                f"ftype={ftype}, must be one of {' '.join(map(str, _BY_NUMBER))}, or a name such as Q4_K_M"
            )
        near = difflib.get_close_matches(name, [*FTYPES, *_BY_ALIAS], n=1, cutoff=0.0)[0]
        raise ValueError(f"ftype={ftype}, must be one of {' '.join(FTYPES)}. Did you mean {near}?")
    return found


def find_qtype(qtype: str, of: str = "tensor type") -> str:
    """Look up a ggml type that can be written, by name in any case.

    Raises
    ------
    ValueError
        If there is no such type; the text names the nearest one.
    """
    if qtype.upper() not in WRITABLE:
        near = difflib.get_close_matches(qtype.upper(), WRITABLE, n=1, cutoff=0.0)[0]
        raise ValueError(f"{of}: type={qtype}, must be one of {' '.join(WRITABLE)}. Did you mean {near}?")
    return qtype.upper()


def layer_of(name: str) -> int:
    """Return the layer number in a tensor's name, -1 for a tensor of no layer."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def in_file_order(names: Iterable[str]) -> list[str]:
    """Sort tensor names as llama-quantize writes them: tensors of no layer first, then by layer, then by name."""
    return sorted(names, key=lambda name: (layer_of(name), name))


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor may be quantized at all: matrices called ``…weight`` that are no norm and no router."""
    is_matrix = sum(n > 1 for n in shape[:-1]) > 0
    return is_matrix and name.endswith("weight") and "_norm.weight" not in name and "ffn_gate_inp.weight" not in name


def converted_type(name: str, shape: tuple[int, ...]) -> str:
    """Return the type in which an F16 conversion holds a tensor: F32 for what is never quantized, else F16."""
    return "F16" if is_quantizable(name, shape) else "F32"


def choose_types(
    hparams,
    shapes: Mapping[str, tuple[int, ...]],
    ftype: str | int,
    *,
    rules: str = "current",
    imatrix: bool = False,
    source: Mapping[str, str] | None = None,
    keep_order: bool = False,
    pure: bool = False,
    leave_output_tensor: bool = False,
    output_tensor_type: str | None = None,
    token_embedding_type: str | None = None,
    tensor_types: Iterable[tuple[str, str]] = (),
) -> dict[str, Choice]:
    """Choose the type of every tensor of a model.

    Two counters, of value and of down projections, advance only where the standard rules run for such a tensor, in the
    order of processing: an override for one layer shifts the pattern of all later ones, as it does in llama.cpp.

    Parameters
    ----------
    hparams : Hparams
        Needs ``arch``, ``n_layer``, ``n_head`` and ``n_head_kv``; ``n_expert``, if there, must be 0.
    shapes : Mapping[str, tuple[int, ...]]
        GGUF tensor name → shape in NumPy order (the row length last).
    ftype : str or int
        A name, alias or number from `FTYPES`.
    rules : str
        "current", or "2023-12". The latter processes tensors in the order of `shapes` (the input file's), the former
        in the order of `in_file_order`.
    imatrix : bool
        Whether an importance matrix is at hand; two of the current rules ask.
    source : Mapping[str, str], optional
        The types the tensors have now, kept where a tensor is not quantized. Default: those of an F16 conversion.
    keep_order : bool
        Process in the order of `shapes` under the current rules too, as ``--keep-split`` does.
    pure : bool
        Give every quantizable tensor the base type.
    leave_output_tensor : bool
        Keep ``output.weight`` as it is.
    output_tensor_type, token_embedding_type : str, optional
        Types for ``output.weight`` (also the embedding, where it is tied) and for ``token_embd.weight``.
    tensor_types : Iterable of (regex, type)
        Types by tensor name; the first expression found in the name wins.

    Returns
    -------
    dict[str, Choice]
        In the order of processing, which is also the order in which llama-quantize writes the tensors.

    Raises
    ------
    ValueError
        If the ftype, a type, the rule set, an expression or the architecture is not known, or there are experts.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> hparams = SimpleNamespace(arch="llama", n_layer=1, n_head=8, n_head_kv=8)
    >>> choose_types(hparams, {"blk.0.ffn_down.weight": (256, 576)}, "Q4_K_M")["blk.0.ffn_down.weight"]
    Choice(qtype='Q5_0', wanted='Q4_K', why='base + fallback')

    Source: llama.cpp, src/llama-quant.cpp (current rules) and llama.cpp at 948ff137 (2023-12). There a request for
    F16 or F32 turned ``output.weight`` into Q6_K; here F16 and F32 hold what they say under both rule sets.
    """
    if rules not in RULES:
        raise ValueError(f"rules={rules}, must be one of {' '.join(RULES)}")
    if hparams.arch not in ARCHITECTURES:
        raise ValueError(f"architecture={hparams.arch}, must be one of {' '.join(ARCHITECTURES)}")
    if getattr(hparams, "n_expert", 0):
        raise ValueError(f"n_expert={hparams.n_expert}, must be 0: no rules for mixtures of experts are known here")
    found = find_ftype(ftype)
    if rules not in found.rules:
        raise ValueError(f"ftype={found.name}: rules={rules}, must be {found.rules[0]}, where this ftype exists")
    asked = _parse_tensor_types(tensor_types)
    if asked and not found.is_quantized:
        raise ValueError(f"tensor types: ftype={found.name}, must be a quantized one for them to apply")
    mixture = _Mixture(found.name, rules == "2023-12", imatrix, hparams, shapes)
    ends = {
        "output.weight": output_tensor_type and find_qtype(output_tensor_type, "output tensor type"),
        "token_embd.weight": token_embedding_type and find_qtype(token_embedding_type, "token embedding type"),
    }
    choices = {}
    for name in shapes if keep_order or mixture.old else in_file_order(shapes):
        shape = tuple(shapes[name])
        has = source[name] if source else converted_type(name, shape)
        left = leave_output_tensor and name == "output.weight"
        if found.qtype is None or left or not is_quantizable(name, shape):
            choices[name] = Choice(has, has, "kept")
        elif ends.get(name):
            choices[name] = Choice(ends[name], ends[name], "asked")
        elif not found.is_quantized:
            choices[name] = Choice(found.qtype, found.qtype, "base")
        else:
            wanted, why = next(((q, "asked") for regex, q in asked if regex.search(name)), (found.qtype, "base"))
            if why == "base" and not pure:
                wanted = mixture.wanted(name, shape, found.qtype, ends["output.weight"])
                why = "mixture" if wanted != found.qtype else why
            qtype = _fitting(wanted, shape[-1], mixture.old)
            choices[name] = Choice(qtype, wanted, why if qtype == wanted else f"{why} + fallback")
    return choices


def _fitting(qtype: str, n_per_row: int, old: bool) -> str:
    """Return `qtype`, or what stands in for it where its blocks do not divide the row."""
    if n_per_row % block_size(qtype) == 0:
        return qtype
    second = (FALLBACK_2023 if old else FALLBACK).get(qtype, qtype)
    return second if n_per_row % block_size(second) == 0 else "F16"


class _Mixture:
    """The rules of one ftype, with the two counters that make them depend on the order of processing."""

    def __init__(self, ftype: str, old: bool, imatrix: bool, hparams, shapes: Mapping[str, tuple[int, ...]]):
        self.ftype = ftype
        self.old = old
        self.imatrix = imatrix
        self.gqa = hparams.n_head // hparams.n_head_kv if hparams.n_head_kv else 0
        self.is_70b = hparams.n_layer == 80 and (
            (hparams.arch == "llama" and hparams.n_head != hparams.n_head_kv) or (hparams.arch == "qwen2" and not old)
        )
        self.tied = "output.weight" not in shapes and not old
        self.n_attn_v = sum("attn_v.weight" in name for name in shapes)
        self.n_ffn_down = sum("ffn_down.weight" in name for name in shapes) if old else hparams.n_layer
        self.i_attn_v = 0
        self.i_ffn_down = 0

    def wanted(self, name: str, shape: tuple[int, ...], base: str, output_type: str | None) -> str:
        """Return the type the mixture gives to a tensor, and advance the counter of its kind."""
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return output_type or self._output(base, shape[-1])
        if "attn_v.weight" in name:
            self.i_attn_v += 1
            qtype = self._attn_v(base, self.i_attn_v - 1, self.n_attn_v)
            return "Q5_K" if self.is_70b and qtype in ("Q3_K", "Q4_K") else qtype
        if "attn_output.weight" in name:
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.ftype, base)
        if "ffn_down" in name:
            self.i_ffn_down += 1
            return self._ffn_down(base, self.i_ffn_down - 1, self.n_ffn_down)
        if self.old and self.ftype == "Q2_K" and ("ffn_gate" in name or "ffn_up" in name):
            return "Q3_K"
        return base

    def _output(self, base: str, n_per_row: int) -> str:
        block = 256 if self.old else block_size(base)
        return "Q8_0" if base == "Q8_0" or n_per_row % block else "Q6_K"

    def _attn_v(self, base: str, i: int, n: int) -> str:
        match self.ftype:
            case "Q2_K":
                return "Q4_K" if self.gqa >= 4 and not self.old else "Q3_K"
            case "Q2_K_S" if self.gqa >= 4:
                return "Q4_K"
            case "Q3_K_M":
                return "Q5_K" if i < 2 else "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if _more_bits(i, n):
                return "Q6_K"
            case "Q4_K_S" if i < 4:
                return "Q5_K"
        return base

    def _ffn_down(self, base: str, i: int, n: int) -> str:
        match self.ftype:
            case "Q2_K":
                return "Q3_K"
            case "Q2_K_S" if i < n // 8:
                return "Q4_K"
            case "Q3_K_M":
                return "Q5_K" if i < (2 if self.old else n // 16) else "Q4_K"
            case "Q3_K_L":
                return "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if _more_bits(i, n):
                return "Q6_K"
            case "Q4_K_S" if i < (4 if self.old else n // 8):
                return "Q5_K"
            case "Q4_0" | "Q5_0" if self.imatrix and not self.old and i < n // 8:
                return "Q4_1" if base == "Q4_0" else "Q5_1"
        return base


def _more_bits(i: int, n: int) -> bool:
    """Tell whether layer i of n gets more bits: the first and the last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _parse_tensor_types(tensor_types: Iterable[tuple[str, str]]) -> list[tuple[re.Pattern, str]]:
    """Compile the expressions, lower-cased as llama-quantize does, and check the types."""
    compiled = []
    for text, qtype in tensor_types:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", FutureWarning)  # a class such as [[:digit:]] would fit something else
                regex = re.compile(text.lower())
        except (re.error, FutureWarning) as error:
            raise ValueError(f"tensor type: name={text}, must be a regular expression ({error})") from None
        compiled.append((regex, find_qtype(qtype, f"tensor type {text}")))
    return compiled


def parse_tensor_type(text: str) -> tuple[str, str]:
    """Split one ``name=type`` of ``--tensor-type`` at its first equals sign.

    Raises
    ------
    ValueError
        If the name or the type is missing.
    """
    name, _, qtype = text.partition("=")
    if not name or not qtype:
        raise ValueError(f"tensor type={text}, must read NAME=TYPE. Example: attn_v=Q6_K")
    return name, qtype


def read_tensor_types(path: str | Path) -> list[tuple[str, str]]:
    """Read a ``--tensor-type-file``: ``name=type`` entries between white space.

    Raises
    ------
    ValueError
        If the file is no text, or an entry does not read ``name=type``.
    """
    try:
        entries = Path(path).read_text(encoding="utf-8").split()
    except UnicodeDecodeError:
        entries = ["\0"]
    if not all(entry.isprintable() for entry in entries):
        raise ValueError(f"{path}: must be a text of NAME=TYPE entries. Check the name.")
    try:
        return [parse_tensor_type(entry) for entry in entries]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclass(frozen=True)
class Recipe:
    """A type for each tensor by name, beyond what any ftype gives.

    Attributes
    ----------
    types : dict[str, str]
        GGUF tensor name → ggml type.

    Examples
    --------
    >>> Recipe({"output.weight": "Q6_K"}).tensor_types()
    [('^output\\\\.weight$', 'Q6_K')]
    """

    types: dict[str, str]

    def tensor_types(self) -> list[tuple[str, str]]:
        """Return the recipe as expressions for `choose_types`, each anchored so that it fits one tensor alone."""
        return [("^" + name.replace(".", r"\.") + "$", qtype) for name, qtype in self.types.items()]

    def save(self, path: str | Path) -> Path:
        """Write the recipe as a ``--tensor-type-file``, which llama-quantize reads as well."""
        path = Path(path)
        path.write_text("".join(f"{regex}={qtype}\n" for regex, qtype in self.tensor_types()), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe that `save` wrote.

        Raises
        ------
        ValueError
            If an entry is not one tensor's full name (any other ``--tensor-type-file``: see `read_tensor_types`).
        """
        types = {}
        for regex, qtype in read_tensor_types(path):
            name = regex.removeprefix("^").removesuffix("$").replace(r"\.", ".")
            if regex != "^" + name.replace(".", r"\.") + "$":
                raise ValueError(f"{path}: name={regex}, must be one tensor's name as ^blk\\.0\\.attn_q\\.weight$")
            types[name] = find_qtype(qtype, f"{path}: {name}")
        return cls(types)
