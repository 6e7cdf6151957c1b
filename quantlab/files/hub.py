"""Checkpoints by path or by their name on the Hugging Face hub."""

import re
from pathlib import Path

__all__ = ["find_checkpoint"]

_WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "README.md", "LICENSE*"]


def find_checkpoint(src: str | Path) -> Path:
    """Return the path of a checkpoint; one on the hub (`org/model`) is downloaded into the hub's cache.

    Raises
    ------
    FileNotFoundError
        If there is nothing at that path and it is no name on the hub, or the hub cannot be reached.
    ImportError
        If a name on the hub is asked for and huggingface_hub is not installed.
    """
    path = Path(src)
    if path.exists():
        return path
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(src)):
        raise FileNotFoundError(f"{src}: no such file or folder. Name a checkpoint's folder, or org/model on the hub.")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(f"{src}: no such folder; a name on the hub needs the package huggingface_hub.") from None
    try:
        return Path(snapshot_download(str(src), allow_patterns=_WANTED))
    except Exception as error:  # network, authorization and naming errors come from several libraries
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"{src}: no such folder, and the hub does not give it ({reason}). Check the name and the network."
        ) from None
