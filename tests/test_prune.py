"""transform/prune.py: layers left out of a file, byte for byte as llama-quantize --prune-layers does."""

import hashlib
from pathlib import Path

import made_models
import numpy as np
import pytest

import quantlab as ql
from quantlab.transform.prune import layers_of, pruned_metadata, pruned_names

# arguments -> SHA-256 of what llama-quantize of llama.cpp wrote (llama-cpp-python 0.3.36)
GOLDEN = {
    ("wide.gguf", "Q4_K_M", (1, 3), None): "67c32a169c22a35588207b86478a24864178c94a25a46f47fdc78cd5879eb19a",
    ("wide.gguf", "Q2_K", (2, 5, 6), "m.imatrix"): "97fabcdd1ce10a3f2c31848346c7cd2f5f3d51503e8b9fcfab916665d0689068",
}
SHARDS = [
    "59157f9f4c341ff977e11e8b1eb1dd79bb57846ecff0c1254b59d5e7dbbabed8",
    "f952c7df3a373d1b7eb41c9a9338c7642501cd5ede37406c4a9ca0bb287d1b33",
]


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_models.made_gguf(Path("wide.gguf"))
    made_models.made_imatrix(Path("m.imatrix"))
    made_models.made_shards(Path("."))


def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("case", GOLDEN)
def test_the_bytes_are_those_of_llama_quantize(work, case):
    source, ftype, layers, matrix = case
    out = ql.quantize(source, "out.gguf", ftype=ftype, prune_layers=layers, imatrix=matrix)
    assert sha256(out) == GOLDEN[case]


def test_shards_stay_shards(work):
    shard = "made-00001-of-00002.gguf"
    ql.quantize(shard, "out.gguf", ftype="Q4_K_M", prune_layers=[3], keep_split=True)
    assert [sha256(f"out-0000{i}-of-00002.gguf") for i in (1, 2)] == SHARDS


def test_numbers_of_layers_are_read():
    assert layers_of("3, 1") == (3, 1)
    for text in ("", "a", "1,,2", "-1", "1.5"):
        with pytest.raises(ValueError, match="prune_layers=.*, must be layer numbers"):
            layers_of(text)


def test_bad_layers_are_refused():
    names = [f"blk.{i}.attn_q.weight" for i in range(3)]
    for layers, rule in (([3], "must be 0 to 2"), ([-1], "must be 0 to 2"), ([0, 1, 2], "must leave at least one")):
        with pytest.raises(ValueError, match=rule):
            pruned_names(names, 3, layers)
    per_layer = {"general.architecture": "x", "x.attention.head_count_kv": np.array([1, 2, 3])}
    with pytest.raises(ValueError, match="x.attention.head_count_kv: has a value per layer"):
        pruned_metadata(per_layer, 3, [1])
