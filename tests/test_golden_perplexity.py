"""The bundled model on the primer: the numbers that llama-perplexity gives.

All logits are llama.cpp's to the last bit. But llama-perplexity keeps the base's in 16 bits: what it measures of them
has a tolerance.
"""

import hashlib
import json
from pathlib import Path

import pytest

import quantlab as ql
from quantlab.files.bundled import data_dir

GOLDEN = json.loads((Path(__file__).parent / "golden" / "llama_perplexity_tiny.json").read_text())
FTYPES = [ftype for ftype in GOLDEN["results"] if ftype != "F16"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Figures of every ftype by name, in ggml-cpu mode, beside the F16 conversion."""
    model = data_dir() / "models" / "tiny"
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert digest == GOLDEN["about"]["model_sha256"], "the golden numbers belong to other weights"
    base = ql.convert(model, tmp_path_factory.mktemp("golden") / "F16.gguf", outtype="f16")
    chunks = GOLDEN["about"]["chunks"]
    found = ql.compare(base, FTYPES, "primer", chunks=chunks, mode="ggml-cpu", progress=False)
    assert found.protocol.text_sha256 == GOLDEN["about"]["text_sha256"]
    assert found.protocol.chunks == GOLDEN["about"]["chunks"]
    return found


@pytest.mark.filterwarnings("ignore:.*became zero in F16")
def test_f16_has_the_same_perplexity(measured):
    expected = GOLDEN["results"]["F16"]
    running = measured.running
    running = running[running["variant"] == "F16"]["ppl"].tolist()
    assert measured.rows[0]["ppl"] == pytest.approx(expected["ppl"], rel=5e-6)
    assert running == pytest.approx(expected["running_ppl"], abs=6e-5)  # four decimals are printed
    assert measured.rows[0]["ppl_se"] == pytest.approx(expected["ppl_se"], rel=5e-6)


@pytest.mark.parametrize("ftype", FTYPES)
def test_ftypes_have_the_same_figures(measured, ftype):
    expected, row = GOLDEN["results"][ftype], measured.to_frame().set_index("variant").loc[ftype]
    assert row["ppl"] == pytest.approx(expected["ppl"], rel=1e-6)
    assert row["kld_mean"] == pytest.approx(expected["kld_mean"], rel=0.03)
    assert row["same_top_p"] == pytest.approx(expected["same_top_p"], abs=5e-3)
    for key in ("ppl_se", "ln_ratio_se", "kld_se", "dp_rms", "kld_median", "kld_p90"):
        assert row[key] == pytest.approx(expected[key], rel=0.15, abs=1e-6), key  # six decimals are printed
