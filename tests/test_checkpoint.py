"""files/checkpoint.py and what it reads: folders that fit together open, and every other one gets one line."""

import base64
import json
import os
import shutil

import numpy as np
import pytest
from checkpoints import GOLDEN, tensors, write_checkpoint, write_meta, write_safetensors

import quantlab as ql
from quantlab.files.checkpoint import open_checkpoint
from quantlab.files.checkpoint_metadata import read_config
from quantlab.files.hub import find_checkpoint
from quantlab.files.vocab import Vocab, text_of_bytes

pytestmark = pytest.mark.filterwarnings("ignore:.*pre-tokenizer .* is not in llama.cpp's list")


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    table = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not None}))


def refuse(folder, text, error=ValueError):
    with pytest.raises(error, match=text) as caught:
        open_checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_q_and_k_are_permuted_whatever_rows_are_read(tmp_path):
    model = ql.open(write_checkpoint(tmp_path / "m", "llama2", "F32"))
    stored = tensors("llama2")["model.layers.0.self_attn.k_proj.weight"]
    expected = stored.reshape(2, 2, 8, 64).swapaxes(1, 2).reshape(32, 64)
    k = model.tensor("blk.0.attn_k.weight")
    assert np.array_equal(k.load(), expected)
    for start in range(32):
        for stop in range(start, 33):
            assert np.array_equal(k.rows(start, stop), expected[start:stop])


def test_biases_of_q_and_k_are_permuted_too(tmp_path, rng):
    src = write_checkpoint(tmp_path / "m", "llama2", "F32")
    sizes = {"q": 64, "k": 32, "v": 32}
    biases = {f"model.layers.{i}.self_attn.{part}_proj.bias": n for i in range(2) for part, n in sizes.items()}
    weights = tensors("llama2") | {name: rng.standard_normal(n, np.float32) for name, n in biases.items()}
    write_safetensors(src / "model.safetensors", weights)
    model = ql.open(src)
    for part, n_head in (("q", 4), ("k", 2), ("v", 0)):
        stored = weights[f"model.layers.1.self_attn.{part}_proj.bias"]
        expected = stored.reshape(n_head, 2, 8).swapaxes(1, 2).reshape(-1) if n_head else stored
        bias = model.tensor(f"blk.1.attn_{part}.bias")
        assert bias.qtype == "F32" and np.array_equal(bias.load(), expected)
        assert bias.rows(0, 0).shape == (0, len(stored))


def test_hparams_of_a_checkpoint(tmp_path):
    hparams = ql.open(write_checkpoint(tmp_path / "m", "qwen3")).hparams
    assert (hparams.arch, hparams.n_head, hparams.n_head_kv, hparams.head_dim) == ("qwen3", 4, 2, 32)
    assert hparams.tied_embeddings and hparams.rope_scaling is None
    hparams = ql.open(write_checkpoint(tmp_path / "n", "qwen2")).hparams
    assert (hparams.rope_scaling.type, hparams.rope_scaling.factor, hparams.rope_scaling.orig_ctx) == (
        "yarn",
        4.0,
        8192,
    )


LINEAR = {"type": "linear", "factor": 4.0}
LAYERS = {"full_attention": {"rope_theta": 5e5, "rope_type": "default"}}
ROPES = [
    ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "rope_scaling": LINEAR}, ("linear", 1e4)),
    ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 5e5, "rope_scaling": LINEAR}, ("linear", 5e5)),
    ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LINEAR | {"rope_theta": 5e5}}, ("linear", 5e5)),
    ({"rope_parameters": {**LINEAR, "rope_theta": 1e4}, "rope_scaling": LINEAR}, ("linear", 1e4)),
    ({"rope_parameters": None, "rope_scaling": LINEAR}, ("linear", 1e4)),
    ({"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": None}, ("default", 5e5)),
    ({"rope_parameters": LAYERS}, ("default", 5e5)),
    ({"rope_parameters": LAYERS | {"sliding_attention": LAYERS["full_attention"]}}, ("default", 5e5)),
    ({"rope_scaling": {"full_attention": LINEAR, "rope_theta": 5e5}}, ("linear", 5e5)),
    (
        {"rope_parameters": LAYERS | {"sliding_attention": LINEAR}, "layer_types": ["full_attention"] * 2},
        ("default", 5e5),
    ),
]


@pytest.mark.parametrize(("changes", "expected"), ROPES)
def test_every_table_of_rotary_positions_is_read(tmp_path, changes, expected):
    src = write_checkpoint(tmp_path / "m", "llama1")
    edit(src / "config.json", **changes)
    config = read_config(src)
    assert (config.rope["rope_type"], config.rope_base) == expected


def test_links_inside_the_folder_are_followed(tmp_path):
    """The hub's cache keeps links to files elsewhere."""
    src = write_checkpoint(tmp_path / "m", "llama1", "BF16", 3)
    (tmp_path / "blobs").mkdir()
    for path in list(src.iterdir()):
        os.rename(path, tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    assert len(ql.open(src)) == 21


def test_a_missing_shard(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1", "BF16", 3)
    (src / "model-00002-of-00003.safetensors").unlink()
    refuse(src, "model-00002-of-00003.safetensors: this shard is missing", FileNotFoundError)


def test_a_truncated_shard(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1", "BF16", 3)
    shard = src / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refuse(src, "model-00002-of-00003.safetensors: model.layers.*: ends at byte .*, the file has")


def test_index_and_shards_that_disagree(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1", "BF16", 3)
    index = src / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {"extra.weight": "model-00001-of-00003.safetensors"})
    refuse(src, "extra.weight.: model.safetensors.index.json names it, but no shard contains it")
    del weight_map["model.norm.weight"]
    edit(index, weight_map=weight_map)
    refuse(src, "model.norm.weight.: a shard contains it, but model.safetensors.index.json does not name it")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/b", "a\\b", "..", "", "\0", "\ud800", 7, "x" * 999], ids=range(10)
)
def test_an_index_that_points_elsewhere(tmp_path, name):
    src = write_checkpoint(tmp_path / "m", "llama1", "BF16", 3)
    index = src / "model.safetensors.index.json"
    edit(index, weight_map=json.loads(index.read_text())["weight_map"] | {"model.norm.weight": name})
    refuse(src, "model.norm.weight.: file .*, need a plain file name")


def test_an_index_that_is_no_table(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1", "BF16", 3)
    edit(src / "model.safetensors.index.json", weight_map=[1])
    refuse(src, r"weight_map=\[1\], need a table")
    (src / "model.safetensors.index.json").write_text("{")
    refuse(src, "model.safetensors.index.json: is not JSON")


def test_missing_and_unknown_tensors(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1", "F32")
    weights = tensors("llama1")
    norm = weights.pop("model.norm.weight")
    write_safetensors(src / "model.safetensors", weights)
    refuse(src, "output_norm.weight: missing from the weights")
    write_safetensors(src / "model.safetensors", weights | {"model.norm.weight": norm, "model.strange.weight": norm})
    refuse(src, "model.strange.weight: no tensor of a llama model with 2 layers has this name")
    write_safetensors(src / "model.safetensors", weights | {"model.norm.weight": norm[:-1]})
    refuse(src, r"output_norm.weight: shape=\(63,\), the configuration gives \(64,\)")


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
CONFIGS = [
    (
        {"architectures": ["FalconForCausalLM"]},
        r"architectures=\['FalconForCausalLM'\], must be a class of .*llama",
    ),
    ({"architectures": None}, "architectures=None, must be a class of"),
    ({"hidden_size": None}, "hidden_size=None, must be"),
    ({"hidden_size": 1 << 40}, "hidden_size=1099511627776, must be"),
    ({"num_attention_heads": "4"}, "num_attention_heads='4', must be"),
    ({"num_attention_heads": 5}, "hidden_size=64 must be a multiple of num_attention_heads=5"),
    ({"num_hidden_layers": 3}, "blk.2.attn_norm.weight: missing from the weights"),
    ({"num_hidden_layers": 1}, "no tensor of a llama model with 1 layers has this name"),
    ({"num_attention_heads": 32, "num_key_value_heads": 3}, "64 rows cannot be split into 3 heads"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps=-1.0, must be"),
    ({"rope_scaling": {"type": "strange"}}, "rope_type='strange', must be default, linear, yarn or llama3"),
    ({"rope_scaling": {"type": "linear"}}, "factor=None, must be"),
    ({"architectures": [["x"]]}, r"architectures=\[\['x'\]\], must be a class of"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, must be 1 to 1024"),
    ({"vocab_size": 10**12}, "vocab_size=1000000000000, must be"),
    ({"hidden_size": 10**4000}, "hidden_size=a number of 13288 bits, must be"),
    ({"num_attention_heads": 0}, "num_attention_heads=0, must be"),
    ({"head_dim": -1}, "head_dim=-1, must be"),
    ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1}}, "high_freq_factor=1, the second must be larger"),
    ({"rope_scaling": LLAMA3_ROPE | {"original_max_position_embeddings": "x"}}, "original_max_.*='x', must be 1"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 1 << 40}},
        "original_max_.* must be",
    ),
    ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": [1]}}, r"beta_fast=\[1\], must be"),
    (
        {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 2.0}},
        r"rope_parameters=\{.*'factor': 2.0.*\} and rope_scaling=\{.*'factor': 4.0.*\} differ. .* Keep only",
    ),
    ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 5e5}}, "500000.0.* differ. .* with rope_theta=10000.0"),
    (
        {"rope_parameters": LAYERS | {"sliding_attention": {"rope_theta": 1e4}}},
        r"rope_parameters=\{'full_attention': .*'sliding_attention': .*must be the same for all layers",
    ),
    ({"rope_parameters": LAYERS, "layer_types": ["sliding_attention"]}, "must be the same for all layers"),
    ({"rope_scaling": [1]}, r"rope_scaling=\[1\], must be a table"),
    ({"rope_theta": 1e-300}, "rope_theta=1e-300, must be 1e-12 to"),
    ({"rope_theta": float("nan")}, "rope_theta=nan, must be"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf, must be"),
    ({"quantization_config": {"bits": 4}}, "config.json: is a quantized checkpoint"),
]


@pytest.mark.parametrize(("changes", "text"), CONFIGS)
def test_configurations_that_do_not_fit(tmp_path, changes, text):
    src = write_checkpoint(tmp_path / "m", "llama1")
    edit(src / "config.json", **changes)
    refuse(src, text)


def test_folders_that_are_no_checkpoint(tmp_path):
    refuse(tmp_path, "holds neither config.json nor params.json", FileNotFoundError)
    src = write_checkpoint(tmp_path / "m", "llama1")
    (src / "model.safetensors").unlink()
    refuse(src, r"holds no model\*.safetensors", FileNotFoundError)
    src = write_checkpoint(tmp_path / "n", "llama1")
    (src / "tokenizer.model").unlink()
    refuse(src, "holds neither tokenizer.model nor tokenizer.json", FileNotFoundError)


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    """As of another model."""
    src = write_checkpoint(tmp_path / "m", "llama2")
    (src / "added_tokens.json").write_text(json.dumps({"<pad>": 640}))
    refuse(src, "tokenizer has 641 tokens, the embedding has 640 rows")
    src = write_checkpoint(tmp_path / "n", "smollm")
    table = json.loads((src / "tokenizer.json").read_text())
    table["added_tokens"].append({**table["added_tokens"][0], "id": 640, "content": "<new>"})
    (src / "tokenizer.json").write_text(json.dumps(table))
    refuse(src, "tokenizer has 641 tokens, the embedding has 640 rows")


def test_the_tokenizer_of_another_model(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1", "F32")
    edit(src / "config.json", vocab_size=500)
    weights = {key: x[:500] if x.shape[0] == 640 else x for key, x in tensors("llama1").items()}
    write_safetensors(src / "model.safetensors", weights)
    refuse(src, "tokenizer has 600 tokens, the embedding has 500 rows. Use this model's own tokenizer")
    edit(src / "config.json", vocab_size=640)
    refuse(src, r"token_embd.weight: shape=\(500, 64\), the configuration gives \(640, 64\)")


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("tokenizer.model", b"\xff" * 100, "tokenizer.model: is not a SentencePiece model"),
        ("tokenizer.model", b"", "tokenizer.model: is not a SentencePiece model"),
        (
            "tokenizer.model",
            b"\x0a\x0a\x0a\x01\xff\x15\0\0\0\0\x18\x02",
            "tokenizer.model: is not a SentencePiece model",
        ),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "a token occurs twice, or one of the 256 bytes is missing"),
        ("tokenizer.model", b"IQ== 0\nIg== 2\n", r"tokenizer.model: line 2 is b'Ig== 2', need a token in base64 and 1"),
        ("tokenizer.model", b"IQ== 0\n!!! 1\n", r"tokenizer.model: line 2 is b'!!! 1', need a token in base64 and 1"),
        ("added_tokens.json", b'{"a": "b"}', "added token has id 'b', need a whole number"),
        ("added_tokens.json", b"[1]", "added_tokens.json: holds a list, need a JSON table"),
        (
            "added_tokens.json",
            b'{"a": [' + b"[]," * 2_000_000,
            "added_tokens.json: 4000002 values, need at most 3000000",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}', "added_tokens_decoder: 'x' is not a token"),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"%s": {}}}' % (b"9" * 5000),
            "added_tokens_decoder: '999",
        ),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}', "chat_template holds half a surrogate pair"),
    ],
)
def test_broken_tokenizer_files(tmp_path, name, content, text):
    src = write_checkpoint(tmp_path / "m", "llama1")
    (src / name).write_bytes(content)
    refuse(src, text)


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
    "special_tokens": {},
}


def nested(key: str, depth: int) -> dict:
    """Sequences in sequences."""
    step: dict = {"type": "Sequence", key: []}
    for _ in range(depth):
        step = {"type": "Sequence", key: [step]}
    return step


GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": {"type": "BPE", "vocab": [], "merges": []}}, "tokenizer.json holds no BPE vocabulary"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "added token has id -1"),
        ({"added_tokens": [7]}, "added token 7 has no text"),
        ({"decoder": {"type": "Nothing"}}, "tokenizer.json cannot be read"),
        ({"version": "\x1b[2J"}, r"tokenizer.json cannot be read \(Unknown tokenizer version '\?\[2J'"),
        ({"normalizer": nested("normalizers", 400)}, "tokenizer.json cannot be read"),
        ({"post_processor": nested("processors", 400)}, "tokenizer.json cannot be read"),
        ({"post_processor": TEMPLATE}, "a template names an unknown token"),
        ({"added_tokens": [{"id": 1 << 40, "content": "a"}]}, "tokenizer has 1099511627777 tokens"),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [GROWING] * 12}},
            "its normalizer makes a text more than 64",
        ),
    ],
)
def test_broken_tokenizer_json(tmp_path, change, text):
    src = write_checkpoint(tmp_path / "m", "smollm")
    edit(src / "tokenizer.json", **change)
    refuse(src, text)


def test_merges_that_are_no_list(tmp_path):
    src = write_checkpoint(tmp_path / "m", "smollm")
    model = json.loads((src / "tokenizer.json").read_text())["model"]
    token = next(iter(model["vocab"]))  # a model without a type and with this is a list of words to the library
    edit(src / "tokenizer.json", model={"vocab": model["vocab"], "unk_token": token, "merges": 0.5})
    refuse(src, "merges=0.5, need a list")


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": [1, {"name": [2], "template": "a"}], "bos_token": [1]},
        {"unk_token": 7, "add_bos_token": "x", "chat_template": {"a": 1}},
        {"additional_special_tokens": 7, "bos_token": {"content": [1]}, "added_tokens_decoder": [1]},
    ],
)
@pytest.mark.parametrize("name", ["llama1", "smollm", "llama_hf"])
def test_strange_settings_of_a_tokenizer_are_passed_over(tmp_path, name, config):
    src = write_checkpoint(tmp_path / "m", name)
    (src / "tokenizer_config.json").write_text(json.dumps(config))
    assert ql.open(src).vocab.n_vocab == 640


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Sequence", "normalizers": 7}},
        {"post_processor": {"type": "TemplateProcessing", "single": {"a": 1}, "pair": {"SpecialToken": 7}}},
        {"post_processor": {"type": "TemplateProcessing", "pair": [{"Sequence": 7}, {"SpecialToken": {"id": [1]}}, 7]}},
        {"post_processor": {"processors": 7}, "added_tokens": [{"id": 1, "content": "a"}]},
    ],
)
def test_strange_parts_of_a_tokenizer_are_passed_over(tmp_path, change):
    src = write_checkpoint(tmp_path / "m", "llama1")  # whose tokens are in tokenizer.model
    (src / "tokenizer.json").write_text(json.dumps(change))
    assert ql.open(src).vocab.n_vocab == 640


@pytest.mark.parametrize(
    ("content", "text"), [(b"\xff", "byte 0 is not UTF-8"), (b"a" * 2_000_000, "2000000 bytes, need at most 1048576")]
)
def test_broken_chat_templates(tmp_path, content, text):
    src = write_checkpoint(tmp_path / "m", "smollm")
    (src / "chat_template.jinja").write_bytes(content)
    edit(src / "tokenizer_config.json", chat_template=None)
    refuse(src, f"chat_template.jinja: {text}")


def test_ids_that_no_token_can_have_are_passed_over(tmp_path):
    src = write_checkpoint(tmp_path / "m", "smollm")
    edit(src / "config.json", pad_token_id=1 << 40, unk_token_id=-1)
    assert "tokenizer.ggml.unknown_token_id" not in ql.open(src).metadata


def test_metas_llama_3_reads_as_its_tokenizer_json(tmp_path):
    """344 tokens of tiny_bpe.json as tiktoken writes them, and the 256 special tokens fill the embedding's 600 rows."""
    table = json.loads((GOLDEN / "tiny_bpe.json").read_text())
    texts = sorted(table["vocab"], key=table["vocab"].get)[:344]
    byte_of = {text_of_bytes(bytes([byte])): byte for byte in range(256)}
    pieces = [bytes(byte_of[char] for char in text) for text in texts]
    src = write_meta(tmp_path / "m")
    lines = [b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces)]
    (src / "tokenizer.model").write_bytes(b"".join(lines))
    model = ql.open(src)
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    assert model.metadata["tokenizer.ggml.tokens"][:346] == [*texts, *special] and model.vocab.n_vocab == 600
    assert (model.vocab.bos_id, model.vocab.eos_id, model.vocab.add_bos, model.vocab.pre) == (
        344,
        345,
        True,
        "llama-bpe",
    )
    merges = [f"{left} {right}" for left, right in table["merges"] if table["vocab"][left + right] < 344]
    by_json = Vocab.from_metadata(model.metadata | {"tokenizer.ggml.merges": merges})
    for text in ("the other  theatre, in 2024\n\n is not that of its author", "naïve — 🦙 \0", "x" * 300):
        assert model.vocab.encode(text).tolist() == by_json.encode(text).tolist()
        assert model.vocab.decode(model.vocab.encode(text)) == text
    assert model.vocab.encode("<|eot_id|>", parse_special=True).tolist() == [344, 344 + 9]


def test_an_unknown_pre_tokenizer_gets_a_warning(tmp_path):
    src = write_checkpoint(tmp_path / "m", "smollm")
    byte_level = json.loads((src / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"][1]
    steps = [{"type": "Whitespace"}, byte_level | {"use_regex": False}]
    edit(src / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    with pytest.warns(UserWarning, match="is not in llama.cpp's list; taking 'default'"):
        assert ql.open(src).metadata["tokenizer.ggml.pre"] == "default"


def test_parts_of_metas_that_do_not_fit(tmp_path):
    src = write_meta(tmp_path / "m", n_parts=2)
    shutil.move(src / "consolidated.01.pth", src / "consolidated.02.pth")
    refuse(src, "consolidated.01.pth: this part is missing", FileNotFoundError)
    src = write_meta(tmp_path / "n", n_parts=2)
    shutil.copy(write_meta(tmp_path / "one", n_parts=1) / "consolidated.00.pth", src / "consolidated.01.pth")
    refuse(src, r"the parts have shapes \[.*\], must be equal")
    edit(src / "params.json", dim=None)
    refuse(src, "dim=None, must be")


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_checkpoint(tmp_path) == tmp_path
    with pytest.raises(FileNotFoundError, match="no such file or folder. Give a checkpoint's folder, or org/model"):
        find_checkpoint(tmp_path / "no")


def test_the_bundled_tokenizers_are_small():
    assert all((GOLDEN / name).stat().st_size < 100_000 for name in ("tiny_spm.model", "tiny_bpe.json"))
