"""The needs of the CPU engine: bytes of a layer and of output matrices, and this machine's speed."""

import time
from collections.abc import Sequence

import numpy as np

from quantlab import arch
from quantlab.evaluate import budget
from quantlab.evaluate.engine.attention import QUERIES
from quantlab.evaluate.engine.tiles import COLUMNS, multiply, n_panels, panels_size
from quantlab.evaluate.engine.workers import Workers
from quantlab.transform.plan import tensor_bytes


def layer_bytes(engine, variants: Sequence, chunks: int, in_memory: bool, observed: bool) -> int:
    """Return the bytes that applying a layer takes at most, hidden states in memory aside.

    Parameters
    ----------
    engine : CpuEngine
    variants : sequence of Variant
    chunks : int
        Chunks that a layer is applied to at a time.
    in_memory : bool
        Whether hidden states stay in memory.
    observed : bool
        Whether the inputs of products are kept for an observer.
    """
    hparams = engine.hparams
    kinds = {hparams.at(i): i for i in range(hparams.n_layer)}
    of = chunks, in_memory, observed
    return max(_bytes_of(engine, variants, h, engine.record.layer_at(hparams, i), i, *of) for h, i in kinds.items())


def _bytes_of(engine, variants, h, does: arch.Layer, index: int, chunks: int, in_memory: bool, observed: bool) -> int:
    """Bytes that one layer takes; `h` are its hyper-parameters."""
    n_ctx, shapes, rows = engine.n_ctx, budget.layer_shapes(variants[0].model, index), engine.rows_at_once
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    stored = {
        (v.model.path, name, v.types[name]): tensor_bytes(shape, v.types[name])
        for v in variants
        for name, shape in shapes.items()
    }
    by_head = does.latent_k + does.latent_v
    mixed = (1 + does.query_width) * h.n_q + 2 * h.n_kv
    scratch = panels_size((n_ctx, h.head_dim)) + panels_size((h.head_dim, n_ctx)) + QUERIES * n_ctx
    if does.conv:
        mixed = h.conv_width + 2 * h.ssm_inner + 2 * h.ssm_heads
        scratch = n_ctx * (2 * h.ssm_state + h.ssm_value) + h.ssm_state * h.ssm_value
    if does.latent_k:
        mixed = h.n_q_mla + 2 * h.head_dim + h.n_lora_q + h.n_v + observed * h.n_head * (h.n_nope + 2 * h.n_lora_kv)
        scratch += n_ctx * (h.head_dim + h.n_lora_kv)
    states = (h.n_embd if engine.hparams.n_state > h.n_embd else 0) + (0 if in_memory else engine.hparams.n_state)
    inputs = h.n_embd + max(h.n_ff, h.n_ff_shexp) + h.n_expert_used * h.n_ff_exp if observed else 0
    routed = h.n_embd * (3 if does.experts_norm else 1) + h.n_expert if h.n_expert else 0
    routed += h.n_embd * h.n_expert_used if engine.sums_experts_first else 0
    per_thread = rows * (4 * h.n_embd + 4 * max(h.n_ff, h.n_ff_exp, h.n_ff_shexp)) + scratch
    weights = sum(panels_size(shape[-2:]) for shape in shapes.values() if len(shape) > 1) + max(sizes)
    weights += sum((h.n_head - 1) * panels_size(shapes[f"blk.{index}.{name}.weight"][1:]) for name in by_head)
    activations = chunks * n_ctx * (mixed + states + inputs + routed)
    return sum(stored.values()) + 4 * (weights + activations + engine.workers.n_threads * per_thread)


def output_bytes(engine, outputs: int, piece: int) -> int:
    """Return the bytes of the output matrices of the base and `outputs` variants, with a block of logits per thread."""
    h = engine.hparams
    matrix, panels = h.n_vocab * h.n_embd, panels_size((h.n_vocab, h.n_embd))
    logits = 2 * engine.workers.n_threads * engine.logit_rows * h.n_vocab
    return (3 + outputs) * matrix + 4 * ((1 + outputs) * panels + min(piece, matrix) + logits)


def peak(workers: Workers, rows: int) -> float:
    """Measure the floating-point operations per second of all threads together, in large products."""
    x, panels = np.ones((rows, 1024), np.float32), np.ones((n_panels(1024), 1024, COLUMNS), np.float32)
    out = [np.empty((rows, 1024), np.float32) for _ in range(workers.n_threads)]
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        workers.map(lambda mine: [multiply(x, panels, mine) for _ in range(10)], out)
        best = min(best, time.perf_counter() - start)
    return 10 * len(out) * 2 * x.size * 1024 / best
