"""Input files behind a file, folder or name: an output of the same call must not replace them."""

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from quantlab.files.bundled import bundled_path
from quantlab.files.output import DIGESTS, beside, is_digests, is_report

__all__ = ["input_files"]

_WEIGHTS = {".safetensors", ".bin", ".pth", ".pt"}
_OF_CHECKPOINTS = {*_WEIGHTS, ".json", ".model", ".jinja", ".tiktoken", ".md", ".py"}
_TEXTS_OF_CHECKPOINTS = {"merges.txt", "vocab.txt"}
_SHARD = re.compile(r"-\d{5}-of-\d{5}(\.\w+)$")


def input_files(names: Iterable[object]) -> list[Path]:
    """Return every existing file that is read for these inputs; links are not resolved.

    Parameters
    ----------
    names : iterable
        Files, checkpoint folders, bundled names; `NAME=FILE` as `compare` takes it. None is left out.

    Examples
    --------
    >>> sorted(path.name for path in input_files(["tiny"]))[:2]
    ['README.md', 'config.json']
    """
    found = []
    for name in filter(None, names):
        for part in {str(name), str(name).partition("=")[2]} - {""}:
            for path in filter(None, (bundled_path(part), Path(part))):
                found += _behind(path)
    return found


def _behind(path: Path) -> list[Path]:
    """Return the files that are read for one path: a checkpoint's, all shards, digests."""
    try:
        if path.is_dir():
            return _checkpoint(path)
        if not path.exists():
            return []
    except OSError:  # the text of another option, too long for a name
        return []
    found = [path, *(old for old in (beside(path, DIGESTS), beside(path, ".json")) if is_digests(old))]
    if shard := _SHARD.search(path.name):
        number = "[0-9]" * 5
        found += path.parent.glob(f"{glob.escape(path.name[: shard.start()])}-{number}-of-{number}{shard[1]}")
    if path.suffix in _WEIGHTS or path.name in ("config.json", "params.json"):
        found += _checkpoint(path.parent)
    return found


def _checkpoint(folder: Path) -> list[Path]:
    """Return the files of a checkpoint's folder, without reports and digests of other calls."""
    files = [file for file in folder.iterdir() if file.suffix in _OF_CHECKPOINTS or file.name in _TEXTS_OF_CHECKPOINTS]
    return [file for file in files if file.suffix != ".json" or not (is_report(file) or is_digests(file))]
