"""Several quantized files from one pass over the source: rows are read once, and encoded once for each type.

source rows ─┬─ encoded as Q4_K ─┬─ file 1
             │                   └─ file 2
             └─ encoded as Q6_K ─── file 3

Bytes, and what an interruption leaves, are those of `quantize` for each file. Memory holds the slabs in flight, in
every type that is wanted of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from quantlab.files.gguf_file import TensorInfo
from quantlab.files.gguf_shards import shard_paths
from quantlab.files.model import LazyTensor
from quantlab.transform.job import Job, Output, Step
from quantlab.transform.quantize import encode, identity
from quantlab.transform.slabs import kernels_in_order, row_ranges
from quantlab.transform.split import groups_within, shard_numbers
from quantlab.transform.unfinished import Unfinished


def quantize_together(jobs: Sequence[Job], *, progress: bool = True) -> None:
    """Take all steps of several jobs in one pass over their source.

    The files appear under their names when all are whole. After an interruption the same call goes on: a tensor is read
    again only for the files that lack it.

    Parameters
    ----------
    jobs : sequence of Job
        Of one source and one importance matrix; all outputs with paths, on disk.
    progress : bool
        Show a progress bar.

    Raises
    ------
    FileExistsError
        If a file has the name of an unfinished output but is something else.
    ValueError
        If the jobs are of different sources, or the source has NaN or infinite weights.
    OSError
        If the disk fills up (the state is kept, to go on from).
    """
    names = [[step.tensor.name for step in job.steps] for job in jobs]
    for job, order in zip(jobs, names, strict=True):
        if order != names[0] or job.source != jobs[0].source or job.options.imatrix is not jobs[0].options.imatrix:
            raise ValueError(f"{job.source}: must be the source, with its order and matrix, of all jobs of one pass.")
    with ExitStack() as stack:
        targets = [stack.enter_context(Unfinished(job.outputs, identity(job))) for job in jobs]
        steps = [job.steps for job in jobs]
        slabs = list(_slabs(steps[0], [len(target.records) for target in targets]))
        total = sum(slab.n_weights() for slab in slabs)
        shown: dict[str, Any] = dict(unit="weights", unit_scale=True, desc=f"{len(jobs)} files", disable=not progress)
        taken = kernels_in_order(partial(_take, steps), slabs, _Slab.n_weights)
        with tqdm(total=total, **shown) as bar, closing(taken):
            for slab, encoded in taken:
                for i, data in encoded:
                    targets[i].write(data)
                    if slab.stop == slab.tensor.nrows:
                        targets[i].finish("")
                bar.update(slab.n_weights())
        for target in targets:
            target.rename()


def in_shards(job: Job, max_size: str | int) -> Job:
    """Return a job whose one output, on disk, is distributed over the shards that `split` would make of it.

    It is the job itself if all tensors fit into one shard.
    """
    (output,) = job.outputs
    by_name = {step.tensor.name: step for step in output.steps}
    tensors = [TensorInfo(step.spec.name, step.spec.shape, step.spec.qtype, 0) for step in output.steps]
    groups = groups_within(tensors, max_size=max_size)
    if len(groups) == 1:
        return job
    outputs = []
    for i, (path, group) in enumerate(zip(shard_paths(output.path, len(groups)), groups, strict=True)):  # pyright: ignore[reportArgumentType]
        metadata = (output.metadata if i == 0 else {}) | shard_numbers(i, len(groups), len(tensors))
        outputs.append(Output(path, metadata, tuple(by_name[tensor.name] for tensor in group)))
    return replace(job, outputs=tuple(outputs))


class _Slab(NamedTuple):
    """Rows of tensor number `index`, and the jobs that want them."""

    index: int
    tensor: LazyTensor
    start: int
    stop: int
    wanted: tuple[int, ...]

    def n_weights(self) -> int:
        return self.tensor.shape[-1] * (self.stop - self.start)


def _slabs(steps: Sequence[Step], done: Sequence[int]) -> Iterator[_Slab]:
    """Yield the slabs of all tensors that a job lacks; `done` says how many tensors each has."""
    for index, step in enumerate(steps):
        wanted = tuple(i for i, n in enumerate(done) if n <= index)
        for start, stop in row_ranges(step.tensor) if wanted else ():
            yield _Slab(index, step.tensor, start, stop, wanted)


def _take(steps: Sequence[Sequence[Step]], slab: _Slab) -> tuple[_Slab, list[tuple[int, np.ndarray]]]:
    """Read a slab and encode it, once for each type; return it with the bytes for each job that wants it."""
    rows = slab.tensor.rows(slab.start, slab.stop)
    made: dict[tuple[str, bool], np.ndarray] = {}
    encoded = []
    for i in slab.wanted:
        step = steps[i][slab.index]
        key = step.choice.qtype, step.weights is None
        if key not in made:
            made[key] = encode(step, rows, slab.start)
        encoded.append((i, made[key]))
    return slab, encoded
