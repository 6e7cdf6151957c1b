"""A release: every file of it whole, genuine and accounted for; resumed runs give the same bytes."""

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import made_models
import pytest
from typer.testing import CliRunner

import quantlab as ql
from quantlab.cli import app
from quantlab.files.imatrix_file import read_imatrix
from quantlab.study import release_making
from quantlab.study.model_card import About, front_matter, markdown
from quantlab.study.release_folder import STATE, WORK
from quantlab.study.release_plan import file_name, release_name
from quantlab.transform.mixture import Recipe, read_tensor_types

ROOT = Path(__file__).parents[1]
ENV = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
ABOUT = {"license": "mit", "quantized_by": "someone", "base_model": "org/Tiny"}
SMALL = {"chunks": 2, "progress": False, **ABOUT}
KILLS = 10


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, the state aside."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != STATE)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe that names two tensors."""
    path = tmp_path_factory.mktemp("recipe") / "mine.txt"
    return Recipe({"output.weight": "Q6_K", "blk.0.ffn_down.weight": "Q4_K"}).save(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory, recipe):
    """A release of every kind of file, and what was returned."""
    folder = tmp_path_factory.mktemp("release") / "tiny"
    ftypes = ["Q8_0", "Q4_K_M", "small=Q2_K+refined", str(recipe)]
    return folder, ql.release("tiny", folder, ftypes=ftypes, prompt="", **SMALL)


def test_the_folder_holds_what_is_said(made):
    folder, found = made
    stems = [f"Tiny-{label}" for label in ("Q8_0", "Q4_K_M", "small", "mine")]
    expected = {f"{stem}.gguf" for stem in stems} | {f"layouts/{stem}.txt" for stem in stems}
    expected |= {f"Modelfile-{stem.removeprefix('Tiny-')}" for stem in stems}
    expected |= {"Tiny.imatrix.gguf", "LICENSE", "README.md", "report.html", "report.json", "SHA256SUMS"}
    assert set(contents(folder)) == {row["file"] for row in found.rows} == expected
    for row in found.rows:
        data = (folder / row["file"]).read_bytes()
        assert (row["bytes"], row["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert found.command == f"hf upload someone/Tiny-GGUF {folder} . --exclude .quantlab-release.json"
    assert not (folder / WORK).exists()


def test_the_digests_are_those_of_all_other_files(made):
    folder, _ = made
    lines = dict(line.split("  ")[::-1] for line in (folder / "SHA256SUMS").read_text().splitlines())
    expected = {name: hashlib.sha256(data).hexdigest() for name, data in contents(folder).items()}
    expected.pop("SHA256SUMS")
    assert lines == expected


@pytest.mark.parametrize("label", ["Q8_0", "Q4_K_M", "small", "mine"])
def test_every_file_is_genuine(made, label):
    folder, _ = made
    found = ql.verify(folder / f"Tiny-{label}.gguf", "tiny", imatrix=folder / "Tiny.imatrix.gguf")
    assert found.verdict == ("refined" if label == "small" else "identical")


def test_files_have_the_bytes_that_quantize_gives(made, tmp_path):
    folder, _ = made
    matrix = read_imatrix(folder / "Tiny.imatrix.gguf")
    key = "quantize.imatrix.file=str:Tiny.imatrix.gguf"
    path = ql.quantize("tiny", tmp_path / "a.gguf", ftype="Q4_K_M", imatrix=matrix, override_kv=[key])
    assert path.read_bytes() == (folder / "Tiny-Q4_K_M.gguf").read_bytes()


def test_layouts_give_the_types_again(made, recipe):
    folder, _ = made
    model = ql.open(folder / "Tiny-mine.gguf")
    assert model.tensor("output.weight").qtype == "Q6_K"
    assert model.tensor("blk.0.attn_q.weight").qtype == "BF16"  # what a recipe does not name stays as it is
    pairs = read_tensor_types(folder / "layouts" / "Tiny-mine.txt")
    assert (r"^output\.weight$", "Q6_K") in pairs
    assert len(pairs) == sum(len(tensor.shape) > 1 for tensor in model)


def test_the_report_and_the_card_have_the_same_figures(made):
    folder, _ = made
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert [row["variant"] for row in rows] == ["tiny", "Q8_0", "Q4_K_M", "small", "mine"]
    card = (folder / "README.md").read_text()
    for row in rows[1:]:
        assert f"| {row['kld_mean']:.5f} ± {row['kld_se']:.5f} |" in card
    command = json.loads((folder / "report.json").read_text())["commands"][0]["command"]
    assert command in card
    assert str(folder) not in card + (folder / "report.html").read_text()


def test_the_hub_reads_the_card(made):
    hub = pytest.importorskip("huggingface_hub")
    data = hub.ModelCard.load(made[0] / "README.md").data.to_dict()
    assert data["base_model"] == "org/Tiny"
    assert data["license"] == "mit"
    assert data["quantized_by"] == "someone"
    assert {"gguf", "imatrix"} <= set(data["tags"])


def test_modelfiles_name_their_file(made):
    assert (made[0] / "Modelfile-Q4_K_M").read_text() == "FROM ./Tiny-Q4_K_M.gguf\nPARAMETER num_ctx 512\n"


def test_a_finished_release_is_left_alone(made, recipe):
    folder, found = made
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.gguf")}
    ftypes = ["Q8_0", "Q4_K_M", "small=Q2_K+refined", str(recipe)]
    again = ql.release("tiny", folder, ftypes=ftypes, prompt="", **SMALL)
    assert again.rows == found.rows
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.gguf")} == before


def test_a_plan_writes_nothing_and_knows_the_sizes(made, tmp_path):
    options = {"ftypes": ["Q8_0", "Q4_K_M", "Q2_K+refined"], "prompt": "", **SMALL}
    plan = ql.release("tiny", tmp_path / "a", dry_run=True, **options)
    assert not (tmp_path / "a").exists()
    sizes = {row["file"]: row["bytes"] for row in plan.rows if row["bytes"]}
    for name in ("Tiny-Q8_0.gguf", "Tiny-Q4_K_M.gguf"):
        assert sizes[name] == (made[0] / name).stat().st_size
    assert set(plan.protocol["seconds"]) == {"importance matrix", "quantizing", "refining", "report"}
    assert "nothing was written" in str(plan)


def test_without_a_matrix_and_a_report(tmp_path):
    found = ql.release("tiny", tmp_path / "a", ftypes="Q4_0", imatrix=None, texts=None, progress=False)
    assert [row["file"] for row in found.rows if row["file"].endswith((".gguf", ".html"))] == ["Tiny-Q4_0.gguf"]
    assert "importance matrix" not in (tmp_path / "a" / "README.md").read_text()


def test_shards_have_a_card_that_says_how_to_merge_them(tmp_path):
    options = {"ftypes": ["Q4_K_M", "Q2_K+refined"], "texts": None, "split_max_size": "1M", **SMALL}
    found = ql.release("tiny", tmp_path / "a", **options)
    for label in ("Q4_K_M", "Q2_K-refined"):
        shards = sorted(row["file"] for row in found.rows if row["file"].startswith(f"Tiny-{label}-0"))
        assert len(shards) > 2
        assert ql.verify(tmp_path / "a" / shards[0], "tiny", imatrix=tmp_path / "a" / "Tiny.imatrix.gguf").is_genuine
        merge = f"quantlab merge {shards[0]} Tiny-{label}.gguf"
        assert merge in (tmp_path / "a" / "README.md").read_text()
        assert (tmp_path / "a" / f"Modelfile-{label}").read_text().splitlines()[0].endswith(merge)


def test_the_word_prints_the_folder_and_the_upload(tmp_path):
    words = ["release", "tiny", "--ftypes", "Q4_0,Q8_0", "--imatrix", "none", "--text", "none"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "a"), "--quantized-by", "me", "--json", "-"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["protocol"]["command"].startswith("hf upload me/Tiny-GGUF")
    assert [row["file"] for row in document["rows"]][:2] == ["Tiny-Q4_0.gguf", "Tiny-Q8_0.gguf"]


# ---- killed runs

RELEASE = """
import os, signal, sys
import quantlab as ql
from quantlab.study.release_folder import Folder
from quantlab.transform.unfinished import Unfinished

def killer(cls, name, count):
    function = getattr(cls, name)
    left = [count]
    def call(*args):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    setattr(cls, name, call)

print(flush=True)
for place in sys.argv[3:]:
    name, _, count = place.partition(":")
    killer(Folder if name == "write" else Unfinished, name, int(count))
ql.release("tiny", sys.argv[1], ftypes=sys.argv[2].split(","), chunks=2, prompt="", license="mit", progress=False)
"""


FEW, SIX = "Q4_K_M,Q2_K", "Q8_0,Q5_K_M,Q4_K_M,Q3_K_M,Q2_K,Q2_K+refined"


def run(folder: Path, ftypes: str, *places: str) -> subprocess.Popen:
    words = [sys.executable, "-c", RELEASE, str(folder), ftypes, *places]
    return subprocess.Popen(words, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    folder = tmp_path / "a"
    assert run(folder, FEW, "finish:40").wait() == -9
    assert list(folder.glob("*.gguf.part"))
    assert run(folder, FEW, "write:3").wait() == -9
    assert len(list(folder.glob("*.gguf"))) == 3  # the matrix too
    assert not (folder / "README.md").exists()
    options = {"ftypes": FEW.split(","), "chunks": 2, "prompt": "", "license": "mit", "progress": False}
    ql.release("tiny", folder, **options)
    ql.release("tiny", tmp_path / "b", **options)
    assert contents(folder) == contents(tmp_path / "b")


@pytest.mark.long
def test_runs_killed_at_random_moments_go_on_to_the_same_bytes(tmp_path):
    folder, moments, killed, went_on = tmp_path / "a", random.Random(20261128), 0, 0
    start = time.monotonic()
    assert run(tmp_path / "b", SIX).wait() == 0
    whole = time.monotonic() - start
    while killed < KILLS:
        went_on += (folder / STATE).exists()
        process = run(folder, SIX)
        process.stdout.readline()
        time.sleep(moments.uniform(0, whole))
        process.kill()
        if process.wait() == 0:  # finished before
            assert contents(folder) == contents(tmp_path / "b")
            shutil.rmtree(folder)
        else:
            killed += 1
    assert run(folder, SIX).wait() == 0
    assert contents(folder) == contents(tmp_path / "b")
    print(f"{killed} kills, {went_on} runs went on")


# ---- untrusted names


def test_names_never_lead_out_of_the_folder(tmp_path):
    model = SimpleNamespace(
        metadata={"general.name": "../../etc/pass wd"}, path=tmp_path / "x.gguf", is_checkpoint=False
    )
    assert release_name(model, None) == "etc-pass-wd"
    assert release_name(model, "/tmp/x/../y") == "tmp-x-..-y"
    assert file_name("..") == file_name("///") == "model"
    assert len(file_name("x" * 1000)) == 80


@pytest.mark.parametrize(
    "text", ["a: b\n- c", "'\"&*!|>%@`{}[]#", "---\nlicense: mit", "\u202eevil\x00\x85", "yes", "über"]
)
def test_the_front_matter_holds_any_text_as_a_text(text):
    yaml = pytest.importorskip("yaml")
    model = SimpleNamespace(metadata={"general.license": text, "general.languages": [text], "general.name": text})
    about = About.of(model, "x", repository=None, base_model=text, license=None, quantized_by=text)
    lines = front_matter(about, has_matrix=False).splitlines()
    assert lines[0] == lines[-1] == "---" and "---" not in lines[1:-1]
    data = yaml.safe_load("\n".join(lines[1:-1]))
    assert data["license"] == data["base_model"] == data["language"][0] == about.license
    assert all(char.isprintable() for char in about.license)
    assert "<" not in markdown(f"{text}<script>").replace("\\<", "")


# ---- bad input


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    options = {"ftypes": ["Q4_0"], "imatrix": None, "texts": None, "progress": False}
    with pytest.raises(
        FileExistsError, match="holds other files, mine.txt. Name another folder or pass overwrite=True"
    ):
        ql.release("tiny", tmp_path, **options)
    found = ql.release("tiny", tmp_path, overwrite=True, **options)
    assert found.protocol["others"] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert "mine.txt" not in (tmp_path / "SHA256SUMS").read_text()
    options["ftypes"] = ["Q5_0"]
    with pytest.raises(FileExistsError, match="holds another release. Name another folder or pass overwrite=True"):
        ql.release("tiny", tmp_path, **options)
    ql.release("tiny", tmp_path, overwrite=True, **options)
    assert not (tmp_path / "Tiny-Q4_0.gguf").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file, must be a folder"):
        ql.release("tiny", tmp_path / "a", ftypes=["Q4_0"], imatrix=None, texts=None)
    with pytest.raises(FileNotFoundError, match="does not exist. Create it first"):
        ql.release("tiny", tmp_path / "b" / "c", ftypes=["Q4_0"], imatrix=None, texts=None)


def test_a_folder_that_the_call_reads_from_is_refused(tmp_path):
    path = made_models.made_gguf(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="holds a.gguf, which the call reads. Name another folder"):
        ql.release(path, tmp_path, ftypes=["Q4_0"], imatrix=None, texts=None, overwrite=True)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ftypes": []}, "must name one at least"),
        ({"ftypes": ["Q4_K_M", "q4_k"]}, "two files would be called q4_k_m, names must differ"),
        ({"ftypes": ["Q4_K_X"]}, "ftype=Q4_K_X, must be one of"),
        ({"ftypes": ["IQ2_XS"], "imatrix": None}, "needs an importance matrix"),
        ({"ftypes": ["Q4_0"], "texts": "sampled"}, "sampled is what is calibrated on, must be another text"),
        ({"ftypes": ["Q4_0"], "split_max_size": "1X"}, "max_size=1X, must be a positive number"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_is_written(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        ql.release("tiny", tmp_path / "a", progress=False, **options)
    assert not (tmp_path / "a").exists()


def test_a_disk_without_room_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(release_making.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(OSError, match=r"needs \d+ bytes, the disk has 10000 free. Free some space or name another"):
        ql.release("tiny", tmp_path / "a", ftypes=["Q4_0"], imatrix=None, texts=None, progress=False)


def test_a_disk_that_fills_up_gives_one_line_and_the_run_goes_on(tmp_path):
    words = [sys.executable, "-m", "quantlab.cli", "release", "tiny", "--ftypes", "Q4_0,Q8_0", "--imatrix", "none"]
    words += ["--text", "none", "--out", str(tmp_path / "a")]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))  # noqa: E731
    full = subprocess.run(words, env=ENV, capture_output=True, text=True, preexec_fn=limit)
    assert full.returncode == 1
    assert full.stderr.splitlines()[-1].startswith("quantlab: ")
    assert "Traceback" not in full.stderr
    assert not list((tmp_path / "a").glob("*.gguf"))
    assert list((tmp_path / "a").glob("*.gguf.part"))
    found = ql.release("tiny", tmp_path / "a", ftypes=["Q4_0", "Q8_0"], imatrix=None, texts=None, progress=False)
    assert len([row for row in found.rows if row["file"].endswith(".gguf")]) == 2
