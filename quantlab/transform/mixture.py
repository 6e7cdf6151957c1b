"""Choice of types: from ftype, tensor names and shapes to a ggml type per tensor.

A *ftype* such as ``Q4_K_M`` is a mixture: most matrices get its base type, a few that matter more get more bits.
The rules stand in `rules.py`; here options of the user come before them, and rows that fit no block after them.
Nothing here reads or writes weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantlab.files.output import replacing
from quantlab.quants.ggml_types import WRITABLE, block_size
from quantlab.transform.expressions import compile_expression
from quantlab.transform.ftypes import FTYPES, RULES, Ftype, did_you_mean, find_ftype
from quantlab.transform.rules import RULE_SETS, in_file_order, is_quantizable, layer_of

__all__ = [
    "FTYPES",
    "RULES",
    "Choice",
    "Ftype",
    "Recipe",
    "choose_types",
    "converted_type",
    "find_ftype",
    "find_qtype",
    "fitting",
    "in_file_order",
    "is_quantizable",
    "layer_of",
    "parse_tensor_type",
    "read_tensor_types",
]

_PER_LAYER = "per_layer_token_embd.weight"


@dataclass(frozen=True)
class Choice:
    """The type of one tensor, and the reason for it."""

    qtype: str  # the type that the tensor gets
    # the type that the rules or the user asked for; differs from `qtype` where the row length forced a fallback
    wanted: str
    # "kept" (never quantized), "base" (the ftype's own type), "mixture" (a rule of the mixture), "asked" (an
    # override); " + fallback" is added where the row length did not fit
    why: str


def find_qtype(qtype: str, of: str = "tensor type") -> str:
    """Look up a ggml type that can be written, by name in any case.

    Raises
    ------
    ValueError
        If there is no such type; the text names the nearest one.
    """
    if qtype.upper() not in WRITABLE:
        near = did_you_mean(qtype.upper(), WRITABLE)
        raise ValueError(f"{of}: type={qtype}, must be one of {' '.join(WRITABLE)}.{near}")
    return qtype.upper()


def converted_type(name: str, shape: tuple[int, ...]) -> str:
    """Return a tensor's type in an F16 conversion: F32 if it is never quantized, else F16."""
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
        Of any architecture.
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
    pure, leave_output_tensor, output_tensor_type, token_embedding_type, tensor_types
        As in `quantlab.transform.job.Options`.

    Returns
    -------
    dict[str, Choice]
        In the order of processing, which is also the order in which llama-quantize writes the tensors.

    Raises
    ------
    ValueError
        If the ftype, a type, the rule set or an expression is unknown, the rule set does not know such a model, an
        expression asks only for tensors that are never quantized, or there are layers that the metadata denies.

    Examples
    --------
    >>> from quantlab.arch import Hparams
    >>> hparams = Hparams(arch="llama", n_layer=1, n_embd=256, n_head=8)
    >>> choose_types(hparams, {"blk.0.ffn_down.weight": (256, 576)}, "Q4_K_M")["blk.0.ffn_down.weight"]
    Choice(qtype='Q8_0', wanted='Q6_K', why='mixture + fallback')

    Source: llama.cpp, src/llama-quant.cpp (current rules) and llama.cpp at 948ff137 (2023-12). There a request for
    F16 or F32 turned ``output.weight`` into Q6_K; here F16 and F32 hold what they say under both rule sets.
    """
    if rules not in RULES:
        raise ValueError(f"rules={rules}, must be one of {' '.join(RULES)}. Choose one of them.")
    found = find_ftype(ftype)
    if rules not in found.rules:
        raise ValueError(
            f"ftype={found.name}: rules={rules}, must be {found.rules[0]}, which has this ftype. Choose other rules."
        )
    names = [*shapes, _PER_LAYER]
    asked = [(compile_expression(text, names), find_qtype(q, f"tensor type {text}")) for text, q in tensor_types]
    if asked and not found.is_quantized:
        raise ValueError(
            f"tensor types: ftype={found.name}, must be a quantized one. "
            f"Choose another ftype, or leave tensor types out."
        )
    mixture = RULE_SETS[rules](found.name, hparams, shapes, imatrix)
    ends = {
        "output.weight": output_tensor_type and find_qtype(output_tensor_type, "output tensor type"),
        "token_embd.weight": token_embedding_type and find_qtype(token_embedding_type, "token embedding type"),
    }
    if not any(is_found(_PER_LAYER) for is_found, _ in asked):
        ends[_PER_LAYER] = ends["token_embd.weight"]
    choices = {}
    for name in shapes if keep_order else mixture.order(shapes):
        shape = tuple(shapes[name])
        has = source[name] if source else converted_type(name, shape)
        left = leave_output_tensor and name == "output.weight"
        if found.qtype is None or left or not mixture.is_quantizable(name, shape):
            choices[name] = Choice(has, has, "kept")
        elif ends.get(name):
            choices[name] = Choice(ends[name], ends[name], "asked")  # pyright: ignore[reportArgumentType]
        elif not found.is_quantized:
            choices[name] = Choice(found.qtype, found.qtype, "base")
        else:
            wanted, why = next(((q, "asked") for is_found, q in asked if is_found(name)), (found.qtype, "base"))
            if why == "base" and not pure:
                wanted = mixture.wanted(name, shape, found.qtype, ends["output.weight"])
                why = "mixture" if wanted != found.qtype else why
            qtype = fitting(wanted, shape[-1], mixture.fallback)
            choices[name] = Choice(qtype, wanted, why if qtype == wanted else f"{why} + fallback")
    _check_asked(asked, choices)
    return choices


def fitting(qtype: str, n_per_row: int, fallback: Mapping[str, str]) -> str:
    """Return `qtype`, or its fallback if its blocks do not divide the row."""
    if n_per_row % block_size(qtype) == 0:
        return qtype
    second = fallback.get(qtype, qtype)
    return second if n_per_row % block_size(second) == 0 else "F16"


def _check_asked(asked: Iterable[tuple[Callable[[str], bool], str]], choices: Mapping[str, Choice]) -> None:
    """Refuse expressions that match only tensors which are never quantized: a router, a norm."""
    for is_found, qtype in asked:
        names = [name for name in choices if is_found(name)]
        kept = [name for name in names if choices[name].why == "kept" and choices[name].qtype != qtype]
        if kept and len(kept) == len(names) and "output.weight" not in kept:
            raise ValueError(
                f"{kept[0]}: type={qtype}, must stay {choices[kept[0]].qtype}: tensors of this name "
                f"are never quantized. Leave this tensor type out."
            )


def parse_tensor_type(text: str) -> tuple[str, str]:
    """Split one ``name=type`` of ``--tensor-type`` at its first equals sign.

    Raises
    ------
    ValueError
        If the name or the type is missing.
    """
    name, _, qtype = text.partition("=")
    if not name or not qtype:
        raise ValueError(f"tensor type={text}, must be NAME=TYPE. Example: attn_v=Q6_K.")
    return name, qtype


def read_tensor_types(path: str | Path) -> list[tuple[str, str]]:
    """Read a ``--tensor-type-file``: ``name=type`` entries separated by white space.

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
    """A type for each tensor by name, independent of ftypes.

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

    @property
    def name(self) -> str:
        """Name in comparisons."""
        return "recipe"

    def tensor_types(self) -> list[tuple[str, str]]:
        """Return the recipe as expressions for `choose_types`, each anchored so that it matches only one tensor."""
        return [("^" + name.replace(".", r"\.") + "$", qtype) for name, qtype in self.types.items()]

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the recipe as a ``--tensor-type-file``, which llama-quantize also reads.

        Raises
        ------
        FileExistsError
            If a file of that name exists and `overwrite` is false.
        """
        with replacing(path, overwrite=overwrite) as part:
            part.write_text("".join(f"{regex}={qtype}\n" for regex, qtype in self.tensor_types()), encoding="utf-8")
        return Path(path)

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
