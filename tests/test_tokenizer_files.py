"""files/tokenizer_files.py: texts get the ids that the model was trained with; llama.cpp's bytes where asked for."""

import io
import json
import shutil

import numpy as np
import pytest
from checkpoints import GOLDEN, bpe_json, spm_as_json
from test_vocab import HARD

from quantlab.files.checkpoint_metadata import read_config
from quantlab.files.tokenizer_files import vocab_metadata
from quantlab.files.vocab import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Vocab

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*pre-tokenizer .* is not in llama.cpp's list")


def folder_of(path, n_vocab, *, model=None, **files):
    """Write a checkpoint's configuration and tokenizer; `model` is tokenizer.model, the others are JSON by stem."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": n_vocab}))
    if model is not None:
        (path / "tokenizer.model").write_bytes(model)
    for stem, table in files.items():
        (path / f"{stem}.json").write_text(json.dumps(table))
    return path


def read(folder, **options):
    return vocab_metadata(folder, read_config(folder), **options)


def tokens_of(keys):
    """Text, score and type by id."""
    scores = keys.get("tokenizer.ggml.scores", keys["tokenizer.ggml.token_type"] * 0)
    return list(zip(keys["tokenizer.ggml.tokens"], scores.tolist(), keys["tokenizer.ggml.token_type"], strict=True))


def added(token_id, text, *, special=False, normalized=False):
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"id": token_id, "content": text, "special": special, "normalized": normalized, **flags}


def as_version_5(n_base=600, more=(), merges_as=list):
    """tiny_spm.model as transformers 5 writes it: tokenizer.json alone, the space put by Metaspace, merges as pairs."""
    table = spm_as_json()
    vocab = {text: i for text, i in table["model"]["vocab"].items() if i < n_base}
    merges = [merge.split(" ") for merge in table["model"]["merges"]]
    table["model"] |= {"vocab": vocab, "merges": [merges_as(merge) for merge in merges], "unk_token": None}
    table |= {"normalizer": None, "added_tokens": table["added_tokens"] + list(more)}
    table["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    return table


SETTINGS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
MODEL = (GOLDEN / "tiny_spm.model").read_bytes()


@pytest.mark.parametrize("merges_as", [list, " ".join], ids=["pairs", "strings"])
def test_a_tokenizer_json_alone_gives_the_original_ids(tmp_path, merges_as):
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=MODEL)
    folder = folder_of(tmp_path, 600, tokenizer=as_version_5(merges_as=merges_as), tokenizer_config=SETTINGS)
    with pytest.warns(UserWarning, match="differs from .* scores are -rank of the merges.*--as-llama-cpp"):
        keys = read(folder)
    vocab = Vocab.from_metadata(keys)
    for text in HARD:
        if "<|user|>" not in text:
            assert vocab.encode(text, add_special=False).tolist() == processor.encode(text), repr(text)
    merges = [merge.replace(" ", "") for merge in spm_as_json()["model"]["merges"]]
    tokens = tokens_of(keys)
    assert all(score == -merges.index(text) for text, score, _ in tokens if text in merges)
    assert [kind for _, _, kind in tokens[:4]] == [UNKNOWN, CONTROL, CONTROL, NORMAL]
    assert sum(kind == BYTE for _, _, kind in tokens) == 256
    theirs = tokens_of(read(folder, as_llama_cpp=True))
    assert {score for _, score, _ in theirs} == {-1000.0} and theirs[0][2] == CONTROL


def test_a_vocabulary_without_scores_is_padded_to_the_embedding(tmp_path):
    folder = folder_of(tmp_path, 640, tokenizer=as_version_5(), tokenizer_config=SETTINGS)
    with pytest.warns(UserWarning, match="padded to the embedding's 640 rows"):
        keys = read(folder)
    assert keys["tokenizer.ggml.tokens"][600:] == [f"[PAD{i}]" for i in range(600, 640)]
    assert set(keys["tokenizer.ggml.token_type"][600:]) == {UNUSED}
    assert len(read(folder, as_llama_cpp=True)["tokenizer.ggml.tokens"]) == 600


NEW = [added(600, "<|im_start|>", special=True), added(601, "<end>", special=True), added(602, "[TOOL]")]
NEW += [added(603, "▁▁"), added(604, "<named>")]


@pytest.mark.parametrize("extra", [["<named>"], {"image": "<named>"}, [{"content": "<named>"}]], ids=range(3))
@pytest.mark.parametrize("key", ["extra_special_tokens", "additional_special_tokens"])
@pytest.mark.parametrize("model", [MODEL, None], ids=["beside", "alone"])
def test_added_tokens_of_tokenizer_json_are_there(tmp_path, model, key, extra):
    settings = SETTINGS | {key: extra}
    folder = folder_of(tmp_path, 640, model=model, tokenizer=as_version_5(more=NEW), tokenizer_config=settings)
    tokens = tokens_of(read(folder))
    expected = [("<|im_start|>", CONTROL), ("<end>", CONTROL), ("[TOOL]", USER_DEFINED), ("  ", USER_DEFINED)]
    assert [(text, kind) for text, _, kind in tokens[600:606]] == [
        *expected,
        ("<named>", CONTROL),
        ("[PAD605]", UNUSED),
    ]
    assert [kind for _, _, kind in tokens[:3]] == [UNKNOWN, CONTROL, CONTROL]
    if model:
        with pytest.warns(UserWarning, match=r"5 added tokens of tokenizer.json are kept; llama.cpp writes \[PADn\]"):
            read(folder)
        assert tokens_of(read(folder, as_llama_cpp=True))[600][0] == "[PAD600]"


def test_pieces_that_tokenizer_json_marks_get_its_type(tmp_path):
    text = "▁the"
    place = as_version_5()["model"]["vocab"][text]
    for special, kind in ((True, CONTROL), (False, USER_DEFINED)):
        table = as_version_5(more=[added(place, text, special=special)])
        folder = folder_of(tmp_path, 600, model=MODEL, tokenizer=table)
        assert tokens_of(read(folder))[place][2] == kind
    assert tokens_of(read(folder, as_llama_cpp=True))[place][2] == NORMAL


def test_tokens_of_old_files_that_the_settings_name_are_control_tokens(tmp_path):
    settings = SETTINGS | {"eos_token": {"content": "<end>"}}
    folder = folder_of(
        tmp_path, 640, model=MODEL, added_tokens={"<end>": 600, "<pad>": 601, "<x>": 602}, tokenizer_config=settings,
        special_tokens_map={"pad_token": "<pad>"},
    )  # fmt: skip
    assert [kind for _, _, kind in tokens_of(read(folder))[600:603]] == [CONTROL, CONTROL, USER_DEFINED]
    theirs = tokens_of(read(folder, as_llama_cpp=True))
    assert [kind for _, _, kind in theirs[600:603]] == [USER_DEFINED] * 3


def trained(**options):
    """Train a SentencePiece model of about 300 pieces; return its bytes."""
    from sentencepiece import SentencePieceTrainer

    out = io.BytesIO()
    text = (GOLDEN.parents[1] / "data" / "text" / "primer.md").read_text(encoding="utf-8").splitlines()[:60]
    settings = {"model_type": "bpe", "byte_fallback": True, "hard_vocab_limit": False, "vocab_size": 400}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=out, **(settings | options))
    return out.getvalue()


def test_user_defined_pieces_are_cut_out_of_a_text(tmp_path):
    model = trained(user_defined_symbols=["<code>", "\t\t", "▁▁▁"])
    folder = folder_of(tmp_path, 640, model=model)
    with pytest.warns(UserWarning, match="3 user-defined pieces are matched in texts"):
        keys = read(folder)
    assert [(text, kind) for text, _, kind in tokens_of(keys)[3:6]] == [
        ("<code>", USER_DEFINED),
        ("\t\t", USER_DEFINED),
        ("   ", USER_DEFINED),
    ]
    vocab = Vocab.from_metadata(keys)
    for text, token_id in (("a<code>b", 3), ("a\t\tb", 4), ("a   b", 5)):
        assert vocab.encode(text, add_special=False).tolist().count(token_id) == 1
    theirs = tokens_of(read(folder, as_llama_cpp=True))
    assert [(text, kind) for text, _, kind in theirs[3:6]] == [("<code>", NORMAL), ("\t\t", NORMAL), ("▁▁▁", NORMAL)]


def test_no_space_is_put_before_a_text_where_the_tokenizer_puts_none(tmp_path):
    from sentencepiece import SentencePieceProcessor

    model = trained(add_dummy_prefix=False)
    folder = folder_of(tmp_path / "m", 640, model=model)
    keys, theirs = read(folder), read(folder, as_llama_cpp=True)
    assert keys["tokenizer.ggml.add_space_prefix"] is False and "tokenizer.ggml.add_space_prefix" not in theirs
    ids = Vocab.from_metadata(keys).encode("the model", add_special=False).tolist()
    assert ids == SentencePieceProcessor(model_proto=model).encode("the model")
    table = as_version_5()
    table["pre_tokenizer"]["prepend_scheme"] = "never"
    folder = folder_of(tmp_path / "json", 600, tokenizer=table)
    assert read(folder)["tokenizer.ggml.add_space_prefix"] is False
    folder_of(tmp_path / "json", 600, tokenizer_config={"add_prefix_space": True})
    assert read(folder)["tokenizer.ggml.add_space_prefix"] is True


def test_byte_level_tokens_of_every_file_are_there(tmp_path):
    decoder = {"630": {"content": "<tool>", "special": True}, "631": {"content": "word"}}
    folder = folder_of(
        tmp_path, 640, tokenizer=bpe_json("bpe_smollm"), added_tokens={"<old>": 632, "<|named|>": 633},
        tokenizer_config={"added_tokens_decoder": decoder, "extra_special_tokens": ["<repo_name>"]},
    )  # fmt: skip
    found = {text: (i, kind) for i, (text, _, kind) in enumerate(tokens_of(read(folder)))}
    assert found["<tool>"] == (630, CONTROL) and found["word"] == (631, USER_DEFINED)
    assert found["<old>"] == (632, USER_DEFINED) and found["<|named|>"] == (633, CONTROL)
    assert found["<repo_name>"] == (603, CONTROL) and found["[PAD634]"] == (634, UNUSED)


def test_an_unknown_pre_tokenizer_is_known_by_how_it_cuts(tmp_path):
    """The same cut, written in another way."""
    table = bpe_json("bpe_qwen2")
    split = table["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\s*[\r\n]+", r"\s*[\n\r]+")
    with pytest.warns(UserWarning, match="its expressions are those of 'qwen2'"):
        assert read(folder_of(tmp_path, 640, tokenizer=table))["tokenizer.ggml.pre"] == "qwen2"


def test_a_folder_that_llama_cpp_reads_right_gives_no_line(tmp_path, recwarn):
    read(folder_of(tmp_path, 640, model=trained(), tokenizer_config=SETTINGS | {"chat_template": "a"}))
    assert not list(recwarn)


# ---- what GGUF cannot hold

WORDS = ["<unk>", "the", "▁the"]
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
KINDS = [
    ({"model": {"type": "WordLevel", "vocab": dict.fromkeys(WORDS, 0)}}, "model type 'WordLevel', need BPE with Byte"),
    ({"model": {"type": "WordPiece", "vocab": dict.fromkeys(WORDS, 0)}}, "model type 'WordPiece', need BPE"),
    ({"model": {"type": "Unigram", "vocab": [[word, -1.0] for word in WORDS]}}, "model type 'Unigram', need BPE"),
    ({"pre_tokenizer": METASPACE}, r"model type 'BPE' with \['Metaspace'\], need BPE with ByteLevel"),
    ({"pre_tokenizer": None}, "model type 'BPE', need BPE with ByteLevel"),
    ({"model": bpe_json("bpe_smollm")["model"] | {"end_of_word_suffix": "</w>"}}, r"with \['end_of_word_suffix'\]"),
]


@pytest.mark.parametrize("as_llama_cpp", [False, True])
@pytest.mark.parametrize(("change", "text"), KINDS, ids=range(len(KINDS)))
def test_kinds_of_tokenizers_that_gguf_cannot_hold(tmp_path, change, text, as_llama_cpp):
    folder = folder_of(tmp_path, 640, tokenizer=bpe_json("bpe_smollm") | change)
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{text}"):
        read(folder, as_llama_cpp=as_llama_cpp)


def test_a_unigram_model_is_refused(tmp_path):
    folder = folder_of(tmp_path, 640, model=trained(model_type="unigram", byte_fallback=False, vocab_size=200))
    with pytest.raises(ValueError, match="tokenizer.model: model_type=unigram, need bpe"):
        read(folder)
    assert read(folder, as_llama_cpp=True)["tokenizer.ggml.model"] == "llama"


def test_two_tokens_of_one_text_are_refused(tmp_path):
    place = as_version_5()["model"]["vocab"]["▁the"]
    folder = folder_of(tmp_path / "a", 640, model=MODEL, added_tokens={"▁the": 620})
    with pytest.raises(ValueError, match=f"tokens {place} and 620 are both '▁the', every token needs its own text"):
        read(folder)
    decoder = {"600": {"content": "<a>"}, "610": {"content": "<a>"}}
    folder = folder_of(tmp_path / "b", 640, model=MODEL, tokenizer_config={"added_tokens_decoder": decoder})
    with pytest.raises(ValueError, match="tokens 600 and 610 are both '<a>'"):
        read(folder)
    for name, table in (("c", as_version_5()), ("d", bpe_json("bpe_smollm"))):
        text = next(text for text in table["model"]["vocab"] if len(text) > 2 and text.isalpha())
        table["added_tokens"].append(added(620, text))
        folder = folder_of(tmp_path / name, 640, tokenizer=table)
        with pytest.raises(ValueError, match=f"tokens [0-9]+ and 620 are both '{text}'"):
            read(folder)


def test_two_texts_of_one_token_are_refused(tmp_path):
    table = bpe_json("bpe_smollm")
    first, second = list(table["model"]["vocab"])[:2]
    table["model"]["vocab"][second] = table["model"]["vocab"][first]
    with pytest.raises(ValueError, match="both have the id .*, every token needs its own"):
        read(folder_of(tmp_path, 640, tokenizer=table))


def test_scores_stay_floats(tmp_path):
    shutil.copy(GOLDEN / "tiny_spm.model", folder_of(tmp_path, 640) / "tokenizer.model")
    assert read(tmp_path)["tokenizer.ggml.scores"].dtype == np.float32
