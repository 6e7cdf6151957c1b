"""Mode `ggml-cpu` on made models of today's families: the numbers that llama-perplexity gives."""

import json
from pathlib import Path

import dense_models
import expert_models
import hybrid_models
import pytest

import quantlab as ql
from quantlab.evaluate.logits import logits

GOLDEN = json.loads((Path(__file__).parent / "golden" / "ggml_cpu.json").read_text())["results"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pre-tokenizer .* is not in llama.cpp's list"),
    pytest.mark.filterwarnings("ignore:.*the vocabulary differs"),
]


@pytest.mark.parametrize("name", GOLDEN)
def test_figures_equal_llama_perplexitys(name, tmp_path):
    if name in expert_models.FAMILIES:
        made = expert_models.write_model(tmp_path / "made", name, **expert_models.WIDE)
    else:
        made = dense_models.write_model(tmp_path / "made", name)
    base, expected = ql.convert(made, outtype="f32", as_llama_cpp=True, progress=False), GOLDEN[name]
    variants = [ftype for ftype in expected if ftype != "F32"]
    found = ql.compare(base, variants, "primer", chunks=2, mode="ggml-cpu", progress=False).to_frame()["ppl"]
    found = dict(zip(["F32", *variants], found, strict=True))
    for ftype, ppl in expected.items():  # four decimals are printed
        assert found[ftype] == pytest.approx(ppl, rel=2e-7), ftype


def test_what_it_does_not_compute_is_refused(tmp_path):
    model = ql.open(hybrid_models.write_model(tmp_path, "qwen35"))
    with pytest.raises(ValueError, match="does not compute delta nets, gates of attention of qwen35. Evaluate"):
        logits(model, [1, 2, 3], mode="ggml-cpu")
