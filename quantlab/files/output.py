"""Write a file beside its final name and rename it when it is whole."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["beside", "check_apart", "check_output", "check_outputs", "replacing"]


def check_output(path: str | Path, *, overwrite: bool = False) -> Path:
    """Refuse an output that exists or whose folder does not, before any work is done.

    Raises
    ------
    FileExistsError
        If `path` exists and `overwrite` is false.
    FileNotFoundError
        If the folder of `path` does not exist.
    IsADirectoryError
        If `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, need the name of a file. Name the output file.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: exists already. Choose another name or pass --overwrite.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: folder {path.parent} does not exist. Create it first.")
    return path


def check_apart(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that is one of the input's files, whatever its name and whatever else is allowed.

    Raises
    ------
    ValueError
        If `path` is one of `inputs`.
    """
    if path.exists() and any(path.samefile(file) for file in inputs if file.exists()):
        raise ValueError(f"{path}: is the input, must be another file. Name another output.")


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path] = (), *, overwrite: bool = False) -> None:
    """Refuse several outputs of one run, before any work is done: each must be possible, and no other file of the run.

    Raises
    ------
    FileExistsError, FileNotFoundError, IsADirectoryError
        As `check_output`.
    ValueError
        If two outputs are one file, or an output is an input.
    """
    inputs, seen = list(inputs), set()
    for path in outputs:
        check_output(path, overwrite=overwrite)
        check_apart(path, inputs)
        if path.resolve() in seen:
            raise ValueError(f"{path}: is named for two outputs, must be for one. Name another output.")
        seen.add(path.resolve())


def beside(path: Path, suffix: str) -> Path:
    """Return the path that stands beside `path` with `suffix` added to its name."""
    return path.with_name(path.name + suffix)


@contextmanager
def replacing(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` when the block ends well, remove it otherwise.

    Parameters
    ----------
    path : str or Path
        Final name of the output.
    overwrite : bool
        Whether a file of that name may be replaced.

    Raises
    ------
    FileExistsError, FileNotFoundError, IsADirectoryError
        As `check_output`, before the block is entered.
    OSError
        If the disk fills up inside the block.

    Examples
    --------
    >>> import tempfile
    >>> final = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replacing(final) as part:
    ...     _ = part.write_text("whole")
    >>> final.read_text()
    'whole'
    """
    path = check_output(path, overwrite=overwrite)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = os.strerror(error.errno)
            raise OSError(f"{path}: {reason}. Free some space or choose another folder.") from error
        raise
    finally:
        part.unlink(missing_ok=True)
