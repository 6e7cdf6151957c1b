"""Which type for which tensor: the least predicted damage that a size allows, from a measured sensitivity.

Damages of single changes add up, very nearly, above 2.5 bits per weight. So the best recipe is the best pick of one
measured change per tensor, or per group of tensors, and `knapsack.solve` finds it exactly.
"""

import operator
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

import quantlab
from quantlab.files.arguments import check_number
from quantlab.files.imatrix_file import ImportanceMatrix, as_matrix
from quantlab.files.model import Model, as_model
from quantlab.files.output import beside, check_output, is_report, is_stream, replacing
from quantlab.result import Result
from quantlab.study.damage_cache import json_digest, matrix_digests, model_digest
from quantlab.study.knapsack import solve
from quantlab.study.sensitivity import Sensitivity
from quantlab.transform.expressions import compile_expression
from quantlab.transform.mixture import FTYPES, Recipe, choose_types, find_qtype
from quantlab.transform.plan import bits_per_weight, parse_bytes, tensor_bytes

Types = Mapping[str, str] | Iterable[tuple[str, str]]  # expression -> type


@dataclass(frozen=True, repr=False)
class BestRecipe(Result, Recipe):
    """The recipe with the least predicted damage under a size limit.

    Attributes
    ----------
    types : dict[str, str]
        GGUF tensor name → ggml type; tensors that are not in it stay as they are.
    rows : tuple of dict
        One per group: `group`, `layer`, `kind`, `qtype`, `n_weights`, `bytes`, `delta_kld`.
    bytes, limit : int
        Tensor data of the whole model, header and padding aside, and what was allowed.
    n_weights : int
        Weights of the whole model.
    predicted : float
        KL divergence from the base on the calibration text, nats per token: that of the sensitivity's starting point
        and all `delta_kld`.
    ftype : str
        The mixture next in size: what llama-quantize is told beside the recipe, and what the file calls itself.
    provenance : dict
        What it was made from: calibration, rule set, constraints.
    """

    rows: tuple[dict, ...]
    bytes: int
    limit: int
    n_weights: int
    predicted: float
    ftype: str
    provenance: dict
    _look = {"na_rep": ""}
    _indent = 1

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.bytes / self.n_weights

    def _document(self) -> dict[str, Any]:
        figures = {"bytes": self.bytes, "limit": self.limit, "bpw": self.bpw, "predicted_kld": self.predicted}
        return {"protocol": self.provenance | figures | {"ftype": self.ftype}, "rows": self.rows}

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the recipe as a ``--tensor-type-file``, and where it comes from beside it, in ``<path>.json``.

        Raises
        ------
        FileExistsError
            If one of the two exists and `overwrite` is false; an older report may always be replaced.
        """
        path = Path(path)
        origin = beside(path, ".json")
        if is_stream(path):
            return super().save(path)
        check_output(origin, overwrite=overwrite, own=is_report)
        super().save(path, overwrite=overwrite)
        with replacing(origin, overwrite=overwrite, own=is_report) as part:
            part.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    def command(self, path: str | Path, source: str = "model.gguf", imatrix: str | Path | None = None) -> str:
        """Return the llama-quantize call that applies the recipe in `path`."""
        target = f"{Path(source).stem}-{Path(path).stem}.gguf"
        words = ["llama-quantize", "--tensor-type-file", str(path), source, target, self.ftype]
        return shlex.join(words[:1] + (["--imatrix", str(imatrix)] if imatrix else []) + words[1:])

    def _lines(self) -> list[str]:
        size = f"{self.bytes} of {self.limit} bytes, {self.bpw:.4f} bits per weight"
        return [f"{size}, predicted KLD {self.predicted:.5f}"]

    def _shown(self) -> pd.DataFrame:
        """Types by layer and kind, where the groups are tensors."""
        frame = self.to_frame()
        if frame["group"].nunique() == len(self.types) and frame["layer"].notna().all():
            return frame.pivot(index="layer", columns="kind", values="qtype")
        return frame.set_index("group")[["qtype", "bytes", "delta_kld"]]


def recipe(
    sensitivity: Sensitivity | str | Path,
    model,
    *,
    target_size: int | str | None = None,
    target_bpw: float | None = None,
    like: str | None = None,
    keep: Types = (),
    min_type: Types = (),
    max_type: Types = (),
    imatrix=None,
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
        If the sensitivity is of another model or matrix, there is not exactly one limit, a type or ftype is not known,
        a constraint fits nothing or leaves nothing that was measured, two groups share a tensor, or nothing is as
        small as the limit.
    """
    base = as_model(model)
    sizes = {"target_size": target_size, "target_bpw": target_bpw, "like": like}
    limit = size_limit(base, **sizes, rules=rules, imatrix=imatrix is not None)
    menu = open_menu(sensitivity, base, keep=keep, min_type=min_type, max_type=max_type, imatrix=imatrix, rules=rules)
    return menu.best(limit)


def size_limit(
    model: Model,
    *,
    target_size: int | str | None = None,
    target_bpw: float | None = None,
    like: str | None = None,
    rules: str = "current",
    imatrix: bool = False,
) -> int:
    """Return the one limit that was given, in bytes of tensor data; parameters and errors as for `recipe`."""
    if (target_size is not None) + (target_bpw is not None) + (like is not None) != 1:
        given = f"target_size={target_size}, target_bpw={target_bpw}, like={like}"
        raise ValueError(f"{given}: must be exactly one of the three. Example: like=Q4_K_M")
    if like is not None:
        return _bytes(model, ftype_types(model, like, rules, imatrix))
    check_number(target_bpw=target_bpw)
    if target_bpw is not None:
        if not 0 < target_bpw < float("inf"):
            raise ValueError(f"target_bpw={target_bpw}, must be a positive number of bits per weight.")
        return int(target_bpw * model.n_weights / 8)
    try:
        return parse_bytes(target_size)
    except ValueError:
        raise ValueError(f"target_size={target_size}, must be a number of bytes such as 3MiB.") from None


def ftype_types(model: Model, ftype: str, rules: str = "current", imatrix: bool = False) -> dict[str, str]:
    """Return the types that a ftype gives to all tensors of a model."""
    source = {tensor.name: tensor.qtype for tensor in model}
    choices = choose_types(model.hparams, model.shapes, ftype, rules=rules, imatrix=imatrix, source=source)
    return {name: choice.qtype for name, choice in choices.items()}


def _bytes(model: Model, types: Mapping[str, str]) -> int:
    """Bytes of the whole model with these types."""
    return sum(tensor_bytes(tensor.shape, types[tensor.name]) for tensor in model)


def open_menu(
    sensitivity: Sensitivity | str | Path,
    model,
    *,
    keep: Types = (),
    min_type: Types = (),
    max_type: Types = (),
    imatrix=None,
    rules: str = "current",
) -> "Menu":
    """Put together what there is to choose from; parameters and errors as for `recipe`."""
    found = sensitivity if isinstance(sensitivity, Sensitivity) else Sensitivity.load(sensitivity)
    base = as_model(model)
    matrix = as_matrix(imatrix)
    _check_same(found, base, matrix)
    groups: dict[str, list[dict]] = {}
    for row in found.rows:
        if row["delta_kld"] is None:
            raise ValueError(f"{row['group']} at {row['qtype']}: no damage is known. Measure the sensitivity again.")
        groups.setdefault(row["group"], []).append(row)
    names = _apart(groups, base)
    asked = {"keep": keep, "min_type": min_type, "max_type": max_type}
    constraints = {key: _parsed(types, names) for key, types in asked.items()}
    if found.protocol["around"] is None:
        for group in groups.values():
            group.append(_as_it_is(group[0], base))
    allowed = {name: [row for row in rows if _allows(row, constraints)] for name, rows in groups.items()}
    for name, rows in allowed.items():
        if not rows:
            had = " ".join(row["qtype"] for row in groups[name])
            raise ValueError(
                f"{name}: measured are {had}, the constraints allow none of them. Measure more types, or ask less."
            )
    texts = {key: [(text, find_qtype(qtype)) for text, qtype in _pairs(types)] for key, types in asked.items()}
    return Menu(base, found, allowed, texts, matrix is not None, rules)


def _check_same(sensitivity: Sensitivity, base: Model, matrix: ImportanceMatrix | None) -> None:
    """Refuse a sensitivity that was measured on another model, or with another matrix."""
    protocol = sensitivity.protocol
    if model_digest(base) != protocol["model_sha256"]:
        raise ValueError(f"{base.path}: the sensitivity is of another model, {protocol['model']}. Measure this one.")
    digest = None if matrix is None else json_digest(matrix_digests(matrix.entries))
    if digest != protocol["imatrix"]:
        was = "without a matrix" if protocol["imatrix"] is None else "with a matrix"
        raise ValueError(f"imatrix={digest and digest[:8]}: the sensitivity was measured {was}, must be the same one.")


def _apart(groups: Mapping[str, list[dict]], base: Model) -> list[str]:
    """Names of the tensors of all groups; refuse tensors that the model does not have, and tensors in two groups."""
    group_of: dict[str, str] = {}
    for group, rows in groups.items():
        for name in dict.fromkeys(name for row in rows for name in row["types"]):
            if name not in base:
                raise ValueError(f"{group}: {name} is not a tensor of {base.path}. Measure the sensitivity again.")
            if name in group_of:
                raise ValueError(
                    f"{name}: is in groups {group_of[name]} and {group}, must be in one. Measure them apart."
                )
            group_of[name] = group
    return list(group_of)


def _pairs(types: Types) -> Iterable[tuple[str, str]]:
    """Expressions over names and types, from a mapping or a list."""
    return types.items() if isinstance(types, Mapping) else types


def _parsed(types: Types, names: Sequence[str]) -> list[tuple[Callable[[str], bool], str]]:
    """Expressions, as tests of a name, and types, checked; a whole tensor name fits that tensor alone."""
    pairs = []
    for text, qtype in _pairs(types):
        is_found = partial(operator.eq, text) if text in names else compile_expression(text, names)
        if not any(map(is_found, names)):
            raise ValueError(f"tensor type: name={text}, must fit a tensor that was measured, such as {names[0]}.")
        pairs.append((is_found, find_qtype(qtype, f"tensor type {text}")))
    return pairs


def _asked(name: str, types: list[tuple[Callable[[str], bool], str]]) -> str | None:
    """The type of the first expression that fits a name."""
    return next((qtype for is_found, qtype in types if is_found(name)), None)


def _allows(row: dict, constraints: Mapping[str, list[tuple[Callable[[str], bool], str]]]) -> bool:
    """Whether all tensors of a row have types that the constraints allow."""
    for name, qtype in row["types"].items():
        keep, least, most = (_asked(name, constraints[key]) for key in ("keep", "min_type", "max_type"))
        if keep is not None and qtype != keep:
            return False
        if least is not None and bits_per_weight(qtype) < bits_per_weight(least):
            return False
        if most is not None and bits_per_weight(qtype) > bits_per_weight(most):
            return False
    return True


def _as_it_is(row: dict, base: Model) -> dict:
    """A group with the types that it has in the base, which does no damage."""
    types = {name: base.tensor(name).qtype for name in row["types"]}
    qtype = next(iter(types.values())) if len(set(types.values())) == 1 else "base"
    n_bytes = sum(base.tensor(name).nbytes for name in types)
    return row | {"qtype": qtype, "types": types, "bytes": n_bytes, "delta_kld": 0.0}


@dataclass(frozen=True)
class Menu:
    """What there is to choose from: for each group the changes that are allowed."""

    base: Model
    sensitivity: Sensitivity
    groups: dict[str, list[dict]]  # rows of the sensitivity by group
    # expressions and types by option, for the record: `groups` holds what they allow
    constraints: dict[str, list[tuple[str, str]]]
    has_imatrix: bool
    rules: str

    @property
    def fixed(self) -> int:
        """Bytes of the tensors that are in no group, such as norms."""
        chosen = {name for rows in self.groups.values() for name in rows[0]["types"]}
        return sum(tensor.nbytes for tensor in self.base if tensor.name not in chosen)

    def types_of(self, ftype: str) -> dict[str, str]:
        """Return the types that a ftype gives to all tensors of the model."""
        return ftype_types(self.base, ftype, self.rules, self.has_imatrix)

    def predicted(self, types: Mapping[str, str]) -> float | None:
        """Return the predicted damage of a choice of types; None if a change in it was not measured."""
        total = self.sensitivity.start["kld_mean"]
        for rows in self.groups.values():
            same = [row for row in rows if all(types[name] == qtype for name, qtype in row["types"].items())]
            if not same:
                return None
            total += same[0]["delta_kld"]
        return total

    def best(self, limit: int) -> BestRecipe:
        """Return the best recipe of at most `limit` bytes."""
        options = [[(row["bytes"], row["delta_kld"]) for row in rows] for rows in self.groups.values()]
        least = self.fixed + sum(min(size for size, _ in group) for group in options)
        if least > limit:
            raise ValueError(f"limit={limit} bytes, must be at least {least} for {self.base.path}. Allow more.")
        picks = solve(options, limit - self.fixed)
        rows = [rows[i] for rows, i in zip(self.groups.values(), picks, strict=True)]
        kept = ("group", "layer", "kind", "qtype", "n_weights", "bytes", "delta_kld")
        types = {name: qtype for row in rows for name, qtype in row["types"].items()}
        n_bytes = self.fixed + sum(row["bytes"] for row in rows)
        return BestRecipe(
            types={tensor.name: types[tensor.name] for tensor in self.base if tensor.name in types},
            rows=tuple({key: row[key] for key in kept} for row in rows),
            bytes=n_bytes,
            limit=limit,
            n_weights=self.base.n_weights,
            predicted=self.sensitivity.start["kld_mean"] + sum(row["delta_kld"] for row in rows),
            ftype=self._nearest(n_bytes),
            provenance={
                "quantlab": quantlab.__version__,
                "calibration": self.sensitivity.protocol,
                "rules": self.rules,
                "constraints": self.constraints,
            },
        )

    def ftypes(self) -> dict[str, int]:
        """Return the size of every quantized ftype, by name."""
        names = [ftype.name for ftype in FTYPES.values() if ftype.is_quantized and self.rules in ftype.rules]
        return {name: _bytes(self.base, self.types_of(name)) for name in names}

    def _nearest(self, n_bytes: int) -> str:
        """The ftype whose size is nearest."""
        return min(self.ftypes().items(), key=lambda item: abs(item[1] - n_bytes))[0]
