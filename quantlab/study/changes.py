"""Changes of a model that a study measures: groups of tensors, each at other types."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from quantlab import arch
from quantlab.files.model import Model
from quantlab.quants.ggml_types import FALLBACK, block_size
from quantlab.transform.mixture import find_qtype, is_quantizable, layer_of
from quantlab.transform.rules import needs_imatrix

FAR = 1.15  # times the error that two other types would have in the same bytes: too much to be worth measuring


@dataclass(frozen=True)
class Change:
    """A group of tensors at another type."""

    group: str  # name of the group; of a tensor that stands for itself, the tensor's
    qtype: str  # the type that was asked for
    types: dict[str, str]  # tensor → the type that it gets; another one where its rows do not fit the blocks of `qtype`

    @property
    def layer(self) -> int | None:
        """Layer of its tensors (-1: no layer, None: several layers)."""
        layers = {layer_of(name) for name in self.types}
        return layers.pop() if len(layers) == 1 else None

    @property
    def kind(self) -> str | None:
        """Kind of its tensors (None: several kinds)."""
        kinds = {kind_of(name) for name in self.types}
        return kinds.pop() if len(kinds) == 1 else None

    def first_layer(self, n_layer: int) -> int:
        """Return the first layer that must be recomputed (only the output: `n_layer`)."""
        return min(n_layer if name.startswith("output") else max(0, layer_of(name)) for name in self.types)


def kind_of(name: str) -> str:
    """Return a tensor's name without layer and `.weight`: `ffn_down`, `output`."""
    return name.removesuffix(".weight").split(".", 2)[-1]


def _layer_or_kind(name: str) -> str:
    return f"blk.{layer_of(name)}" if layer_of(name) >= 0 else kind_of(name)


# what the tensors of a group have in common
_GROUPS = {"layer": _layer_or_kind, "kind": kind_of, "model": lambda name: "model"}


def plan_changes(
    model: Model,
    types: Sequence[str],
    groups: str | Mapping | None,
    *,
    exclude: Sequence[str] = (),
    weighted: Container[str] = (),
) -> list[Change]:
    """List the changes of a model: groups in the order of the layers, types as given, as for `quantlab.sensitivity`.

    `weighted` are the tensors that an importance matrix has an entry for; the others get no type that needs one.

    Raises
    ------
    ValueError
        If a type or a group is not known, or nothing is left.
    """
    computed = [tensor for tensor in model if layer_of(tensor.name) < model.hparams.n_layer]
    names = [tensor.name for tensor in computed if is_quantizable(tensor.name, tensor.shape)]
    place = partial(_place, kinds=arch.known(model.hparams.arch).matrices())
    names.sort(key=place)
    if groups is None:
        members = {name: [name] for name in names}
    elif isinstance(groups, str) and groups in _GROUPS:
        members = {}
        for name in names:
            members.setdefault(_GROUPS[groups](name), []).append(name)
    elif isinstance(groups, Mapping):
        members = {key: sorted(group, key=place) for key, group in groups.items()}
    else:
        raise ValueError(
            f"groups={groups}, must be None, layer, kind, model or a mapping from group to tensor names. Choose one."
        )
    if not types or not members or not all(members.values()):
        raise ValueError("types and groups: must not be empty. Leave them out for the default.")
    unknown = [name for group in members.values() for name in group if name not in names]
    if unknown:
        raise ValueError(f"groups: {unknown[0]} is not a tensor of {model.path} that can be quantized. See its .names.")
    left_out = {find_qtype(qtype, "exclude") for qtype in exclude}
    changes = {}  # two types may fall back to one
    for key, group in members.items():
        for qtype in map(find_qtype, types):
            given = {name: fitting(qtype, model.tensor(name).shape[-1]) for name in group}
            if None in given.values() or left_out.intersection(given.values()):
                continue
            if not any(_wants_imatrix(*pair, model, weighted) for pair in given.items()):  # pyright: ignore[reportArgumentType]
                changes.setdefault((key, *given.values()), Change(key, _asked(qtype, given), given))  # pyright: ignore[reportArgumentType]
    if not changes:
        raise ValueError(
            f"types={','.join(types)}: nothing can be changed to them. "
            "Pass an importance matrix, or types that rows fit and exclude does not name."
        )
    return list(changes.values())


def _place(name: str, kinds: Sequence[str]) -> tuple:
    """Return a sort key: embeddings, layers in the order of the forward pass, output."""
    layer, kind = layer_of(name), kind_of(name)
    outer = {"token_embd": -1, "output": 1 << 30}.get(kind, layer)
    return outer, kinds.index(kind) if kind in kinds else -1, name


def fitting(qtype: str, n_per_row: int) -> str | None:
    """Return `qtype` or llama-quantize's fallback for it (None: neither's blocks fit a row)."""
    return next((q for q in (qtype, FALLBACK.get(qtype)) if q and n_per_row % block_size(q) == 0), None)


def _wants_imatrix(name: str, qtype: str, model: Model, weighted: Container[str]) -> bool:
    """Tell whether a tensor cannot get a type because it has no importance matrix."""
    return name not in weighted and qtype != model.tensor(name).qtype and needs_imatrix(name, qtype)


def worth_measuring(
    changes: Sequence[Change],
    cost: Callable[[Change], tuple[int, float]],
    can_beat: Callable[[Change, Change], bool] = lambda a, b: True,
) -> list[Change]:
    """Leave out changes to types that no best recipe has, going by bytes and errors of the weights.

    Of a group's changes a few lie on the lower left hull of (bytes, error): nothing else is as good as two of them,
    each for a part of the bytes. What has `FAR` times the hull's error at its bytes is left out. `cost` gives bytes and
    error of a change, `can_beat` whether the error of one change says anything of the other's.

    Examples
    --------
    >>> errors = {"Q4_0": (18, 1.4), "Q4_K": (18, 1.0), "Q4_1": (20, 0.97), "Q5_K": (22, 0.25)}
    >>> changes = [Change("a", qtype, {}) for qtype in errors]
    >>> [change.qtype for change in worth_measuring(changes, lambda change: errors[change.qtype])]
    ['Q4_K', 'Q5_K']
    """
    members: dict[str, list[Change]] = {}
    for change in changes:
        members.setdefault(change.group, []).append(change)

    def is_far(change: Change) -> bool:
        size, error = cost(change)
        others = [cost(other) for other in members[change.group] if other is not change and can_beat(other, change)]
        smaller = [other for other in others if other[0] <= size]
        larger = [other for other in others if other[0] > size]
        bounds = [least for _, least in smaller]
        bounds += [a + (size - x) / (y - x) * (b - a) for x, a in smaller for y, b in larger]
        return error > FAR * min(bounds, default=error)

    return [change for change in changes if not is_far(change)]


def _asked(qtype: str, given: Mapping[str, str]) -> str:
    """Return the type in a change's name: its tensors' common type, else the requested one."""
    return next(iter(given.values())) if len(set(given.values())) == 1 else qtype
