"""Time until something is seen: the command line's help, the header of a file with a large vocabulary.

python tests/bench_start.py [--runs N]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from quantlab.files.gguf_file import read_header, write_gguf

N_TOKENS = 152_000  # as many as Qwen's vocabulary has
BARS = {"help": 0.5, "header": 0.6}  # seconds, on a machine with nothing else to do


def best(function: Callable[[], object], runs: int) -> float:
    """Seconds of the quickest of some runs."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    """Print each time beside its bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    command = [sys.executable, "-m", "quantlab.cli", "--help"]
    seconds = {"help": best(lambda: subprocess.run(command, capture_output=True, check=True), runs)}
    tokens = [f"token{i}" for i in range(N_TOKENS)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.gguf"
        write_gguf(path, {"tokens": tokens, "merges": [f"{token} {token}" for token in tokens]}, [], [])
        seconds["header"] = best(lambda: list(read_header(path).metadata["tokens"]), runs)
    print(f"quantlab --help: {seconds['help']:.2f} s (bar: {BARS['help']} s)")
    print(f"header of a file with {N_TOKENS} tokens and merges: {seconds['header']:.2f} s (bar: {BARS['header']} s)")


if __name__ == "__main__":
    main()
