"""Checkpoint → F32, F16, BF16 or Q8_0 GGUF, a few rows in memory at a time."""

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from quantlab.files.arguments import check_path
from quantlab.files.checkpoint import OUTTYPES, RangeLoss, open_checkpoint
from quantlab.files.gguf_file import TensorSpec, pack_header, write_gguf
from quantlab.files.hub import default_folder, find_checkpoint
from quantlab.files.inputs import input_files
from quantlab.files.model import LazyTensor, Model
from quantlab.files.output import check_apart, check_output, follow, is_stream, replacing
from quantlab.files.progress import announce
from quantlab.transform.slabs import in_order

__all__ = ["convert"]

BLOCK = 1 << 20  # bytes of output per piece of work; larger arrays come as fresh pages, whose zeroing takes most time
AHEAD = 8  # pieces that are read while one is written


def convert(
    src: str | Path,
    outfile: str | Path | None = None,
    *,
    outtype: str = "auto",
    as_llama_cpp: bool = False,
    model_name: str | None = None,
    mtp: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Convert a checkpoint to GGUF, as llama.cpp's converter does.

    Parameters
    ----------
    src : str or Path
        A bundled checkpoint's name ("tiny"), a Hugging Face folder, a folder of Meta's, one file of weights with its
        configuration beside it, or a name on the Hugging Face hub (`org/model`).
    outfile : str or Path, optional
        Default: `ggml-model-<TYPE>.gguf` in the folder of `src`; in the current one for a name or a hub's checkpoint.
    outtype : str
        Type of the matrices: `"f32" "f16" "bf16" "q8_0"`, or `"auto"` for the checkpoint's own. Vectors stay F32.
    as_llama_cpp : bool
        Write llama.cpp's bytes where quantlab differs on purpose: a vocabulary that gives texts other ids than the
        model was trained with, an activation that llama.cpp does not compute.
    model_name : str, optional
        `general.name` of the file. Default: that of the model card, or one made from the name of the folder or of the
        hub's repository.
    mtp : bool
        Write layers that guess several tokens at once, which llama.cpp can draft with. Nothing here computes them.
    overwrite : bool
        Whether a file of that name may be replaced.
    progress : bool
        Say what the run will take, and show a progress bar, on standard error.

    Returns
    -------
    Path
        The file that was written. An interrupted or failed conversion leaves nothing under that name.

    Raises
    ------
    FileNotFoundError
        If the checkpoint, its weights, configuration or tokenizer are missing.
    FileExistsError
        If the output exists and `overwrite` is false.
    ValueError
        If a file of the checkpoint is damaged or of a kind that is not read, a weight is not finite, or the output is
        one of the checkpoint's files.
    OSError
        If the disk has not enough room.

    Warns
    -----
    UserWarning
        If values left F16's range or became zero in it, the pre-tokenizer is not known, the vocabulary differs from
        what llama.cpp's converter writes, or a part of the checkpoint is left out or read under another name.

    Source: `convert_hf_to_gguf.py` of llama.cpp, for what is written.
    """
    check_path(src=src, **({} if outfile is None else {"outfile": outfile}))
    src, loss = find_checkpoint(src), RangeLoss()
    model = open_checkpoint(src, outtype, loss=loss, as_llama_cpp=as_llama_cpp, model_name=model_name, mtp=mtp)
    name = OUTTYPES[outtype] or _own_type(model)
    folder = src if src.is_dir() else src.parent
    outfile = _checked(outfile, default_folder(src) / f"ggml-model-{name}.gguf", overwrite)
    check_apart(outfile, input_files([src, folder]))
    specs = [TensorSpec(tensor.name, tensor.shape, tensor.qtype) for tensor in model]
    header = len(pack_header(model.metadata, specs))
    _check_room(outfile, header + model.nbytes)
    if progress:
        announce(_plan_line(src, outfile, model, header))
    # beside the disk, kernels in more threads would only wait for each other; reading alone loads no kernel
    limit = None if outtype == "auto" else 1
    blocks = in_order(lambda read: read(), _reads(model), kernel_threads=limit, ahead=AHEAD)
    data = (islice(blocks, _n_blocks(tensor)) for tensor in model)
    with replacing(outfile, overwrite=overwrite) as part:
        with tqdm(total=model.nbytes, unit="B", unit_scale=True, desc=outfile.name, disable=not progress) as bar:
            try:
                write_gguf(part, model.metadata, specs, data, progress=bar.update)
            finally:
                blocks.close()
    _warn_of_loss(loss)
    return outfile


def _checked(outfile: str | Path | None, default: Path, overwrite: bool) -> Path:
    """Return the output's path, or refuse one that must not be written."""
    try:
        return check_output(default if outfile is None else outfile, overwrite=overwrite)
    except PermissionError:
        if outfile is not None:
            raise
        raise PermissionError(
            f"{default}: the checkpoint's folder is not writable. Choose another output with outfile=FILE."
        ) from None


def _own_type(model: Model) -> str:
    """Return the type of the first matrix."""
    return next(tensor.qtype for tensor in model if len(tensor.shape) > 1)


def _check_room(outfile: Path, nbytes: int) -> None:
    free = _free(outfile)
    if free is not None and free < nbytes:
        raise OSError(
            f"{outfile}: needs {nbytes} bytes, the disk has {free} free. Free some space or choose another folder."
        )


def _free(outfile: Path) -> int | None:
    """Return the free bytes on the output's disk (None: a device or a pipe)."""
    return None if is_stream(outfile) else shutil.disk_usage(follow(outfile).parent).free


def _plan_line(src: Path, outfile: Path, model: Model, header: int) -> str:
    """Return one line about a conversion's input, output, memory and time, estimated from a first read."""
    largest = max(model, key=lambda tensor: tensor.nbytes)
    rows = min(_rows_per_block(largest), largest.nrows)
    largest.rows(0, 1)  # what is loaded for it is loaded once
    begin = time.perf_counter()
    largest.rows(0, rows)
    rate = rows * largest.nbytes / largest.nrows / (time.perf_counter() - begin)
    free = _free(outfile)
    disk = "" if free is None else f" ({free / 2**30:.1f} GiB are free)"
    return (
        f"{src} → {outfile}: {len(model)} tensors, {(header + model.nbytes) / 2**20:.1f} MiB to write{disk}, "
        f"about {4 * (AHEAD + 1) * BLOCK >> 20} MiB of memory, at least {max(model.nbytes / rate, 1):.0f} s"
    )


def _rows_per_block(tensor: LazyTensor) -> int:
    return max(1, BLOCK * tensor.nrows // tensor.nbytes)


def _n_blocks(tensor: LazyTensor) -> int:
    return -(-tensor.nrows // _rows_per_block(tensor))


def _reads(model: Model) -> Iterator[Callable[[], np.ndarray]]:
    """Yield the reads of all tensors, block by block, in file order."""
    for tensor in model:
        step = _rows_per_block(tensor)
        for start in range(0, tensor.nrows, step):
            yield lambda tensor=tensor, start=start, step=step: tensor.rows(start, min(start + step, tensor.nrows))


def _warn_of_loss(loss: RangeLoss) -> None:
    for what, counts in (("became infinite", loss.overflowed), ("became zero", loss.vanished)):
        if counts:
            worst = max(counts, key=lambda name: counts[name])
            warnings.warn(
                f"{sum(counts.values())} values of {len(counts)} tensors {what} in F16, "
                f"most of them in {worst} ({counts[worst]}). BF16 keeps their range.",
                stacklevel=3,
            )
