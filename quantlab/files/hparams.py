"""Hyper-parameters of a model, from GGUF metadata."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from quantlab.files.gguf_file import Strings
from quantlab.files.recognize import short

__all__ = ["Hparams", "RopeScaling"]

MAX_NAME = 64  # characters of an architecture's
MAX_LAYERS = 1024  # the deepest models have about 130; tables of names grow with them


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the context length of the training.

    `type` is `linear`, `yarn` or `longrope`; `factor` stretches, `orig_ctx` is the context length before it (0: not
    given), `attn_factor` multiplies the magnitude. Llama 3's scheme is no entry here: its factors are the tensor
    `rope_freqs.weight`.
    """

    type: str
    factor: float
    orig_ctx: int
    attn_factor: float


@dataclass(frozen=True)
class Hparams:
    """Hyper-parameters under llama.cpp's names.

    Attributes
    ----------
    n_ctx : int
        Context length of the training, in tokens.
    n_rot : int
        Dimensions of a head that are rotated.
    n_expert : int
        Experts per layer; 0 in a dense model.
    rope_scaling : RopeScaling or None
    tied_embeddings : bool
        Whether the output layer is the token embedding.
    """

    arch: str
    n_vocab: int
    n_ctx: int
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_rot: int
    rms_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    n_expert: int
    tied_embeddings: bool

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], tensors: Container[str], *, source: str = "metadata"
    ) -> "Hparams":
        """Read the hyper-parameters out of GGUF metadata.

        Parameters
        ----------
        metadata : mapping
            As `read_header` returns it.
        tensors : container of str
            Names of the tensors that there are.
        source : str
            What the error text starts with.

        Raises
        ------
        ValueError
            If a key is missing, is no single number, or out of range.
        """
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str) or not arch.isprintable() or len(arch) > MAX_NAME:
            raise ValueError(
                f"{source}: general.architecture={short(arch)}, need a name. This is no language model's file."
            )

        def number(key: str, default: Any = None) -> Any:
            value = metadata.get(f"{arch}.{key}", default)
            if not isinstance(value, np.generic | int | float) or isinstance(value, bool):
                raise ValueError(
                    f"{source}: {arch}.{key}={short(value)}, need one number. Convert the checkpoint again."
                )
            return value.item() if isinstance(value, np.generic) else value

        def whole(key: str, default: Any = None, least: int = 1, most: int = (1 << 31) - 1) -> int:
            value = number(key, default)
            if type(value) is not int or not least <= value <= most:
                raise ValueError(
                    f"{source}: {arch}.{key}={value}, need a whole number from {least} to {most}. Convert again."
                )
            return value

        def positive(key: str, default: Any = None) -> float:
            value = number(key, default)
            if not 0 < value < float("inf"):
                raise ValueError(f"{source}: {arch}.{key}={value}, need a positive number. Convert again.")
            return value

        n_embd, n_head = whole("embedding_length"), whole("attention.head_count")
        head_dim = whole("attention.key_length", max(1, n_embd // n_head))
        tokens = metadata.get("tokenizer.ggml.tokens")
        return cls(
            arch=arch,
            n_vocab=whole("vocab_size", len(tokens) if isinstance(tokens, list | Strings) else 0, least=0),
            n_ctx=whole("context_length"),
            n_embd=n_embd,
            n_ff=whole("feed_forward_length"),
            n_layer=whole("block_count", most=MAX_LAYERS),
            n_head=n_head,
            n_head_kv=whole("attention.head_count_kv", n_head),
            head_dim=head_dim,
            n_rot=whole("rope.dimension_count", head_dim),
            rms_eps=positive("attention.layer_norm_rms_epsilon"),
            rope_base=positive("rope.freq_base", 10000.0),
            rope_scaling=_rope_scaling(metadata, positive, whole),
            n_expert=whole("expert_count", 0, least=0),
            tied_embeddings="output.weight" not in tensors,
        )


def _rope_scaling(metadata: Mapping[str, Any], positive: Any, whole: Any) -> RopeScaling | None:
    arch = metadata["general.architecture"]
    kind = metadata.get(f"{arch}.rope.scaling.type", "linear" if f"{arch}.rope.scale_linear" in metadata else "none")
    if not isinstance(kind, str) or kind == "none":
        return None
    key = "rope.scaling.factor" if f"{arch}.rope.scaling.factor" in metadata else "rope.scale_linear"
    given = metadata.get(f"{arch}.{key}")
    is_zero = isinstance(given, int | float | np.number) and given == 0  # llama.cpp takes it as not given
    factor = 1.0 if is_zero else positive(key, 1.0)
    orig_ctx = whole("rope.scaling.original_context_length", 0, least=0)
    return RopeScaling(kind, factor, orig_ctx, positive("rope.scaling.attn_factor", 1.0))
