"""The wheel carries what the checkout has, and works without the checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from the checkout as it is."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def tracked(folder: str) -> set[str]:
    """Files of the checkout that belong into the wheel."""
    left_out = ("data/runs/", "/.", "__pycache__", "train_the_bundled_model")  # that notebook needs tools/
    files = (path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path for path in files if not any(part in path for part in left_out)}


def test_the_wheel_carries_code_data_and_notebooks(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert tracked("quantlab") <= names
    assert {f"quantlab/{path}" for path in tracked("data") | tracked("notebooks")} <= names
    assert not [name for name in names if "train_the_bundled_model" in name]
    assert not [name for name in names if "runs/" in name or name.startswith(("tests", "tools"))]


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs a command of an environment with the wheel, away from the checkout."""
    home = tmp_path_factory.mktemp("elsewhere")
    venv.create(home / "venv", system_site_packages=False, with_pip=False)
    site = next((home / "venv").glob("lib/python*/site-packages"))
    python = str(home / "venv" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True)
    own = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    dependencies = site / "dependencies-of-the-test-environment.pth"
    dependencies.write_text(f"{own}\n")  # after the wheel's own folder; .pth files of that folder are not read
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    env["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")  # nbconvert's templates

    def run(command: str, *arguments: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [home / "venv" / "bin" / command, *arguments], cwd=home, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(installed):
    assert str(ROOT) not in installed("python", "-c", "import quantlab; print(quantlab.__file__)").stdout
    assert "Q5_K_M" in installed("quantlab", "sizes", "yi-34b").stdout
    assert "ppl" in installed("quantlab", "perplexity", "tiny", "-f", "primer", "--chunks", "2").stdout
    done = installed("quantlab", "notebook", "size_ppl_table", "-p", "chunks", "2", "-p", "ftypes", "Q4_K_M,Q2_K")
    assert "quantlab-runs" in done.stdout
    assert "Q4_K_M" in done.stdout
