"""pyproject.toml, environment.yml and constraints.txt say the same, and the Makefile installs once."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENT = re.compile(r"^\s*(?:- |\")([A-Za-z][\w.-]*)(>=[\d.]+)\"?,?\s+# \w.*$")


def lines_of(path: str, first: str, last: str) -> list[str]:
    """The lines of a file after the one that starts with `first`, up to the one that starts with `last`."""
    lines = (ROOT / path).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(first)) + 1
    stop = next(i for i, line in enumerate(lines[start:], start) if line.startswith(last))
    return lines[start:stop]


def requirements(lines: list[str]) -> dict[str, str]:
    """Package -> bound, of the lines that name one."""
    return {m[1].lower(): m[2] for m in map(REQUIREMENT.match, lines) if m}


def test_conda_and_pip_name_the_same_packages():
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + extras["lab"] + extras["test"] + extras["docs"]
    conda = requirements(lines_of("environment.yml", "dependencies:", "  - pip:"))
    assert conda.pop("python") == PROJECT["requires-python"]
    assert conda == {name.lower(): f">={bound}" for name, bound in (line.split(">=") for line in wanted)}


def test_conda_ends_with_the_checkout_itself():
    assert (ROOT / "environment.yml").read_text().rstrip().endswith("- pip:\n      - -e .")


@pytest.mark.parametrize("path", ["pyproject.toml", "environment.yml"])
def test_every_requirement_gives_its_reason(path):
    for line in (ROOT / path).read_text().splitlines():
        if re.match(r"^\s*(- |\")[A-Za-z][\w.-]*>=", line) and "requires" not in line:
            assert REQUIREMENT.match(line), f"{path}: no reason in: {line}"


def test_constraints_pin_every_requirement_and_are_portable():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", line) for line in lines), "no paths, no local versions"
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    direct = PROJECT["dependencies"] + [line for extra in PROJECT["optional-dependencies"].values() for line in extra]
    assert {line.split(">=")[0].lower().replace("_", "-") for line in direct} <= pinned


@pytest.fixture
def checkout(tmp_path):
    """A folder with what the Makefile looks at."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    if shutil.which("make") is None:
        pytest.skip("no make")
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=folder, env=env, capture_output=True, text=True)


def python_that_fails_on(folder: Path, word: str) -> Path:
    """A stand-in for a Python that lacks something: it fails when its program mentions `word`."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\ncase "$2" in *{word}*) exit 1;; esac\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("word", "remedy"),
    [("version_info", r"needs Python 3.11 or newer.*make PYTHON="), ("ensurepip", "apt install python3-venv")],
)
def test_a_python_that_will_not_do_gets_one_line_with_the_remedy(checkout, word, remedy):
    done = make(checkout, "table", f"PYTHON={python_that_fails_on(checkout, word)}")
    assert done.returncode != 0
    assert len(done.stdout.splitlines()) == 1
    assert re.search(remedy, done.stdout)
    assert not (checkout / ".venv").exists()


def test_a_missing_python_gets_one_line_with_the_remedy(checkout):
    done = make(checkout, "table", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert re.search("no-such-python is not there. Install it", done.stdout)


def test_a_second_run_installs_nothing(checkout):
    (checkout / ".venv").mkdir()
    for stamp in (".python", ".lab", ".test"):
        (checkout / ".venv" / stamp).touch()
    assert "install" not in make(checkout, "--dry-run", "test").stdout
    os.utime(checkout / "constraints.txt", (2e9, 2e9))
    assert "install" in make(checkout, "--dry-run", "test").stdout
