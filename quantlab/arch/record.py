"""The parts of an architecture's record: its tensors, and the steps of a layer."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal

from quantlab.arch.hparams import Hparams

Role = Literal["embedding", "norm", "matrix", "bias", "router", "experts", "output", "state", "rope", "other"]
_DENSE = ("shared_gate", "ffn_in", "ffn_down")
FLOAT_ROLES = ("norm", "bias", "router", "state", "rope")  # stay F32 in every file


@dataclass(frozen=True)
class Tensor:
    """One tensor of a model, or one of each of its layers.

    Attributes
    ----------
    name : str
        GGUF name; `{}` stands for the number of the layer.
    shape : str
        Fields of `Hparams` in NumPy order, the row length last: `"n_ff n_embd"`.
    role : str
        What it is: a matrix multiplies, a norm scales, a router picks experts, a state belongs to a recurrent layer;
        `other` is a matrix of a kind that the evaluator does not compute.
    checkpoint : tuple of str
        Its names in Hugging Face checkpoints, `{}` for the number of the layer; empty where the converter computes it.
    change : tuple of str
        What the converter does with the rows. `("permute", "n_head")` turns the halves of each of `n_head` heads into
        pairs, `("add", "1")` adds a number. `("stack",)` stacks the matrices of a layer's experts, whose names have a
        second `{}`. Of a tensor that holds two projections of all experts, `("half", "0")` takes the first half of each
        expert's rows, `("every", "0")` the even ones, `("columns", "0")` the even columns. `("transpose",)` turns each
        expert's matrix around, perhaps with the number for `every` after it. `("mxfp4",)` joins blocks and scales;
        with a number, the even rows of the blocks (0) or the odd ones (1). `("tile", "ssm_value")` puts the last rows,
        heads of v of this size, into an order in which they take turns for the heads of k; `("tile_columns", …)` the
        columns; `("tile_decay", "1")` also takes -e^x, `("decay", "")` does only that. `("squeeze", "")` drops
        dimensions of size 1. Of rows that lie head of k by head of k, `("part", "qkv")` takes all of q, all of k, all
        of v, and `("part", "z")` all of the gate. Of rows that hold keys and values head by head, `("head", "k")` takes
        the keys, each head's matrix transposed, and `("head", "v")` the values; both are stacks.
    meta : str
        Its name in Meta's checkpoints, whose rows have GGUF's order already.
    optional : bool
        Whether a model may lack it.
    only : str
        Field of `Hparams` that is not zero in the layers that have it; with `!` before its name, zero. Empty: all have.
    forms : tuple of (str, str, ...)
        More names in checkpoints, each followed by the change that its form needs.
    """

    name: str
    shape: str
    role: Role
    checkpoint: tuple[str, ...] = ()
    change: tuple[str, ...] = ()
    meta: str = ""
    optional: bool = False
    only: str = ""
    forms: tuple[tuple[str, ...], ...] = ()

    @property
    def is_layered(self) -> bool:
        """True if each layer has one."""
        return "{}" in self.name

    def is_in(self, hparams: Hparams) -> bool:
        """Tell whether the model or layer with `hparams` has this tensor."""
        return not self.only or bool(getattr(hparams, self.only.removeprefix("!"))) != self.only.startswith("!")

    def shape_in(self, hparams: Hparams) -> tuple[int, ...]:
        """Return its shape; `hparams` are those of its layer."""
        return tuple(getattr(hparams, size) for size in self.shape.split())


@dataclass(frozen=True)
class Layer:
    """The steps of a layer in order; fields name tensors without `blk.N.` and `.weight` (empty: none).

        x ─ attn_norm ─ attn_qkv ─ q_norm, k_norm ─ rope ─ attention ─ attn_output ─ attn_post_norm ─ + x
        x ─ ffn_norm ─ ffn_in ─ activation ─ ffn_down ─ ffn_post_norm ─ + x

    With experts, the last line is that of an expert that every token sees, which may be missing. Beside it:

        x ─ ffn_norm ─ router ─ gating ─ the experts of each token, by weight
                     ─ experts_in ─ activation ─ experts_down ─ · weight ─ + x
                     ─ shared_gate ─ sigmoid: what `ffn_down` is multiplied by

    Attributes
    ----------
    attn_qkv, attn_output, router, experts_in, experts_down, shared_gate, ffn_in, ffn_down : tuple of str
        The products with weights. The matrices of one product have the same input; a bias has its matrix's name. One
        matrix for all of a product holds the rows of q, k, v or of gate, up in this order. Those of experts are
        stacked, one matrix after the other, and so are their biases.
    attn_norm, q_norm, k_norm, attn_post_norm, ffn_norm, ffn_post_norm : str
        RMS norms. q_norm and k_norm are of each head, or of a whole row where their weights are as long as that.
    latent_q_norm, latent_q, latent_norm, latent_k, latent_v : str, and tuple of str
        Of latent attention: `attn_qkv` are queries, or a short row that `latent_q` makes queries of, and a short row
        for keys and values with the rotated part of keys. `latent_k` and `latent_v` are stacks of a matrix for each
        head: from queries to that row, and from it to values.
    v_norm : bool
        Whether each head of v is normalized, without weights.
    experts_norm, shared_post_norm, experts_post_norm : str
        Where the experts have norms of their own: of what they see, of what the one gives that every token sees, and
        of what they give. `ffn_post_norm` is that of the sum of both then.
    router_scale : str
        What the columns that the router then sees are multiplied by, and by n_embd^-½, after a norm without weights.
    expert_scales : str
        One number for each expert, which the weights of those chosen are multiplied by.
    layer_gate, layer_out, layer_post_norm : tuple of str, and str
        What a layer adds for each token by itself: gelu(gate) · what it learns of the token, multiplied by `layer_out`
        and normalized.
    layer_scale : str
        One number that everything is multiplied by in the end.
    rope : str
        Which dimensions of a head are turned together: neighbours (`pairs`) or those half a head apart (`halves`).
    activation : str
        `silu`: silu(gate) · up, `ffn_in` being gate and up. `gelu`: gelu(gate) · up, by tanh. `swiglu_oai`:
        gate · sigmoid(1.702 · gate) · (up + 1), with gate at most 7, up within ±7.
    scaled_queries : bool
        Whether llama.cpp multiplies queries by the factor of scores, before it rounds their products.
    query_width : int
        2 where the rows of the first matrix of `attn_qkv` are for each head those of a query and those of a gate, whose
        sigmoid multiplies what attention gives; else 1.
    sinks : str
        One number for each head, a score that takes part in the softmax of attention and belongs to no token.
    conv, time_step, decay, state_norm : str
        Of a gated delta net, which takes the place of attention: `attn_qkv` are q, k and v in one, a gate, beta and
        alpha, the heads of v in turns for those of k; `attn_output` has what `state_norm` and the gate leave.
    in_groups : bool
        Whether the heads of v that share one of k lie together there, with beta and alpha of each group in one matrix.
    gating : str
        How scores of experts become weights: `softmax` of all, `sigmoid` of each, or `softmax_chosen`, of those chosen.
    choice_bias : str
        What is added to the weights while the experts are chosen, and not after.
    sums_to_one : bool
        Whether the weights of the chosen experts are divided by their sum. (`Hparams.expert_scale` comes after.)

    What differs between models or layers of one architecture is in `Hparams`: windows, scales, softcaps, rope.
    """

    attn_norm: str = "attn_norm"
    attn_qkv: tuple[str, ...] = ("attn_q", "attn_k", "attn_v")
    q_norm: str = ""
    k_norm: str = ""
    v_norm: bool = False
    latent_q_norm: str = ""
    latent_q: tuple[str, ...] = ()
    latent_norm: str = ""
    latent_k: tuple[str, ...] = ()
    latent_v: tuple[str, ...] = ()
    attn_output: tuple[str, ...] = ("attn_output",)
    attn_post_norm: str = ""
    ffn_norm: str = "ffn_norm"
    router: tuple[str, ...] = ()
    experts_in: tuple[str, ...] = ()
    experts_down: tuple[str, ...] = ()
    shared_gate: tuple[str, ...] = ()
    ffn_in: tuple[str, ...] = ("ffn_gate", "ffn_up")
    ffn_down: tuple[str, ...] = ("ffn_down",)
    ffn_post_norm: str = ""
    experts_norm: str = ""
    shared_post_norm: str = ""
    experts_post_norm: str = ""
    router_scale: str = ""
    expert_scales: str = ""
    layer_gate: tuple[str, ...] = ()
    layer_out: tuple[str, ...] = ()
    layer_post_norm: str = ""
    layer_scale: str = ""
    rope: Literal["pairs", "halves"] = "halves"
    activation: Literal["silu", "gelu", "swiglu_oai"] = "silu"
    scaled_queries: bool = False
    query_width: int = 1
    sinks: str = ""
    conv: str = ""
    time_step: str = ""
    decay: str = ""
    state_norm: str = ""
    in_groups: bool = False
    gating: Literal["softmax", "sigmoid", "softmax_chosen"] = "softmax"
    choice_bias: str = ""
    sums_to_one: bool = False

    @property
    def products(self) -> dict[str, tuple[str, ...]]:
        """The matrices of each product with weights, by field, in the order in which a layer computes them."""
        latent, own = ("latent_q", "latent_k", "latent_v"), ("layer_gate", "layer_out")
        return self._there("attn_qkv", *latent, "attn_output", "router", "experts_in", "experts_down", *_DENSE, *own)

    @property
    def norms(self) -> dict[str, str]:
        """The norms of the layer, by field."""
        of_experts = "experts_norm", "shared_post_norm", "experts_post_norm", "layer_post_norm"
        latent = "latent_q_norm", "latent_norm"
        return self._there(
            "attn_norm", *latent, "q_norm", "k_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm", *of_experts
        )

    @property
    def vectors(self) -> dict[str, str]:
        """The other tensors of a layer (not products, biases or norms), by field."""
        scales = "router_scale", "expert_scales", "layer_scale"
        return self._there("sinks", "choice_bias", "conv", "time_step", "decay", "state_norm", *scales)

    def _there(self, *names: str) -> dict:
        """Return the fields that are not empty."""
        return {name: getattr(self, name) for name in names if getattr(self, name)}


@dataclass(frozen=True)
class Architecture:
    """The record of one architecture, complete for all parts of the package.

    Attributes
    ----------
    name : str
        `general.architecture`.
    classes : tuple of str
        Classes of checkpoints, as `architectures` in config.json has them.
    tensors : tuple of Tensor
        In the order in which a converter writes them.
    layer : Layer
        What a layer does.
    kinds : tuple of (str, Layer)
        What some layers do instead: those in which this field of `Hparams` is not zero. The first that fits counts.
    defaults : mapping
        `model_type` → what a configuration of this type means where it says nothing. A `head_dim` of 0 follows from
        the other sizes, and is written all the same.
    sizes : mapping
        Field of `Hparams` → its key in a configuration, where only some architectures have it.
    metadata : mapping
        GGUF key without the architecture's name → field of `Hparams`: written after those that every file has, and
        read from a file.
    order : tuple of str
        All keys in the order in which the converter writes them, where that is another one; `file_type` stands for
        that of the file.
    skipped : tuple of str
        Ends of the names of a checkpoint's tensors that no file needs.
    vocab : str
        `tokenizer.ggml.model` where it is another one than the tokenizer's files say.
    has_llama_vocab : bool
        Whether the converter writes vocabularies as Llama's: scores for SentencePiece in a tokenizer.json.
    tokenizer : mapping
        What it adds to those of a tokenizer.model: name of a `tokenizer.ggml` key → value.
    special : mapping
        Roles of special tokens whose text the converter knows, for tokenizers that do not say.
    packed : tuple of str
        Quantizers, by the names of `packed_by`, whose weights the converter reads.
    left_out : tuple of str
        Starts of names of tensors of layers that guess several tokens at once, `{}` for the number of the other layers.
        They are written where it is asked for, if `metadata` has `nextn_predict_layers`.
    window_period : int
        Every how many layers one sees all tokens, the others a window, where the metadata does not say which; 0: the
        architecture knows no windows.
    window : int
        Tokens of a window where the metadata does not say.
    window_rope : float or None
        `rope_base` of layers with a window, whose positions are not stretched: 0 for that of the other layers. None:
        they are rotated as the others.
    yarn : tuple of str
        Fields of `RopeScaling` for YaRN that llama.cpp reads from a file of this architecture.
    unrotated_period : int
        Every how many layers one has no positions; 0: all have.
    derive : callable, optional
        `derive(hparams)` returns fields that llama.cpp takes from others, where the metadata has no key for them.
    """

    name: str
    classes: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    layer: Layer = Layer()
    kinds: tuple[tuple[str, Layer], ...] = ()
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    skipped: tuple[str, ...] = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq", "rope.freqs")
    vocab: str = ""
    has_llama_vocab: bool = False
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    special: Mapping[str, str] = field(default_factory=dict)
    packed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    window_period: int = 0
    window: int = 0
    window_rope: float | None = None
    yarn: tuple[str, ...] = ()
    unrotated_period: int = 0
    derive: Callable[[Hparams], Mapping[str, Any]] | None = None

    @cached_property
    def _by_name(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    def tensor(self, name: str) -> Tensor | None:
        """Return the record of the tensor called `name` in a file (None: such a model lacks it)."""
        return self._by_name.get(re.sub(r"^blk\.\d+\.", "blk.{}.", name))

    def layer_at(self, hparams: Hparams, index: int) -> Layer:
        """Return what layer `index` does, with the matrices that it has."""
        own = hparams.at(index)
        layer = next((layer for field, layer in self.kinds if getattr(own, field)), self.layer)

        def is_there(name: str) -> bool:
            tensor = self._by_name.get(f"blk.{{}}.{name}.weight")
            return tensor is None or tensor.is_in(own)

        found: dict[str, Any] = {field: tuple(filter(is_there, names)) for field, names in layer.products.items()}
        if own.expert_gating and layer.router:
            found |= {"gating": ("softmax", "sigmoid")[own.expert_gating - 1], "sums_to_one": own.expert_norm}
        return replace(layer, **found)

    def used(self, hparams: Hparams) -> set[str]:
        """Return the names of all matrices and norms that the layers of a model compute with."""
        layers = enumerate(self.layer_at(hparams, i) for i in range(hparams.n_layer))
        names = ((i, (*chain(*layer.products.values()), *layer.norms.values())) for i, layer in layers)
        return {f"blk.{i}.{name}.weight" for i, own in names for name in own}

    def matrices(self) -> list[str]:
        """Return the names of all matrices in layers' products, in the order of computation."""
        layers = [layer for _, layer in self.kinds] + [self.layer]
        return list(dict.fromkeys(name for layer in layers for names in layer.products.values() for name in names))

    def complete(self, hparams: Hparams) -> Hparams:
        """Complete hyper-parameters by the architecture's rules: windows and rotation layer by layer."""
        n_layer, window, period = hparams.n_layer, hparams.window, self.window_period
        found = dict(self.derive(hparams)) if self.derive else {}
        if not isinstance(window, tuple):
            window = tuple(window if period and i % period < period - 1 else 0 for i in range(n_layer))
        found["window"] = window if any(window) else 0
        if any(window) and self.window_rope is not None and not isinstance(hparams.rope_base, tuple):
            base = hparams.rope_base_window or self.window_rope or hparams.rope_base
            found["rope_base"] = tuple(base if size else hparams.rope_base for size in window)
            found["rope_scaling"] = tuple(None if size else hparams.rope_scaling for size in window)
        for name in ("head_dim", "n_rot"):
            if (size := getattr(hparams, f"{name}_window")) and not isinstance(getattr(hparams, name), tuple):
                found[name] = tuple(size if windowed else getattr(hparams, name) for windowed in window)
        if hparams.n_kv_shared:
            found["kv_shared"] = tuple(int(i >= n_layer - hparams.n_kv_shared) for i in range(n_layer))
        if (step := self.unrotated_period) and not isinstance(hparams.n_rot, tuple):
            found["n_rot"] = tuple(hparams.n_rot if (i + 1) % step else 0 for i in range(n_layer))
        if any(field == "recurrent" for field, _ in self.kinds) and not isinstance(hparams.recurrent, tuple):
            step = hparams.attention_interval or 4
            found["recurrent"] = tuple(int((i + 1) % step > 0) for i in range(n_layer))
        return replace(hparams, **found)

    def expand(self, hparams: Hparams) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
        """Yield name, record and shape of every possible tensor of such a model, in file order."""
        hparams = hparams.whole
        layers = [hparams.at(i) for i in range(hparams.n_layer)]
        inner = [tensor for tensor in self.tensors if tensor.is_layered]
        first = self.tensors.index(inner[0]) if inner else len(self.tensors)
        single = [tensor for tensor in self.tensors if not tensor.is_layered and tensor.is_in(hparams)]
        for tensor in single:
            if tensor in self.tensors[:first]:
                yield tensor.name, tensor, tensor.shape_in(hparams)
        for i, sizes in enumerate(layers):
            for tensor in inner:
                if tensor.is_in(sizes):
                    yield tensor.name.format(i), tensor, tensor.shape_in(sizes)
        for tensor in single:
            if tensor not in self.tensors[:first]:
                yield tensor.name, tensor, tensor.shape_in(hparams)

    def checkpoint_names(self, hparams: Hparams) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
        """Return the GGUF names and row changes for every tensor name that a checkpoint may use.

        The change of one of many experts is `("stack", number)`.
        """
        found: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        hparams = hparams.whole
        layers = [hparams.at(i) for i in range(hparams.n_layer)]
        for tensor in self.tensors:
            forms = [(name, tensor.change) for name in tensor.checkpoint] + [(tensor.meta, ())] * bool(tensor.meta)
            forms += [(name, tuple(change)) for name, *change in tensor.forms]
            for i, layer in enumerate(layers if tensor.is_layered else layers[:1]):
                for name, change in forms if tensor.is_in(layer) else ():
                    stacked = [("stack", str(e)) for e in range(layer.n_expert)] if change == ("stack",) else [change]
                    for e, how in enumerate(stacked):
                        found.setdefault(name.format(i, e), []).append((tensor.name.format(i), how))
        return found
