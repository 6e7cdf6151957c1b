"""DataFrame → matplotlib Axes: every figure of the notebooks, one file for each subject.

`title` says what is shown: the model, the text, the type. `ax` or `axes` is where to draw (default: a new figure). The
functions return the Axes that they drew on.
"""

from quantlab.study.plots.bits import block_search, importance, matrix_gain, recipe_front, type_map
from quantlab.study.plots.damage import bpw_against_ppl, size_against_kld
from quantlab.study.plots.drawings import block_layout, number_line, transformer_block
from quantlab.study.plots.errors import against_tails, by_layer, code_shares, error_map, histograms, percentile_bands
from quantlab.study.plots.feedback import rounding_plane
from quantlab.study.plots.protocol import effects, nll_by_position
from quantlab.study.plots.reports import kld_by_confidence, kld_by_model
from quantlab.study.plots.running import memory
from quantlab.study.plots.sensitivity import additivity, damage_map, error_against_damage, more_bits
from quantlab.study.plots.speed import scaling, throughput
from quantlab.study.plots.style import save
from quantlab.study.plots.training import loss_curve
from quantlab.study.plots.types import bit_budget, bit_map, block_weights, by_outlier, scale_search, snr_against_bits

__all__ = [
    "additivity",
    "against_tails",
    "bit_budget",
    "bit_map",
    "block_layout",
    "block_search",
    "block_weights",
    "bpw_against_ppl",
    "by_layer",
    "by_outlier",
    "code_shares",
    "damage_map",
    "effects",
    "error_against_damage",
    "error_map",
    "histograms",
    "importance",
    "kld_by_confidence",
    "kld_by_model",
    "loss_curve",
    "matrix_gain",
    "memory",
    "more_bits",
    "nll_by_position",
    "number_line",
    "percentile_bands",
    "recipe_front",
    "rounding_plane",
    "save",
    "scale_search",
    "scaling",
    "size_against_kld",
    "snr_against_bits",
    "throughput",
    "transformer_block",
    "type_map",
]


def __dir__() -> list[str]:
    return __all__
