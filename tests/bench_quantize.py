"""Speed of quantizing a whole file: in a warm process, as a command from its start, and beside llama-quantize.

    python tests/bench_quantize.py [FILE | SHAPE --layers N] [--ftype Q4_K_M] [--runs N] [--llama-quantize PATH]

SHAPE is a published one, such as llama-7b, whose F16 file is made for the time; one with experts gets a small
vocabulary (`qwen3-30b-a3b --layers 2`: 1.25e9 weights, nearly all of them experts'). All take turns, with the same
number of threads; the outputs must be the same bytes. On a machine with other work, compare processor seconds.
"""

import argparse
import filecmp
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import median

import made_models
import ml_dtypes
import numba
import numpy as np
import scale

import quantlab as ql
from quantlab.arch import Hparams, tensor_shapes
from quantlab.files import bundled
from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.transform.convert import convert


def made_file(folder: Path, shape: dict) -> Path:
    """Write an F16 file of made weights."""
    if "n_expert" in shape:
        return made_mixture(folder / "made-f16.gguf", shape | {"n_vocab": 320})
    scale.write_config(folder, shape)
    scale.stand_in(shape)
    return convert(folder, folder / "made-f16.gguf", outtype="f16", progress=False)


def made_mixture(path: Path, shape: dict) -> Path:
    """Write an F16 file of made weights with experts, tensor by tensor."""
    known = Hparams(**{field.name: shape[field.name] for field in fields(Hparams) if field.name in shape})
    arch, metadata = known.arch, made_models.metadata_of(known)
    metadata = {key.replace("llama.", f"{arch}."): value for key, value in metadata.items()}
    metadata |= {
        "general.architecture": arch,
        f"{arch}.expert_count": np.uint32(known.n_expert),
        f"{arch}.expert_used_count": np.uint32(known.n_expert_used),
        f"{arch}.expert_feed_forward_length": np.uint32(known.n_ff_exp),
        f"{arch}.attention.key_length": np.uint32(known.head_dim),
        f"{arch}.attention.value_length": np.uint32(known.head_dim),
    }
    shapes = tensor_shapes(known)
    specs = [
        TensorSpec(name, dims, "F16" if len(dims) > 1 and "gate_inp" not in name else "F32")
        for name, dims in shapes.items()
    ]
    write_gguf(path, metadata, specs, (made_pieces(spec) for spec in specs))
    return path


def made_pieces(spec: TensorSpec) -> Iterator[np.ndarray]:
    """Yield a tensor's made weights, a few million at a time."""
    made, dtype = scale.Made(spec.name, spec.shape), np.float16 if spec.qtype == "F16" else np.float32
    for start in range(0, made.nbytes, 1 << 23):
        yield made.read(start, min(start + (1 << 23), made.nbytes)).view(ml_dtypes.bfloat16).astype(dtype)


def processor_seconds() -> float:
    """Return the processor time of this process and of its ended children."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run(*command) -> None:
    """Run a command without a word; an error ends us."""
    subprocess.run([str(part) for part in command], capture_output=True, check=True)


def main() -> None:
    """Take turns, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", default="tiny", help="a GGUF file, a bundled model's or a shape's name")
    parser.add_argument("--layers", type=int, help="of a shape only so many layers")
    parser.add_argument("--ftype", default="Q4_K_M")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--llama-quantize", metavar="PATH")
    parser.add_argument("--folder", help="where the files go for the time; default: the system's folder for such")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quantlab-bench-", dir=options.folder) as name:
        folder = Path(name)
        if bundled.is_shape(options.file):
            shape = bundled.shape(options.file)
            src = made_file(folder, shape | {"n_layer": options.layers or shape["n_layer"]})
        else:
            src = bundled.model_path(options.file)
        race(src, folder, options)


def race(src: Path, folder: Path, options: argparse.Namespace) -> None:
    """Let everybody quantize `src` in turn; print the medians, and how often ours goes into llama-quantize's."""
    ours, command, theirs = (folder / f"{name}.gguf" for name in ("ours", "command", "theirs"))
    ways = {
        "in a warm process": (ours, partial(ql.quantize, src, ours, ftype=options.ftype)),
        "quantlab quantize": (
            command,
            partial(run, sys.executable, "-m", "quantlab.cli", "quantize", src, command, options.ftype),
        ),
    }
    if options.llama_quantize:
        threads = numba.get_num_threads()
        tool = partial(run, options.llama_quantize, src, theirs, options.ftype, threads)
        ways["llama-quantize"] = theirs, tool
    seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(options.runs + 1):  # the first loads kernels and fills the page cache
        for way, (out, quantize) in ways.items():
            out.unlink(missing_ok=True)
            before = processor_seconds()
            elapsed, _ = scale.timed(quantize)
            seconds[way].append((elapsed, processor_seconds() - before))
        for out, _ in ways.values():
            if not filecmp.cmp(ours, out, shallow=False):
                raise SystemExit(f"{out.name}: other bytes than {ours.name}")
    n_weights = ql.open(src).n_weights
    print(f"{src.name}, {n_weights:,} weights, → {options.ftype}, {numba.get_num_threads()} threads, same bytes")
    took = {way: tuple(map(median, zip(*times[1:], strict=True))) for way, times in seconds.items()}
    for way, (elapsed, processor) in took.items():
        line = f"{way:<18} {elapsed:8.3f} s {n_weights / elapsed / 1e6:8.0f} Mw/s   processor {processor:8.3f} s"
        if options.llama_quantize:
            line += "   {:5.1f} and {:5.1f} times".format(*np.divide(took["llama-quantize"], took[way]))
        print(line)


if __name__ == "__main__":
    main()
