"""DataFrame → matplotlib Axes: every figure of the notebooks, one file for each subject."""

from quantlab.study.plots.damage import bpw_against_ppl, size_against_kld
from quantlab.study.plots.running import memory
from quantlab.study.plots.style import save
from quantlab.study.plots.training import loss_curve

__all__ = ["bpw_against_ppl", "loss_curve", "memory", "save", "size_against_kld"]
