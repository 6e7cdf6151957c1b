"""files/arguments.py: wrong types from Python become whole sentences in every public function."""

import re

import pytest

import quantlab as ql


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: ql.perplexity("tiny", n_ctx="512"), "n_ctx='512', must be a whole number"),
        (lambda: ql.perplexity("tiny", n_ctx=512.0), "n_ctx=512.0, must be a whole number"),
        (lambda: ql.perplexity("tiny", chunks=1.5), "chunks=1.5, must be a whole number"),
        (lambda: ql.perplexity("tiny", chunks=True), "chunks=True, must be a whole number"),
        (lambda: ql.perplexity(None), "model=None, must be a path or a name"),
        (lambda: ql.perplexity("tiny", text=5), "text=5, must be a path or a name"),
        (lambda: ql.compare(None, ["Q4_0"]), "model=None, must be"),
        (lambda: ql.compare("tiny", ["Q4_0"], n_ctx="512"), "n_ctx='512', must be"),
        (lambda: ql.imatrix("tiny", chunks="2"), "chunks='2', must be"),
        (lambda: ql.sensitivity("tiny", sample="2"), "sample='2', must be"),
        (lambda: ql.open(None), "model=None, must be"),
        (lambda: ql.open(["a"]), r"model=\['a'\], must be"),
        (lambda: ql.inspect(7), "model=7, must be"),
        (lambda: ql.quantize(None, ftype="Q4_0"), "model=None, must be"),
        (lambda: ql.quantize("tiny", "x.gguf", ftype="Q4_0", imatrix=5), "imatrix=5, must be"),
        (lambda: ql.convert(None), "src=None, must be"),
        (lambda: ql.convert("tiny", 3), "outfile=3, must be"),
        (lambda: ql.split("x.gguf", max_tensors="3"), "max_tensors='3', must be"),
        (lambda: ql.merge(None), "src=None, must be"),
        (lambda: ql.fit("yi-34b", n_ctx="4096"), "n_ctx='4096', must be"),
        (lambda: ql.fit("yi-34b", n_gpu_layers="5"), "n_gpu_layers='5', must be"),
        (lambda: ql.generate(["tiny"], "x", n_predict="4"), "n_predict='4', must be"),
    ],
)
def test_wrong_types_are_named(call, rule):
    with pytest.raises(TypeError, match=rule) as caught:
        call()
    assert re.search(r"\. Give .*\.$", str(caught.value))
