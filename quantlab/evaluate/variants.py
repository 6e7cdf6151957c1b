"""Models of a comparison: a base and its variants, files or made from the base's weights in memory."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from quantlab import quants
from quantlab.arch import find
from quantlab.evaluate.engine import Stored
from quantlab.files.bundled import bundled_path, model_path
from quantlab.files.model import LazyTensor, Model, is_checkpoint
from quantlab.files.model import open as open_model
from quantlab.quants.validate import check_encoded, check_stored
from quantlab.transform.mixture import Recipe, choose_types, layer_of
from quantlab.transform.plan import tensor_bytes
from quantlab.transform.rules import needs_imatrix

_ROWS = 2048  # rows of a matrix that are read or converted at a time
_FREE = ("n_ctx", "tied_embeddings")  # hyper-parameters in which files of one model may differ
_PIECE = 1 << 22  # weights that are dequantized at a time on their way to another type


@dataclass(frozen=True)
class Variant:
    """A model to evaluate: the type of each tensor, and the source of its values."""

    name: str
    model: Model  # the file that holds its tensors; for a variant made in memory, the base
    types: dict[str, str]  # tensor name → ggml type
    imatrix: Mapping[str, np.ndarray]  # tensor name → weights per column; empty without an importance matrix
    refined: Path | None = None  # folder of bytes that are taken for the base's, see evaluate/refined_alone.py

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor_bytes(tensor.shape, self.types[tensor.name]) for tensor in self.model)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.nbytes / self.model.n_weights


def as_is(model: Model, name: str | None = None) -> Variant:
    """Return a model as a variant without changes."""
    return Variant(name or model.path.stem, model, {tensor.name: tensor.qtype for tensor in model}, {})


def resolve(base: Model, specs: Sequence, *, rules: str = "current", imatrix=None) -> list[Variant]:
    """Resolve the names of variants to variants.

    Parameters
    ----------
    base : Model
    specs : sequence of str, Path or Recipe
        A GGUF file, a recipe (object or file), a ftype; a string may name it: `NAME=SPEC`.
    rules : str
        Rule set for ftypes.
    imatrix : ImportanceMatrix or None
        Used for ftypes and recipes.

    Returns
    -------
    list of Variant
        Names made unique by `#2`, `#3`, ….

    Raises
    ------
    ValueError
        If a spec is no ftype, or a file is of another model.
    FileNotFoundError
        If a file is missing.
    """
    weights = {} if imatrix is None else imatrix.entries
    found = []
    for spec in specs:
        label, spec = split_label(spec)
        variant = _resolve_one(base, spec, rules, weights)
        found.append(replace(variant, name=label or variant.name))
    seen: Counter = Counter()
    for i, variant in enumerate(found):
        seen[variant.name] += 1
        if seen[variant.name] > 1:
            found[i] = replace(variant, name=f"{variant.name}#{seen[variant.name]}")
    return found


def split_label(spec):
    """Split `NAME=SPEC` into (NAME, SPEC); other texts have no label."""
    if isinstance(spec, str) and "=" in spec and not Path(spec).exists():
        label, spec = spec.split("=", 1)
        return label, spec
    return None, spec


def _resolve_one(base: Model, spec, rules: str, imatrix: Mapping[str, np.ndarray]) -> Variant:
    mark = "+imatrix" if imatrix else ""
    if isinstance(spec, Recipe):
        return _from_recipe(base, spec.name + mark, spec, imatrix)
    path = Path(spec) if bundled_path(str(spec)) is None else model_path(spec)
    if is_checkpoint(path) or path.suffix.lower() == ".gguf":
        return _from_file(base, path)
    if path.is_file():
        return _from_recipe(base, path.stem + mark, Recipe.load(path), imatrix)
    source = {tensor.name: tensor.qtype for tensor in base}
    choices = choose_types(base.hparams, base.shapes, spec, rules=rules, imatrix=bool(imatrix), source=source)
    types = {name: choice.qtype for name, choice in choices.items()}
    return _checked(Variant(str(spec).upper() + mark, base, types, imatrix))


def _from_recipe(base: Model, name: str, recipe: Recipe, imatrix: Mapping[str, np.ndarray]) -> Variant:
    """Return a recipe's types; other tensors keep the base's types."""
    check_recipe(recipe, base, name)
    types = {tensor.name: recipe.types.get(tensor.name, tensor.qtype) for tensor in base}
    return _checked(Variant(name, base, types, imatrix))


def check_recipe(recipe: Recipe, base: Model, name: str) -> None:
    """Refuse a recipe with tensors that the model does not have."""
    unknown = [tensor for tensor in recipe.types if tensor not in base]
    if unknown:
        raise ValueError(f"{name}: {unknown[0]} is not a tensor of {base.path}. Make the recipe for this model.")


def _checked(variant: Variant) -> Variant:
    """Return a variant, or refuse one with types that cannot be made without importance."""
    for name, qtype in variant.types.items():
        is_kept = qtype == variant.model.tensor(name).qtype
        if not is_kept and name not in variant.imatrix and needs_imatrix(name, qtype):
            raise ValueError(
                f"{variant.name}: {name}: type={qtype}, needs an importance matrix. Pass one (see quantlab imatrix)."
            )
    return variant


def _from_file(base: Model, path: Path) -> Variant:
    model = open_model(path)
    ours, theirs = (asdict(m.hparams) for m in (base, model))
    differing = [key for key in ours if key not in _FREE and ours[key] != theirs[key]]
    if differing:
        key = differing[0]
        raise ValueError(
            f"{path}: {key}={theirs[key]}, must be {ours[key]} as in {base.path}. Compare variants of one model."
        )
    if model.vocab.digest != base.vocab.digest:
        raise ValueError(f"{path}: its vocabulary differs from that of {base.path}. Compare variants of one model.")
    return as_is(model)


class Weights:
    """Stored tensors of the variants; tensors that variants share are read and quantized once.

    A base tensor is remembered, and so are its bytes in a type that more than one variant wants; `forget` drops all
    that, and belongs at the end of each layer.
    """

    def __init__(self, base: Model, variants: Sequence[Variant]):
        self._base = base
        self._wanted = Counter(identity(variant, name) for variant in variants for name in variant.types)
        self._stored: dict[str, np.ndarray] = {}
        self._encoded: dict[tuple, np.ndarray] = {}

    def get(self, variant: Variant, name: str) -> Stored | None:
        """Return tensor `name` of a variant (None: it has no such tensor)."""
        if name not in variant.model:
            return None
        data, shape = self._load_as(variant, name), variant.model.tensor(name).shape
        if (n := _leading_ones(variant.model, name)) > 0:
            data, shape = data.reshape((1,) * n + data.shape), (1,) * n + shape
        return Stored(data, variant.types[name], shape)

    def output(self, variant: Variant) -> tuple[Stored, Stored]:
        """Return output norm and output matrix."""
        return self.get(variant, "output_norm.weight"), self.get(variant, output_name(variant.model))  # pyright: ignore[reportReturnType]

    def _load_as(self, variant: Variant, name: str) -> np.ndarray:
        """Return tensor `name` of `variant`, stored in its type."""
        tensor = variant.model.tensor(name)
        if variant.model is not self._base:
            return _load_checked(tensor)
        if variant.types[name] == tensor.qtype:
            return self._load(name)
        return self._encode(variant, name)

    def rows(self, variant: Variant, name: str, indices: np.ndarray) -> np.ndarray:
        """Return some rows of a matrix [shape=(len(indices), n_per_row), dtype=float32]; `indices` ascend."""
        tensor, qtype = variant.model.tensor(name), variant.types[name]
        found = np.empty((len(indices), tensor.shape[-1]), np.float32)
        for start in range(0, tensor.nrows, _ROWS):
            low, high = np.searchsorted(indices, [start, start + _ROWS])
            if low == high:
                continue
            stored = tensor.rows(start, min(start + _ROWS, tensor.nrows))[indices[low:high] - start]
            x = found[low:high]
            x[:] = Stored(stored, tensor.qtype, stored.shape[:1] + tensor.shape[1:]).floats()
            if qtype != tensor.qtype:
                _round_rows(x, qtype, variant.imatrix.get(name), name, indices[low:high])
            elif not np.isfinite(x).all():
                for row, index in zip(stored, indices[low:high], strict=True):
                    check_stored(row[None].view(np.uint8), qtype, name=name, first_row=int(index))
        return found

    def embeddings(self, variant: Variant, tokens: np.ndarray) -> np.ndarray:
        """Return the first hidden states of tokens [shape=(len(tokens), n_embd), dtype=float32]; `tokens` ascend."""
        found, scale = self.rows(variant, "token_embd.weight", tokens), variant.model.hparams.embd_scale
        if scale != 1:
            found *= np.float32(scale)
        return found

    def forget(self) -> None:
        """Drop the cached tensors."""
        self._stored.clear()
        self._encoded.clear()

    def _load(self, name: str) -> np.ndarray:
        if name not in self._stored:
            self._stored[name] = _load_checked(self._base.tensor(name))
        return self._stored[name]

    def _encode(self, variant: Variant, name: str) -> np.ndarray:
        """Return the bytes of a base tensor in the variant's type."""
        key = identity(variant, name)
        if key in self._encoded:
            return self._encoded[key]
        if (
            variant.refined is not None
            and (data := refined_bytes(variant.refined, name, variant.types[name])) is not None
        ):
            return data
        tensor = self._base.tensor(name)
        stored = Stored(self._load(name), tensor.qtype, tensor.shape)
        data = _requantize(stored, variant.types[name], variant.imatrix.get(name), name)
        if self._wanted[key] > 1:
            self._encoded[key] = data
        return data


def refined_path(folder: Path, name: str, qtype: str) -> Path:
    """Return the file of a tensor's refined bytes at a type."""
    return folder / f"{name}.{qtype}.npy"


def refined_bytes(folder: Path, name: str, qtype: str) -> np.ndarray | None:
    """Return a tensor's refined bytes (None: it has ordinary bytes at this type)."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: refined bytes are missing. Share this folder with the workers.")
    path = refined_path(folder, name, qtype)
    return np.load(path) if path.exists() else None


def _leading_ones(model: Model, name: str) -> int:
    """Return how many sizes of 1 a quantized file leaves out in front of a tensor's shape."""
    record = find(model.hparams.arch)
    tensor = record and record.tensor(name)
    return len(tensor.shape.split()) - len(model.tensor(name).shape) if tensor else 0


def output_name(model: Model) -> str:
    """Return the name of the matrix that gives the logits (default: the embeddings)."""
    return "output.weight" if "output.weight" in model else "token_embd.weight"


def _load_checked(tensor: LazyTensor) -> np.ndarray:
    """Read a whole tensor, and refuse floats and scales that are not finite."""
    stored = tensor.load()
    rows = stored.reshape(-1, stored.shape[-1])
    check_stored(rows.view(np.uint8), tensor.qtype, name=tensor.name)
    return stored


def _requantize(stored: Stored, qtype: str, weights: np.ndarray | None, name: str, first_row: int = 0) -> np.ndarray:
    """Encode a tensor in another type (stacked matrices: each with its own importance)."""
    if len(stored.shape) > 2:
        n, rows = stored.shape[:2]
        each = [None] * n if weights is None else weights.reshape(n, -1)
        return np.stack([_requantize(stored.expert(i), qtype, each[i], name, i * rows) for i in range(n)])
    if stored.data.dtype != np.uint8:
        return _quantize(stored.data, qtype, weights, name, first_row)
    step, encoded = max(1, _PIECE // stored.shape[-1]), []  # pyright: ignore[reportGeneralTypeIssues]
    for start in range(0, len(stored.data), step):
        encoded.append(_quantize(stored.floats(slice(start, start + step)), qtype, weights, name, first_row + start))
    return np.concatenate(encoded)


def _quantize(x: np.ndarray, qtype: str, weights: np.ndarray | None, name: str, first_row: int = 0) -> np.ndarray:
    """Encode rows as in a file, F16 without infinities."""
    data = quants.quantize(x, qtype, weights, name=name, first_row=first_row)
    if qtype == "F16":
        rows = data.reshape(-1, data.shape[-1])
        check_encoded(rows, x.reshape(len(rows), -1), qtype, name=name, first_row=first_row)
    return data


def _round_rows(x: np.ndarray, qtype: str, weights: np.ndarray | None, name: str, indices: np.ndarray) -> None:
    """Quantize and decode rows of a matrix; `indices` are their numbers, for error texts."""
    try:
        data = _quantize(x, qtype, weights, name)
    except ValueError:
        for row, index in zip(x, indices, strict=True):
            _quantize(row[None], qtype, weights, name, int(index))
        raise
    quants.dequantize(data, qtype, x.shape, out=x)


def identity(variant: Variant, name: str) -> tuple:
    """Return a value that is equal for two variants if and only if this tensor has the same bytes."""
    qtype = variant.types[name]
    kept = qtype == variant.model.tensor(name).qtype
    return id(variant.model), name, qtype, None if kept else (id(variant.imatrix.get(name)), variant.refined)


def shared_layers(variants: Sequence[Variant]) -> list[tuple[int, int]]:
    """Find the layers that each variant shares with an earlier one, to compute them once.

    Parameters
    ----------
    variants : sequence of Variant
        Of one shape.

    Returns
    -------
    list of (int, int)
        For each variant which of `variants` it follows (the first of those that it follows longest, for the first
        itself 0), and the layer whose input it takes over from that one: 0 with the same embeddings, `n_layer` where
        only the output differs or nothing does, -1 where there is nothing to take over.
    """
    tensors = [_by_layer(variant) for variant in variants]
    shared = [(0, -1)]
    for i in range(1, len(variants)):
        agreed = [_agreement(tensors[i], tensors[j]) for j in range(i)]
        shared.append((agreed.index(max(agreed)), max(agreed)))
    return shared


def steps(variants: Sequence[Variant]) -> int:
    """Return the number of layers and outputs that a pass over the variants computes."""
    n_layer = variants[0].model.hparams.n_layer
    return sum(n_layer + 1 - max(0, layer) for _, layer in shared_layers(variants))


def _by_layer(variant: Variant) -> list[list[tuple]]:
    """Return the identities of the embeddings, of layer 0's tensors, of layer 1's, …"""
    found = [[] for _ in range(variant.model.hparams.n_layer + 1)]
    for name in variant.types:
        if not name.startswith("output") and layer_of(name) < len(found) - 1:
            found[layer_of(name) + 1].append(identity(variant, name))
    return found


def _agreement(a: Sequence, b: Sequence) -> int:
    """Return the index of the last common first element (-1: none)."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a)) - 1
