"""Hyper-parameters of a model: one record for files, checkpoints and published shapes."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING

__all__ = ["MAX_LAYERS", "Hparams", "PerLayer", "RopeScaling"]

MAX_LAYERS = 1024  # the deepest models have about 130; tables of names grow with them

if TYPE_CHECKING:  # nearly all code asks for the values of one layer (`at`): to a checker of types they are that
    PerLayer = int
else:
    PerLayer = int | tuple[int, ...]  # one value, or one for each layer


@dataclass(frozen=True)
class RopeScaling:
    """The extension of rotary positions beyond the context length of the training.

    `type` is `linear`, `yarn` or `longrope`; `factor` stretches, `orig_ctx` is the context length before it (0: not
    given), `attn_factor` multiplies the magnitude. YaRN leaves alone what turns more than `beta_fast` times within the
    context and stretches what turns less than `beta_slow` times; with `log_mul` 1 it has no magnitude of its own.
    Llama 3's scheme has no entry here: its factors are the tensor `rope_freqs.weight`.
    """

    type: str
    factor: float
    orig_ctx: int
    attn_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    log_mul: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Hparams:
    """The hyper-parameters of a model, under llama.cpp's names.

    A field may have one value or a tuple with one for each layer; `at` gives those of a layer.

    Attributes
    ----------
    n_head_kv : int or tuple of int
        `n_head` where it is not given.
    head_dim : int or tuple of int
        `n_embd // n_head` where it is not given.
    head_dim_window, n_rot_window : int
        Those of layers with a window where they differ; 0 where they do not. `arch.complete` distributes them.
    v_is_k : int or tuple of int
        1 in a layer whose values are its keys before norm and rotation.
    n_kv_shared : int
        How many layers, the last ones, use keys and values of layers before them.
    kv_shared : int or tuple of int
        1 in such a layer.
    n_embd_layer : int
        Size of what a layer learns of each token by itself, beside its embedding; 0: nothing.
    n_ctx : int
        Context length of the training, in tokens.
    n_rot : int or tuple of int
        Dimensions of a head that are rotated; all of them where it is not given, 0 in a layer without positions.
    rope_base_window : float
        `rope_base` of layers with a window where it differs; 0 where it does not. `arch.complete` distributes it.
    window : int or tuple of int
        Tokens that a position sees, itself included; 0: all before it.
    attn_scale : float
        What scores are multiplied by; 0: 1 / sqrt(head_dim).
    attn_softcap, logit_softcap : float
        c of c · tanh(x / c), for the scores of attention and the logits; 0: none.
    attn_temp_scale : float
        Queries from `rope_scaling.orig_ctx` on are multiplied by 1 + this · ln(1 + position // orig_ctx); 0: none.
    embd_scale, residual_scale, logit_scale : float
        What embeddings, the change of each half of a layer, and logits are multiplied by.
    n_expert : int or tuple of int
        Experts of a layer; 0 in a dense one.
    n_expert_used : int
        Experts that a token sees.
    n_ff_exp, n_ff_shexp : int
        Inner size of an expert, and of the one that every token sees; 0 where there is none.
    recurrent : int or tuple of int
        1 in a layer that keeps a state instead of keys and values.
    ssm_conv, ssm_state, ssm_groups, ssm_heads, ssm_inner : int
        Of such a layer the size of the convolution and of a head of q and k, the numbers of heads of q and k and of
        v, and the columns of v.
    attention_interval : int
        Every how many layers one has attention, the others being recurrent; 0: not given.
    expert_scale : float
        What the weights of the chosen experts are multiplied by.
    expert_gating : int
        How scores of experts become weights, where models of an architecture differ: 1 softmax, 2 sigmoid; 0: as its
        layers say.
    expert_norm : bool
        Whether the weights of the chosen experts are divided by their sum, where `expert_gating` counts.
    expert_groups, expert_groups_used : int
        Groups that experts lie in, and of how many of them a token's are chosen; 0: no groups.
    n_expert_shared : int
        Experts that every token sees, side by side in one.
    n_dense : int
        How many layers, the first ones, have no experts.
    dense : int or tuple of int
        1 in such a layer.
    n_lora_q, n_lora_kv : int
        Of latent attention the columns of the short row that queries are made of (0: none), and of that for keys and
        values. `head_dim` is then that of the latter with the rotated dimensions, as one head of keys.
    head_dim_mla, head_dim_v : int
        Of latent attention the sizes of a head of keys and of one of values.
    rope_scaling : RopeScaling or None
    n_layer_nextn : int
        Layers after those that guess several tokens at once: `n_layer` does not count them, nobody computes them.
    nextn : int or tuple of int
        1 in such a layer, see `whole`.
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
    n_head_kv: PerLayer = None  # type: ignore[assignment]  # `n_head`
    n_ff: PerLayer = 0
    n_vocab: int = 0
    n_ctx: int = 0
    head_dim: PerLayer = None  # type: ignore[assignment]  # `n_embd // n_head`
    head_dim_window: int = 0
    n_rot: PerLayer = None  # type: ignore[assignment]  # `head_dim`
    n_rot_window: int = 0
    v_is_k: PerLayer = 0
    n_kv_shared: int = 0
    kv_shared: PerLayer = 0
    n_embd_layer: int = 0
    rms_eps: float = 1e-6
    rope_base: float = 10000.0  # or a tuple with one for each layer
    rope_base_window: float = 0.0
    rope_scaling: "RopeScaling | None" = None  # or a tuple with one for each layer
    window: PerLayer = 0
    attn_scale: float = 0.0
    attn_softcap: float = 0.0
    attn_temp_scale: float = 0.0
    embd_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    n_expert: PerLayer = 0
    n_expert_used: int = 0
    n_ff_exp: int = 0
    n_ff_shexp: int = 0
    expert_scale: float = 1.0
    expert_gating: int = 0
    expert_norm: bool = False
    expert_groups: int = 0
    expert_groups_used: int = 0
    n_expert_shared: int = 0
    n_dense: int = 0
    dense: PerLayer = 0
    n_lora_q: int = 0
    n_lora_kv: int = 0
    head_dim_mla: int = 0
    head_dim_v: int = 0
    recurrent: PerLayer = 0
    ssm_conv: int = 0
    ssm_state: int = 0
    ssm_groups: int = 0
    ssm_heads: int = 0
    ssm_inner: int = 0
    attention_interval: int = 0
    n_layer_nextn: int = 0
    nextn: PerLayer = 0
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
        """Names of the fields with one value per layer."""
        return tuple(field.name for field in fields(self) if isinstance(getattr(self, field.name), tuple))

    def at(self, layer: int) -> "Hparams":
        """Return the hyper-parameters of one layer: every field that varies has this layer's value."""
        return self._each[layer] if self.varies else self

    @cached_property
    def _each(self) -> tuple["Hparams", ...]:
        """The hyper-parameters of each layer; layers that agree share theirs."""
        values = list(zip(*(getattr(self, name) for name in self.varies), strict=True))
        known = {value: replace(self, **dict(zip(self.varies, value, strict=True))) for value in set(values)}
        return tuple(known[value] for value in values)

    @property
    def n_layer_all(self) -> int:
        """Layers of a file."""
        return self.n_layer + self.n_layer_nextn

    @property
    def whole(self) -> "Hparams":
        """The same with layers that guess several tokens at once counted as others, and told apart by `nextn`."""
        if not self.n_layer_nextn:
            return self
        more = self.n_layer_nextn
        varied = {name: getattr(self, name) + getattr(self, name)[-1:] * more for name in self.varies}
        varied |= {"nextn": (0,) * self.n_layer + (1,) * more, "n_layer": self.n_layer_all, "n_layer_nextn": 0}
        if "recurrent" in varied:
            varied["recurrent"] = (*self.recurrent, *(0,) * more)  # pyright: ignore[reportGeneralTypeIssues]
        return replace(self, **varied)

    def kept(self, layer: int) -> slice:
        """Return the columns of a state that hold keys and values of `layer` for later ones, or of an earlier one."""
        start = self.n_embd + self.n_embd_layers
        for windowed, source, size in self._sources:
            if self.windowed[layer] == windowed and layer >= source:
                return slice(start, start + size)
            start += size
        return slice(start, start)

    @cached_property
    def _sources(self) -> list[tuple[bool, int, int]]:
        """The layers whose keys and values others use: the last ones of their own, with a window and without."""
        own = range(self.n_layer - self.n_kv_shared if self.n_kv_shared else 0)
        last = {self.windowed[i]: i for i in own}
        return [(windowed, i, 2 * self.at(i).n_kv) for windowed, i in last.items()]

    @property
    def n_state(self) -> int:
        """Columns of a token's state between layers: its stream, and what later layers need beside it."""
        return self.n_embd + self.n_embd_layers + sum(size for _, _, size in self._sources)

    @property
    def n_embd_twice(self) -> int:
        """Columns of a hidden state beside an embedding."""
        return 2 * self.n_embd

    @property
    def window_size(self) -> int:
        """The largest window of any layer."""
        return max(self.window) if isinstance(self.window, tuple) else self.window

    @property
    def windowed(self) -> list[bool]:
        """For each layer, True if it has a window."""
        return [self.at(i).window > 0 for i in range(self.n_layer)]

    @property
    def score_scale(self) -> float:
        """Factor of the scores of a layer's attention."""
        return self.attn_scale or self.head_dim**-0.5

    @property
    def n_q(self) -> int:
        """Columns of a layer's queries."""
        return self.n_head * self.head_dim

    @property
    def one(self) -> int:
        """Number of rows of a matrix that gives one number: 1."""
        return 1

    @property
    def recurrent_layers(self) -> list[bool]:
        """For each layer of a file, True if it is recurrent."""
        return [self.at(i).recurrent > 0 for i in range(self.n_layer)] + [False] * self.n_layer_nextn

    @property
    def n_q_gate(self) -> int:
        """Columns of a layer's queries and, as many, of their gates."""
        return 2 * self.n_q

    @property
    def ssm_value(self) -> int:
        """Size of a head of v in a recurrent layer."""
        return self.ssm_inner // max(1, self.ssm_heads)

    @property
    def ssm_heads_twice(self) -> int:
        """Columns of beta and alpha in a recurrent layer."""
        return 2 * self.ssm_heads

    @property
    def conv_width(self) -> int:
        """Columns of q, k and v in a recurrent layer."""
        return 2 * self.ssm_groups * self.ssm_state + self.ssm_inner

    @property
    def n_kv(self) -> int:
        """Columns of a layer's keys, and of its values."""
        return self.n_head_kv * self.head_dim

    @property
    def n_qkv(self) -> int:
        """Columns of a layer's queries, keys and values."""
        return self.n_q + 2 * self.n_kv

    @property
    def n_q_mla(self) -> int:
        """Columns of the queries of latent attention."""
        return self.n_head * self.head_dim_mla

    @property
    def n_nope(self) -> int:
        """Dimensions of a head of latent attention that are not rotated."""
        return self.head_dim_mla - self.n_rot

    @property
    def n_v(self) -> int:
        """Columns of what latent attention gives."""
        return self.n_head * self.head_dim_v

    @property
    def n_ff_twice(self) -> int:
        """Columns of gate and up."""
        return 2 * self.n_ff

    @property
    def n_pairs(self) -> int:
        """Pairs of dimensions of a head that are turned together, the most of any layer."""
        return max(self.n_rot if isinstance(self.n_rot, tuple) else (self.n_rot,)) // 2

    @property
    def n_embd_layers(self) -> int:
        """Columns of what all layers learn of a token."""
        return self.n_layer * self.n_embd_layer

    @property
    def n_ff_exp_twice(self) -> int:
        """Columns of gate and up of an expert."""
        return 2 * self.n_ff_exp
