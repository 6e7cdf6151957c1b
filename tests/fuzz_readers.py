"""Fuzz a reader of strangers' files: `python tests/fuzz_readers.py READER FOLDER [options of libFuzzer]`.

READER is one of gguf shards imatrix safetensors torch tokenizer checkpoint. FOLDER keeps the corpus and, under finds/,
one input with its traceback for each place that breaks a rule of `hostile.py`, takes more than 5 seconds of processor
time, more than 200 MiB, warns, opens a file outside its folder, or starts a program. Useful options: `-max_total_time=`
(seconds), `-runs=`. Needs atheris (Linux, by hand: `pip install atheris`).
"""

import contextlib
import hashlib
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["quantlab.files", "pickletools", "zipfile"]):
    from hostile import READERS

MAX_SECONDS, MAX_GROWTH = 5, 200 << 20
MAX_INPUT = 1 << 18
LIBRARIES = (sys.prefix, sys.base_prefix, "/proc/", "/dev/null")  # what is opened there is no stranger's wish
LIBRARY_PARTS = ("site-packages", "numba", "quantlab/")


class BrokenRule(BaseException):
    """What a reader must not do; no `except Exception` hides it."""


class Watch:
    """Looks on while a reader works: processor time, memory, files, programs."""

    def __init__(self, folder: Path):
        self.folder, self.on = str(folder), False
        signal.signal(signal.SIGPROF, self._too_slow)
        sys.addaudithook(self._audit)

    def _too_slow(self, *_) -> None:
        raise BrokenRule(f"takes more than {MAX_SECONDS} seconds")

    def _audit(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event.startswith(("subprocess.", "os.system", "os.exec", "os.posix_spawn", "socket.", "os.fork")):
            raise BrokenRule(f"{event} {arguments!r:.200}")
        if event == "open" and isinstance(arguments[0], str):
            name = arguments[0]
            if not name.startswith((self.folder, *LIBRARIES)) and not any(part in name for part in LIBRARY_PARTS):
                raise BrokenRule(f"opens {name!r:.200}")

    def __enter__(self) -> None:
        self.before, self.peak = _resident(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        self.on = True

    def __exit__(self, kind, *_) -> None:
        self.on = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if kind is None and peak > self.peak and peak - self.before > MAX_GROWTH:
            raise BrokenRule(f"takes {(peak - self.before) >> 20} MiB")


def _resident() -> int:
    """Bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _keep(finds: Path, raw: bytes, error: BaseException) -> None:
    """Save the first input that breaks a rule at a place."""
    origin = error.__context__ if isinstance(error, AssertionError) and error.__context__ else error
    frames = traceback.extract_tb(origin.__traceback__)
    own = [f"{frame.filename}:{frame.lineno}" for frame in frames if "quantlab" in frame.filename]
    sign = hashlib.sha256(f"{type(error).__name__} {type(origin).__name__} {own[-1:]}".encode()).hexdigest()[:12]
    if not (finds / f"{sign}.txt").exists():
        (finds / f"{sign}.bin").write_bytes(raw)
        (finds / f"{sign}.txt").write_text("".join(traceback.format_exception(error)), errors="backslashreplace")
        print(f"FIND {finds / sign}.txt: {type(error).__name__}: {str(error)[:200]!r}", file=sys.stderr, flush=True)


def main() -> None:
    """Set the fuzzer up and let it run."""
    reader, home = READERS[sys.argv[1]], Path(sys.argv[2]).resolve()
    corpus, finds = home / "corpus", home / "finds"
    corpus.mkdir(parents=True, exist_ok=True)
    finds.mkdir(exist_ok=True)
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", UserWarning)  # the readers' own
    warnings.filterwarnings("ignore", module="pickletools")
    scratch = Path(tempfile.mkdtemp(prefix="fuzz"))
    for i, seed in enumerate(reader.seeds(scratch)):
        (corpus / f"seed{i}").write_bytes(seed)
    with contextlib.suppress(Exception):
        for path in corpus.glob("seed*"):
            reader.read(Path(tempfile.mkdtemp(dir=scratch)), path.read_bytes())  # loads what is loaded once
    watch = Watch(scratch)

    def one_input(raw: bytes) -> None:
        shutil.rmtree(scratch)
        scratch.mkdir()
        try:
            with watch:
                reader.read(scratch, raw)
        except (Exception, BrokenRule, BaseException) as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            _keep(finds, raw, error)

    def spoil(raw: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.15:
            return atheris.Mutate(raw, max_size)
        for _ in range(rng.choice((1, 1, 2, 4))):
            raw = reader.spoil(raw, rng)
        return raw[:max_size]

    options = [
        f"-max_len={MAX_INPUT}",
        "-timeout=900",
        "-rss_limit_mb=3000",
        "-report_slow_units=100",
        f"-artifact_prefix={finds}/",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options, *sys.argv[3:]], one_input, custom_mutator=spoil)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
