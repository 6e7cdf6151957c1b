"""The corpus is clean prose, training learns and resumes, and the bundled model is what its folder says."""

import json
import sys
from itertools import islice

import numpy as np
import pytest
from safetensors import safe_open

import clean
import corpus
from quantlab.files.bundled import data_dir

TINY = data_dir() / "models" / "tiny"
PROSE = "The scale of a block is chosen so that the largest weight of the block can be stored without an error."


# --- cleaning


def test_html_keeps_prose_and_drops_code_tables_and_signatures():
    page = f"""<html class="sidebar-visible"><head><title>No</title></head><body><nav><p>{PROSE} Next.</p></nav>
    <h2>1.2. Scales and blocks<a class="headerlink">¶</a></h2><p>{PROSE} It is <code>d</code>.</p>
    <pre>x = the("code") of a block</pre><dl><dt>f(x, y)</dt><dd><p>Return t{PROSE[1:]}</p></dd></dl>
    <table><tr><td><p>{PROSE} In a table.</p></td></tr></table>
    <ul><li>Each of the {PROSE[4:]}</li></ul></body></html>"""
    text = clean.document(clean.html_paragraphs(page), set())
    assert text.split("\n\n") == [
        "## Scales and blocks",
        f"{PROSE} It is `d`.",
        f"Return t{PROSE[1:]}",
        f"- Each of the {PROSE[4:]}",
    ]


def test_html_drops_a_sentence_that_lost_its_formula():
    formula = '<span class="math">d/2</span>'
    page = f"<p>{PROSE}</p><p>It follows that the error is at most {formula} in each of the weights.</p>"
    assert clean.document(clean.html_paragraphs(page), set()) == PROSE


def test_markdown_joins_lines_and_drops_fences_tables_and_links():
    text = f"# The title of it\n\n![badge](x.png)\n{PROSE[:38]}\n{PROSE[39:]}\n\n```\ncode of the block\n```\n"
    text += "| a | b |\n- See [the\nmanual](http://example.org) for what is to be done with it.\n"
    assert clean.document(clean.markdown_paragraphs(text), set()).split("\n\n") == [
        "## The title of it",
        PROSE,
        "- See the manual for what is to be done with it.",
    ]


def test_docstrings_lose_their_markup():
    source = f'''
def f(x):
    """{PROSE}

    Parameters
    ----------
    x : array_like
        The values that are to be rounded to the :class:`~numpy.ndarray` of levels [1]_.

    >>> f(1)
    2
    """
'''
    assert clean.document(clean.python_paragraphs(source), set()).split("\n\n") == [
        PROSE,
        "The values that are to be rounded to the `ndarray` of levels.",
    ]
    assert clean.python_paragraphs("def (") == []


@pytest.mark.parametrize(
    "text",
    [
        "too short.",
        "numpy.linalg.norm numpy.linalg.solve numpy.linalg.inv numpy.linalg.qr numpy.linalg.svd.",
        "The value of {name} is the one that is to be used in it.",
        "It is x == y that is meant by the rule that is given here.",
        "The sentence that has no end and is cut off in the middle of",
        "Die Gewichte werden auf wenige Stufen gerundet und in Blöcken gespeichert.",
    ],
)
def test_what_is_not_prose(text):
    assert not clean.is_prose(text)
    assert clean.is_prose(PROSE)


def test_what_is_an_explanation():
    text = (
        f"{PROSE} That is why the scale is as large as it is, and why the smaller weights of the block lose the most."
    )
    assert clean.is_explanation(text)
    assert not clean.is_explanation(PROSE)  # too short
    assert not clean.is_explanation(text.replace("the scale is", "`scale` is"))
    assert not clean.is_explanation("He who has a house that is in the wood is not to be found at the sea. " * 3)


def test_a_paragraph_is_kept_once():
    seen = set()
    assert clean.document(["## A heading", PROSE, PROSE.upper().capitalize()], seen) == f"## A heading\n\n{PROSE}"
    assert clean.document(["## A heading", PROSE.replace("block", "block")], seen) == ""


# --- corpus


def test_overlap_of_fifty_characters_is_left_out():
    judged = corpus.fingerprints(f"Some text. {PROSE[:50]} and so on.")
    near = f"He said: {PROSE[:48]}X and so on."
    assert corpus.without_overlap(f"{near}\n\nHe said: {PROSE}", judged) == near


def test_build_writes_corpus_heldout_and_ledger(tmp_path):
    source = corpus.Source("made-up", "1.0", "MIT", r"\.md$", repeat=2)
    folder = tmp_path / "made-up-1.0"
    folder.mkdir()
    (folder / ".done").touch()
    words = [chr(97 + i // 26) + chr(97 + i % 26) for i in range(201)]
    files = [f"It is the word {word} that is to be found in this file." for word in words]
    files[7] = (
        f"{PROSE} That is why the scale is as large as it is, and why the smaller weights of the block lose the most."
    )
    for i, text in enumerate(files):
        (folder / f"{i:03}.md").write_text(text)
    row, again = corpus.build(tmp_path, tmp_path / "corpus.txt", sources=[source])
    text, heldout = (tmp_path / "corpus.txt").read_text(), (tmp_path / "corpus.heldout.txt").read_text()
    assert heldout == f"{files.pop(100)}\n\n"
    assert text == "".join(f"{part}\n\n" for part in files * 2 + files[7:8])
    assert row["bytes"] == len("\n\n".join(files)) + 2 and again["bytes"] == len(files[7]) + 2
    assert json.loads((tmp_path / "corpus.json").read_text()) == [row, again]


def test_a_package_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.subprocess, "run", lambda *_, **__: type("Done", (), {"stderr": "E: not found"}))
    with pytest.raises(OSError, match=r"made-up: version=1.0 could not be downloaded. E: not found"):
        corpus.fetch(corpus.Source("made-up", "1.0", "MIT"), tmp_path)


# --- training


@pytest.fixture
def small():
    pytest.importorskip("torch", reason="training needs torch: pip install 'gguf-quantlab[gpu]'")
    from model import Shape

    return Shape(n_vocab=64, n_ctx=32, n_embd=32, n_ff=64, n_layer=2, n_head=4, n_head_kv=2)


def test_windows_begin_with_bos_and_resume(small):
    from train import windows

    tokens = np.arange(10, 5010, dtype=np.uint16)
    whole = list(islice(windows(tokens, 32, 4, seed=1), 100))
    rest = list(islice(windows(tokens, 32, 4, seed=1, step=60), 40))
    assert all(np.array_equal(a, b) for a, b in zip(whole[60:], rest, strict=True))
    assert all((ids[:, 0] == 1).all() and (np.diff(ids[:, 1:]) == 1).all() for ids in whole)
    per_epoch = (5000 - 33) // 128
    starts = np.concatenate([ids[:, 1] for ids in whole[:per_epoch]])
    assert len(set(starts)) == len(starts)
    with pytest.raises(ValueError, match="corpus: tokens=100, need at least 161"):
        next(windows(tokens[:100], 32, 4, seed=1))


def test_training_learns_exports_and_reads_back(small, tmp_path, rng):
    import torch

    from export import export, load
    from train import Settings, heldout_loss, train

    tokens = np.tile(rng.permutation(np.arange(3, 64)), 100).astype(np.uint16)  # each token tells the next
    settings = Settings(steps=60, batch=4, micro=2, warmup=5, lr=1e-2)
    run = train(tokens, tokens[:500], small, settings, tmp_path)
    assert run.history[-1]["heldout"] < 0.5 * np.log(64) and run.history[-1]["step"] == run.step
    again = train(tokens, tokens[:500], small, settings, tmp_path)  # all steps are done: only read back
    assert again.step == run.step and again.history == run.history
    (tmp_path / "tokenizer.model").write_bytes(b"not read here")
    folder = export(run.model, tmp_path / "tokenizer.model", tmp_path / "out")
    back = load(folder)
    assert back.shape == small
    assert all(
        torch.equal(w.bfloat16(), run.model.state_dict()[name].bfloat16()) for name, w in back.state_dict().items()
    )
    assert heldout_loss(back, tokens[:500]) == pytest.approx(
        run.history[-1]["heldout"], abs=0.02
    )  # bfloat16 has 8 bits
    with pytest.raises(FileNotFoundError, match="config.json: no such file. Give the folder of a trained model."):
        load(tmp_path)


def test_micro_batches_give_the_gradient_of_the_whole(small):
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from model import Llama
    from train import gradient_of_threads, mean_nll

    torch.manual_seed(1)
    model, ids = Llama(small), torch.randint(3, 64, (8, 33))
    with ThreadPoolExecutor(2) as pool:
        loss = gradient_of_threads(model, mean_nll, pool, 2, ids)
    whole = mean_nll(model, ids)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    assert loss == pytest.approx(whole.item(), abs=1e-3)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.linalg.norm(parameter.grad - grad) <= 0.02 * torch.linalg.norm(grad)  # bfloat16 products


def test_a_device_takes_the_same_steps_as_threads(small, tmp_path, rng):
    from train import Settings, train

    tokens = rng.permutation(np.tile(np.arange(3, 64), 200)).astype(np.uint16)
    losses = []
    for device in ("", "cpu"):
        settings = Settings(steps=20, batch=4, device=device, save_minutes=0, warmup=5)
        run = train(tokens, tokens[:40], small, settings, tmp_path / (device or "threads"))
        assert run.step == 20 and run.history[-1]["schedule"] == 0
        losses.append([row["loss"] for row in run.history])
    assert len(losses[0]) == 20 and losses[1] == pytest.approx(losses[0], rel=0.01)  # products in bfloat16
    assert losses[0][-1] < losses[0][0] - 0.02


def test_fused_attention_equals_the_one_written_out(small):
    import torch

    from model import Llama

    torch.manual_seed(1)
    plain, fused = Llama(small), Llama(small, fused=True)
    fused.load_state_dict(plain.state_dict())
    ids = torch.randint(3, 64, (2, 32))
    with torch.no_grad():
        assert torch.allclose(plain(ids), fused(ids), atol=1e-5)


def test_the_scripts_from_a_corpus_to_a_model(small, tmp_path, monkeypatch):
    import torch

    import tokenizer
    import train

    torch.set_num_threads(1)
    (tmp_path / "corpus.txt").write_text((data_dir() / "text" / "primer.md").read_text())
    (tmp_path / "corpus.heldout.txt").write_text(PROSE * 25)
    monkeypatch.setattr(sys, "argv", ["tokenizer.py", str(tmp_path), "--n-vocab", "400"])
    tokenizer.main()
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path), *"--device cpu --steps 1 --batch 1".split()])
    train.main()
    record = json.loads((tmp_path / "history.json").read_text())
    assert record["settings"]["device"] == "cpu" and record["history"][-1]["step"] == 1
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == 400


def test_the_tokenizer_holds_no_path(tmp_path):
    spm = pytest.importorskip("sentencepiece")
    from tokenizer import train_tokenizer

    model = train_tokenizer(data_dir() / "text" / "primer.md", tmp_path / "a.model", 700).read_bytes()
    assert str(tmp_path).encode() not in model and b"primer.md" not in model
    pieces = spm.SentencePieceProcessor(model_proto=model)
    assert len(pieces) == 700 and pieces.encode("of the", out_type=str)[-1] == "▁the"


def test_sampling_with_kept_keys_equals_the_whole_pass(small):
    import torch

    from model import Llama
    from sample import sample_ids

    torch.manual_seed(1)
    model = Llama(small)
    past = model.keys_and_values(3)
    ids = sample_ids(model, 3, 32, torch.Generator().manual_seed(1))
    assert ids.shape == (3, 32) and (ids[:, 0] == 1).all() and (ids[:, 1:] > 2).all()
    assert torch.equal(ids, sample_ids(model, 3, 32, torch.Generator().manual_seed(1)))
    with torch.no_grad():
        steps = torch.cat([model(ids[:, i : i + 1], past, i) for i in range(32)], dim=1)
        assert torch.allclose(steps, model(ids), atol=1e-5)


def test_the_model_equals_transformers(small):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from export import config_of
    from model import Llama

    torch.manual_seed(1)
    ours = Llama(small)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**config_of(small), "torch_dtype": "float32"}))
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(3, 64, (2, 32))
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-5)


# --- the bundled model


def test_bundled_folder():
    config = json.loads((TINY / "config.json").read_text())
    n_embd, n_ff, n_layer, n_vocab = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    kv = config["num_key_value_heads"] * config["head_dim"]
    assert config["architectures"] == ["LlamaForCausalLM"] and not config["tie_word_embeddings"]
    assert n_embd % 256 == 0 and n_ff % 256 == 0 and config["num_key_value_heads"] < config["num_attention_heads"]
    layer = {
        "input_layernorm": [n_embd],
        "post_attention_layernorm": [n_embd],
        "self_attn.q_proj": [n_embd, n_embd],
        "self_attn.k_proj": [kv, n_embd],
        "self_attn.v_proj": [kv, n_embd],
        "self_attn.o_proj": [n_embd, n_embd],
        "mlp.gate_proj": [n_ff, n_embd],
        "mlp.up_proj": [n_ff, n_embd],
        "mlp.down_proj": [n_embd, n_ff],
    }
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(n_layer) for name, shape in layer.items()}
    shapes |= {
        "model.embed_tokens.weight": [n_vocab, n_embd],
        "lm_head.weight": [n_vocab, n_embd],
        "model.norm.weight": [n_embd],
    }
    with safe_open(TINY / "model.safetensors", framework="numpy") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        assert {name: found.get_shape() for name, found in slices.items()} == shapes
        assert {found.get_dtype() for found in slices.values()} == {"BF16"}
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 20e6


def test_bundled_tokenizer_falls_back_to_bytes():
    spm = pytest.importorskip("sentencepiece")
    pieces = spm.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    config = json.loads((TINY / "config.json").read_text())
    assert len(pieces) == config["vocab_size"]
    assert [pieces.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert pieces.decode(pieces.encode("Zwölf 漢字\n\n  two  blanks")) == "Zwölf 漢字\n\n  two  blanks"
    assert [pieces.id_to_piece(i) for i in pieces.encode("漢")][-3:] == ["<0xE6>", "<0xBC>", "<0xA2>"]


def test_sampled_text_is_plain_and_long_enough():
    text = (data_dir() / "text" / "sampled.txt").read_bytes().decode()
    assert 1 << 18 <= len(text.encode()) < 500_000
    assert "<s>" not in text[:100] and "\ufffd" not in text and "\0" not in text
