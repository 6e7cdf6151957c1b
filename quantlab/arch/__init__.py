"""Architectures of models: one file per `general.architecture`, found by its name.

A file `NAME.py` (a hyphen of the architecture's name is an underscore) holds one record, `ARCH`. The converter, the
plan, the evaluator, importance matrices, sensitivity and memory estimates read it. An architecture without a file can
still be inspected, quantized and compared file to file: those rules go by tensor names and shapes.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from quantlab.arch.hparams import MAX_LAYERS, Hparams, RopeScaling
from quantlab.arch.record import Architecture, Layer, Tensor

__all__ = [
    "MAX_LAYERS",
    "Architecture",
    "Hparams",
    "Layer",
    "RopeScaling",
    "Tensor",
    "architectures",
    "complete",
    "find",
    "find_class",
    "known",
    "tensor_shapes",
]

_PARTS = ("hparams", "record")  # modules of this room that are not architectures


@cache
def architectures() -> dict[str, Architecture]:
    """Return the record of every supported architecture by name, sorted."""
    names = sorted(module.name for module in iter_modules(__path__) if module.name not in _PARTS)
    records = [import_module(f"{__name__}.{name}").ARCH for name in names]
    return {record.name: record for record in records}


def find(name: str) -> Architecture | None:
    """Return the record of `general.architecture` = `name` (None: unsupported).

    Examples
    --------
    >>> find("llama").layer.rope, find("gpt2")
    ('pairs', None)
    """
    return architectures().get(name)


def known(name: str) -> Architecture:
    """Return the record of `general.architecture` = `name`.

    Raises
    ------
    ValueError
        If it has no file here.
    """
    record = find(name)
    if record is None:
        names = ", ".join(architectures())
        raise ValueError(f"architecture={name}, must be one of {names}. Give a GGUF file instead of a shape.")
    return record


def find_class(name: str) -> Architecture | None:
    """Return the architecture of a checkpoint's class in config.json (None: unknown).

    Examples
    --------
    >>> find_class("MistralForCausalLM").name
    'llama'
    """
    return next((record for record in architectures().values() if name in record.classes), None)


def complete(hparams: Hparams) -> Hparams:
    """Complete hyper-parameters by their architecture's rules (unknown architecture: unchanged)."""
    record = find(hparams.arch)
    return hparams if record is None else record.complete(hparams)


def tensor_shapes(hparams: Hparams) -> dict[str, tuple[int, ...]]:
    """Derive the name and shape of every tensor of a model from its hyper-parameters.

    Parameters
    ----------
    hparams : Hparams
        `tied_embeddings` says whether the model has no output matrix of its own.

    Returns
    -------
    dict[str, tuple[int, ...]]
        GGUF name → shape in NumPy order, in the order in which a converter writes them. Tensors that a model may
        lack, such as optional biases, are left out.

    Raises
    ------
    ValueError
        If the architecture has no file here.

    Examples
    --------
    >>> hparams = Hparams(arch="llama", n_layer=1, n_embd=8, n_head=2, n_head_kv=1, n_ff=16, n_vocab=32)
    >>> tensor_shapes(hparams)["blk.0.attn_v.weight"]
    (4, 8)
    """
    record, hparams, shapes = known(hparams.arch), complete(hparams), {}
    used = record.used(hparams)
    for name, tensor, shape in record.expand(hparams):
        if not tensor.optional or name in used or (tensor.role == "output" and not hparams.tied_embeddings):
            shapes[name] = shape
    return shapes
