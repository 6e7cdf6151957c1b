"""Refined experts: each with its own tokens, the same bytes on any number of threads and after an interruption."""

import re

import expert_models
import hybrid_models
import latent_models
import numpy as np
import pytest
from numba import get_num_threads, set_num_threads

import quantlab as ql
from quantlab.evaluate import refine as module
from quantlab.evaluate import refinement
from quantlab.evaluate.engine import ExpertInputs
from quantlab.evaluate.refine_experts import OriginalExperts, Rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*pre-tokenizer|.*vocabulary differs|.*became zero in F16|.*multi-token"
)
FAMILIES = {
    "qwen3moe": (expert_models, "Q3_K_M"),
    "mixtral": (expert_models, "Q3_K_M"),
    "gpt-oss": (expert_models, "Q3_K_M"),
    "deepseek-v3": (latent_models, "Q4_0"),
    "qwen35moe": (hybrid_models, "Q4_0"),
}
OPTIONS = {"ftype": "Q4_0", "n_ctx": 128, "chunks": 2, "sweeps": 1, "progress": False}
SHORT = {"n_ctx": 256, "chunks": 8, "progress": False}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function that makes the F16 file of a family, once."""
    folder, paths = tmp_path_factory.mktemp("made"), {}

    def make(name: str):
        if name not in paths:
            module = FAMILIES[name][0]
            sizes = expert_models.WIDE if module is expert_models else {}
            module.write_model(folder / name, name, "F16", **sizes)
            paths[name] = ql.convert(folder / name, folder / f"{name}.gguf")
        return paths[name]

    return make


@pytest.fixture(scope="module")
def refined(made, tmp_path_factory):
    """The smallest of the models, which has a shared expert and latent attention too, refined at Q4_0."""
    return ql.refine(made("deepseek-v3"), tmp_path_factory.mktemp("refined") / "a.gguf", **OPTIONS)


def differing(path, other) -> dict[str, np.ndarray]:
    """Return for each tensor whose bytes differ in two files, which of its rows do."""
    one, two = ql.open(path), ql.open(other)
    assert [(t.name, t.shape, t.qtype) for t in one] == [(t.name, t.shape, t.qtype) for t in two]
    rows = {t.name: (t.rows(0, t.nrows) != two.tensor(t.name).rows(0, t.nrows)).any(axis=-1) for t in one}
    return {name: found for name, found in rows.items() if found.any()}


@pytest.mark.parametrize("name", FAMILIES)
def test_refined_experts_do_less_damage(made, tmp_path, name):
    path, ftype = made(name), FAMILIES[name][1]
    refined = ql.refine(path, tmp_path / "r.gguf", ftype=ftype, sweeps=1, **SHORT)
    plain = ql.quantize(path, tmp_path / "o.gguf", layout_of=refined, report=lambda _: None)
    others = differing(refined, plain)
    assert {key for key in others if "exps" in key} == {t.name for t in ql.open(path) if "exps.weight" in t.name}
    assert ql.verify(refined, path).verdict == "refined"
    for text, share in (("sampled", 0.8), ("primer", 0.95)):
        found = ql.compare(path, [f"o={plain}", f"r={refined}"], text, **SHORT | {"chunks": 2}).rows
        assert found[2]["kld_mean"] < share * found[1]["kld_mean"]


def test_one_thread_writes_the_same_experts(made, refined, tmp_path):
    before = get_num_threads()
    set_num_threads(1 if before > 1 else before)
    try:
        again = ql.refine(made("deepseek-v3"), tmp_path / "a.gguf", **OPTIONS)
    finally:
        set_num_threads(before)
    assert again.read_bytes() == refined.read_bytes()


def test_a_run_stopped_at_an_expert_resumes_to_the_same_bytes(made, refined, tmp_path, monkeypatch):
    whole = refinement.Refinement._refine

    class Stopped(Exception):
        pass

    def until(self, name, *parts, expert=0):
        if name == "blk.1.ffn_down_exps.weight" and expert == 3:
            raise Stopped
        return whole(self, name, *parts, expert=expert)

    options = OPTIONS | {"scratch": tmp_path / "scratch"}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(refinement.Refinement, "_refine", until)
        ql.refine(made("deepseek-v3"), tmp_path / "a.gguf", **options)
    assert ql.refine(made("deepseek-v3"), tmp_path / "a.gguf", **options).read_bytes() == refined.read_bytes()


def test_experts_with_few_tokens_get_ordinary_bytes_and_are_counted(made, tmp_path, capsys):
    few = OPTIONS | {"n_ctx": 32, "chunks": 3, "sweeps": 0, "progress": True}  # 36 for each of 8 experts on average
    path = ql.refine(made("deepseek-v3"), tmp_path / "a.gguf", **few)
    plain = ql.quantize(made("deepseek-v3"), tmp_path / "b.gguf", layout_of=path, report=lambda _: None)
    others, shapes = differing(path, plain), ql.open(path).shapes
    stacks = [name for name in shapes if "exps.weight" in name]
    changed = sum(others[name].reshape(8, -1).any(axis=1).sum() for name in stacks)
    assert 0 < changed < 8 * len(stacks)
    text = r"(\d+) experts' matrices get ordinary bytes: fewer tokens reached them than half of their inputs"
    assert int(re.search(text, capsys.readouterr().err)[1]) == 8 * len(stacks) - changed
    assert "5 experts' matrices from layer 2 on get" in module._too_few(5, 2)  # a resumed run has not seen the others


def test_sensitivity_measures_refined_experts(made, tmp_path):
    options = {
        "groups": {"down": ["blk.2.ffn_down_exps.weight"]},
        "types": ["Q4_0"],
        "cache": tmp_path,
        "chunks": 1,
        "n_ctx": 128,
    }
    plain, refined = (
        ql.sensitivity(made("deepseek-v3"), refined=refined, progress=False, **options) for refined in (False, True)
    )
    assert refined.rows[0]["delta_kld"] < 0.9 * plain.rows[0]["delta_kld"]


def test_types_that_need_a_matrix(made, tmp_path):
    """IQ2_XXS is not encoded without one: experts with few tokens take theirs from it, and so does a sensitivity."""
    path = made("qwen3moe")
    matrix = ql.imatrix(path, **SHORT)
    refined = ql.refine(path, tmp_path / "r.gguf", ftype="IQ2_XXS", imatrix=matrix, **SHORT | {"sweeps": 0})
    found = ql.verify(refined, path, imatrix=matrix)
    of_experts = found.tensors[found.tensors["name"].str.contains("exps") & (found.tensors["qtype"] == "IQ2_XXS")]
    assert found.verdict == "refined" and len(of_experts) and not of_experts["imatrix"].any()
    one = {"groups": {"down": ["blk.1.ffn_down_exps.weight"]}, "types": ["IQ2_XXS"], "cache": tmp_path / "cache"}
    short = {"chunks": 1, "n_ctx": 128, "progress": False}
    plain, refined = (
        ql.sensitivity(path, imatrix=matrix, refined=refined, **one, **short).rows[0] for refined in (False, True)
    )
    assert refined["delta_kld"] != plain["delta_kld"] > 0


def test_blocks_too_far_from_their_weights_get_ordinary_bytes(made, tmp_path):
    """With next to no damping feedback moves some blocks of 32 weights by several times ordinary rounding."""
    path = ql.refine(made("deepseek-v3"), tmp_path / "a.gguf", damping=1e-4, **OPTIONS)
    assert ql.verify(path, made("deepseek-v3")).verdict == "refined"


def test_a_file_that_stores_a_gate_as_a_vector_is_refined(made, tmp_path):
    halves = ql.quantize(made("qwen35moe"), tmp_path / "h.gguf", ftype="F16", report=lambda _: None)
    assert len(ql.open(halves).shapes["blk.0.ffn_gate_inp_shexp.weight"]) == 1
    assert ql.verify(ql.refine(halves, tmp_path / "a.gguf", **OPTIONS), halves).verdict == "refined"


def test_quantized_tensors_are_refined_on_request(made, tmp_path):
    source = ql.quantize(made("deepseek-v3"), tmp_path / "q.gguf", ftype="Q8_0", report=lambda _: None)
    with pytest.raises(ValueError, match="is quantized already"):
        ql.refine(source, tmp_path / "a.gguf", **OPTIONS)
    assert (
        ql.verify(ql.refine(source, tmp_path / "a.gguf", allow_requantize=True, **OPTIONS), source).verdict == "refined"
    )


def test_inputs_are_paired_token_by_token():
    """Two batches of two tokens, one expert each; the other stream sends the last token elsewhere."""
    kept, rng = OriginalExperts(4), np.random.default_rng(0)
    x, inner = rng.random((4, 3), np.float32), rng.random((4, 2), np.float32)
    for batch in (slice(0, 2), slice(2, 4)):  # in both the first token sees expert 1, the second expert 0
        kept.keep("experts_in", batch, ExpertInputs(x[batch], np.array([1, 0]), np.array([0, 1, 2])))
        kept.keep("experts_down", batch, ExpertInputs(inner[batch], np.array([0, 1]), np.array([0, 1, 2])))
    other, rows, tokens = rng.random((4, 2), np.float32), np.array([1, 2, 3]), np.array([0, 2, 3])  # of expert 1
    original, here = kept.pair("experts_down", 1, other, rows, tokens)
    assert np.array_equal(original[:], inner[[1, 3]])  # inputs of tokens 0 and 2, by expert
    assert np.array_equal(here[:], other[[1, 2]])
    original, here = kept.pair("experts_in", 1, x, tokens, tokens)
    assert np.array_equal(original[:], x[tokens]) and len(here) == 3


def test_rows_are_read_as_an_array_is():
    x, rows = np.arange(12.0).reshape(4, 3), np.array([3, 0, 0])
    some = Rows(x, rows)
    assert some.shape == (3, 3)
    assert np.array_equal(some[1:, 1:], x[rows][1:, 1:]) and np.array_equal(some[:2], x[rows][:2])
