"""Names of a checkpoint's tensors, without the prefixes that training wrappers add."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

__all__ = ["plain_names", "text_names"]

Source = TypeVar("Source")
# torch.compile, FSDP and activation checkpointing anywhere in a name; data parallel training in front
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_IN_FRONT = re.compile(r"^(\.?module\.)+|^\.")
# parts of a name that belong to what sees and hears, as llama.cpp's converter tells them
_OTHER = re.compile(
    r"^(mlp|vit\.|vpm\.|siglip2\.|conformer\.|merger\.|resampler\.|sound_\w+\.|speech_embeddings\.)"
    r"|visual\.|vision[._]|audio[._]|talker\.|token2wav\.|code2wav\.|projector\.|image_newline|view_seperator"
    r"|pre_mm_projector_norm|patch_embed|patch_merger\.|patch_merge_mlp\.|model\.connector\."
)
_INNER = re.compile(r"(layers\.\d+|embed_tokens|norm)\.")  # how the names of a model without its head begin


def plain_names(folder: Path, stored: Mapping[str, Source]) -> dict[str, Source]:
    """Return tensors by the names that transformers gives them.

    The parts that `torch.compile` (`_orig_mod.`), data parallel training (`module.`) and FSDP add are dropped. Names
    without `model.` in front, as those of a model that was saved without its head, get it back.

    Raises
    ------
    ValueError
        If two tensors have the same name then.

    Warns
    -----
    UserWarning
        If names were changed.
    """
    names = {name: _IN_FRONT.sub("", _WRAPPERS.sub("", name)) for name in stored}
    changed = [name for name, plain in names.items() if plain != name]
    if changed:
        _say(folder, changed[0], names[changed[0]], len(changed), "a wrapper of the training put more into them.")
    bare = [name for name, plain in names.items() if _INNER.match(plain)]
    is_meta = "tok_embeddings.weight" in names.values()  # Meta's own names have no such prefix
    if bare and not is_meta and not any(plain.startswith("model.") for plain in names.values()):
        names |= {name: f"model.{names[name]}" for name in bare}
        _say(folder, bare[0], names[bare[0]], len(bare), "the names lack the prefix model.")
    plain = {names[name]: source for name, source in stored.items()}
    if len(plain) < len(names):
        twice = next(name for name in names.values() if list(names.values()).count(name) > 1)
        raise ValueError(
            f"{folder}: {twice}: two tensors have this name once prefixes are removed. Save the checkpoint again."
        )
    return plain


def text_names(folder: Path, stored: Mapping[str, Source]) -> dict[str, Source]:
    """Return the tensors of the text model within a multimodal checkpoint, by their plain names.

    Warns
    -----
    UserWarning
        If others are left out.
    """
    kept = {name: source for name, source in stored.items() if not _OTHER.search(name)}
    left = [name for name in stored if name not in kept]
    if left:
        parts = sorted({name.removeprefix("model.").partition(".")[0] for name in left})
        warnings.warn(
            f"{folder}: the text model is converted; {len(left)} tensors of {', '.join(parts)} are left out. "
            f"llama.cpp's converter writes them with --mmproj.",
            stacklevel=4,
        )
    return {name.replace("language_model.", ""): source for name, source in kept.items()}


def _say(folder: Path, name: str, plain: str, count: int, why: str) -> None:
    warnings.warn(f"{folder}: {name} is read as {plain}, {count} names in all: {why}", stacklevel=4)
