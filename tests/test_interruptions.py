"""kill -9 at random moments, and a disk that fills up: a whole file or none, and the same bytes in the end."""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import made_models
import pytest

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
KILLS, REFINEMENT_KILLS = 50, 20
LARGER = made_models.WIDE | dict(n_embd=1024, n_ff=2816, n_layer=8)

QUANTIZE = """
import sys
from quantlab.transform.quantize import quantize
quantize("in.gguf", "out.gguf", ftype="Q4_K_M", report=lambda line: print(line, flush=True))
"""

REFINE = """
from quantlab.evaluate.refine import refine
print(flush=True)
refine("tiny", "out.gguf", ftype="Q2_K", chunks=2, sweeps=1, scratch="scratch", progress=False)
"""

FULL_DISK = """
import os, sys
from pathlib import Path
from quantlab.transform.quantize import quantize

source, disk = sys.argv[1], Path(sys.argv[2])

def fill(line):
    if str(line).startswith("[  20/"):
        with open(disk / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

try:
    quantize(source, disk / "out.gguf", ftype="Q4_K_M", report=fill)
except OSError as error:
    print(error)
assert sorted(path.name for path in disk.iterdir()) == ["filler", "out.gguf.part", "out.gguf.part.json"]
(disk / "filler").unlink()
lines = []
quantize(source, disk / "out.gguf", ftype="Q4_K_M", report=lambda line: lines.append(str(line)))
print(*[line for line in lines if str(line).startswith("going on after")])
sys.stdout.flush()
os.write(1, (disk / "out.gguf").read_bytes())
"""


def start(folder, program=QUANTIZE):
    """Start a run and wait until it says something: it is past its plan."""
    run = subprocess.Popen([sys.executable, "-c", program], cwd=folder, env=ENV, stdout=subprocess.PIPE, text=True)
    run.stdout.readline()
    return run


@pytest.mark.long
def test_killed_runs_leave_a_whole_file_or_none_and_go_on_to_the_same_bytes(tmp_path):
    source = made_models.made_gguf(tmp_path / "in.gguf", LARGER)
    begin = time.perf_counter()
    undisturbed = start(tmp_path)
    assert undisturbed.communicate()[0] and undisturbed.returncode == 0
    duration = time.perf_counter() - begin
    out = tmp_path / "out.gguf"
    expected = hashlib.sha256(out.read_bytes()).digest()
    moments, killed, went_on, finished = random.Random(20231212), 0, 0, 0
    while killed < KILLS:
        if out.exists():
            assert hashlib.sha256(out.read_bytes()).digest() == expected
            finished += 1
            for path in tmp_path.glob("out*"):
                path.unlink()
        run = start(tmp_path)
        time.sleep(moments.uniform(0, duration / 4))
        killed += run.poll() is None
        run.kill()
        went_on += "going on after" in run.communicate()[0]
        assert source.exists()
    if not out.exists():
        last = start(tmp_path)
        assert "going on after" in last.communicate()[0] or went_on
    assert hashlib.sha256(out.read_bytes()).digest() == expected
    assert went_on > 5, (went_on, finished)
    print(f"{killed} kills, {went_on} runs went on, {finished + 1} files finished")


def _can_mount() -> bool:
    command = ["unshare", "-rm", "true"]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="a small disk needs unshare and a namespace of one's own")
def test_a_full_disk_keeps_the_state_and_nothing_under_the_final_name(tmp_path):
    source, disk = made_models.made_gguf(tmp_path / "in.gguf"), tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "child.py").write_text(FULL_DISK)
    mount = f"mount -t tmpfs -o size=4m none {disk} && exec {sys.executable} {tmp_path / 'child.py'} {source} {disk}"
    run = subprocess.run(["unshare", "-rm", "sh", "-c", mount], env=ENV, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    message, went_on, written = run.stdout.split(b"\n", 2)
    assert b"no space left on the disk after" in message and b"it resumes there" in message
    assert went_on.startswith(b"going on after")
    from quantlab.transform.quantize import quantize

    assert written == quantize(source, tmp_path / "out.gguf", ftype="Q4_K_M").read_bytes()


@pytest.mark.long
def test_killed_refinements_go_on_to_the_same_bytes(tmp_path):
    assert start(tmp_path, REFINE).wait() == 0  # compiles
    out = tmp_path / "out.gguf"
    expected, moments, killed, went_on = out.read_bytes(), random.Random(20261128), 0, 0
    out.unlink()
    begin = time.perf_counter()
    assert start(tmp_path, REFINE).wait() == 0
    duration = time.perf_counter() - begin
    assert out.read_bytes() == expected
    out.unlink()
    while killed < REFINEMENT_KILLS:
        went_on += (tmp_path / "scratch" / "states" / "progress.json").exists()
        run = start(tmp_path, REFINE)
        time.sleep(moments.uniform(0, duration / 2))
        run.kill()
        killed += run.wait() < 0
        if out.exists():
            assert out.read_bytes() == expected
            shutil.rmtree(tmp_path / "scratch", ignore_errors=True)
            out.unlink()
    assert start(tmp_path, REFINE).wait() == 0
    assert out.read_bytes() == expected and went_on > REFINEMENT_KILLS // 4
