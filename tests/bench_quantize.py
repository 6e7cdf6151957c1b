"""Speed of quantizing a whole file: in a warm process, as a command from its start, and beside llama-quantize.

    python tests/bench_quantize.py [FILE | SHAPE --layers N] [--ftype Q4_K_M] [--runs N] [--llama-quantize PATH]

SHAPE is a published one, such as llama-7b, whose F16 file is made for the time. All take turns, with the same number of
threads; the outputs must be the same bytes.
"""

import argparse
import filecmp
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numba
import scale

import quantlab as ql
from quantlab.files import bundled
from quantlab.transform.convert import convert


def made_file(folder: Path, shape: dict) -> Path:
    """Write an F16 file of made weights."""
    scale.write_config(folder, shape)
    scale.stand_in(shape)
    return convert(folder, folder / "made-f16.gguf", outtype="f16", progress=False)


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
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.runs + 1):  # the first loads kernels and fills the page cache
        for way, (out, quantize) in ways.items():
            out.unlink(missing_ok=True)
            seconds[way].append(scale.timed(quantize)[0])
        for out, _ in ways.values():
            if not filecmp.cmp(ours, out, shallow=False):
                raise SystemExit(f"{out.name}: other bytes than {ours.name}")
    n_weights = ql.open(src).n_weights
    print(f"{src.name}, {n_weights:,} weights, → {options.ftype}, {numba.get_num_threads()} threads, same bytes")
    took = {way: median(times[1:]) for way, times in seconds.items()}
    for way, time in took.items():
        ratio = f"   {took['llama-quantize'] / time:5.1f} times" if options.llama_quantize else ""
        print(f"{way:<18} {time:8.3f} s {n_weights / time / 1e6:8.0f} Mw/s{ratio}")


if __name__ == "__main__":
    main()
