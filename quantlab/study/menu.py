"""Menus: the measured changes of each group of tensors that the constraints allow."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import quantlab
from quantlab.files.imatrix_file import ImportanceMatrix, MatrixLike, as_matrix
from quantlab.files.model import Model, ModelLike, as_model
from quantlab.study.best_recipe import BestRecipe
from quantlab.study.damage_cache import json_digest, matrix_digests, model_digest
from quantlab.study.knapsack import solve
from quantlab.study.sensitivity import Sensitivity
from quantlab.transform.expressions import compile_expression
from quantlab.transform.mixture import FTYPES, choose_types, find_qtype
from quantlab.transform.plan import bits_per_weight, tensor_bytes
from quantlab.transform.rules import needs_imatrix

Types = Mapping[str, str] | Iterable[tuple[str, str]]  # expression -> type
CRITERIA = {"kld": "delta_kld", "error": "error"}  # what is least → the figure of a row that is summed


def open_menu(
    sensitivity: Sensitivity | str | Path,
    model: ModelLike,
    *,
    keep: Types = (),
    min_type: Types = (),
    max_type: Types = (),
    exclude: Sequence[str] = (),
    criterion: str = "kld",
    imatrix: MatrixLike | None = None,
    rules: str = "current",
) -> "Menu":
    """Build the menu of allowed changes; parameters and errors as for `recipe`."""
    if criterion not in CRITERIA:
        raise ValueError(f"criterion={criterion}, must be one of {', '.join(CRITERIA)}.")
    found = sensitivity if isinstance(sensitivity, Sensitivity) else Sensitivity.load(sensitivity)
    base = as_model(model)
    matrix = as_matrix(imatrix)
    _check_same(found, base, matrix)
    groups: dict[str, list[dict]] = {}
    for row in found.rows:
        if row[CRITERIA[criterion]] is None:
            raise ValueError(f"{row['group']} at {row['qtype']}: its damage is unknown. Measure the sensitivity again.")
        groups.setdefault(row["group"], []).append(row)
    names = _apart(groups, base)
    asked = {"keep": keep, "min_type": min_type, "max_type": max_type}
    constraints = {key: _parsed(types, names) for key, types in asked.items()}
    if found.protocol["around"] is None:
        for group in groups.values():
            group.append(_as_it_is(group[0], base))
    left_out = {find_qtype(qtype, "exclude") for qtype in exclude}
    allowed = {
        name: [row for row in rows if _allows(row, constraints) and not left_out.intersection(row["types"].values())]
        for name, rows in groups.items()
    }
    for name, rows in allowed.items():
        if not rows:
            had = " ".join(row["qtype"] for row in groups[name])
            raise ValueError(
                f"{name}: the constraints exclude all measured types, {had}. "
                f"Measure more types, or relax the constraints."
            )
    texts = {key: [(text, find_qtype(qtype)) for text, qtype in _pairs(types)] for key, types in asked.items()}
    return Menu(base, found, allowed, texts | {"exclude": sorted(left_out)}, matrix is not None, rules, criterion)


def _check_same(sensitivity: Sensitivity, base: Model, matrix: ImportanceMatrix | None) -> None:
    """Refuse a sensitivity that was measured on another model, or with another matrix."""
    protocol = sensitivity.protocol
    if model_digest(base) != protocol["model_sha256"]:
        raise ValueError(
            f"{base.path}: the sensitivity belongs to another model, {protocol['model']}. Measure this one."
        )
    digest = None if matrix is None else json_digest(matrix_digests(matrix.entries))
    if digest != protocol["imatrix"]:
        was = "without a matrix" if protocol["imatrix"] is None else "with a matrix"
        raise ValueError(f"imatrix={digest and digest[:8]}: the sensitivity was measured {was}, must be the same one.")


def _apart(groups: Mapping[str, list[dict]], base: Model) -> list[str]:
    """Return the tensors of all groups; refuse unknown tensors, and tensors in two groups."""
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
    """Return expressions over names and types, from a mapping or a list."""
    return list(types.items()) if isinstance(types, Mapping) else types  # pyright: ignore[reportReturnType]


def _parsed(types: Types, names: Sequence[str]) -> list[tuple[Callable[[str], bool], str]]:
    """Check expressions and types; a whole tensor name matches only that tensor."""
    pairs = []
    for text, qtype in _pairs(types):
        is_found = partial(operator.eq, text) if text in names else compile_expression(text, names)
        if not any(map(is_found, names)):
            raise ValueError(f"tensor type: name={text}, must match a measured tensor. Give for example {names[0]}.")
        pairs.append((is_found, find_qtype(qtype, f"tensor type {text}")))
    return pairs


def _asked(name: str, types: list[tuple[Callable[[str], bool], str]]) -> str | None:
    """Return the type of the first expression that matches a name."""
    return next((qtype for is_found, qtype in types if is_found(name)), None)


def _allows(row: dict, constraints: Mapping[str, list[tuple[Callable[[str], bool], str]]]) -> bool:
    """Tell whether the constraints allow the types of all tensors of a row."""
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
    """Return a group with the types of the base, which does no damage."""
    types = {name: base.tensor(name).qtype for name in row["types"]}
    qtype = next(iter(types.values())) if len(set(types.values())) == 1 else "base"
    n_bytes = sum(base.tensor(name).nbytes for name in types)
    return row | {"qtype": qtype, "types": types, "bytes": n_bytes, "delta_kld": 0.0, "error": 0.0}


@dataclass(frozen=True)
class Menu:
    """The allowed changes of each group."""

    base: Model
    sensitivity: Sensitivity
    groups: dict[str, list[dict]]  # rows of the sensitivity by group
    # expressions and types by option, for the record: `groups` holds what they allow
    constraints: dict[str, list]
    has_imatrix: bool
    rules: str
    criterion: str = "kld"

    @property
    def fixed(self) -> int:
        """Bytes of the tensors outside all groups, such as norms."""
        chosen = {name for rows in self.groups.values() for name in rows[0]["types"]}
        return sum(tensor.nbytes for tensor in self.base if tensor.name not in chosen)

    def types_of(self, ftype: str) -> dict[str, str]:
        """Return the types that a ftype gives to all tensors of the model."""
        return ftype_types(self.base, ftype, self.rules, self.has_imatrix)

    def predicted(self, types: Mapping[str, str]) -> float | None:
        """Return the predicted damage of a choice of types (None: a change in it was not measured)."""
        total = self.sensitivity.start["kld_mean"]
        for rows in self.groups.values():
            same = [row for row in rows if all(types[name] == qtype for name, qtype in row["types"].items())]
            if not same:
                return None
            total += same[0]["delta_kld"]
        return total

    def best(self, limit: int) -> BestRecipe:
        """Return the best recipe of at most `limit` bytes."""
        figure = CRITERIA[self.criterion]
        # errors are of any size: their sum is brought to that of damages, which the solver rounds
        largest = max(row[figure] for rows in self.groups.values() for row in rows)
        scale = 1.0 if self.criterion == "kld" else 1.0 / (largest or 1.0)
        options = [[(row["bytes"], scale * row[figure]) for row in rows] for rows in self.groups.values()]
        least = self.fixed + sum(min(size for size, _ in group) for group in options)
        if least > limit:
            raise ValueError(f"limit={limit} bytes, must be at least {least} for {self.base.path}. Raise the limit.")
        picks = solve(options, limit - self.fixed)
        return self.recipe_of([rows[i] for rows, i in zip(self.groups.values(), picks, strict=True)], limit)

    def recipe_of(self, rows: Sequence[dict], limit: int) -> BestRecipe:
        """Return the recipe that takes one row of each group."""
        kept = ("group", "layer", "kind", "qtype", "n_weights", "bytes", "delta_kld", "error")
        types = {name: qtype for row in rows for name, qtype in row["types"].items()}
        n_bytes = self.fixed + sum(row["bytes"] for row in rows)
        deltas = [row["delta_kld"] for row in rows]
        return BestRecipe(
            types={tensor.name: types[tensor.name] for tensor in self.base if tensor.name in types},
            rows=tuple({key: row[key] for key in kept} for row in rows),
            bytes=n_bytes,
            limit=limit,
            n_weights=self.base.n_weights,
            predicted=None if None in deltas else self.sensitivity.start["kld_mean"] + sum(deltas),
            ftype=self._nearest(n_bytes),
            provenance={
                "quantlab": quantlab.__version__,
                "calibration": self.sensitivity.protocol,
                "criterion": self.criterion,
                "rules": self.rules,
                "constraints": self.constraints,
            },
        )

    def ftypes(self) -> dict[str, int]:
        """Return the size of every quantized ftype that can be made, by name."""
        names = [ftype.name for ftype in FTYPES.values() if ftype.is_quantized and self.rules in ftype.rules]
        types = {name: self.types_of(name) for name in names}
        return {name: model_bytes(self.base, types[name]) for name in names if self._can_make(name, types[name])}

    def _can_make(self, ftype: str, types: Mapping[str, str]) -> bool:
        """Tell whether llama-quantize makes a ftype with the given matrix."""
        changed = [name for name, qtype in types.items() if qtype != self.base.tensor(name).qtype]
        return self.has_imatrix or not any(needs_imatrix(name, types[name], ftype) for name in changed)

    def _nearest(self, n_bytes: int) -> str:
        """Return the ftype with the nearest size."""
        return min(self.ftypes().items(), key=lambda item: abs(item[1] - n_bytes))[0]


def ftype_types(model: Model, ftype: str, rules: str = "current", imatrix: bool = False) -> dict[str, str]:
    """Return the types that a ftype gives to all tensors of a model."""
    source = {tensor.name: tensor.qtype for tensor in model}
    choices = choose_types(model.hparams, model.shapes, ftype, rules=rules, imatrix=imatrix, source=source)
    return {name: choice.qtype for name, choice in choices.items()}


def model_bytes(model: Model, types: Mapping[str, str]) -> int:
    """Return the bytes of the whole model with these types."""
    return sum(tensor_bytes(tensor.shape, types[tensor.name]) for tensor in model)
