"""Safe outputs: checked before any work, written beside the final name, renamed when complete.

Every output of every word and function goes through `check_output` and `replacing`. The rules: never a file that the
same call reads; never a folder; a device or pipe is written into, not replaced; a link is followed to its target; a
file that exists is replaced only with `overwrite`, or where `own` recognizes it as this program's by its content.
"""

import errno
import json
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = [
    "DIGESTS",
    "beside",
    "check_apart",
    "check_output",
    "check_outputs",
    "descriptor",
    "follow",
    "is_digests",
    "is_picture",
    "is_report",
    "is_stream",
    "open_stream",
    "replacing",
]

DIGESTS = ".quantlab.json"  # added to a quantized file's name: the digests that a later run with `reuse` compares

Own = Callable[[Path], bool]


# ── rules ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_output(path: str | Path, *, overwrite: bool = False, own: Own | None = None) -> Path:
    """Refuse an output that must not be written, before any work.

    Parameters
    ----------
    path : str or Path
    overwrite : bool
        Whether a file that exists may be replaced.
    own : callable, optional
        `is_report`, `is_picture` or `is_digests`: such a file may always be replaced.

    Raises
    ------
    FileExistsError
        If a file exists that may not be replaced.
    FileNotFoundError, PermissionError
        If the folder does not exist or cannot be written.
    IsADirectoryError, OSError
        If `path` is a folder, a disk or a socket.
    ValueError
        If a report would replace a binary file, which `overwrite` does not allow either.
    """
    path = Path(path)
    if is_stream(path):
        return path
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    if mode is not None:
        _check_existing(path, mode, overwrite, own)
    folder = follow(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{path}: folder {folder} does not exist. Create it first.")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path}: folder {folder} is not writable. Choose an output in another folder.")
    return path


def _check_existing(path: Path, mode: int, overwrite: bool, own: Own | None) -> None:
    """Refuse to replace a file that must be kept."""
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{path}: is a folder, must be a file. Give the name of the output file.")
    if not stat.S_ISREG(mode):
        raise OSError(f"{path}: is a disk or a socket, must be a file, device or pipe. Choose another output.")
    if own is not None and own(path):
        return
    if not overwrite:
        what, remedy = _OTHERS.get(own, ("", "Choose another name or pass overwrite=True"))  # pyright: ignore[reportCallIssue, reportArgumentType]
        raise FileExistsError(f"{path}: exists already{what}. {remedy}.")
    if own is is_report and b"\0" in _start(path):
        raise ValueError(f"{path}: is a binary file, a report may replace only text. Choose another name.")


def check_apart(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that the same call reads, under the same name or another.

    Raises
    ------
    ValueError
        If `path` is one of `inputs`.
    """
    if path.exists() and not is_stream(path) and any(path.samefile(file) for file in inputs if file.exists()):
        raise ValueError(f"{path}: is the input, must be another file. Choose another output.")


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path] = (), *, overwrite: bool = False) -> None:
    """Check the outputs of one call: each must be writable, different from the inputs and the others.

    Parameters
    ----------
    outputs, overwrite
        As for `check_output`.
    inputs : iterable of Path
        All files that the call reads, see `quantlab.files.inputs.input_files`.

    Raises
    ------
    FileExistsError, FileNotFoundError, PermissionError, IsADirectoryError, OSError
        As `check_output`.
    ValueError
        If two outputs are one file, or an output is an input.
    """
    inputs, seen = list(inputs), set()
    for path in outputs:
        check_apart(path, inputs)
        check_output(path, overwrite=overwrite)
        if follow(path) in seen:
            raise ValueError(f"{path}: is given for two outputs, must be for one. Choose another output.")
        if not is_stream(path):
            seen.add(follow(path))


# ── what is there ───────────────────────────────────────────────────────────────────────────────────────────────────


def follow(path: str | Path) -> Path:
    """Return the path that links lead to; it need not exist."""
    return Path(os.path.realpath(path))


def is_stream(path: str | Path) -> bool:
    """Tell whether a path is written into, not replaced: a pipe, a device, an open file's number."""
    if descriptor(path) is not None:
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def descriptor(path: str | Path) -> int | None:
    """Return the open file's number behind a path such as /dev/stdout (None: any other path)."""
    path = str(path)
    for _ in range(40):  # as many links as Linux follows
        folder, name = os.path.split(os.path.abspath(path))
        folder = os.path.realpath(folder)
        if folder in ("/dev/fd", f"/proc/{os.getpid()}/fd") and name.isdecimal():
            return int(name)
        path = os.path.join(folder, name)
        if not os.path.islink(path):
            return None
        path = os.path.join(folder, os.readlink(path))
    return None


def open_stream(path: str | Path) -> BinaryIO:
    """Open a pipe, device or open file's number for writing, after flushing the printed text."""
    number = descriptor(path)
    if number is None:
        return open(path, "wb")
    _flush()
    return os.fdopen(os.dup(number), "wb")


def _flush() -> None:
    for printed in (sys.stdout, sys.stderr):
        if printed is not None:
            printed.flush()


def is_report(path: Path) -> bool:
    """Tell whether a file is a report of `--json` or `save`: JSON of `schema`, `protocol` and `rows`."""
    return _has(_json(path), schema=int, protocol=dict, rows=list)


def is_digests(path: Path) -> bool:
    """Tell whether a file holds a quantized file's digests: JSON of `schema`, `header` and `tensors`."""
    return _has(_json(path), schema=int, header=str, tensors=dict)


def is_picture(path: Path) -> bool:
    """Tell whether a file is a PNG picture that quantlab wrote."""
    return b"tEXtSoftware\0quantlab" in _start(path)


_OTHERS = {  # what a file is not that stands in the way of a report, a picture, digests; and the remedy
    is_report: (" and is not a report", "Choose another name or pass overwrite=True"),
    is_picture: (" and is not a picture of quantlab", "Choose another name or pass overwrite=True"),
    is_digests: (" and holds no digests of quantlab", "Move it, or name another output"),
}


def _has(document: object, **types: type) -> bool:
    return isinstance(document, dict) and all(isinstance(document.get(key), kind) for key, kind in types.items())


def _json(path: Path) -> object:
    """Return a file's JSON (None: it holds none)."""
    if not _start(path).lstrip().startswith(b"{"):
        return None
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def _start(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4096)
    except OSError:
        return b""


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def beside(path: Path, suffix: str) -> Path:
    """Return the path in the same folder with `suffix` added to the name."""
    return path.with_name(path.name + suffix)


@contextmanager
def replacing(path: str | Path, *, overwrite: bool = False, own: Own | None = None) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` on success, remove it on failure.

    Where `path` is a device or a pipe, the block writes into it. Where it is a link, the link's target is replaced.

    Parameters
    ----------
    path : str or Path
        Final name of the output.
    overwrite, own
        As for `check_output`.

    Raises
    ------
    FileExistsError, FileNotFoundError, PermissionError, IsADirectoryError, ValueError
        As `check_output`, before the block is entered.
    OSError
        If the disk fills up inside the block.

    Examples
    --------
    >>> final = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replacing(final) as part:
    ...     _ = part.write_text("whole")
    >>> final.read_text()
    'whole'
    """
    path = check_output(path, overwrite=overwrite, own=own)
    if is_stream(path):
        with _into(path) as part:
            yield part
        return
    final = follow(path)
    part = final.with_name(f"{final.name[:50]}.{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, final)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = os.strerror(error.errno)
            raise OSError(f"{path}: {reason}. Free some space or choose another folder.") from error
        raise
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _into(path: Path) -> Iterator[Path]:
    """Yield a path for writing a device or pipe; an open file gets its bytes on success."""
    _flush()
    number = descriptor(path)
    if number is None or not stat.S_ISREG(os.fstat(number).st_mode):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="quantlab-") as folder:
        part = Path(folder) / path.name
        yield part
        with open_stream(path) as out, open(part, "rb") as whole:
            shutil.copyfileobj(whole, out, 1 << 20)
