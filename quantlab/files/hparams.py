"""Hyper-parameters, read from GGUF metadata."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np

from quantlab.arch import MAX_LAYERS, Hparams, RopeScaling, complete, find
from quantlab.files.recognize import short

__all__ = ["read_hparams"]

MAX_NAME = 64  # characters of an architecture's
_MOST = (1 << 31) - 1
_YARN = {"beta_fast": "beta_fast", "beta_slow": "beta_slow", "log_mul": "log_multiplier"}


def read_hparams(metadata: Mapping[str, Any], tensors: Container[str], *, source: str = "metadata") -> Hparams:
    """Read the hyper-parameters from GGUF metadata, as `read_header` returns it, and the names of the tensors.

    `source` starts the error text.

    Returns
    -------
    Hparams
        Of an architecture without a file in `arch/`, what is missing is 0 or None.

    Raises
    ------
    ValueError
        If a key is missing, has no number, or one that is out of range.
    """
    keys = _Keys(metadata, source)
    given = None if keys.is_known else 0  # without a file in `arch/`, types of tensors are all that follows from these
    n_all = keys.whole("block_count", given, least=1 if keys.is_known else 0, most=MAX_LAYERS)
    n_layer = n_all - _guessing(keys, n_all)
    n_head = keys.per_layer("attention.head_count", n_layer, given)
    tokens = metadata.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, Sequence) and not isinstance(tokens, str) else 0
    sizes = {
        "n_layer_nextn": n_all - n_layer,
        "n_embd": keys.loosely(lambda: keys.whole("embedding_length"), 0),
        "n_vocab": keys.loosely(lambda: keys.whole("vocab_size", n_tokens, least=0), n_tokens),
        "n_ctx": keys.loosely(lambda: keys.whole("context_length"), 0),
        "head_dim": keys.loosely(lambda: keys.whole("attention.key_length", optional=True), None),
        "n_rot": keys.loosely(lambda: keys.whole("rope.dimension_count", optional=True), None),
        "rms_eps": keys.loosely(lambda: keys.positive("attention.layer_norm_rms_epsilon"), 0.0),
        "rope_base": keys.loosely(lambda: keys.positive("rope.freq_base", 10000.0), 0.0),
        "rope_scaling": keys.loosely(lambda: _rope_scaling(keys), None),
    }
    is_dense = keys.get("expert_count") is None or keys.get("feed_forward_length") is not None
    hparams = Hparams(
        arch=keys.arch,
        n_layer=n_layer,
        n_head=n_head,
        n_head_kv=keys.per_layer("attention.head_count_kv", n_layer, n_head),
        n_ff=keys.per_layer("feed_forward_length", n_layer, given) if is_dense else 0,
        n_expert=keys.whole("expert_count", 0, least=0),
        n_expert_used=keys.whole("expert_used_count", 0, least=0),
        tied_embeddings="output.weight" not in tensors,
        **(_of_architecture(keys, n_layer) | sizes),
    )
    record = find(keys.arch)
    if record is not None and any(tensor.only == "!v_is_k" for tensor in record.tensors):
        names = [(f"blk.{i}.attn_k.weight" in tensors, f"blk.{i}.attn_v.weight" in tensors) for i in range(n_layer)]
        hparams = replace(hparams, v_is_k=tuple(int(has_k and not has_v) for has_k, has_v in names))
    return complete(hparams)


def _of_architecture(keys: "_Keys", n_layer: int) -> dict[str, Any]:
    """Read the fields that only some architectures have."""
    record = find(keys.arch)
    if record is None:
        return {}
    found: dict[str, Any] = {}
    defaults = {item.name: item.default for item in fields(Hparams)}
    for key, name in record.metadata.items():
        kind = type(defaults.get(name))
        if kind is bool and keys.get(key) is not None:
            found[name] = keys.get(key) is True
        elif kind in (int, float) and keys.get(key) is not None:
            found[name] = keys.positive(key) if kind is float else keys.whole(key, least=0)
    recurrent = keys.get("attention.recurrent_layers")
    if "attention.recurrent_layers" in record.metadata and isinstance(recurrent, list | np.ndarray):
        if len(recurrent) not in (n_layer, n_layer + _guessing(keys)):
            raise ValueError(
                f"{keys.source}: {keys.arch}.attention.recurrent_layers={short(recurrent)}, must have one for each of "
                f"{n_layer} layers. Convert the checkpoint again."
            )
        found["recurrent"] = tuple(int(bool(item)) for item in recurrent[:n_layer])
    if record.window_period:
        size = keys.whole("attention.sliding_window", record.window, least=0)
        pattern = keys.get("attention.sliding_window_pattern")
        if isinstance(pattern, list | np.ndarray):
            if len(pattern) != n_layer:
                raise ValueError(
                    f"{keys.source}: {keys.arch}.attention.sliding_window_pattern={short(pattern)}, must have one "
                    f"for each of {n_layer} layers. Convert the checkpoint again."
                )
            found["window"] = tuple(size if windowed else 0 for windowed in pattern)
        elif pattern is not None:
            step = keys.whole("attention.sliding_window_pattern", least=0)
            found["window"] = tuple(0 if step and i % step == step - 1 else size for i in range(n_layer))
        else:
            found["window"] = size
        found["rope_base_window"] = keys.positive("rope.freq_base_swa") if keys.get("rope.freq_base_swa") else 0.0
    return found


def _guessing(keys: "_Keys", n_all: int = MAX_LAYERS) -> int:
    """Return how many layers guess several tokens at once: the last ones, where the architecture knows them."""
    record = find(keys.arch)
    if record is None or "nextn_predict_layers" not in record.metadata:
        return 0
    return keys.whole("nextn_predict_layers", 0, least=0, most=n_all - 1)


class _Keys:
    """The `ARCH.*` keys of some metadata, read as numbers."""

    def __init__(self, metadata: Mapping[str, Any], source: str):
        arch = metadata.get("general.architecture")
        if metadata.get("general.type") == "adapter":
            raise ValueError(
                f"{source}: is an adapter (general.type), must be a whole model. Merge it into its base first."
            )
        if not isinstance(arch, str) or not arch.isprintable() or len(arch) > MAX_NAME:
            raise ValueError(
                f"{source}: general.architecture={short(arch)}, must be a name. Give a language model's file."
            )
        self.metadata, self.arch, self.source = metadata, arch, source
        self.is_known = find(arch) is not None

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: Any = None) -> Any:
        value = self.get(key, default)
        if not isinstance(value, np.generic | int | float) or isinstance(value, bool):
            raise ValueError(
                f"{self.source}: {self.arch}.{key}={short(value)}, need one number. Convert the checkpoint again."
            )
        return value.item() if isinstance(value, np.generic) else value

    def loosely(self, read: Callable[[], Any], default: Any) -> Any:
        """Return what `read` reads, or the default for an architecture without a record."""
        try:
            return read()
        except ValueError:
            if self.is_known:
                raise
            return default

    def whole(self, key: str, default: Any = None, least: int = 1, most: int = _MOST, *, optional: bool = False) -> Any:
        """Return a whole number (None: optional and not given)."""
        if optional and self.get(key) is None:
            return None
        value = self.number(key, default)
        if type(value) is not int or not least <= value <= most:
            raise ValueError(
                f"{self.source}: {self.arch}.{key}={value}, need a whole number from {least} to {most}. Convert again."
            )
        return value

    def per_layer(self, key: str, n_layer: int, default: Any = None) -> Any:
        """Return a whole number, or a tuple with one per layer if they differ."""
        values = self.get(key, default)
        if isinstance(values, tuple):  # a default that varies
            return values
        if not isinstance(values, np.ndarray):
            return self.whole(key, default, least=1 if self.is_known else 0)
        if values.dtype.kind not in "iu" or values.shape != (n_layer,) or values.min() < 0 or values.max() > _MOST:
            raise ValueError(
                f"{self.source}: {self.arch}.{key}={short(values)}, need one number, or a whole number of 0 to {_MOST} "
                f"for each of {n_layer} layers. Convert the checkpoint again."
            )
        values = tuple(values.tolist())
        return values[0] if len(set(values)) == 1 else values

    def positive(self, key: str, default: Any = None) -> float:
        value = self.number(key, default)
        if not 0 < value < float("inf"):
            raise ValueError(f"{self.source}: {self.arch}.{key}={value}, need a positive number. Convert again.")
        return value


def _rope_scaling(keys: _Keys) -> RopeScaling | None:
    given = any(keys.get(key) is not None for key in ("rope.scale_linear", "rope.scaling.attn_factor"))
    kind = keys.get("rope.scaling.type", "linear" if given else "none")
    if not isinstance(kind, str) or kind == "none":
        return None
    key = "rope.scaling.factor" if keys.get("rope.scaling.factor") is not None else "rope.scale_linear"
    given = keys.get(key)
    is_zero = isinstance(given, int | float | np.number) and given == 0  # llama.cpp takes it as not given
    factor = 1.0 if is_zero else keys.positive(key, 1.0)
    orig_ctx = keys.whole("rope.scaling.original_context_length", 0, least=0)
    scaling = RopeScaling(kind, factor, orig_ctx, keys.positive("rope.scaling.attn_factor", 1.0))
    record, given = find(keys.arch), {}
    for name in record.yarn if record else ():  # llama.cpp reads these for some architectures alone
        if keys.get(f"rope.scaling.yarn_{_YARN[name]}") is not None:
            given[name] = keys.positive(f"rope.scaling.yarn_{_YARN[name]}")
    return replace(scaling, **given)
