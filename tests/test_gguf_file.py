"""files/gguf_file.py, gguf_shards.py: what is written is read, and nothing that a file claims is believed."""

import os
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_models import NARROW, metadata_of, shape_of

import quantlab as ql
from quantlab.files.gguf_file import Strings, TensorSpec, read_header, write_gguf

METADATA = {
    "general.architecture": "llama",
    "a.u8": np.uint8(7),
    "a.i8": np.int8(-7),
    "a.u16": np.uint16(65535),
    "a.i16": np.int16(-3),
    "a.u32": np.uint32(1 << 31),
    "a.i32": np.int32(-5),
    "a.f32": np.float32(0.1),
    "a.u64": np.uint64(1 << 63),
    "a.i64": np.int64(-(1 << 62)),
    "a.f64": np.float64(0.1),
    "a.bool": True,
    "a.text": "é 😀 \udcff",
    "a.floats": np.array([1.5, -2.5], np.float32),
    "a.flags": np.array([True, False]),
    "a.none": np.array([], np.int32),
    "a.texts": ["", "x", "ü"],
    "a.nested": [["a"], ["b", "c"]],
}


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def entry(name: bytes = b"x", shape=(32,), qtype: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, qtype, offset)


def gguf(keys=(), entries=(), data: bytes = b"", version: int = 3, n_keys=None, n_tensors=None) -> bytes:
    """Assemble a file from parts that need not fit together."""
    n_keys, n_tensors = len(keys) if n_keys is None else n_keys, len(entries) if n_tensors is None else n_tensors
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join([*keys, *entries])
    return head + bytes(-len(head) % 32) + data


KEY = string(b"k") + struct.pack("<I", 4) + struct.pack("<I", 1)
ARRAY = string(b"k") + struct.pack("<I", 9)
ALIGNMENT = string(b"general.alignment")

BAD = {
    "empty": (b"", r"first 4 bytes are b'', need b'GGUF'. The file is empty"),
    "torch": (b"PK\x03\x04" + bytes(99), r"b'PK\\x03\\x04', need b'GGUF'. This looks like a torch file"),
    "safetensors": (struct.pack("<Q", 99) + b'{"a":', "looks like a safetensors file"),
    "html": (b"<!DOCTYPE html><html>", "This is a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "legacy ggml": (b"tjgg" + bytes(40), "GGJT file of 2023"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "version 1": (gguf(version=1), "version=1, need 2 or 3"),
    "version 4": (gguf(version=4), "version=4, need 2 or 3"),
    "half a header": (b"GGUF" + struct.pack("<I", 3) + b"\1", "ends at byte 16, the file has 9"),
    "absurd n_kv": (gguf(n_keys=1 << 60), "n_kv=1152921504606846976"),
    "absurd n_tensors": (gguf(n_tensors=1 << 63), "n_tensors=9223372036854775808"),
    "key length": (gguf([struct.pack("<Q", 1 << 40)]), "key 0 has length 1099511627776, need at most 65535"),
    "text length": (
        gguf([string(b"k") + struct.pack("<IQ", 8, 1 << 62)]),
        "k has length 4611686018427387904, need at most",
    ),
    "text past the end": (gguf([string(b"k") + struct.pack("<IQ", 8, 9999)]), "k ends at byte .*, the file has"),
    "empty key": (gguf([string(b"") + struct.pack("<IB", 0, 1)]), "key 0 is ''"),
    "same key": (gguf([KEY, KEY]), "key 1 is 'k', must be a printable name that occurs once"),
    "value type": (gguf([string(b"k") + struct.pack("<I", 13)]), "k: value type 13, need 0 to 12"),
    "array length": (gguf([ARRAY + struct.pack("<IQ", 4, 1 << 60)]), "k: array of 1152921504606846976 values"),
    "array of texts": (gguf([ARRAY + struct.pack("<IQ", 8, 99)], data=bytes(64)), "k: array of 99 values, only"),
    "array type": (gguf([ARRAY + struct.pack("<IQ", 77, 1) + b"\0"]), "array of value type 77"),
    "nested arrays": (
        gguf([ARRAY + struct.pack("<IQ", 9, 1) * 6 + struct.pack("<IQ", 4, 0)]),
        "arrays nested deeper than 4",
    ),
    "many nested arrays": (
        gguf([ARRAY + struct.pack("<IQ", 9, 5000) + struct.pack("<IQ", 4, 0) * 5000]),
        "k brings the file to 5000 arrays in arrays, need at most 4096",
    ),
    "many strings": (
        gguf([ARRAY + struct.pack("<IQ", 8, 1_600_000) + bytes(8 * 1_600_000)]),
        "k brings the file to 1600000 strings, need at most 1500000",
    ),
    "alignment": (
        gguf([string(b"general.alignment") + struct.pack("<II", 4, 48)]),
        r"general.alignment=np.uint32\(48\), need a power of two",
    ),
    "alignment 0": (gguf([ALIGNMENT + struct.pack("<II", 4, 0)]), r"general.alignment=np.uint32\(0\), need a power of"),
    "alignment of 8 bytes": (
        gguf([ALIGNMENT + struct.pack("<IQ", 10, 32)]),
        "general.alignment=.*, need a power of two",
    ),
    "huge alignment": (
        gguf([ALIGNMENT + struct.pack("<II", 4, 1 << 31)], [entry()], bytes(256)),
        "x: shape=.* F32 ends at byte 2147483776, the file has",
    ),
    "key of strange letters": (gguf([string(b"k\xff\x1b[2J") + KEY[9:]]), r"key 0 is 'k\\udcff\\x1b\[2J', must be a"),
    "long key": (gguf([string(b"k" * 60000) + struct.pack("<I", 99)]), "k{99}…k{90}.*: value type 99, need 0 to 12"),
    "nested array length": (
        gguf([ARRAY + struct.pack("<IQIQ", 9, 1, 4, 1 << 61)]),
        "k: array of 2305843009213693952 values",
    ),
    "string in an array": (
        gguf([ARRAY + struct.pack("<IQQ", 8, 1, (1 << 64) - 1)], data=bytes(64)),
        "k ends at byte .*, the file has",
    ),
    "tensor name": (gguf(entries=[entry(b"n" * 200)]), "tensor name has length 200, need at most 127"),
    "broken name": (gguf(entries=[entry(b"a\nb")], data=bytes(128)), r"tensor name 'a\\nb', need printable characters"),
    "n_dims": (gguf(entries=[entry(shape=(1,) * 5)], data=bytes(999)), "x: n_dims=5, GGUF tensors have at most 4"),
    "zero dimension": (gguf(entries=[entry(shape=(0,))]), r"x: shape=\(0,\), every dimension must be at least 1"),
    "product overflows": (gguf(entries=[entry(shape=(1 << 62, 1 << 62))]), "x: shape=.* ends at byte"),
    "type": (gguf(entries=[entry(qtype=77)]), "x: ggml type 77 is not known. A newer llama.cpp may read it"),
    "removed type": (gguf(entries=[entry(qtype=31)]), r"x: ggml type 31 \(Q4_0_4_4\) was removed from llama.cpp"),
    "type of a fork": (gguf(entries=[entry(qtype=139)]), "x: ggml type 139 is unknown to llama.cpp; numbers 97 to 399"),
    "row of no block": (gguf(entries=[entry(shape=(31,), qtype=8)]), "x: n_per_row=31 is not a multiple of the Q8_0"),
    "same name": (gguf(entries=[entry(), entry(offset=128)], data=bytes(256)), "x: two tensors have this name"),
    "crooked offset": (gguf(entries=[entry(offset=4)], data=bytes(256)), "x: offset=4 is not a multiple of"),
    "out of the file": (gguf(entries=[entry(offset=1 << 63)], data=bytes(128)), "x: shape=.* F32 ends at byte"),
    "truncated data": (gguf(entries=[entry()], data=bytes(127)), "x: shape=.* F32 ends at byte .*, the file has"),
    "overlap": (gguf(entries=[entry(b"a"), entry(b"b", offset=96)], data=bytes(256)), "b: overlaps a"),
}


def write(path, metadata, tensors):
    specs = [TensorSpec(name, value.shape, "F32") for name, value in tensors.items()]
    return write_gguf(path, metadata, specs, tensors.values())


def test_every_value_type_comes_back(tmp_path):
    write(tmp_path / "a.gguf", METADATA, {})
    found = read_header(tmp_path / "a.gguf").metadata
    assert list(found) == list(METADATA)
    for key, value in METADATA.items():
        is_strings = isinstance(value, list) and isinstance(value[0], str)
        assert type(found[key]) is (Strings if is_strings else type(value))
        assert np.array_equal(found[key], value) if isinstance(value, np.ndarray) else found[key] == value
        assert getattr(found[key], "dtype", None) == getattr(value, "dtype", None)


def test_tensors_come_back_whole_and_by_rows(tmp_path, rng):
    x, y = rng.standard_normal((3, 5, 32), np.float32), rng.standard_normal(7, np.float32)
    nbytes = write(tmp_path / "a.gguf", METADATA, {"x": x, "y": y})
    assert nbytes == (tmp_path / "a.gguf").stat().st_size
    model = ql.open(tmp_path / "a.gguf")
    assert model.names == ["x", "y"] and "y" in model and len(model) == 2
    assert np.array_equal(model.tensor("x").load(), x)
    assert np.array_equal(model.tensor("x").rows(4, 9), x.reshape(15, 32)[4:9])
    assert np.array_equal(model.tensor("x").floats(2, 3), x.reshape(15, 32)[2:3])
    assert np.array_equal(model.tensor("y").floats(), y)
    assert list(model.tensors["bytes"]) == [x.nbytes, y.nbytes]


def test_a_tensor_without_dimensions_is_one_value(tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf(entries=[entry(shape=())], data=struct.pack("<f", 2.5)))
    tensor = ql.open(tmp_path / "a.gguf").tensor("x")
    assert tensor.shape == (1,) and tensor.load().tolist() == [2.5]


def test_blocks_of_rows_make_the_same_file(tmp_path, rng):
    x = rng.standard_normal((10, 32), np.float32)
    spec = [TensorSpec("x", x.shape, "F32")]
    write_gguf(tmp_path / "a.gguf", METADATA, spec, [x])
    write_gguf(tmp_path / "b.gguf", METADATA, spec, [iter([x[:3], x[3:]])])
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_version_2_is_read(tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf([KEY], version=2))
    assert read_header(tmp_path / "a.gguf").version == 2


@pytest.mark.parametrize("lengths", [[5], [0, 1, 7, 8], [255, 256, 300, 3], [0, 9, 65536, 2, 1 << 18], [7, 150_000]])
@pytest.mark.parametrize("byte", [b"x", b"\0"])
def test_arrays_of_strings_of_all_lengths_come_back(tmp_path, rng, lengths, byte):
    """However the strings lie to what the reader looks at in one go, and whatever their bytes look like."""
    common = rng.choice([length for length in lengths if length < 400], 20_000)
    rare = [byte.decode() * length for length in lengths] * 3
    texts = [byte.decode() * int(length) for length in common[:9000]] + rare + [str(length) for length in common[9000:]]
    write(tmp_path / "a.gguf", {"a": texts, "b": ["", "last"]}, {})
    found = read_header(tmp_path / "a.gguf").metadata
    assert list(found["a"]) == texts and list(found["b"]) == ["", "last"]


def test_a_large_vocabulary_comes_back(tmp_path):
    tokens = [f"token{i}" for i in range(152_000)]
    write(tmp_path / "a.gguf", METADATA | {"tokens": tokens, "merges": [f"{t} {t}" for t in tokens]}, {})
    assert read_header(tmp_path / "a.gguf").metadata["tokens"] == tokens


def test_a_pipe_is_called_one(tmp_path):
    os.mkfifo(tmp_path / "a.gguf")
    with pytest.raises(OSError, match="a.gguf: is a pipe or device, must be a file on disk"):
        ql.open(tmp_path / "a.gguf")


def test_the_content_decides_not_the_name(tmp_path):
    write(tmp_path / "a.bin", METADATA, {})
    assert ql.open(tmp_path / "a.bin").metadata["a.bool"] is True
    (tmp_path / "b.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="This looks like a torch file"):
        ql.open(tmp_path / "b.gguf")


def shards(folder, x):
    """Write two shards of one tensor each."""
    for i in range(2):
        keys = {"split.no": np.uint16(i), "split.count": np.uint16(2), "split.tensors.count": np.int32(2)}
        write(folder / f"m-{i + 1:05d}-of-00002.gguf", METADATA | keys, {f"x{i}": x[i]})
    return [folder / f"m-{i + 1:05d}-of-00002.gguf" for i in range(2)]


def test_shards_open_as_one_model_from_any_of_them(tmp_path, rng):
    x = rng.standard_normal((2, 3, 32), np.float32)
    for path in shards(tmp_path, x):
        model = ql.open(path)
        assert model.names == ["x0", "x1"] and "split.count" not in model.metadata
        assert np.array_equal(model.tensor("x1").load(), x[1])


@pytest.mark.parametrize(("name", "content"), BAD.items(), ids=BAD)
def test_bad_files_get_one_line(tmp_path, name, content):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content[0])
    with pytest.raises(ValueError, match=content[1]) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_bad_shards_get_one_line(tmp_path, rng):
    first, second = shards(tmp_path, rng.standard_normal((2, 3, 32), np.float32))
    first.with_name("other.gguf").write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="so the name must end in -00001-of-00002.gguf"):
        ql.open(first.with_name("other.gguf"))
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="00002-of-00002.gguf: split.no=0, need 1 of 2"):
        ql.open(first)
    second.write_bytes(whole.replace(b"x1", b"x0"))
    with pytest.raises(ValueError, match="1 different tensors in 2 entries"):
        ql.open(first)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="00002-of-00002.gguf: this shard of 2 is missing"):
        ql.open(first)


def test_a_file_that_shrinks_while_it_is_open_gets_one_line(tmp_path):
    write(tmp_path / "a.gguf", {}, {"x": np.ones((4, 32), np.float32)})
    tensor = ql.open(tmp_path / "a.gguf").tensor("x")
    (tmp_path / "a.gguf").write_bytes((tmp_path / "a.gguf").read_bytes()[:-40])
    with pytest.raises(ValueError, match="file ends at byte .*, 40 bytes too early"):
        tensor.load()
    with pytest.raises(ValueError, match="x: rows 3:5, must be a range within 0:4"):
        tensor.rows(3, 5)


def test_missing_files_and_tensors_get_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no.gguf: no such file"):
        ql.open(tmp_path / "no.gguf")
    write(tmp_path / "a.gguf", {}, {})
    with pytest.raises(KeyError, match="no tensor is called y"):
        ql.open(tmp_path / "a.gguf").tensor("y")


def test_the_writer_refuses_what_does_not_fit(tmp_path):
    spec, x = [TensorSpec("x", (2, 32), "F32")], np.ones((1, 32), np.float32)
    with pytest.raises(ValueError, match="x: 128 bytes of data"):
        write_gguf(tmp_path / "a.gguf", {}, spec, [x])
    with pytest.raises(ValueError, match="x: has no data"):
        write_gguf(tmp_path / "a.gguf", {}, spec, [])
    with pytest.raises(TypeError, match="k: int has no GGUF type"):
        write_gguf(tmp_path / "a.gguf", {"k": 7}, [], [])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_in_one_line_or_does_no_harm(tmp_path, data):
    """Change, cut or lengthen a good file anywhere: it opens, or a ValueError of one line says why not."""
    path = tmp_path / "a.gguf"
    write(path, METADATA, {"x": np.ones((2, 32), np.float32), "y": np.ones(32, np.float32)})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 8))
        raw[at : at + 8] = data.draw(st.sampled_from([b"\xff" * 8, bytes(8), b"", b"\x01"]) | st.binary(max_size=8))
    path.write_bytes(raw)
    try:
        read_header(path)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))


@pytest.mark.parametrize("value", [np.float32(np.nan), np.float32(np.inf), "x", np.array([1, 2]), [], [["a"]]], ids=str)
@pytest.mark.parametrize(
    "key",
    ["split.count", "split.no", "general.file_type", "llama.block_count", "llama.rope.scaling.type"]
    + [f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "bos_token_id", "add_bos_token")],
)
def test_values_of_the_wrong_kind_get_one_line_or_do_no_harm(tmp_path, key, value):
    path = tmp_path / "a.gguf"
    vocabulary = {"model": "gpt2", "tokens": ["a", "b"], "merges": [], "pre": "gpt-2"}
    metadata = metadata_of(shape_of(**NARROW)) | {f"tokenizer.ggml.{name}": text for name, text in vocabulary.items()}
    write_gguf(path, metadata | {key: value}, [], [])
    for ask in (lambda model: model.ftype, lambda model: model.hparams, lambda model: model.vocab):
        try:
            ask(ql.open(path))
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error)
