"""Importance matrices on disk, against files that llama-imatrix wrote from the same numbers."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.files.imatrix_file import ImportanceMatrix, merge, read_imatrix, write_imatrix

GOLDEN = json.loads((Path(__file__).parent / "golden" / "imatrix.json").read_text())


def made(seed):
    """Sums that only integer arithmetic went into, so that every machine makes the same ones."""
    rng = np.random.default_rng(seed)
    names = [f"blk.{i}.{kind}.weight" for i in range(2) for kind in ("attn_q", "ffn_down")]
    sums = {name: (rng.integers(0, 1 << 20, (1, 64)) / 1024).astype(np.float32) for name in names}
    counts = {name: np.full(1, 8 * 512, np.float32) for name in names}
    return ImportanceMatrix(sums, counts, 8, 512, (f"text{seed}.txt",))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def equal(a, b):
    same = a.sums.keys() == b.sums.keys() and all(np.array_equal(a.sums[name], b.sums[name]) for name in a.sums)
    counts = all(np.array_equal(a.counts[name], b.counts[name]) for name in a.counts)
    return same and counts and (a.chunk_count, a.datasets) == (b.chunk_count, b.datasets)


def test_written_files_equal_llama_imatrix(tmp_path):
    first, second = made(1), made(2)
    assert sha256(write_imatrix(first, tmp_path / "a.gguf")) == GOLDEN["gguf"]
    assert sha256(write_imatrix(first, tmp_path / "a.dat", legacy=True)) == GOLDEN["legacy"]
    assert sha256(write_imatrix(merge([first, second]), tmp_path / "ab.gguf")) == GOLDEN["merged"]
    assert (
        sha256(write_imatrix(merge([read_imatrix(tmp_path / "a.dat"), second]), tmp_path / "c.gguf"))
        == (GOLDEN["merged_legacy"])
    )


def test_heads_may_be_counted_together():
    """As llama-imatrix counts the heads of latent attention."""
    name, sums = "blk.0.attn_k_b.weight", np.arange(8, dtype=np.float32)
    apart = ImportanceMatrix({name: sums.reshape(2, 4)}, {name: np.full(2, 3, np.float32)}, 1, 512)
    together = ImportanceMatrix({name: 3 * sums[None]}, {name: np.full(1, 5, np.float32)}, 1, 512)
    for found in (merge([apart, together]), merge([together, apart]), merge([together, together, apart, apart])):
        total = found.counts[name][0]
        assert found.sums[name].shape == (2, 4) and found.counts[name].tolist() == [total, total]
        assert np.array_equal(found.sums[name].reshape(-1), sums * total / 2)
    three = ImportanceMatrix({name: sums[:6].reshape(3, 2)}, {name: np.full(3, 5, np.float32)}, 1, 512)
    with pytest.raises(ValueError, match="shapes .* must be equal"):
        merge([apart, three])


def test_both_formats_are_recognized_by_content(tmp_path):
    matrix = made(1)
    gguf = read_imatrix(write_imatrix(matrix, tmp_path / "wrong.dat"))
    legacy = read_imatrix(write_imatrix(matrix, tmp_path / "wrong.gguf", legacy=True))
    assert (gguf.is_legacy, legacy.is_legacy) == (False, True)
    assert equal(gguf, matrix) and legacy.datasets == matrix.datasets


def test_weights_are_means_and_ones_where_nothing_was_counted():
    sums = {"a": np.array([[2, 4]], np.float32), "b": np.array([[0, 0]], np.float32)}
    counts = {"a": np.array([2], np.float32), "b": np.array([0], np.float32)}
    entries = ImportanceMatrix(sums, counts, 1, 512).entries
    assert entries["a"].tolist() == [1, 2] and entries["b"].tolist() == [1, 1]
    assert ImportanceMatrix(sums, counts, 1, 0).weights("b").tolist() == [0, 0]
    assert entries["a"].dtype == np.float32


def test_entries_are_kept_by_name():
    assert list(made(1).keep(lambda name: "ffn" in name).entries) == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]


def test_means_are_not_written_as_sums(tmp_path):
    legacy = read_imatrix(write_imatrix(made(1), tmp_path / "a.dat", legacy=True))
    with pytest.raises(ValueError, match="holds means, a GGUF matrix needs sums"):
        write_imatrix(legacy, tmp_path / "b.gguf")


@pytest.mark.parametrize("n", [0, 3, 4, 7, 20, 100, 500])
def test_a_file_cut_off_anywhere_is_refused(tmp_path, n):
    raw = write_imatrix(made(1), tmp_path / "a.dat", legacy=True).read_bytes()
    (tmp_path / "b.dat").write_bytes(raw[:n])
    with pytest.raises(ValueError, match=r"b\.dat"):
        read_imatrix(tmp_path / "b.dat")


def test_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such importance matrix"):
        read_imatrix(tmp_path / "none")
    bad = tmp_path / "bad"
    bad.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(ValueError, match="first 4 bytes are b'PK"):
        read_imatrix(bad)
    bad.write_bytes(struct.pack("<ii", 1, 1 << 30) + bytes(100))
    with pytest.raises(ValueError, match="length of name 0=1073741824"):
        read_imatrix(bad)
    bad.write_bytes(struct.pack("<ii4sii", 1, 4, b"blk0", 1, -1) + bytes(100))
    with pytest.raises(ValueError, match="blk0: nval=-1"):
        read_imatrix(bad)
    write_gguf(bad, {"general.architecture": "llama"}, [], [])
    with pytest.raises(ValueError, match=r"imatrix\.datasets is missing, but every importance matrix has it"):
        read_imatrix(bad)
    matrix = made(1)
    matrix.sums["blk.0.attn_q.weight"][0, 3] = np.nan
    write_imatrix(matrix, bad, overwrite=True)
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight: values must be finite"):
        read_imatrix(bad)
    matrix = made(1)
    matrix.counts["blk.0.attn_q.weight"].view(np.uint32)[0] = 0x7F800001  # a signalling NaN
    write_imatrix(matrix, bad, overwrite=True)
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight: values must be finite"):
        read_imatrix(bad)
    metadata = {"imatrix.datasets": ["t"], "imatrix.chunk_count": np.uint32(1), "imatrix.chunk_size": np.uint32(512)}
    write_gguf(bad, metadata, [TensorSpec("a.in_sum2", (4,), "F32")], [np.ones(4, np.float32)])
    with pytest.raises(ValueError, match="a: sums and counts do not match"):
        read_imatrix(bad)
    write_gguf(bad, metadata, [], [])
    with pytest.raises(ValueError, match="has no entries"):
        read_imatrix(bad)
    for key, value in [
        ("chunk_size", np.uint32(0)),
        ("chunk_size", np.float32(np.inf)),
        ("chunk_size", np.ones(1, np.int32)),
        ("chunk_count", "x"),
        ("chunk_count", ["x"]),
        ("datasets", [["t"]]),
        ("datasets", "t"),
    ]:
        write_gguf(bad, metadata | {f"imatrix.{key}": value}, [], [])
        with pytest.raises(ValueError, match=rf"bad: imatrix.*{key}=.*, must be"):
            read_imatrix(bad)
    bad.write_bytes(struct.pack("<ii4sii", 1, 4, b"\x1b[2J", 1, 1) + bytes(100))
    with pytest.raises(ValueError, match=r"bad: name 0 is '\\x1b\[2J', must be printable"):
        read_imatrix(bad)
    wide = ImportanceMatrix({"a": np.ones((1, 8), np.float32)}, {"a": np.ones(1, np.float32)}, 1, 512)
    long = ImportanceMatrix({"a": np.ones((1, 9), np.float32)}, {"a": np.ones(1, np.float32)}, 1, 512)
    with pytest.raises(ValueError, match="a: shapes"):
        merge([wide, long])


def test_names_of_texts_are_shown_printably():
    sums, counts = {"a": np.ones((1, 8), np.float32)}, {"a": np.ones(1, np.float32)}
    shown = str(ImportanceMatrix(sums, counts, 1, 512, ("plain.txt", "\x1b[2J")))
    assert "plain.txt, '\\x1b[2J'" in shown and "\x1b" not in shown


def test_sums_beyond_float32_are_refused():
    counts = {"a": np.ones(1, np.float32)}
    most = np.full((1, 32), np.finfo(np.float32).max)
    matrix = ImportanceMatrix({"a": most}, counts, 1, 512)
    with pytest.raises(ValueError, match=r"^a: the sum exceeds 3.403e\+38"):
        merge([matrix, matrix])
