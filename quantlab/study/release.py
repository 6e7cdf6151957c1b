"""From a checkpoint to a folder that can be uploaded: files, matrix, layouts, report, card, digests.

importance matrix ─ all plain files in one pass ─ each refined file ─ layouts ─ report ─ card ─ SHA256SUMS

The same call resumes where a run was stopped, and gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from quantlab.result import Result
from quantlab.study.model_card import About, upload_command
from quantlab.study.release_folder import STATE, Folder
from quantlab.study.release_making import COLLECT, Making


@dataclass(frozen=True)
class Release(Result):
    """The contents of a release, written or planned.

    Attributes
    ----------
    protocol : dict
        `folder`, `name`, `model`, `imatrix`, `dry_run`; `bytes` of all quantized files; `seconds`, an estimate by step
        (of a dry run); `others`, files in the folder that are not of the release.
    rows : tuple of dict
        `file`, `what` it is, `bytes` (of a dry run only those of quantized files), `sha256` (None in a dry run).
    command : str
        What uploads the folder.
    """

    protocol: dict[str, Any]
    rows: tuple[dict, ...]
    command: str

    def _document(self) -> dict[str, Any]:
        return {"protocol": self.protocol | {"command": self.command}, "rows": self.rows}

    def _lines(self) -> list[str]:
        p = self.protocol
        total = f"{p['bytes'] / 2**20:.2f} MiB of quantized files"
        lines = [f"{p['name']} in {p['folder']}: {len(self.rows)} files, {total}"]
        if p["dry_run"]:
            steps = ", ".join(f"{step} {value:.0f} s" for step, value in p["seconds"].items())
            lines += [f"estimated time: {steps}; nothing was written"]
        lines += [f"not of this release: {', '.join(p['others'])}"] if p["others"] else []
        return [*lines, f"To upload it: {self.command}"]

    def _shown(self) -> pd.DataFrame:
        frame = self.to_frame()
        frame["MiB"] = [("" if pd.isna(n) else f"{n / 2**20:.2f}") for n in frame.pop("bytes")]
        return frame[["file", "what", "MiB"]]


def release(
    model,
    out: str | Path,
    *,
    ftypes: Sequence,
    imatrix=COLLECT,
    text="sampled",
    texts="primer",
    n_ctx: int = 512,
    chunks: int | None = None,
    rules: str = "current",
    split_max_size: str | int | None = None,
    name: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    quantized_by: str | None = None,
    prompt: str | None = None,
    allow_requantize: bool = False,
    mode: str = "float",
    device: str = "auto",
    device_memory: str | int | None = None,
    memory: str | int | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Release:
    """Make a folder that can be uploaded: quantized files, and what tells people which one to take and how to run it.

    All files that are not refined come from one pass over the source. The same call resumes a stopped run. Nothing is
    uploaded.

    Parameters
    ----------
    model : str or Path
        A checkpoint folder, a name on the hub (`org/model`), a GGUF file or a bundled model's name.
    out : str or Path
        The folder; made if missing.
    ftypes : sequence of str
        Mixtures (`Q4_K_M`), refined ones (`Q4_K_M+refined`) and recipe files, also as `NAME=SPEC`.
    imatrix : str, Path, ImportanceMatrix or None
        Importance matrix. `collect`: make one on `text`. None: quantize without.
    text : str, Path or Text
        What to calibrate on.
    texts : str, Path, a sequence of them, a mapping, or None
        What the report measures on, as for `quantlab.report`; None leaves the report out.
    n_ctx : int
        Tokens per chunk.
    chunks : int, optional
        Chunks of each text at most (default: the whole text).
    rules : str
        Rule set of ftypes.
    split_max_size : str or int, optional
        Most bytes of tensors in a file, `45G` or `500M` (powers of 1000); larger models get shards (default: none do).
    name : str, optional
        What the files' names begin with (default: the model's name).
    base_model, license, quantized_by : str, optional
        For the card: the model's name on the hub, its licence, your name there (default: what the model's files say).
    prompt : str, optional
        What each file continues in the report (default: the beginning of its first text; empty: nothing).
    allow_requantize : bool
        Quantize tensors that are quantized already.
    mode, device, device_memory, memory
        As for `perplexity`.
    dry_run : bool
        Return the plan, with sizes and an estimate of the time; write nothing.
    overwrite : bool
        Whether other files of the same names, and those of another release, may be replaced.
    progress : bool
        Show what is done.

    Raises
    ------
    FileNotFoundError, FileExistsError, NotADirectoryError
        If model, text or the folder above `out` is missing; if `out` holds other files and `overwrite` is false.
    ValueError
        If an ftype or recipe is not valid, the model may not be quantized so, or a text is measured and calibrated on.
    OSError
        If the files do not fit on the disk, or it fills up (what is finished is kept).

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "tiny"
    >>> found = release("tiny", folder, ftypes=["Q8_0"], imatrix=None, texts=None, progress=False)
    >>> [row["file"] for row in found.rows][:2]
    ['Tiny-Q8_0.gguf', 'layouts/Tiny-Q8_0.txt']
    """
    how = {"mode": mode, "device": device, "device_memory": device_memory, "memory": memory}
    cut = {"n_ctx": n_ctx, "chunks": chunks}
    about_given = {"base_model": base_model, "license": license, "quantized_by": quantized_by}
    making = Making(model, Path(out), name, how, cut, progress)
    making.plan(ftypes, imatrix, text, texts, rules, allow_requantize, split_max_size)
    making.about = About.of(making.model, making.name, repository=making.repository, **about_given)
    making.prompt = prompt
    making.said = {"--name": name, "--base-model": base_model, "--license": license, "--quantized-by": quantized_by}
    making.said |= {"--prompt": prompt}
    making.check_inputs([imatrix, text, *(source for source, _ in making.texts.values()), *making.specs])
    folder = Folder(Path(out), making.identity(), making.names(), overwrite=overwrite)
    if dry_run:
        return _result(making, folder, *making.preview())
    making.check_room(folder)
    folder.open()
    making.run(folder)
    rows = [{"file": name, "what": what, **folder.files[name]} for name, what in making.names().items()]
    return _result(making, folder, rows, None)


def _result(making: Making, folder: Folder, rows: list[dict], seconds: dict[str, float] | None) -> Release:
    """Return what there is, or would be."""
    names = {name for job in making.jobs for name in making.files_of(job)}
    total = sum(row["bytes"] for row in rows if row["file"] in names)
    protocol = {"folder": str(making.out), "name": making.name, "model": making.given, "dry_run": seconds is not None}
    protocol |= {"imatrix": COLLECT if making.collects else making.has_matrix, "bytes": total, "seconds": seconds}
    protocol |= {"others": folder.others}
    return Release(protocol, tuple(rows), upload_command(making.about, str(making.out), STATE))
