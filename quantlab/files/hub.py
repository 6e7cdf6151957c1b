"""Checkpoints, found by path or by their name on the Hugging Face hub."""

import re
from pathlib import Path

from quantlab.files.bundled import bundled_path, is_own, model_path
from quantlab.files.recognize import reason

__all__ = ["default_folder", "find_checkpoint", "repository_of"]

_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "README.md", "LICENSE*"]


def find_checkpoint(src: str | Path) -> Path:
    """Return the path of a checkpoint, downloaded into the hub's cache if it is named `org/model`.

    Raises
    ------
    ValueError
        If it is a GGUF file already.
    FileNotFoundError
        If there is nothing at that path and it is not a name on the hub, or the hub cannot be reached.
    ImportError
        If a name on the hub is asked for and huggingface_hub is not installed.
    """
    path = Path(src) if bundled_path(str(src)) is None else model_path(src)
    if path.suffix == ".gguf" and path.is_file():
        raise ValueError(f"{src}: is a GGUF file already, must be a checkpoint. Use the file directly, or quantize it.")
    if path.exists():
        return path
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(src)):
        raise FileNotFoundError(f"{src}: no such file or folder. Give a checkpoint's folder, or org/model on the hub.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{src}: no such folder, and a name on the hub needs huggingface_hub. Run pip install huggingface_hub."
        ) from None
    try:
        return Path(snapshot_download(str(src), allow_patterns=_WANTED))
    except Exception as error:  # network, authorization and naming errors come from several libraries
        raise FileNotFoundError(
            f"{src}: no such folder, and the hub did not provide it ({reason(error)}). Check the name and the network."
        ) from None


def repository_of(folder: Path) -> str | None:
    """Return the hub name, `org/model`, of a folder in the hub's cache (None: any other folder).

    Examples
    --------
    >>> repository_of(Path("hub/models--org--model-1B/snapshots/0123456789abcdef0123456789abcdef01234567"))
    'org/model-1B'
    """
    kind, _, name = folder.parent.parent.name.partition("--")
    if kind != "models" or folder.parent.name != "snapshots" or not re.fullmatch("[0-9a-f]{40}", folder.name):
        return None
    return name.replace("--", "/", 1)


def default_folder(src: Path) -> Path:
    """Return the folder for outputs of a checkpoint or file: its own, but never a cache or bundled folder."""
    folder = src if src.is_dir() else src.parent
    is_cached = any(map(repository_of, (folder.absolute(), *folder.absolute().parents)))
    return Path() if is_cached or is_own(folder) else folder
