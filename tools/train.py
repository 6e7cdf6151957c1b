"""Train the bundled model: batches, schedule, checkpoints, and the loop over them."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from model import Llama, Shape
from quantlab.files.output import replacing

BOS = 1


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes
    ----------
    minutes : float
        Training time; the learning rate falls to zero at its end.
    batch : int
        Windows of n_ctx tokens in a step.
    micro : int
        Windows that one thread takes at a time.
    threads : int
        Threads that share a step's windows.
    lr : float
        Highest learning rate of embedding, output and norms (AdamW).
    lr_inner : float
        Highest learning rate of the layers' matrices (Muon: a step turns every direction of a matrix equally far).
    warmup : int
        Steps in which the learning rate rises.
    weight_decay : float
        Decay of the layers' matrices, times their learning rate, per step.
    clip : float
        Largest norm of a step's gradient.
    save_minutes : float
        Time between two checkpoints.
    seed : int
        Of the first weights and of the windows' order.
    compile : bool
        Compile the model first (a minute, then a quarter faster; needs a C++ compiler).
    """

    minutes: float = 70.0
    batch: int = 8
    micro: int = 2
    threads: int = 2
    lr: float = 3e-3
    lr_inner: float = 0.02
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    save_minutes: float = 3.0
    seed: int = 1
    compile: bool = False


def windows(tokens: np.ndarray, n_ctx: int, batch: int, seed: int, step: int = 0) -> Iterator[np.ndarray]:
    """Yield batches of windows for ever, from `step` on.

    An epoch cuts the tokens at another phase and takes the pieces in another order. Each window begins with BOS in the
    place of its first token, as in llama.cpp's perplexity protocol.

    Parameters
    ----------
    tokens : np.ndarray [shape=(n,), dtype=uint16, n >= (batch + 1) * n_ctx + 1]
        The corpus.
    n_ctx, batch : int
        Tokens per window, windows per batch.
    seed : int
        Of phases and orders.
    step : int
        The first batch to yield.

    Yields
    ------
    np.ndarray [shape=(batch, n_ctx + 1), dtype=int64]
        Inputs are ``[:, :-1]``, targets ``[:, 1:]``.

    Raises
    ------
    ValueError
        If the corpus is too short for one batch.
    """
    per_epoch = (len(tokens) - n_ctx - 1) // (n_ctx * batch)
    if per_epoch < 1:
        raise ValueError(
            f"corpus: tokens={len(tokens)}, need at least {batch * n_ctx + n_ctx + 1}. "
            "Take a longer text or a smaller batch."
        )
    while True:
        epoch, index = divmod(step, per_epoch)
        rng = np.random.default_rng([seed, epoch])
        phase = rng.integers(n_ctx)
        starts = phase + n_ctx * rng.permutation(per_epoch * batch)
        for chosen in starts.reshape(per_epoch, batch)[index:]:
            ids = tokens[chosen[:, None] + np.arange(n_ctx + 1)].astype(np.int64)
            ids[:, 0] = BOS
            step += 1
            yield ids


def schedule(step: int, progress: float, warmup: int) -> float:
    """Share of the highest learning rate: up over the first steps, straight down to 0 as `progress` goes to 1."""
    return min(1.0, (step + 1) / warmup) * max(0.0, 1.0 - progress)


def optimizers_of(model: Llama, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embedding, output and norms; each knows its highest rate."""
    inner = [p for name, p in model.named_parameters() if name.startswith("model.layers") and p.ndim == 2]
    chosen = set(map(id, inner))
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(inner, lr=settings.lr_inner, momentum=0.95, weight_decay=settings.weight_decay),
        torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def mean_nll(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss, nats per token, of ids [shape=(windows, n_ctx + 1)], the matrix products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def gradient(model: Llama, loss_of, ids: torch.Tensor, pool: ThreadPoolExecutor, micro: int) -> float:
    """Put the gradient of the mean loss over `ids` into the parameters; return the loss.

    Threads take windows as they become free, so that a busy core delays a step less than it would with threads inside
    each operation.
    """
    parameters = list(model.parameters())

    def share(part):
        loss = loss_of(model, part)
        return loss.item(), torch.autograd.grad(loss, parameters)

    parts = ids.split(micro)
    total, sums = 0.0, None
    for loss, grads in pool.map(share, parts):
        total += loss / len(parts)
        if sums is None:
            sums = list(grads)
        else:
            torch._foreach_add_(sums, list(grads))
    for parameter, grad in zip(parameters, sums, strict=True):
        parameter.grad = grad / len(parts)
    return total


@torch.no_grad()
def heldout_loss(model: Llama, tokens: np.ndarray, limit: int = 64) -> float:
    """Mean loss, nats per token, over the first `limit` windows of held-out tokens."""
    n_ctx = model.shape.n_ctx
    count = min(limit, (len(tokens) - 1) // n_ctx)
    losses = []
    for start in range(0, count * n_ctx, n_ctx):
        ids = torch.from_numpy(tokens[start : start + n_ctx + 1].astype(np.int64))[None]
        ids[:, 0] = BOS
        losses.append(mean_nll(model, ids).item())
    return float(np.mean(losses))


@dataclass
class Run:
    """What a training run has come to: the model, the optimizers' moments, and the history so far."""

    model: Llama
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    minutes: float = 0.0
    history: list[dict] = field(default_factory=list)  # step, tokens, minutes, schedule, loss, heldout

    def save(self, path: Path) -> None:
        """Write a checkpoint whole or not at all."""
        with replacing(path, overwrite=True) as part:
            torch.save(
                {
                    "model": self.model.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                    "step": self.step,
                    "minutes": self.minutes,
                    "history": self.history,
                },
                part,
            )

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, moments in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
        self.step, self.minutes, self.history = state["step"], state["minutes"], state["history"]


def train(
    tokens: np.ndarray, heldout: np.ndarray, shape: Shape, settings: Settings, folder: Path, *, report=None
) -> Run:
    """Train a model, or go on from the checkpoint in `folder`.

    Parameters
    ----------
    tokens, heldout : np.ndarray [shape=(n,), dtype=uint16]
        The corpus and what is kept from it, as token ids.
    shape : Shape
        The model.
    settings : Settings
        How to train.
    folder : Path
        Where ``checkpoint.pt`` is written, and read from if it is there.
    report : callable, optional
        Called with the newest line of the history whenever a checkpoint is written.

    Returns
    -------
    Run
        The trained model and its history.

    Raises
    ------
    ValueError
        If the corpus is too short for one batch, or the loss is not a number.
    """
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)
    model = Llama(shape)
    run = Run(model, optimizers_of(model, settings))
    path = folder / "checkpoint.pt"
    if path.exists():
        run.resume(path)
    folder.mkdir(parents=True, exist_ok=True)
    loss_of = torch.compile(mean_nll) if settings.compile else mean_nll
    batches = windows(tokens, shape.n_ctx, settings.batch, settings.seed, run.step)
    begun, losses = time.monotonic() - 60 * run.minutes, []
    with ThreadPoolExecutor(settings.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        while run.minutes < settings.minutes:
            losses.append(gradient(model, loss_of, torch.from_numpy(next(batches)), pool, settings.micro))
            _update(run, settings)
            run.minutes = (time.monotonic() - begun) / 60
            last = run.history[-1]["minutes"] if run.history else 0.0
            if run.minutes - last >= settings.save_minutes or run.minutes >= settings.minutes:
                row = {
                    "step": run.step,
                    "tokens": run.step * settings.batch * shape.n_ctx,
                    "minutes": run.minutes,
                    "schedule": schedule(run.step, run.minutes / settings.minutes, settings.warmup),
                    "loss": float(np.mean(losses)),
                    "heldout": heldout_loss(model, heldout),
                }
                if math.isnan(row["loss"]):
                    raise ValueError(
                        f"training: loss={row['loss']} at step {run.step}, need a number. Lower the learning rate."
                    )
                run.history.append(row)
                run.save(path)
                losses = []
                if report:
                    report(row)
    return run


def _update(run: Run, settings: Settings) -> None:
    """Take one step down the gradient that the parameters hold."""
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip)
    share = schedule(run.step, run.minutes / settings.minutes, settings.warmup)
    for optimizer, highest in zip(run.optimizers, (settings.lr_inner, settings.lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = highest * share
        optimizer.step()
    run.step += 1
