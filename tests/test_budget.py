"""The plan of a pass: bytes read from text, and how a pass is cut to fit."""

import expert_models
import gemma_models
import hybrid_models
import llama_models
import numpy as np
import pytest

import quantlab as ql
from quantlab.evaluate import budget, perplexity
from quantlab.evaluate.engine import find
from quantlab.evaluate.protocol import Windows, cut
from quantlab.evaluate.variants import as_is, resolve
from quantlab.files.bundled import read_text


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("8GiB", 8 << 30), ("512M", 512 << 20), ("1.5 kib", 1536), (1000, 1000), ("4gb", 4 << 30)]
)
def test_bytes_are_read_from_text(text, n_bytes):
    assert budget.parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "eight", "-1GiB", "0", "8GiBs"])
def test_what_is_no_number_of_bytes_is_refused(text):
    with pytest.raises(ValueError, match="must be a positive number of bytes"):
        budget.parse_bytes(text)


def test_a_forgotten_unit_is_refused():
    with pytest.raises(ValueError, match=r"vram=24, has no unit, must be at least 1024 bytes. Did you mean 24GiB\?"):
        budget.parse_bytes("24", "vram")


@pytest.fixture
def variants(tmp_path):
    return [as_is(ql.open(llama_models.write_model(tmp_path / "llama2", "llama2")))] * 4


def test_less_memory_cuts_the_pass_finer(variants):
    windows, _ = cut(
        read_text("primer"), variants[0].model.vocab, n_ctx=512, chunks=None, name="full", mode="float", rules="current"
    )
    with find("float")(variants[0].model, 512) as engine:
        wide = engine.plan(variants, windows, None, False)
        kept = engine.plan(variants, windows, None, True)
        observed = engine.plan(variants, windows, None, False, observed=True)
        narrow = engine.plan(variants, windows, wide.memory - 1, False)
        least = engine.plan(variants, windows, budget.PROCESS + (12 << 20), False)
    assert wide.in_memory and wide.disk == 0
    assert not kept.in_memory and kept.disk == 2 * 4 * 4 * windows.tokens.size * variants[0].model.hparams.n_embd
    assert narrow.memory < wide.memory < observed.memory
    assert (least.in_memory, least.chunks_at_once) == (False, 1)


def test_a_pass_in_pieces_on_disk_gives_the_same(tmp_path, monkeypatch):
    folder = llama_models.write_model(tmp_path / "llama2", "llama2")
    options = {"n_ctx": 64, "chunks": 6, "progress": False}
    whole = ql.compare(folder, ["Q8_0", "Q4_0"], "primer", **options)
    monkeypatch.setattr(find("float").engine, "plan", lambda *args, **kwargs: budget.Budget(2, 1, False, 0, 0, 0.0))
    pieces = ql.compare(folder, ["Q8_0", "Q4_0"], "primer", **options)
    for a, b in zip(whole.rows, pieces.rows, strict=True):
        assert a["ppl"] == pytest.approx(b["ppl"], rel=1e-6)  # products of other sizes may add up in another order
        assert a["kld_mean"] == pytest.approx(b["kld_mean"], rel=1e-5)


def test_a_full_disk_is_noticed_before_the_run(tmp_path):
    with pytest.raises(OSError, match="bytes are free, the hidden states need"):
        perplexity._check_disk(tmp_path / "scratch", 1 << 60)


def test_embeddings_of_each_layer_are_counted(tmp_path):
    model = ql.open(gemma_models.write_model(tmp_path / "made", "gemma4-e"))
    tokens = np.arange(256, dtype=np.int32).reshape(2, 128) % 100
    windows = Windows(tokens, tokens[:, 64:], 63)
    options = {"layer_bytes": lambda chunks, in_memory: 0, "output_bytes": lambda outputs: 0, "speed": 1.0}
    found = budget.fit([as_is(model)], windows, None, False, **options)
    h = model.hparams
    assert h.n_embd_layers > 0
    assert found.memory == budget.PROCESS + 4 * (256 * h.n_state + 100 * (h.n_embd + h.n_state + h.n_embd_layers))


def work_of(model):
    """Operations and encoded weights of a pass over a model and a variant of it."""
    tokens = np.zeros((2, 128), np.int32)
    return budget.work_of([as_is(model), *resolve(model, ["Q4_0"])], Windows(tokens, tokens[:, 64:], 63))


@pytest.mark.filterwarnings("ignore:.*pre-tokenizer|.*vocabulary differs|.*multi-token")
def test_time_counts_what_is_computed(tmp_path):
    src, options = hybrid_models.write_model(tmp_path / "made", "qwen35", mtp=True), dict(outtype="f16", progress=False)
    whole, plain = (ql.open(ql.convert(src, tmp_path / f"{mtp}.gguf", mtp=mtp, **options)) for mtp in (True, False))
    assert whole.hparams.n_layer_nextn and sum(t.n_weights for t in whole) > sum(t.n_weights for t in plain)
    assert work_of(whole) == work_of(plain)
    model = ql.open(expert_models.write_model(tmp_path / "experts", "qwen3moe"))
    h, experts = model.hparams, sum(t.n_weights for t in model if "_exps." in t.name)
    others = sum(t.n_weights for t in model if t.name.startswith("blk.")) - experts
    weights = others + experts * h.n_expert_used / h.n_expert
    assert work_of(model)[0] == 2 * 2 * (256 * weights + 128 * h.n_vocab * h.n_embd)
