"""files/vocab.py and pretokenizers.py: text and ids agree with the original tokenizers and with llama.cpp."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from checkpoints import GOLDEN, bpe_json, spm_as_json, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

import quantlab as ql
from quantlab.files.checkpoint import open_checkpoint
from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.files.pretokenizers import pre_tokenizer
from quantlab.files.vocab import CONTROL, NORMAL, USER_DEFINED, Vocab

HARD = [
    "",
    " ",
    "  ",
    "Hello world",
    " Hello  world ",
    "   lead",
    "tab\tx\n\n new\r\n",
    "😀👍🏽 👩‍👩‍👧 🦙",
    "\x00\x01\x02\x7f",
    "a\u0301e\u0308 n\u0303",
    "你好,世界。こんにちは 한국어",
    "مرحبا שלום हिन्दी ไทย",
    "<s>",
    "</s> <s>x<unk>",
    "<0x0A>",
    "▁",
    "▁▁a▁b",
    "<|im_start|>user\nhi<|im_end|>",
    "<|user|> hi <|user|>",
    "1234567 3.14 1,000",
    "don't I'LL we've'S",
    "\u200b\u200d\ufeff\u2028\u2029\u0085\u00a0\u3000",
    "ﬁ ① ² ß İ ı ſ K ‘’“”…—–",
    "    def f(x):\n        return x**2  # c",
    "\U0010ffff\U000e0001",
]


def random_text(n: int) -> str:
    """Return `n` random characters of the planes that are in use."""
    source = random.Random(7)
    return "".join(chr(code) for code in (source.randrange(0x20000) for _ in range(n)) if not 0xD800 <= code < 0xE000)


@pytest.fixture(scope="module")
def vocabs(tmp_path_factory):
    """Vocabularies of a checkpoint of each kind, by the checkpoint's name."""
    names = ("llama1", "llama3", "smollm", "qwen2", "yi")
    folders = {name: write_checkpoint(tmp_path_factory.mktemp(name), name) for name in names}
    found = {}
    for name, folder in folders.items():
        if name in ("llama3", "smollm", "qwen2"):
            with pytest.warns(UserWarning, match="its expressions are those of"):
                found[name] = ql.open(folder).vocab
        else:
            found[name] = open_checkpoint(folder, as_llama_cpp=True).vocab
    return found


def test_spm_ids_are_sentencepieces(vocabs):
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(GOLDEN / "tiny_spm.model"))
    for text in [*HARD, random_text(50_000)]:
        if "<|user|>" not in text:  # a user-defined piece, which llama.cpp's converter makes a normal one
            assert vocabs["llama1"].encode(text, add_special=False).tolist() == processor.encode(text), repr(text[:40])


@pytest.mark.parametrize("name", ["llama3", "smollm", "qwen2"])
def test_bpe_ids_are_the_tokenizers(vocabs, name):
    from tokenizers import Tokenizer

    table = bpe_json(f"bpe_{name}") | {"normalizer": None, "post_processor": None, "added_tokens": []}
    tokenizer = Tokenizer.from_str(json.dumps(table))
    for text in [*HARD, random_text(50_000)]:
        ids = vocabs[name].encode(text, add_special=False).tolist()
        assert ids == tokenizer.encode(text).ids, repr(text[:40])


def test_gemmas_merges_start_from_characters():
    """Its spaces are U+2581, its lines are the pieces; a run of newlines that is a token stays whole."""
    from tokenizers import Tokenizer

    table = spm_as_json() | {"post_processor": None, "added_tokens": [], "pre_tokenizer": None}
    table["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    model = table["model"]
    model["vocab"] |= {"\n\n": len(model["vocab"])}
    keys = {"model": "gpt2", "pre": "gemma4", "tokens": list(model["vocab"]), "merges": model["merges"]}
    keys |= {"bos_token_id": np.uint32(1), "add_bos_token": False}
    vocab = Vocab.from_metadata({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    library = Tokenizer.from_str(json.dumps(table))
    for text in HARD:
        if "\n\n" not in text:
            assert vocab.encode(text, add_special=False).tolist() == library.encode(text).ids, repr(text)
    assert vocab.encode("a\n\nb", add_special=False).tolist().count(vocab.tokens.index("\n\n")) == 1
    assert vocab.add_bos  # llama.cpp overrides the key
    other = {"tokenizer.ggml.model": "gemma4", "tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": []}
    assert Vocab.from_metadata(other).pre == "gemma4"


@pytest.mark.parametrize("name", ["llama1", "llama3", "smollm", "qwen2", "yi"])
def test_ids_are_llama_cpps(vocabs, name):
    """ids.json was made by llama.cpp's server (/tokenize) on the same checkpoints, converted by llama.cpp."""
    golden = json.loads((GOLDEN / "ids.json").read_text())["ids"][name]
    for text, by_flags in zip(HARD, golden, strict=True):
        for flags, ids in by_flags.items():
            add, parse = flags == "add", flags == "parse"
            assert vocabs[name].encode(text, add_special=add, parse_special=parse).tolist() == ids, (text, flags)


@pytest.mark.parametrize("name", ["llama1", "llama3", "smollm", "qwen2"])
def test_decoding_restores_the_text(vocabs, name):
    for text in [*HARD, random_text(5_000)]:
        restored = vocabs[name].decode(vocabs[name].encode(text, add_special=False), special=True)
        assert restored == (text.replace("▁", " ") if vocabs[name].kind == "spm" else text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_goes_through_and_back(vocabs_module, text):
    for vocab in vocabs_module.values():
        restored = vocab.decode(vocab.encode(text, add_special=False), special=True)
        assert restored == (text.replace("▁", " ") if vocab.kind == "spm" else text)


@pytest.fixture(scope="module")
def vocabs_module(vocabs):
    return {name: vocabs[name] for name in ("llama1", "smollm")}


def test_control_tokens_are_text_unless_asked_for(vocabs):
    vocab = vocabs["smollm"]
    end = vocab.tokens.index("<|im_end|>")
    assert vocab.types[end] == CONTROL
    assert end not in vocab.encode("hi<|im_end|>")
    assert vocab.encode("hi<|im_end|>", parse_special=True)[-1] == end
    assert vocab.decode([end]) == "" and vocab.decode([end], special=True) == "<|im_end|>"


def test_user_defined_tokens_are_always_cut_out(vocabs):
    vocab = vocabs["yi"]
    tool = vocab.tokens.index("<tool>")
    assert vocab.types[tool] == USER_DEFINED and tool in vocab.encode("a<tool>b")


def test_bos_and_eos_are_added_where_the_vocabulary_asks(vocabs):
    vocab = vocabs["llama1"]
    assert vocab.add_bos and not vocab.add_eos
    assert vocab.encode("x")[0] == vocab.bos_id and vocab.encode("x", add_special=False)[0] != vocab.bos_id
    assert replace(vocab, add_eos=True).encode("x")[-1] == vocab.eos_id
    assert not vocabs["smollm"].add_bos


def test_the_digest_sees_every_rule(vocabs):
    vocab = vocabs["llama1"]
    others = [replace(vocab, add_bos=False), replace(vocab, scores=vocab.scores + 1), vocabs["yi"], vocabs["smollm"]]
    assert len({vocab.digest, *(other.digest for other in others)}) == 5


KEYS = {"model": "llama", "tokens": ["<unk>", "a", "b"], "scores": np.array([0, -1, -2], np.float32)}
BAD = [
    ({"model": "bert"}, "tokenizer.ggml.model='bert', need 'llama', 'gpt2' or 'gemma4'"),
    ({"model": "gpt2", "pre": "no-such", "merges": []}, "tokenizer.ggml.pre='no-such', need one of"),
    ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
    ({"tokens": []}, "tokenizer.ggml.tokens has 0 tokens"),
    ({"tokens": ["a", "a", "b"]}, "tokenizer.ggml.tokens has 3 tokens, need different ones"),
    ({"scores": np.array([0, np.nan, 0], np.float32)}, "tokenizer.ggml.scores needs 3 finite numbers"),
    ({"token_type": np.array([1], np.int32)}, "tokenizer.ggml.token_type needs 3 finite numbers"),
    # llama.cpp refuses these when it loads them: a key of another type, a byte that is none
    ({"token_type": np.array([1, 1, 1], np.uint32)}, "tokenizer.ggml.token_type needs 3 finite numbers of type int32"),
    ({"scores": np.array([0, -1, -2], np.float64)}, "scores needs 3 finite numbers of type float32 or int32"),
    ({"bos_token_id": np.int32(1)}, r"tokenizer.ggml.bos_token_id=np.int32\(1\) of type int32, need uint32"),
    ({"fim_pad_token_id": np.uint64(1)}, "fim_pad_token_id=.* of type uint64, need uint32"),
    ({"add_bos_token": np.uint8(1)}, "tokenizer.ggml.add_bos_token=.* of type uint8, need bool: llama.cpp refuses"),
    ({"add_space_prefix": "yes"}, "add_space_prefix='yes' of type str, need bool"),
    ({"pre": np.uint32(1)}, "tokenizer.ggml.pre=.* of type uint32, need str"),
    ({"token_type": np.array([2, 6, 1], np.int32)}, "token 1 is a byte called 'a', need <0x00> to <0xFF>"),
]


@pytest.mark.parametrize(("change", "text"), BAD)
def test_bad_vocabularies_get_one_line(change, text):
    with pytest.raises(ValueError, match=text):
        Vocab.from_metadata({f"tokenizer.ggml.{key}": value for key, value in (KEYS | change).items()})


def test_bytes_that_are_not_all_there_stand_for_nothing():
    tokens = ["<unk>", "a", "b", "<0x0A>", "\udcff"]
    types = np.array([2, 1, 1, 6, 1], np.int32)
    keys = KEYS | {"tokens": tokens, "scores": np.zeros(5, np.float32), "token_type": types, "add_bos_token": False}
    vocab = Vocab.from_metadata({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    assert vocab.encode("a\nb\ufffd").tolist() == [
        0,
        1,
        0,
        2,
        0,
    ]  # the leading space, the line's end, the sign: unknown


def test_tokens_that_no_text_holds_are_passed_over():
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "\udcff", "b"], "merges": []}
    vocab = Vocab.from_metadata({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    assert vocab.encode("ab").tolist() == [0, 2]
    assert vocab.decode([0, 1, 2]) == "a\ufffdb"


def test_ids_out_of_range_are_taken_as_not_given():
    keys = KEYS | {"bos_token_id": np.uint32(1 << 30), "eos_token_id": np.uint32(3)}
    vocab = Vocab.from_metadata({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    assert (vocab.bos_id, vocab.eos_id) == (1, 2)


@pytest.mark.parametrize(
    ("tokens", "kinds"),
    [
        (["<|channel|>", "<|end|>", "<|return|>", "<|call|>"], [USER_DEFINED, USER_DEFINED, CONTROL, CONTROL]),
        (["<|end|>", "<|return|>", "</s>"], [CONTROL, CONTROL, CONTROL]),
        (["<|end|>", "<|flush|>", "<|calls|>"], [USER_DEFINED, CONTROL, CONTROL]),
        (["</s>", "<|tool_response>", "<turn|>"], [NORMAL, CONTROL, CONTROL]),
    ],
)
def test_types_that_llama_cpp_corrects(tokens, kinds):
    """As of gpt-oss, Solar and Gemma 4: `llama_vocab::impl::load`."""
    keys = KEYS | {"tokens": ["<unk>", *tokens], "scores": np.zeros(1 + len(tokens), np.float32)}
    vocab = Vocab.from_metadata({f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    assert vocab._kinds[1:] == kinds


def test_a_vocabulary_has_as_many_tokens_as_the_embedding_has_rows(tmp_path):
    header = {f"tokenizer.ggml.{key}": value for key, value in KEYS.items()} | {"general.architecture": "llama"}
    x = np.zeros((4, 32), np.float32)
    path = tmp_path / "a.gguf"
    write_gguf(path, header, [TensorSpec("token_embd.weight", x.shape, "F32")], [x])
    with pytest.raises(ValueError, match="a.gguf: token_embd.weight has 4 rows, but the vocabulary has 3 tokens"):
        ql.open(path).vocab  # noqa: B018


def test_bad_texts_and_merges_get_one_line(vocabs):
    with pytest.raises(ValueError, match=r"character 1 is '\\ud800', half a surrogate pair"):
        vocabs["llama1"].encode("a\ud800")
    with pytest.raises(ValueError, match="add_bos is set and bos_id is not"):
        replace(vocabs["llama1"], bos_id=None).encode("a")
    with pytest.raises(ValueError, match="merge 'a nothing' names missing tokens"):
        replace(vocabs["smollm"], merges=("a nothing",)).encode("a")
    with pytest.raises(ValueError, match="need one of"):
        pre_tokenizer("no-such")
    zero = Vocab.from_metadata({f"tokenizer.ggml.{key}": x for key, x in (KEYS | {"tokens": ["u", "a", "\0"]}).items()})
    with pytest.raises(ValueError, match="metadata: sentencepiece refuses the tokens .*null character"):
        zero.encode("a")
