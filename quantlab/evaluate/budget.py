"""How much memory, disk and time a pass takes, worked out before it starts, and how it is cut to fit the memory."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quantlab.evaluate.attention import QUERIES
from quantlab.evaluate.dense import Workers
from quantlab.evaluate.llama import ROWS, layer_shapes, layer_weights
from quantlab.evaluate.protocol import Windows
from quantlab.evaluate.tiles import COLUMNS, multiply, n_panels, panels_size
from quantlab.evaluate.variants import PIECE, Variant
from quantlab.transform.plan import parse_bytes, tensor_bytes

PROCESS = 400 << 20  # bytes that Python, its packages and compiled code take by themselves
ROWS_AT_ONCE = 4096  # tokens that a layer is applied to at a time, where memory allows
LOGITS = 6 << 20  # logits per thread and model at a time
SHARE_OF_PEAK = 0.7  # of the speed of one large product that a whole pass reaches
ENCODE_SPEED = 20e6  # weights per second, of the slower types


@dataclass(frozen=True)
class Budget:
    """How a pass is cut, and what it needs.

    Attributes
    ----------
    chunks_at_once : int
        Chunks that a layer is applied to at a time.
    outputs_at_once : int
        Variants whose logits are computed beside the base's at a time.
    logit_rows : int
        Positions whose logits a thread computes at a time.
    in_memory : bool
        Whether the hidden states stay in memory; else they are in files.
    memory, disk : int
        Bytes needed at most.
    seconds : float
        Estimated time.
    """

    chunks_at_once: int
    outputs_at_once: int
    logit_rows: int
    in_memory: bool
    memory: int
    disk: int
    seconds: float

    def __str__(self) -> str:
        disk = "" if self.in_memory else f", {self.disk / 2**30:.2f} GiB on disk"
        return f"memory {self.memory / 2**30:.2f} GiB{disk}; about {self.seconds / 60:.1f} minutes"


def fit(
    variants: Sequence[Variant], windows: Windows, workers: Workers, memory: str | int | None, keep_states: bool
) -> Budget:
    """Cut a pass so that it stays within `memory`.

    Parameters
    ----------
    variants : sequence of Variant
        The base first.
    windows : Windows
    workers : Workers
    memory : str, int or None
        Bytes, or a text such as `8GiB`. None allows three quarters of the machine's memory.
    keep_states : bool
        Whether the hidden states go to files even where there is memory for them, so that a stopped run resumes.

    Raises
    ------
    ValueError
        If the pass does not fit however it is cut; the text says how much it needs.
    """
    allowed = _physical_memory() * 3 // 4 if memory is None else parse_bytes(memory)
    hparams, (n_chunks, n_ctx) = variants[0].model.hparams, windows.tokens.shape
    states = 4 * windows.tokens.size * hparams.n_embd * len(variants)
    logit_rows = max(16, min(128, LOGITS // hparams.n_vocab))
    chunks, outputs = min(n_chunks, max(1, ROWS_AT_ONCE // n_ctx)), max(1, len(variants) - 1)
    in_memory = not keep_states

    def needed() -> int:
        layer = _layer_bytes(variants, n_ctx, chunks, in_memory, workers.n_threads)
        output = _output_bytes(variants, outputs, logit_rows, workers.n_threads)
        return PROCESS + in_memory * states + max(layer, output)

    while needed() > allowed and (chunks > 1 or outputs > 1 or in_memory):
        if in_memory and (states > allowed // 4 or chunks == outputs == 1):
            in_memory = False
        else:
            chunks, outputs = max(1, chunks // 2), max(1, outputs // 2)
    if needed() > allowed:
        least = f"must be at least {needed() / 2**30:.2f} GiB for this model"
        raise ValueError(f"memory={memory or allowed}, {least}. Give more, or a smaller n_ctx.")
    disk = 0 if in_memory else 2 * states
    seconds = _seconds(variants, windows, workers)
    return Budget(chunks, outputs, logit_rows, in_memory, needed(), disk, seconds)


def _physical_memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _layer_bytes(variants: Sequence[Variant], n_ctx: int, chunks: int, in_memory: bool, n_threads: int) -> int:
    """Bytes that applying a layer takes at most, hidden states in memory aside."""
    base = variants[0].model
    hparams = base.hparams
    shapes = layer_shapes(base, hparams.n_layer // 2)
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    stored = {
        (v.model.path, name, v.types[name]): tensor_bytes(shape, v.types[name])
        for v in variants
        for name, shape in shapes.items()
    }
    states = 0 if in_memory else hparams.n_embd
    activations = chunks * n_ctx * (2 * (hparams.n_head + hparams.n_head_kv) * hparams.head_dim + states)
    keys_and_values = panels_size((n_ctx, hparams.head_dim)) + panels_size((hparams.head_dim, n_ctx))
    per_thread = ROWS * (4 * hparams.n_embd + 4 * hparams.n_ff) + keys_and_values + QUERIES * n_ctx
    weights = layer_weights(base, hparams.n_layer // 2) + max(sizes)
    return sum(stored.values()) + 4 * (weights + activations + n_threads * per_thread)


def _output_bytes(variants: Sequence[Variant], outputs: int, logit_rows: int, n_threads: int) -> int:
    """Bytes that the output matrices of the base and `outputs` variants take, with a block of logits of each thread."""
    hparams = variants[0].model.hparams
    matrix = hparams.n_vocab * hparams.n_embd
    panels = panels_size((hparams.n_vocab, hparams.n_embd))
    logits = 2 * n_threads * logit_rows * hparams.n_vocab
    return (3 + outputs) * matrix + 4 * ((1 + outputs) * panels + min(PIECE, matrix) + logits)


def _seconds(variants: Sequence[Variant], windows: Windows, workers: Workers) -> float:
    """Estimate the time from the speed of one large product on this machine."""
    base = variants[0].model
    n_output = base.hparams.n_vocab * base.hparams.n_embd
    n_layers = sum(tensor.n_weights for tensor in base if tensor.name.startswith("blk."))
    operations = 2 * len(variants) * (n_layers * windows.tokens.size + n_output * windows.targets.size)
    encoded = {
        (name, q)
        for v in variants[1:]
        for name, q in v.types.items()
        if v.model is base and q != base.tensor(name).qtype
    }
    return (
        operations / (SHARE_OF_PEAK * peak(workers))
        + sum(base.tensor(name).n_weights for name, _ in encoded) / ENCODE_SPEED
    )


def peak(workers: Workers) -> float:
    """Measure what all threads together reach in one large product each, floating-point operations per second."""
    x, panels = np.ones((ROWS, 1024), np.float32), np.ones((n_panels(1024), 1024, COLUMNS), np.float32)
    out = [np.empty((ROWS, 1024), np.float32) for _ in range(workers.n_threads)]
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        workers.map(lambda mine: [multiply(x, panels, mine) for _ in range(10)], out)
        best = min(best, time.perf_counter() - start)
    return 10 * len(out) * 2 * x.size * 1024 / best
