"""Names and sampling defaults of a file; what cannot be read of a model card never stops a conversion."""

import os

import pytest
from checkpoints import write_checkpoint

import quantlab as ql
from quantlab.files.hub import default_folder, repository_of

COMMIT = "0123456789abcdef" * 2 + "01234567"
CARD, SAMPLING = "README.md", "generation_config.json"
BROKEN = [
    (CARD, b"---\na: [\n---\n"),
    (CARD, b"---\nlicense: [1]\ntags: [7]\n---\n"),
    (CARD, b"---\nname: {a: 1}\n---\n"),
    (CARD, b"---\ntitle: a: b\n\tc\n---\n"),
    (CARD, b"---\n\xff\xfe\n---\n"),
    (CARD, b"---\na: &a [x, x]\nb: [*a, *a]\n---\n"),
    (CARD, b"---\n" + b"a\n" * 200_000 + b"---\n"),
    (SAMPLING, b'{"top_k": "x"}'),
    (SAMPLING, b'{"top_k": 99999999999999999999}'),
    (SAMPLING, b"{"),
    (SAMPLING, b'{"a":' * 100_000),
]


@pytest.mark.parametrize(("name", "content"), BROKEN, ids=range(len(BROKEN)))
def test_what_cannot_be_read_is_left_out(tmp_path, name, content):
    src = write_checkpoint(tmp_path / "Some-Model-1B-Chat", "llama1")
    (src / name).write_bytes(content)
    with pytest.warns(UserWarning, match=f"{name}: left out, ") as caught:
        model = ql.open(src)
    messages = [str(warning.message) for warning in caught if "left out" in str(warning.message)]
    assert len(messages) == 1 and "\n" not in messages[0]
    assert model.metadata["general.name"] == "Some Model 1B Chat" and len(model) == 21


def test_both_files_may_be_broken(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1")
    (src / CARD).write_bytes(b"---\nname: [1]\n---\n")
    (src / SAMPLING).write_bytes(b'{"temperature": "hot"}')
    with pytest.warns(UserWarning, match=CARD), pytest.warns(UserWarning, match=SAMPLING):
        assert ql.open(src).metadata["general.name"] == "M"


def test_a_good_part_stays_beside_a_broken_one(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1")
    (src / CARD).write_bytes(b"---\nname: Good\nlicense: mit\n---\n")
    (src / SAMPLING).write_bytes(b'{"temperature": "hot"}')
    with pytest.warns(UserWarning, match=SAMPLING):
        metadata = ql.open(src).metadata
    assert (metadata["general.name"], metadata["general.license"]) == ("Good", "mit")
    (src / SAMPLING).write_bytes(b'{"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}')
    metadata = ql.open(src).metadata
    assert float(metadata["general.sampling.temp"]) == pytest.approx(0.6) and metadata["general.sampling.top_k"] == 20
    assert float(metadata["general.sampling.penalty_repeat"]) == pytest.approx(1.1)


# ---- the hub's cache


@pytest.fixture
def cached(tmp_path):
    """A checkpoint as the hub's cache keeps it: a folder named after a commit, links to blobs."""
    repository = tmp_path / "hub" / "models--org--Tiny-Model-1B-Chat"
    src = write_checkpoint(repository / "snapshots" / COMMIT, "llama1", "F32")
    (repository / "blobs").mkdir()
    for i, path in enumerate(list(src.iterdir())):
        os.rename(path, repository / "blobs" / str(i))
        path.symlink_to(repository / "blobs" / str(i))
    return src


def files_under(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_the_repository_gives_the_name_and_nothing_is_written_into_the_cache(cached, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = files_under(tmp_path / "hub")
    path = ql.convert(cached, progress=False)
    assert path.resolve() == tmp_path / "here" / "ggml-model-F32.gguf"
    assert ql.open(path).metadata["general.name"] == "Tiny Model 1B Chat"
    quantized = ql.quantize(cached, ftype="Q8_0")
    assert quantized.resolve() == tmp_path / "here" / "ggml-model-Q8_0.gguf"
    assert files_under(tmp_path / "hub") == before


def test_a_name_of_ones_own(cached, tmp_path):
    path = ql.convert(cached, tmp_path / "a.gguf", model_name="My model", progress=False)
    metadata = ql.open(path).metadata
    assert metadata["general.name"] == "My model" and metadata["general.finetune"] == "1b-Chat"


def test_folders_of_the_cache_are_recognized_by_all_of_their_parts(tmp_path):
    assert repository_of(tmp_path / "models--a--b--c" / "snapshots" / COMMIT) == "a/b--c"
    assert repository_of(tmp_path / "models--gpt2" / "snapshots" / COMMIT) == "gpt2"
    for folder in (f"datasets--a--b/snapshots/{COMMIT}", f"models--a--b/refs/{COMMIT}", "models--a--b/snapshots/main"):
        assert repository_of(tmp_path / folder) is None
        (tmp_path / folder).mkdir(parents=True)
        assert default_folder(tmp_path / folder) == tmp_path / folder
