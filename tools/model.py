"""A small Llama in PyTorch: the shape that the bundled model is trained in.

The modules are named so that ``state_dict()`` has Hugging Face's tensor names; a trained model is therefore exported by
writing that dictionary down. Rotary positions are applied to the two halves of a head, as Hugging Face does.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters of a small Llama, in llama.cpp's words."""

    n_vocab: int = 2048
    n_ctx: int = 512  # tokens in a training window
    n_embd: int = 256
    n_ff: int = 512
    n_layer: int = 8
    n_head: int = 4
    n_head_kv: int = 2
    rms_eps: float = 1e-5
    rope_base: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, then scale each column by a learned weight."""

    def __init__(self, n_embd: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Causal self-attention in which several query heads share one key and value head."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.head_dim = shape.head_dim
        self.n_group = shape.n_head // shape.n_head_kv  # query heads per key and value head
        kv = shape.n_head_kv * shape.head_dim
        self.q_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.k_proj = nn.Linear(shape.n_embd, kv, bias=False)
        self.v_proj = nn.Linear(shape.n_embd, kv, bias=False)
        self.o_proj = nn.Linear(shape.n_embd, shape.n_embd, bias=False)

    def forward(self, x, cos, sin, mask, past=None):
        batch, length, _ = x.shape
        q, k, v = (
            p(x).view(batch, length, -1, self.head_dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:  # one token, whose keys and values join those of the tokens before
            past[0][:, :, -1:], past[1][:, :, -1:] = k, v
            k, v = past
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None, enable_gqa=True)
        else:
            k, v = (t.repeat_interleave(self.n_group, dim=1) for t in (k, v))
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1) + mask
            y = scores.softmax(dim=-1).to(v.dtype) @ v
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """Llama's gated feed-forward network: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.up_proj = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.down_proj = nn.Linear(shape.n_ff, shape.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and feed-forward network, each added to the residual stream."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = RMSNorm(shape.n_embd, shape.rms_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.n_embd, shape.rms_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x, cos, sin, mask, past=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids to logits.

    Parameters
    ----------
    shape : Shape
        The hyper-parameters.
    fused : bool
        Use torch's fused attention kernel where no keys are kept. On CPUs in bfloat16 it takes twice the time of all
        the rest together, so there attention is written out.
    """

    def __init__(self, shape: Shape, fused: bool = False):
        super().__init__()
        self.shape, self.fused = shape, fused
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(shape.n_vocab, shape.n_embd),
                "layers": nn.ModuleList(Layer(shape) for _ in range(shape.n_layer)),
                "norm": RMSNorm(shape.n_embd, shape.rms_eps),
            }
        )
        self.lm_head = nn.Linear(shape.n_embd, shape.n_vocab, bias=False)
        cos, sin = rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.apply(_initialize)
        for layer in self.model["layers"]:  # keeps the residual stream's variance from growing with depth
            for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
                nn.init.normal_(out.weight, std=0.02 / (2 * shape.n_layer) ** 0.5)

    def keys_and_values(self, batch: int) -> torch.Tensor:
        """Return room for the keys and values of `batch` texts, which `forward` fills token by token."""
        shape = self.shape
        return torch.zeros(shape.n_layer, 2, batch, shape.n_head_kv, shape.n_ctx, shape.head_dim)

    def forward(self, ids, past=None, start=0):
        """Return the logits of each position.

        Parameters
        ----------
        ids : torch.Tensor [shape=(batch, length), dtype=int64]
            Token ids.
            With `past` one token of each text.
        past : torch.Tensor, optional
            What `keys_and_values` returned, filled by calls for the `start` tokens before.
        start : int
            Position of the first token.

        Returns
        -------
        torch.Tensor [shape=(batch, length, n_vocab)]
            Logits.
        """
        here = slice(start, start + ids.shape[1])
        x = self.model["embed_tokens"](ids)
        mask = None  # the fused kernel has its own
        if past is None and not self.fused:
            mask = torch.full((here.stop, here.stop), -torch.inf, dtype=torch.bfloat16, device=ids.device).triu(1)
        for i, layer in enumerate(self.model["layers"]):
            kept = past[i, :, :, :, : here.stop] if past is not None else None
            x = layer(x, self.cos[here], self.sin[here], mask, kept)
        return self.lm_head(self.model["norm"](x))


def rope_tables(shape: Shape):
    """Cosines and sines of the rotary angles [shape=(n_ctx, head_dim)], the halves equal."""
    rates = shape.rope_base ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
    angles = torch.outer(torch.arange(shape.n_ctx).float(), rates).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the pairs (i, i + head_dim/2) of x [shape=(…, length, head_dim)] by their position's angles."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def _initialize(module) -> None:
    """Draw weight matrices from a normal distribution of standard deviation 0.02."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
