"""How large llama.cpp's compute buffer becomes: its graph of one batch, laid out as its allocator does.

llama.cpp reserves one buffer for all intermediate results of a batch of `n_ubatch` tokens. The bytes of a result that
nothing reads any more are given to another one, and additions write over their input. So the buffer is neither the sum
of the results nor the largest of them; here the graph is written down and walked through.

Source: llama.cpp, `ggml/src/ggml-alloc.c` (the allocator), `src/models/llama.cpp` and `src/llama-graph.cpp` (the
graph), and what `GGML_SCHED_DEBUG=2` prints of it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

F32, F16, I32, I64 = 4, 2, 4, 8  # bytes
CELLS = 256  # the KV cache has a multiple of so many


@dataclass(frozen=True)
class Node:
    """One result of the graph: its bytes, the results that it reads, and whether it takes the place of the first."""

    name: str
    n_bytes: int
    reads: tuple[str, ...] = ()
    in_place: bool = False


@dataclass
class Arena:
    """Address space whose free holes are reused best fit first; `peak` is what the buffer must hold."""

    peak: int = 0
    holes: list[tuple[int, int]] = field(default_factory=list)  # (offset, bytes), by offset, none of them at the end
    end: int = 0

    def take(self, n_bytes: int) -> int:
        """Return the offset of `n_bytes`: in the tightest hole, of equals the last, or else at the end."""
        fitting = [hole for hole in self.holes if hole[1] >= n_bytes]
        if not fitting:
            offset, self.end = self.end, self.end + n_bytes
            self.peak = max(self.peak, self.end)
            return offset
        offset, size = min(reversed(fitting), key=lambda hole: hole[1])
        self.holes.remove((offset, size))
        if size > n_bytes:
            self.holes = sorted([*self.holes, (offset + n_bytes, size - n_bytes)])
        return offset

    def give_back(self, offset: int, n_bytes: int) -> None:
        """Free a range and merge it with the holes beside it."""
        merged: list[tuple[int, int]] = []
        for start, size in sorted([*self.holes, (offset, n_bytes)]):
            if merged and sum(merged[-1]) == start:
                start, size = merged[-1][0], merged.pop()[1] + size
            merged.append((start, size))
        if merged and sum(merged[-1]) == self.end:
            self.end = merged.pop()[0]
        self.holes = merged


def compute_bytes(
    hparams, *, n_ctx: int, n_ubatch: int = 512, flash_attn: bool = True, kv_quantized: bool = False
) -> int:
    """Compute the size of llama.cpp's compute buffer.

    Parameters
    ----------
    hparams : Hparams
        Needs ``n_vocab n_embd n_ff n_layer n_head n_head_kv head_dim``.
    n_ctx : int
        Tokens of context, as asked for.
    n_ubatch : int
        Most tokens that go through the model at once.
    flash_attn : bool
        Whether attention runs without storing its scores, as it does by default.
    kv_quantized : bool
        Whether the KV cache is quantized: llama.cpp then rotates heads whose size is a multiple of 64.

    Returns
    -------
    int
        Bytes.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> smollm2 = SimpleNamespace(n_vocab=49152, n_embd=576, n_ff=1536, n_layer=30, n_head=9, n_head_kv=3, head_dim=64)
    >>> round(compute_bytes(smollm2, n_ctx=2048) / 1024**2, 2)
    16.64
    """
    n_tokens, n_cells = min(n_ctx, n_ubatch), cells(n_ctx)
    rotated = kv_quantized and hparams.head_dim % 64 == 0
    inputs = _inputs(hparams, n_tokens, n_cells, flash_attn)
    return _peak(inputs + _nodes(hparams, n_tokens, n_cells, flash_attn, rotated))


def input_bytes(hparams, *, n_ctx: int, n_ubatch: int = 512, flash_attn: bool = True) -> int:
    """Compute what of the compute buffer is on the CPU when every layer is on the GPU: inputs and embedded tokens."""
    n_tokens = min(n_ctx, n_ubatch)
    inputs = _inputs(hparams, n_tokens, cells(n_ctx), flash_attn)
    return sum(node.n_bytes for node in inputs) + n_tokens * hparams.n_embd * F32


def cells(n_ctx: int) -> int:
    """Round a context up to the cells that its KV cache has."""
    return -(-n_ctx // CELLS) * CELLS


def _inputs(hparams, n_tokens: int, n_cells: int, flash_attn: bool) -> list[Node]:
    """What is set from outside before a batch runs; `mixed_…` is for batches of tokens and embeddings together."""
    n_embd_kv = hparams.head_dim * hparams.n_head_kv
    return [
        Node("tokens", n_tokens * I32),
        Node("mixed_tokens", n_tokens * I32),
        Node("mixed_embd", n_tokens * hparams.n_embd * F32),
        Node("mixed_slots", n_tokens * I64),
        Node("pos", n_tokens * I32),
        Node("k_idxs", n_tokens * I64),
        Node("v_idxs", n_tokens * I64 * (1 if flash_attn else n_embd_kv)),  # without flash attention V lies transposed
        Node("embd", n_tokens * hparams.n_embd * F32),  # for embeddings given in place of tokens, as images are
        Node("mask", n_tokens * n_cells * (F16 if flash_attn else F32)),
    ]


def _nodes(hparams, n_tokens: int, n_cells: int, flash_attn: bool, rotated: bool) -> list[Node]:
    """All results of one batch, in the order of their computation."""
    row = n_tokens * F32
    nodes = [
        Node("inp", row * hparams.n_embd, ("tokens",)),
        Node("mixed_rows", row * hparams.n_embd, ("tokens",)),
        Node("mixed", row * hparams.n_embd, ("mixed_embd",)),  # nothing reads it, so it keeps its place to the end
        Node("mixed_set", 0, ("mixed_rows",)),
    ]
    n_layer = min(hparams.n_layer, 4)  # from the third layer on every one lies where the one before it lay
    for i in range(n_layer):
        source = f"{i - 1}.out" if i else "inp"
        nodes += _attention(hparams, f"{i}.", source, row, n_cells, flash_attn, rotated)
        if i == n_layer - 1:  # from here on only the last token, whose logits are wanted
            row = F32
            nodes.append(Node("out_rows", row * hparams.n_embd, (nodes[-1].name,)))
            nodes.append(Node("inp_rows", row * hparams.n_embd, (source,)))
            nodes.append(Node(f"{i}.ffn_inp", row * hparams.n_embd, ("out_rows", "inp_rows"), in_place=True))
        else:
            nodes.append(Node(f"{i}.ffn_inp", row * hparams.n_embd, (nodes[-1].name, source), in_place=True))
        nodes += _feed_forward(hparams, f"{i}.", row)
    nodes.append(Node("result_norm", row * hparams.n_embd, (nodes[-1].name,), in_place=True))
    return [*nodes, Node("logits", row * hparams.n_vocab, ("result_norm",))]


def _attention(hparams, layer: str, source: str, row: int, n_cells: int, flash_attn: bool, rotated: bool) -> list[Node]:
    """From a layer's input to the output of its attention; K and V end in the cache."""
    q, kv = row * hparams.head_dim * hparams.n_head, row * hparams.head_dim * hparams.n_head_kv
    ends: dict[str, str] = {}
    nodes = [Node(f"{layer}norm", row * hparams.n_embd, (source,))]
    for part, n_bytes in (("q", q), ("v", kv), ("k", kv)):
        steps = [""] + ["_rope"] * (part != "v") + ["_rotated"] * rotated
        read = f"{layer}norm"
        for step in steps:
            nodes.append(Node(f"{layer}{part}{step}", n_bytes, (read,)))
            read = nodes[-1].name
        ends[part] = read
    nodes += [Node(f"{layer}{part}_cached", 0, (ends[part],)) for part in "kv"]
    if not flash_attn:  # softmax writes over the scores
        nodes.append(Node(f"{layer}scores", row * n_cells * hparams.n_head, (ends["q"],)))
        nodes.append(Node(f"{layer}heads", q, (f"{layer}scores",)))
    nodes.append(Node(f"{layer}attention", q, (ends["q"] if flash_attn else f"{layer}heads",)))
    if rotated:
        nodes.append(Node(f"{layer}rotated_back", q, (f"{layer}attention",)))
    return [*nodes, Node(f"{layer}attn_out", row * hparams.n_embd, (nodes[-1].name,))]


def _feed_forward(hparams, layer: str, row: int) -> list[Node]:
    """From the sum of attention and layer input to the layer's output."""
    return [
        Node(f"{layer}ffn_norm", row * hparams.n_embd, (f"{layer}ffn_inp",)),
        Node(f"{layer}gate", row * hparams.n_ff, (f"{layer}ffn_norm",)),
        Node(f"{layer}up", row * hparams.n_ff, (f"{layer}ffn_norm",)),
        Node(f"{layer}swiglu", row * hparams.n_ff, (f"{layer}gate", f"{layer}up")),
        Node(f"{layer}down", row * hparams.n_embd, (f"{layer}swiglu",)),
        Node(f"{layer}out", row * hparams.n_embd, (f"{layer}down", f"{layer}ffn_inp"), in_place=True),
    ]


def _peak(nodes: list[Node]) -> int:
    """Walk through the graph, giving and taking back bytes, and return the most that were in use."""
    arena, readers = Arena(), Counter(name for node in nodes for name in node.reads)
    placed: dict[str, tuple[int, int]] = {}
    for node in nodes:
        if node.in_place and readers[node.reads[0]] == 1:
            placed[node.name] = placed.pop(node.reads[0])
        else:
            placed[node.name] = (arena.take(node.n_bytes), node.n_bytes)
        for name in node.reads:
            readers[name] -= 1
            if readers[name] == 0 and name in placed:
                arena.give_back(*placed.pop(name))
    return arena.peak
