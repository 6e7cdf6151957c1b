"""Expressions over tensor names fit what llama-quantize's do, and never take forever."""

import pytest

from quantlab.transform import expressions
from quantlab.transform.expressions import compile_expression
from quantlab.transform.mixture import choose_types

NAMES = [f"blk.{i}.{part}.weight" for i in range(12) for part in ("attn_q", "attn_v", "ffn_down", "ffn_up_exps")]


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("attn_v", 12),
        ("ATTN_V", 12),
        (r"blk\.(0|11)\.attn", 4),
        ("^attn", 0),
        (r"blk\.([0-9]|1[01])\.ffn_(up|down).*", 24),
        (r"(blk\.)+1\.", 4),  # a repeated group, which is matched in another process
        (r"b?l?k?\.[0-4]+\.attn_[qv].*", 14),
        (r"^(blk\.\d+\.(attn_q|attn_v)\.weight)*$", 24),
    ],
)
def test_expressions_are_found_anywhere_in_lower_case(text, n):
    assert sum(map(compile_expression(text, NAMES), NAMES)) == n


@pytest.mark.parametrize(
    "text",
    ["(.+)+x$", "(.*)*(.*)*(.*)*y", r"(\w|\.)*!", "([a-z._0-9]+)*=", ".*.*.*.*.*.*.*.*.*.*!", "(((((.+)+)+)+)+)+!"],
)
def test_expressions_that_never_end_are_refused(text, monkeypatch):
    monkeypatch.setattr(expressions, "PATIENCE", 0.7)
    names = ["blk.0." + "ffn_gate_up_exps_" * 3 + "weight"]
    try:
        assert not any(map(compile_expression(text, names), names))
    except ValueError as error:
        assert str(error).startswith(f"tensor type: name={text}, must be matched with every name within 0.7 s. Write")


def test_the_mixture_refuses_them_too(monkeypatch):
    monkeypatch.setattr(expressions, "PATIENCE", 0.7)
    from types import SimpleNamespace

    hparams = SimpleNamespace(arch="llama", n_layer=1, n_head=8, n_head_kv=8)
    with pytest.raises(ValueError, match=r"tensor type: name=\(\.\+\)\+x, must be matched with every name"):
        choose_types(
            hparams, {"blk.0.ffn_down_down_down_down.weight": (256, 256)}, "Q4_0", tensor_types=[("(.+)+x", "Q8_0")]
        )


@pytest.mark.parametrize("text", ["(", "[[:digit:]]", "*"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(ValueError, match="tensor type: name=.*, must be a regular expression"):
        compile_expression(text, NAMES)
