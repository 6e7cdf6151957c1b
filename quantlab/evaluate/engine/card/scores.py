"""Scores of tokens from logits, on the device, with the figures of `fused.score`."""

from dataclasses import dataclass

import torch

TOP = 10  # how many of a row's greatest logits are compared
ARRAYS = 6  # of the size of the logits that are alive at once


@dataclass(frozen=True)
class Prediction:
    """Logits of some positions [rows, n_vocab], and values derived from them."""

    logits: torch.Tensor
    exps: torch.Tensor  # e^(logit - greatest logit)
    total: torch.Tensor  # [rows]: their sum, in float64 where the device has that
    log_z: torch.Tensor  # [rows]
    top: torch.Tensor  # [rows, TOP]: indices of the greatest logits, greatest first

    @classmethod
    def of(cls, logits: torch.Tensor) -> "Prediction":
        """Compute the derived values of logits."""
        values, top = logits.topk(min(TOP, logits.shape[1]))
        exps = (logits - values[:, :1]).exp_()
        total = exps.sum(-1, dtype=wide(logits.device))
        return cls(logits, exps, total, total.log() + values[:, 0], top)


def compare(base: Prediction, other: Prediction, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the fields of `TokenScores` [rows] of `other` compared with `base`."""
    difference = (base.logits - other.logits).mul_(base.exps)
    kld = difference.sum(-1, dtype=wide(targets.device)) / base.total + (other.log_z - base.log_z)
    same = other.top[:, :, None] == base.top[:, None, :]
    return {
        "nll": other.log_z - other.logits.gather(1, targets[:, None])[:, 0],
        "kld": kld,
        "same_top": same[:, 0, 0],
        "correct": other.top[:, 0] == targets,
        "top5": same[:, :5, :5].sum((1, 2)),
        "top10": same.sum((1, 2)),
        "top_p": 1 / other.total,
    }


def wide(device: torch.device) -> torch.dtype:
    """Return the widest float type that the device supports."""
    return torch.float32 if device.type == "mps" else torch.float64
