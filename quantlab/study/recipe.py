"""Recipes: a type for every tensor, with the least predicted damage under a size limit.

Damages of single changes add up, very nearly, above 2.5 bits per weight. So the best recipe is the best pick of one
measured change per tensor, or per group of tensors, and `knapsack.solve` finds it exactly.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantlab.files.arguments import check_number
from quantlab.files.imatrix_file import MatrixLike
from quantlab.files.model import Model, ModelLike, as_model
from quantlab.study.best_recipe import BestRecipe
from quantlab.study.menu import Types, ftype_types, model_bytes, open_menu
from quantlab.study.sensitivity import Sensitivity
from quantlab.transform.mixture import find_ftype
from quantlab.transform.plan import parse_bytes


def recipe(
    sensitivity: Sensitivity | str | Path,
    model: ModelLike,
    *,
    target_size: int | str | None = None,
    target_bpw: float | None = None,
    like: str | None = None,
    keep: Types = (),
    min_type: Types = (),
    max_type: Types = (),
    exclude: Sequence[str] = (),
    criterion: str = "kld",
    imatrix: MatrixLike | None = None,
    rules: str = "current",
) -> BestRecipe:
    """Choose one type per tensor, or group of tensors, with the least predicted damage under a size limit.

    Parameters
    ----------
    sensitivity : Sensitivity or path
        What each change costs: of `quantlab.sensitivity`, or a file that it saved.
    model : str, Path or Model
        The model that it was measured on.
    target_size : int or str, optional
        Limit in bytes, or a text such as `3MiB`: tensor data of the whole model, header and padding aside.
    target_bpw : float, optional
        Limit in bits per weight, all tensors counted.
    like : str, optional
        A ftype whose size is the limit. One of the three limits must be given.
    keep, min_type, max_type : mapping or iterable of (expression, type)
        The type, the least and the most bits per weight, of the tensors so named: a tensor's whole name means it
        alone, anything else is an expression found anywhere in names. Of several that fit the first counts.
    exclude : sequence of str
        Types that no tensor may get.
    criterion : str
        What is least: `kld`, the predicted damage, or `error`, the squared error of the weights alone, weighted by the
        matrix.
    imatrix : str, Path or ImportanceMatrix, optional
        The matrix that the sensitivity was measured with; it decides, here, which rules a ftype goes by.
    rules : str
        Rule set of the ftypes.

    Returns
    -------
    BestRecipe
        The same, bit for bit, for the same damages and limits. Of recipes with equal damage the smallest; see
        `knapsack.solve` for the rest.

    Raises
    ------
    FileNotFoundError
        If model, sensitivity or matrix is not there.
    ValueError
        If the sensitivity is of another model or matrix, there is not exactly one limit, a type, ftype or criterion is
        not known, a constraint fits nothing or leaves nothing that was measured, two groups share a tensor, or nothing
        is as small as the limit.
    """
    base = as_model(model)
    sizes = {"target_size": target_size, "target_bpw": target_bpw, "like": like}
    limit = size_limit(base, **sizes, rules=rules, imatrix=imatrix is not None)
    asked = {"keep": keep, "min_type": min_type, "max_type": max_type, "exclude": exclude, "criterion": criterion}
    menu = open_menu(sensitivity, base, **asked, imatrix=imatrix, rules=rules)
    best = menu.best(limit)
    return replace(best, ftype=find_ftype(like).name) if like is not None and find_ftype(like).is_quantized else best


def size_limit(
    model: Model,
    *,
    target_size: int | str | None = None,
    target_bpw: float | None = None,
    like: str | None = None,
    rules: str = "current",
    imatrix: bool = False,
) -> int:
    """Return the size limit in bytes of tensor data; parameters and errors as for `recipe`."""
    if (target_size is not None) + (target_bpw is not None) + (like is not None) != 1:
        given = f"target_size={target_size}, target_bpw={target_bpw}, like={like}"
        raise ValueError(f"{given}: must be exactly one of the three. Give for example like=Q4_K_M.")
    if like is not None:
        return model_bytes(model, ftype_types(model, like, rules, imatrix))
    check_number(target_bpw=target_bpw)
    if target_bpw is not None:
        if not 0 < target_bpw < float("inf"):
            raise ValueError(
                f"target_bpw={target_bpw}, must be a positive number of bits per weight. Give for example 4.5."
            )
        return int(target_bpw * model.n_weights / 8)
    try:
        return parse_bytes(target_size)  # pyright: ignore[reportArgumentType]
    except ValueError:
        raise ValueError(f"target_size={target_size}, must be a number of bytes. Give for example 3MiB.") from None
