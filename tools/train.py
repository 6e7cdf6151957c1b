"""Train the bundled model: batches, schedule, checkpoints, and the loop over them.

``python tools/train.py FOLDER --device cuda`` trains on a card; without ``--device`` CPU threads share each step.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor

from export import export
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
    steps : int
        Steps to train for in place of the time, 0 for none: the same weights on a faster and a slower machine.
    batch : int
        Windows of n_ctx tokens in a step.
    device : str
        Torch device that takes a step's windows at once with fused attention: `cuda`, or `cpu` to check it. Empty:
        CPU threads share them, which is faster on a few cores.
    micro, threads : int
        Windows that a thread takes at a time, and the threads, where there is no device.
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
    steps: int = 0
    batch: int = 8
    device: str = ""
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
    with torch.autocast(ids.device.type, torch.bfloat16):
        logits = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def gradient(model: Llama, loss_of: Callable, ids: torch.Tensor) -> torch.Tensor:
    """Put the gradient of the mean loss over `ids` into the parameters, all windows at once; return the loss.

    The loss stays on the device: to read it is to wait for the step.
    """
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, ids)
    loss.backward()
    return loss.detach()


def gradient_of_threads(
    model: Llama, loss_of: Callable, pool: ThreadPoolExecutor, micro: int, ids: torch.Tensor
) -> float:
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
    n_ctx, device = model.shape.n_ctx, model.lm_head.weight.device
    count = min(limit, (len(tokens) - 1) // n_ctx)
    losses = []
    for start in range(0, count * n_ctx, n_ctx):
        ids = torch.from_numpy(tokens[start : start + n_ctx + 1].astype(np.int64))[None]
        ids[:, 0] = BOS
        losses.append(mean_nll(model, ids.to(device)).item())
    return float(np.mean(losses))


@dataclass
class Run:
    """What a training run has come to: the model, the optimizers' moments, and the history so far."""

    model: Llama
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    minutes: float = 0.0
    history: list[dict] = field(default_factory=list)  # step, tokens, minutes, schedule, loss, heldout

    def progress(self, settings: Settings) -> float:
        """Share of the training that is done."""
        return self.step / settings.steps if settings.steps else self.minutes / settings.minutes

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
        state = torch.load(path, weights_only=True, map_location=self.model.lm_head.weight.device)
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
    model = Llama(shape, fused=bool(settings.device)).to(settings.device or "cpu")
    run = Run(model, optimizers_of(model, settings))
    path = folder / "checkpoint.pt"
    if path.exists():
        run.resume(path)
    folder.mkdir(parents=True, exist_ok=True)
    batches = windows(tokens, shape.n_ctx, settings.batch, settings.seed, run.step)
    begun, losses = time.monotonic() - 60 * run.minutes, []
    with _gradient_function(model, settings) as step:
        while run.progress(settings) < 1:
            losses.append(step(torch.from_numpy(next(batches))))
            _update(run, settings)
            run.minutes = (time.monotonic() - begun) / 60
            last = run.history[-1]["minutes"] if run.history else 0.0
            if run.minutes - last >= settings.save_minutes or run.progress(settings) >= 1:
                row = {
                    "step": run.step,
                    "tokens": run.step * settings.batch * shape.n_ctx,
                    "minutes": run.minutes,
                    "schedule": schedule(run.step, run.progress(settings), settings.warmup),
                    "loss": float(np.mean([float(loss) for loss in losses])),
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


@contextmanager
def _gradient_function(model: Llama, settings: Settings) -> Iterator[Callable[[torch.Tensor], float | torch.Tensor]]:
    """Yield the function that takes a step's windows: on the device at once, or by threads."""
    loss_of = torch.compile(mean_nll) if settings.compile else mean_nll
    if settings.device:
        yield lambda ids: gradient(model, loss_of, ids.to(settings.device))
        return
    torch.set_num_threads(1)
    with ThreadPoolExecutor(settings.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield partial(gradient_of_threads, model, loss_of, pool, settings.micro)


def _update(run: Run, settings: Settings) -> None:
    """Take one step down the gradient that the parameters hold."""
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), settings.clip)
    share = schedule(run.step, run.progress(settings), settings.warmup)
    for optimizer, highest in zip(run.optimizers, (settings.lr_inner, settings.lr), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = highest * share
        optimizer.step()
    run.step += 1


def main() -> None:
    """Read the command line, train, write the model and the record of its training."""
    parser = argparse.ArgumentParser(description="Train the bundled model's shape on an encoded corpus.")
    parser.add_argument("folder", type=Path, help="what tokenizer.py left; model/ and history.json go there")
    parser.add_argument("--device", default="", help="cuda or cpu: windows at once (default: CPU threads share them)")
    parser.add_argument("--minutes", type=float, default=Settings.minutes, help="training time (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="stop after these steps (default: after the minutes)")
    parser.add_argument("--batch", type=int, default=Settings.batch, help="windows in a step (default: %(default)s)")
    parser.add_argument("--save-minutes", type=float, default=Settings.save_minutes, help="between two checkpoints")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of weights and order (default: %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: with cuda)")
    given = vars(parser.parse_args())
    folder = given.pop("folder")
    if given["compile"] is None:
        given["compile"] = given["device"].startswith("cuda")
    settings = Settings(**given)
    tokens, heldout = (np.fromfile(folder / name, np.uint16) for name in ("corpus.ids", "corpus.heldout.ids"))
    shape = Shape(n_vocab=len(SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))))
    run = train(tokens, heldout, shape, settings, folder, report=print)
    export(run.model, folder / "tokenizer.model", folder / "model")
    on_card = settings.device.startswith("cuda")
    record = {
        "settings": asdict(settings),
        "machine": torch.cuda.get_device_name(settings.device) if on_card else f"{os.cpu_count()} CPU cores",
        "torch": torch.__version__,
        "tokens": len(tokens),
        "heldout_tokens": len(heldout),
        "history": run.history,
    }
    (folder / "history.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
