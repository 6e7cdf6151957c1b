"""Estimates of a pass's memory, disk and time, and its division to fit the memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from quantlab import arch
from quantlab.arch import Hparams
from quantlab.evaluate.protocol import Windows
from quantlab.evaluate.variants import Variant
from quantlab.files.machine import physical_memory
from quantlab.files.model import Model
from quantlab.transform.plan import parse_bytes
from quantlab.transform.rules import layer_of

PROCESS = 400 << 20  # bytes that Python, its packages and compiled code take by themselves
ROWS_AT_ONCE = 4096  # tokens that a layer is applied to at a time, where memory allows
ENCODE_SPEED = 20e6  # weights per second, of the slower types


@dataclass(frozen=True)
class Budget:
    """The division of a pass, and its needs of memory, disk and time."""

    chunks_at_once: int  # chunks that a layer is applied to at a time
    outputs_at_once: int  # variants whose logits are computed beside the base's at a time
    in_memory: bool  # whether the hidden states stay in memory or on the card; else they are in files
    # memory, disk: bytes needed at most
    memory: int
    disk: int
    seconds: float  # estimated time
    states_on_device: bool = False  # whether the hidden states stay on the card
    device_memory: int = 0  # bytes of the card needed at most
    said: tuple[str, str] = ("", "")  # what else is said of the plan: before the memory, and after it

    def __str__(self) -> str:
        before, after = self.said
        disk = "" if self.in_memory or after else f", {self.disk / 2**30:.2f} GiB on disk"
        time = f"{max(self.seconds, 1):.0f} s" if self.seconds < 90 else f"{self.seconds / 60:.1f} minutes"
        return f"{before}memory {self.memory / 2**30:.2f} GiB{disk}{after}; about {time}"


def fit(
    variants: Sequence[Variant],
    windows: Windows,
    memory: str | int | None,
    keep_states: bool,
    *,
    layer_bytes: Callable[[int, bool], int],
    output_bytes: Callable[[int], int],
    speed: float,
) -> Budget:
    """Cut a pass so that it stays within `memory`.

    Parameters
    ----------
    variants : sequence of Variant
        The base first.
    windows : Windows
    memory : str, int or None
        Bytes, or a text such as `8GiB`. None allows three quarters of the machine's memory.
    keep_states : bool
        Whether the hidden states go to files even where there is memory for them, so that a stopped run resumes.
    layer_bytes : callable
        `layer_bytes(chunks, in_memory)`: bytes that a layer takes over so many chunks, states in memory aside.
    output_bytes : callable
        `output_bytes(outputs)`: bytes that the output takes for the base and this number of variants.
    speed : float
        Floating-point operations per second of a pass.

    Raises
    ------
    ValueError
        If the pass does not fit however it is cut; the text says how much it needs.
    """
    allowed = allowed_bytes(memory)
    n_chunks, n_ctx = windows.tokens.shape
    hparams = variants[0].model.hparams
    states = 4 * windows.tokens.size * hparams.n_state * len(variants)
    embeddings = embedding_bytes(hparams, windows)
    chunks, outputs = min(n_chunks, max(1, ROWS_AT_ONCE // n_ctx)), max(1, len(variants) - 1)
    in_memory = not keep_states

    def needed() -> int:
        steps = embeddings, layer_bytes(chunks, in_memory), output_bytes(outputs)
        return PROCESS + in_memory * states + max(steps)

    while needed() > allowed and (chunks > 1 or outputs > 1 or in_memory):
        if in_memory and (states > allowed // 4 or chunks == outputs == 1):
            in_memory = False
        else:
            chunks, outputs = max(1, chunks // 2), max(1, outputs // 2)
    if needed() > allowed:
        least = f"must be at least {needed() / 2**30:.2f} GiB for this model"
        raise ValueError(f"memory={memory or allowed}, {least}. Give more memory, or a smaller n_ctx.")
    disk = 0 if in_memory else 2 * states
    operations, encoded = work_of(variants, windows)
    return Budget(chunks, outputs, in_memory, needed(), disk, operations / speed + encoded / ENCODE_SPEED)


def embedding_bytes(h: Hparams, windows: Windows) -> int:
    """Return the bytes of the embeddings of the tokens that occur, with what layers learn of them."""
    beside = h.n_embd + h.n_embd_layers if h.n_state > h.n_embd else 0
    return 4 * len(np.unique(windows.tokens)) * (h.n_state + beside)


def layer_shapes(model: Model, index: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of layer `index`."""
    return {tensor.name: tensor.shape for tensor in model if tensor.name.startswith(f"blk.{index}.")}


def allowed_bytes(memory: str | int | None) -> int:
    """Return the bytes that `memory` allows: a number, a text such as `8GiB`, or three quarters of the machine's."""
    return physical_memory() * 3 // 4 if memory is None else parse_bytes(memory)


def work_of(variants: Sequence[Variant], windows: Windows) -> tuple[float, int]:
    """Return the number of operations of a pass, and of weights to quantize for it."""
    base, h = variants[0].model, variants[0].model.hparams
    record = arch.known(h.arch)
    n_output, n_layers = h.n_vocab * h.n_embd, 0.0
    for tensor in base:
        if 0 <= (index := layer_of(tensor.name)) < h.n_layer:  # those after guess ahead
            found = record.tensor(tensor.name)
            is_expert = found is not None and found.role == "experts"
            n_layers += tensor.n_weights * (h.n_expert_used / h.at(index).n_expert if is_expert else 1)
    operations = 2 * len(variants) * (n_layers * windows.tokens.size + n_output * windows.targets.size)
    encoded = {
        (name, q)
        for v in variants[1:]
        for name, q in v.types.items()
        if v.model is base and q != base.tensor(name).qtype and layer_of(name) < h.n_layer
    }
    return operations, sum(base.tensor(name).n_weights for name, _ in encoded)
