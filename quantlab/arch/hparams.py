"""Hyper-parameters of a model: one record for files, checkpoints and published shapes."""

from dataclasses import dataclass, fields, replace
from functools import cached_property

__all__ = ["MAX_LAYERS", "Hparams", "PerLayer", "RopeScaling"]

MAX_LAYERS = 1024  # the deepest models have about 130; tables of names grow with them

PerLayer = int | tuple[int, ...]  # one value, or one for each layer


@dataclass(frozen=True)
class RopeScaling:
    """How rotary positions are stretched beyond the context length of the training.

    `type` is `linear`, `yarn` or `longrope`; `factor` stretches, `orig_ctx` is the context length before it (0: not
    given), `attn_factor` multiplies the magnitude. Llama 3's scheme has no entry here: its factors are the tensor
    `rope_freqs.weight`.
    """

    type: str
    factor: float
    orig_ctx: int
    attn_factor: float


@dataclass(frozen=True, kw_only=True)
class Hparams:
    """Hyper-parameters under llama.cpp's names.

    Attributes
    ----------
    n_head, n_head_kv, n_ff : int or tuple of int
        One value, or one for each layer. `n_head_kv` is `n_head` where it is not given.
    head_dim : int
        `n_embd // n_head` where it is not given.
    n_ctx : int
        Context length of the training, in tokens.
    n_rot : int
        Dimensions of a head that are rotated; all of them where it is not given.
    n_expert : int or tuple of int
        Experts of a layer; 0 in a dense one.
    n_expert_used : int
        Experts that a token sees.
    n_ff_exp, n_ff_shexp : int
        Inner size of an expert, and of the one that every token sees; 0 where there is none.
    expert_scale : float
        What the weights of the chosen experts are multiplied by.
    rope_scaling : RopeScaling or None
    tied_embeddings : bool
        Whether the output layer is the token embedding.

    Examples
    --------
    >>> hparams = Hparams(arch="llama", n_layer=2, n_embd=64, n_head=4, n_ff=(128, 256))
    >>> hparams.head_dim, hparams.n_kv, hparams.at(1).n_ff
    (16, 64, 256)
    """

    arch: str
    n_layer: int
    n_embd: int
    n_head: PerLayer
    n_head_kv: PerLayer | None = None
    n_ff: PerLayer = 0
    n_vocab: int = 0
    n_ctx: int = 0
    head_dim: int | None = None
    n_rot: int | None = None
    rms_eps: float = 1e-6
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    n_expert: PerLayer = 0
    n_expert_used: int = 0
    n_ff_exp: int = 0
    n_ff_shexp: int = 0
    expert_scale: float = 1.0
    tied_embeddings: bool = False

    def __post_init__(self):
        heads = max(self.n_head) if isinstance(self.n_head, tuple) else self.n_head
        given = {"n_head_kv": self.n_head, "head_dim": max(1, self.n_embd // max(1, heads))}
        for name, value in given.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.n_rot is None:
            object.__setattr__(self, "n_rot", self.head_dim)

    @cached_property
    def varies(self) -> tuple[str, ...]:
        """Names of the fields that have a value of their own for each layer."""
        return tuple(field.name for field in fields(self) if isinstance(getattr(self, field.name), tuple))

    def at(self, layer: int) -> "Hparams":
        """Return the hyper-parameters of one layer: every field that varies has this layer's value."""
        if not self.varies:
            return self
        return replace(self, **{name: getattr(self, name)[layer] for name in self.varies})

    @property
    def n_q(self) -> int:
        """Columns of a layer's queries."""
        return self.n_head * self.head_dim

    @property
    def n_kv(self) -> int:
        """Columns of a layer's keys, and of its values."""
        return self.n_head_kv * self.head_dim

    @property
    def n_pairs(self) -> int:
        """Pairs of dimensions of a head that are turned together."""
        return self.n_rot // 2
