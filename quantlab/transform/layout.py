"""Layouts: the types of a file's tensors, read from one file and applied to another."""

from collections.abc import Mapping

from quantlab.files.model import LazyTensor, Model
from quantlab.quants.ggml_types import WRITABLE, block_size
from quantlab.transform.mixture import Choice
from quantlab.transform.rules import in_file_order, is_quantizable

__all__ = ["apply_layout", "layout", "layout_lines"]


def layout(model: Model) -> dict[str, str]:
    """Return the type of every tensor that quantizing can change, by name, in llama-quantize's order."""
    arch = model.hparams.arch
    return {
        name: model.tensor(name).qtype
        for name in in_file_order(model.names)
        if is_quantizable(name, model.tensor(name).shape, arch)
    }


def layout_lines(types: Mapping[str, str]) -> list[str]:
    r"""Return a layout as the lines of a `--tensor-type-file`, which llama-quantize also reads.

    Examples
    --------
    >>> layout_lines({"output.weight": "Q6_K"})
    ['^output\\.weight$=Q6_K']
    """
    return ["^" + name.replace(".", r"\.") + f"$={qtype}" for name, qtype in types.items()]


def apply_layout(model: Model, other: Model) -> tuple[dict[str, Choice], list[str]]:
    """Give each tensor of `model` the type of the same tensor in `other`.

    Returns
    -------
    choices : dict[str, Choice]
        In the order of processing.
    misfits : list of str
        One line for every tensor whose type cannot be applied.

    Raises
    ------
    ValueError
        If the two have different architectures.
    """
    if model.hparams.arch != other.hparams.arch:
        raise ValueError(
            f"{other.path}: architecture={other.hparams.arch}, must be {model.hparams.arch}, the source's. "
            f"Use the layout of a file of the same model."
        )
    given, choices, misfits = layout(other), {}, []
    for name in in_file_order(model.names):
        tensor = model.tensor(name)
        qtype, why = given.pop(name, None), "asked"
        if not is_quantizable(name, tensor.shape, model.hparams.arch):
            qtype, why = tensor.qtype, "kept"
        misfit = _misfit(tensor, qtype, other.path.name)
        misfits += [misfit] if misfit else []
        qtype = tensor.qtype if misfit else qtype
        choices[name] = Choice(qtype, qtype, why)  # pyright: ignore[reportArgumentType]
    misfits += [f"{name}: is in the layout of {other.path.name} only." for name in given]
    return choices, misfits


def _misfit(tensor: LazyTensor, qtype: str | None, other: str) -> str:
    """Explain why a tensor cannot get its type in the layout of `other` (None: it can)."""
    if qtype is None:
        return f"{tensor.name}: is missing from the layout of {other}. Use a file of the same model."
    block = block_size(qtype)
    if tensor.shape[-1] % block:
        return f"{tensor.name}: n_per_row={tensor.shape[-1]} is not a multiple of the {qtype} block size {block}."
    if qtype not in WRITABLE and qtype != tensor.qtype:
        return f"{tensor.name}: type={qtype}, must be one of {' '.join(WRITABLE)}."
    return ""
