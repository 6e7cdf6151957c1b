"""The folder of a release: what may stand in it, and what an earlier run has finished there."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from quantlab.files.output import beside, replacing

STATE = ".quantlab-release.json"  # what is finished, and of which release
WORK = ".quantlab-work"  # folder of what is needed to resume
SUMS = "SHA256SUMS"
_DRAFT = re.compile(r"\.[0-9a-f]{8}\.part$")  # that `replacing` writes under


class Folder:
    """The folder of a release.

    Parameters
    ----------
    path : Path
        Made if missing; its parent must exist.
    identity : str
        What the bytes of all files depend on.
    names, overwrite
        Files of the release, relative to `path`, and whether files that stand there may be replaced.

    Attributes
    ----------
    files : dict of str to dict
        What is finished: name → `bytes` and `sha256`.
    others : list of str
        What else stands there; only with `overwrite`.

    Raises
    ------
    FileExistsError
        If there are other files, or those of another release, and `overwrite` is false.
    FileNotFoundError, NotADirectoryError
        If the parent folder is missing, or `path` is a file.
    """

    def __init__(self, path: Path, identity: str, names: Iterable[str], *, overwrite: bool):
        self.path, self._identity, names = path, identity, set(names)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path}: folder {path.parent} does not exist. Create it first.")
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path}: is a file, must be a folder. Name another.")
        state = self._read_state()
        is_same = state is not None and state["identity"] == identity
        former = {} if state is None else state["files"]
        known = names | {SUMS} | (set(former) if overwrite or is_same else set())
        self.others = sorted(name for name in self._there() if not _belongs(name, known))
        if not overwrite and state is not None and not is_same:
            raise FileExistsError(f"{path}: holds another release. Name another folder or pass overwrite=True.")
        if not overwrite and (self.others or state is None and self._there()):
            first = (self.others or sorted(self._there()))[0]
            raise FileExistsError(f"{path}: holds other files, {first}. Name another folder or pass overwrite=True.")
        self.files = {n: entry for n, entry in former.items() if is_same and self._is_whole(n, entry)}
        self._names = known

    def open(self) -> None:
        """Make the folder, and remove what interrupted runs and former releases left there."""
        self.path.mkdir(exist_ok=True)
        for name in self._there() - set(self.files) - set(self.others):
            file = self.path / name
            if not name.startswith(f"{WORK}/") and not name.endswith((".gguf.part", ".gguf.part.json")):
                file.unlink()
        self._save()

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def unfinished_bytes(self) -> int:
        """Return the size of what is there and will be gone on with, or replaced."""
        return sum((self.path / name).stat().st_size for name in self._there() - set(self.files) - set(self.others))

    def work(self, name: str) -> Path:
        """Return a folder for what is needed to resume, made if missing."""
        folder = self.path / WORK / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finish(self, *names: str) -> None:
        """Note files that are whole, with their digests."""
        for name in names:
            path = self.path / name
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self.files[name] = {"bytes": path.stat().st_size, "sha256": digest}
        self._save()

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file and note it; one that is there already stays."""
        if name in self:
            return
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        with replacing(path, overwrite=True) as part:
            part.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        self.finish(name)

    def close(self) -> None:
        """Write the digests of all files, and remove what was needed to resume."""
        lines = [f"{entry['sha256']}  {name}\n" for name, entry in sorted(self.files.items()) if name != SUMS]
        self.files.pop(SUMS, None)
        self.write(SUMS, "".join(lines))
        shutil.rmtree(self.path / WORK, ignore_errors=True)

    def _there(self) -> set[str]:
        """Files in the folder, the state aside."""
        if not self.path.is_dir():
            return set()
        found = (p for p in self.path.rglob("*") if p.is_symlink() or not p.is_dir())
        return {p.relative_to(self.path).as_posix() for p in found} - {STATE}

    def _is_whole(self, name: str, entry: dict) -> bool:
        path = self.path / name
        return path.is_file() and path.stat().st_size == entry["bytes"]

    def _read_state(self) -> dict | None:
        try:
            state = json.loads((self.path / STATE).read_text(encoding="utf-8"))
            files = {
                str(name): {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in state["files"].items()
            }
            return {"identity": str(state["identity"]), "files": files}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    def _save(self) -> None:
        with replacing(self.path / STATE, overwrite=True) as part:
            part.write_text(json.dumps({"identity": self._identity, "files": self.files}, indent=1), encoding="utf-8")


def _belongs(name: str, known: set[str]) -> bool:
    """Tell whether a file belongs to the release, or is a draft of one."""
    if name.startswith(f"{WORK}/"):
        return True
    whole = _DRAFT.sub("", name)
    drafts = whole != name and any(Path(n).name[:50] == Path(whole).name for n in (*known, STATE))
    parts = {str(beside(Path(n), suffix)) for n in known for suffix in (".part", ".part.json")}
    return name in known or drafts or name in parts
