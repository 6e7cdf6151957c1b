"""Every output of every word and function: never over an input, a device, a link or a file that was not asked for."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import typing
from pathlib import Path

import numpy as np
import pytest
import typer
from made_models import metadata_of, shape_of
from typer.testing import CliRunner

import quantlab as ql
from quantlab.cli import app
from quantlab.files.bundled import model_path
from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.files.imatrix_file import ImportanceMatrix
from quantlab.files.inputs import input_files
from quantlab.files.output import DIGESTS, is_digests, is_report
from quantlab.transform.mixture import Recipe

COMMANDS = typer.main.get_command(app).commands
FUNCTIONS = {command.name or command.callback.__name__: command.callback for command in app.registered_commands}

# word -> a call that works, in the folder that `work` makes
CALLS = {
    "convert": ["checkpoint"],
    "sizes": ["llama-7b"],
    "inspect": ["whole.gguf"],
    "diff": ["whole.gguf", "other.gguf"],
    "verify": ["other.gguf", "--source", "whole.gguf"],
    "split": ["whole.gguf", "parts", "--split-max-tensors", "1"],
    "merge": ["two-00001-of-00002.gguf"],
    "quantize": ["whole.gguf", "q.gguf", "Q4_0"],
    "perplexity": ["tiny", "-c", "64", "--chunks", "1"],
    "compare": ["tiny", "Q4_0", "-c", "64", "--chunks", "1"],
    "sensitivity": ["tiny", "--types", "Q4_0", "--groups", "layer", "-c", "64", "--chunks", "1", "--cache", "cache"],
    "table": ["tiny", "--ftypes", "Q4_0", "-c", "64", "--chunks", "1"],
    "imatrix": ["tiny", "-c", "64", "--chunks", "1"],
    "refine": ["tiny", "r.gguf", "Q2_K", "--chunks", "1", "--sweeps", "0", "--judge", "none"],
    "report": ["tiny", "Q4_0", "-c", "64", "--chunks", "1", "-p", ""],
    "release": ["tiny", "--ftypes", "Q4_0", "--imatrix", "none", "--text", "none", "--out", "released"],
    "recipe": ["tiny", "--sensitivity", "s.json", "--like", "Q4_K_M", "--judge", "none"],
    "notebook": ["type_zoo"],
    "fit": ["llama-7b"],
}
# options that name files or folders and are no outputs; an option that is in none of the lists fails the test below
READ = {
    "imatrix",
    "in_file",
    "sensitivity",
    "reuse",
    "tensor_type_file",
    "layout_of",
    "recipe",
    "parameters_file",
    "file",
    "shape",
    "source",
}
# only files of their own names are written there, see test_states; a release refuses other folders, see test_release
FOLDERS = {"scratch", "cache", "out"}


def parameters(word: str):
    """The parameters of a word whose values may name files: click's parameter, and its place among the arguments."""
    hints = typing.get_type_hints(FUNCTIONS[word])
    place = 0
    for param in COMMANDS[word].params:
        is_option = param.opts[0].startswith("-")
        if param.name in hints and re.search(r"\b(str|Path|pathlib)\b", str(hints[param.name])):
            yield param, None if is_option else place
        place += not is_option


OUTPUTS = [
    (word, param.opts[-1], place)
    for word in COMMANDS
    for param, place in parameters(word)
    if getattr(param.callback, "written", None)
]


def call(word: str, option: str, place: int | None, value: object, *more: object) -> list[str]:
    """The words of a call whose output, or input, at `option` or at a place among the arguments is `value`."""
    arguments = list(CALLS[word])
    if option.startswith("-"):
        arguments += [option, str(value)]
    else:
        place = 1 if word in ("quantize", "refine") else place
        arguments[place : place + 1] = [str(value)]
    return [word, *arguments, *map(str, more)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder with a small file of every kind that the words read."""
    folder = tmp_path_factory.mktemp("outputs")
    x = np.random.default_rng(7).standard_normal((4, 32)).astype(np.float32)
    metadata = metadata_of(shape_of(n_embd=32, n_ff=32, n_layer=1, n_head=1, n_head_kv=1, n_vocab=8, head_dim=32))
    specs = [TensorSpec(f"blk.0.{name}.weight", x.shape, "F32") for name in ("attn_q", "attn_k")]
    write_gguf(folder / "whole.gguf", metadata, specs, [x, x])
    ql.quantize(folder / "whole.gguf", folder / "other.gguf", ftype="Q4_0")
    ql.split(folder / "whole.gguf", folder / "two.gguf", max_tensors=1)
    shutil.copytree(model_path("tiny"), folder / "checkpoint")
    kinds = ql.sensitivity("tiny", types=["Q4_K", "Q2_K"], n_ctx=64, chunks=1, groups="layer", cache=False)
    kinds.save(folder / "s.json")
    return folder


@pytest.fixture
def work(store, tmp_path, monkeypatch):
    shutil.copytree(store, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def invoke(arguments: list[str]):
    return CliRunner().invoke(app, arguments)


def refused(arguments: list[str], rule: str) -> None:
    done = invoke(arguments)
    assert done.exit_code == 1 and re.search(rule, str(done.exception)), (arguments, done.exception, done.output)


# ── every word ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_option_that_names_a_file_is_an_output_or_an_input():
    for word in COMMANDS:
        for param, _ in parameters(word):
            names_file = re.search(r"FILE|OUT|FOLDER", str(param.metavar)) or "Path" in str(
                typing.get_type_hints(FUNCTIONS[word])[param.name]
            )
            known = getattr(param.callback, "written", None) or param.name in READ | FOLDERS
            prefix = (word, param.name) == ("split", "outfile")  # begins the names of shards, which `split` checks
            assert known or prefix or not names_file, f"{word}: {param.opts}: say whether it is written or read"
    assert {word for word, *_ in OUTPUTS} <= CALLS.keys()
    assert len(OUTPUTS) >= 21


@pytest.mark.parametrize(("word", "option", "place"), OUTPUTS)
def test_no_output_replaces_an_input(work, word, option, place):
    shutil.copy("whole.gguf", "x.gguf")
    before = Path("x.gguf").read_bytes()
    for param, other in parameters(word):
        if param.opts[-1] == option or getattr(param.callback, "written", None) and param.name != "files":
            continue
        if param.name == "files" and option == "files":
            other = 0
        arguments = call(word, option, place, "x.gguf", "--overwrite")
        if param.name == "layout_of":  # stands for the ftype
            arguments.remove("Q4_0")
        if other is None:
            arguments += [param.opts[-1], "x.gguf"]
        else:
            arguments[1 + other] = "x.gguf"
        done = invoke(arguments)
        assert done.exit_code != 0 and Path("x.gguf").read_bytes() == before, arguments
        assert re.search("is the input|is given for two", str(done.exception)), (arguments, done.exception)


@pytest.mark.parametrize(("word", "option", "place"), OUTPUTS)
def test_two_outputs_are_two_files(work, word, option, place):
    for param, _ in parameters(word):
        if param.opts[-1] != option and param.opts[-1].startswith("-") and getattr(param.callback, "written", None):
            refused(call(word, option, place, "new", param.opts[-1], "new"), "new: is given for two outputs")


@pytest.mark.parametrize(("word", "option", "place"), OUTPUTS)
def test_existing_files_and_folders_are_refused(work, word, option, place):
    Path("mine").write_text('{"schema": "mine"}')
    refused(call(word, option, place, "mine"), "mine: exists already")
    refused(call(word, option, place, work), "is a folder")
    refused(call(word, option, place, "no/new"), "folder .*no does not exist")
    os.symlink("mine", "link")
    refused(call(word, option, place, "link"), "link: exists already")
    if option == "--json":
        refused(call(word, option, place, "two-00001-of-00002.gguf", "--overwrite"), "binary file|is the input")
    assert Path("mine").read_text() == '{"schema": "mine"}'


RUN = [(word, option, place) for word, option, place in OUTPUTS if word != "notebook"]


@pytest.mark.parametrize(("word", "option", "place"), RUN)
def test_a_link_is_followed_and_an_older_report_replaced(work, word, option, place):
    Path("elsewhere").mkdir()
    os.symlink("elsewhere/target", "link")
    done = invoke(call(word, option, place, "link"))
    assert done.exit_code in (0, 1) and not done.exception or isinstance(done.exception, SystemExit), done.exception
    assert Path("link").is_symlink() and Path("elsewhere/target").stat().st_size > 0
    assert not list(Path("elsewhere").glob("*.part*"))
    if option == "--json":
        assert is_report(Path("link"))
        again = invoke(
            call(
                word,
                option,
                place,
                "link",
                *(["--overwrite"] if word in ("quantize", "split", "imatrix", "recipe", "refine") else []),
            )
        )
        assert not again.exception or isinstance(again.exception, SystemExit), again.exception
    elif option != "--plot":
        refused(call(word, option, place, "link"), "link: exists already")


WRITERS = [(word, option, place) for word, option, place in RUN if option != "--json" or word == "sizes"]


def device(folder: Path) -> Path:
    """A device that swallows what is written; one of our own, as root could replace the machine's."""
    if os.geteuid() != 0:
        return Path("/dev/null")
    os.mknod(folder / "null", 0o666 | 0o020000, os.makedev(1, 3))
    return folder / "null"


@pytest.mark.parametrize(("word", "option", "place"), WRITERS)
def test_devices_and_pipes_are_written_into(work, word, option, place):
    null = device(work)
    assert invoke(call(word, option, place, null)).exit_code == 0
    assert null.is_char_device()
    assert not list(work.glob("null.*"))  # no digests, no unfinished file
    os.mkfifo("pipe")
    received = []
    reader = threading.Thread(target=lambda: received.append(Path("pipe").read_bytes()))
    reader.start()
    done = invoke(
        call(word, option, place, "pipe", *(["--overwrite"] if word in ("imatrix", "recipe", "refine") else []))
    )
    reader.join(10)
    assert done.exit_code == 0 and len(received[0]) > 100, done.exception
    assert Path("pipe").is_fifo()


def test_standard_output_carries_an_output_alone(work):
    os.symlink("/proc/self/fd/1", "link")
    for name, stdout in (("/dev/stdout", subprocess.PIPE), ("link", open("printed", "wb"))):
        arguments = ["sizes", "llama-7b", "--json", name]
        done = subprocess.run([sys.executable, "-m", "quantlab.cli", *arguments], stdout=stdout, check=True)
        assert len(json.loads(done.stdout or Path("printed").read_bytes())["rows"]) > 10


def test_read_only_folders_are_refused_before_any_work(work, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root every folder can be written
    with pytest.raises(PermissionError, match="checkpoint's folder is not writable. .* outfile=FILE"):
        ql.convert("checkpoint", progress=False)
    with pytest.raises(PermissionError, match="is not writable. Choose an output in another folder"):
        ql.quantize("whole.gguf", "new.gguf", ftype="Q4_0")


# ── functions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inputs_are_all_files_that_are_read(work):
    names = {path.name for path in input_files(["two-00002-of-00002.gguf"])}
    assert names == {"two-00001-of-00002.gguf", "two-00002-of-00002.gguf"}
    assert {path.name for path in input_files(["checkpoint/model.safetensors"])} >= {"config.json", "tokenizer.model"}
    assert {path.name for path in input_files(["A=other.gguf"])} == {"other.gguf", "other.gguf" + DIGESTS}
    assert [path.name for path in input_files(["primer", "llama-7b", None, "x" * 5000])] == [
        "primer.md",
        "llama-7b.json",
    ]


@pytest.mark.parametrize("alias", ["same", "hard link", "link", "link to input"])
def test_an_input_is_recognized_under_other_names(work, alias):
    out = Path("whole.gguf")
    if alias == "hard link":
        os.link("whole.gguf", out := Path("hard.gguf"))
    elif alias == "link":
        os.symlink("whole.gguf", out := Path("soft.gguf"))
    elif alias == "link to input":
        os.rename("whole.gguf", out := Path("moved.gguf"))
        os.symlink("moved.gguf", "whole.gguf")
    for made in (
        lambda: ql.quantize("whole.gguf", out, ftype="Q4_0", overwrite=True),
        lambda: ql.quantize("other.gguf", out, ftype="Q4_0", imatrix="whole.gguf", overwrite=True),
    ):
        with pytest.raises(ValueError, match="is the input|not an importance matrix|imatrix"):
            made()
    assert ql.inspect("whole.gguf").model.tensors["qtype"].tolist() == ["F32", "F32"]


def test_functions_never_replace_what_they_read(work):
    x = np.ones((1, 32), np.float32)
    matrix = ImportanceMatrix({"blk.0.attn_q.weight": x}, {"blk.0.attn_q.weight": np.ones(1, np.float32)}, 1, 32)
    matrix.save("m.gguf")
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    shard = "two-00001-of-00002.gguf"
    for made in (
        lambda: ql.quantize("whole.gguf", "m.gguf", ftype="Q4_0", imatrix="m.gguf", overwrite=True),
        lambda: ql.quantize("whole.gguf", "other.gguf", ftype="Q4_0", reuse="other.gguf", overwrite=True),
        lambda: ql.quantize("whole.gguf", "other.gguf" + DIGESTS, ftype="Q4_0", reuse="other.gguf", overwrite=True),
        lambda: ql.quantize("checkpoint", "checkpoint/tokenizer.model", ftype="Q4_0", overwrite=True),
        lambda: ql.convert("checkpoint", "checkpoint/README.md", overwrite=True, progress=False),
        lambda: ql.convert("checkpoint/model.safetensors", "checkpoint/config.json", overwrite=True, progress=False),
        lambda: ql.merge(shard, "two-00002-of-00002.gguf", overwrite=True),
        lambda: ql.split(shard, "two", overwrite=True),
    ):
        with pytest.raises(ValueError, match="is the input|is a shard already"):
            made()
    assert before == {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}


def test_saving_refuses_existing_files_until_told(work):
    Path("mine").write_text("mine")
    x = {"blk.0.attn_q.weight": np.ones((1, 32), np.float32)}
    matrix = ImportanceMatrix(x, {"blk.0.attn_q.weight": np.ones(1, np.float32)}, 1, 32)
    savers = [matrix.save, Recipe({"output.weight": "Q6_K"}).save, load_sensitivity().save]
    for save in savers:
        with pytest.raises(FileExistsError, match="mine: exists already.* pass overwrite=True"):
            save("mine")
    assert Path("mine").read_text() == "mine"
    for save in savers:
        save("mine", overwrite=True)
    load_sensitivity().save("mine")  # an older report


def load_sensitivity():
    from quantlab.study.sensitivity import Sensitivity

    return Sensitivity.load("s.json")


def test_pictures_are_recognized(tmp_path):
    import matplotlib.pyplot as plt

    ax = plt.subplots()[1]
    ql.plots.save(ax, tmp_path / "a.png")
    ql.plots.save(ax, tmp_path / "a.png")
    ax.figure.savefig(tmp_path / "mine.png")
    with pytest.raises(FileExistsError, match="mine.png: exists already and is not a picture of quantlab"):
        ql.plots.save(ax, tmp_path / "mine.png")
    plt.close(ax.figure)


def test_digests_lie_where_no_file_of_the_users_is(work):
    Path("q.gguf.json").write_text('{"mine": 1}')
    ql.quantize("whole.gguf", "q.gguf", ftype="Q4_0")
    assert Path("q.gguf.json").read_text() == '{"mine": 1}' and is_digests(Path("q.gguf" + DIGESTS))
    ql.quantize("whole.gguf", "q.gguf", ftype="Q5_0", overwrite=True)
    Path("r.gguf" + DIGESTS).write_text('{"mine": 1}')
    with pytest.raises(FileExistsError, match=r"r\.gguf\.quantlab\.json: exists already"):
        ql.quantize("whole.gguf", "r.gguf", ftype="Q4_0")
    Path("q.gguf" + DIGESTS).rename("q.gguf.json")  # where earlier versions put them
    ql.quantize("whole.gguf", "again.gguf", ftype="Q5_0", reuse="q.gguf")


@pytest.mark.parametrize("suffix", [".part", ".part.json"])
def test_unfinished_outputs_replace_no_file_of_the_users(work, suffix):
    Path("q.gguf" + suffix).write_text("mine")
    with pytest.raises(FileExistsError, match="is not an unfinished output of quantlab"):
        ql.quantize("whole.gguf", "q.gguf", ftype="Q4_0")
    assert Path("q.gguf" + suffix).read_text() == "mine"


def test_shards_are_not_written_to_devices(work):
    for made in (
        lambda: ql.split("whole.gguf", "/dev/null", max_tensors=1),
        lambda: ql.quantize("two-00001-of-00002.gguf", "/dev/null", ftype="Q4_0", keep_split=True),
    ):
        with pytest.raises(ValueError, match="shards must be files"):
            made()


def test_functions_name_arguments_and_words_name_options(work):
    """Errors of the package's functions name no option of the command line."""
    package = Path(ql.__file__).parent
    for path in package.rglob("*.py"):
        if path.relative_to(package).parts[0] not in ("cli", "train"):
            raised = [
                node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Raise)
            ]
            for node in raised:
                texts = [
                    part.value
                    for part in ast.walk(node)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
                assert not any(re.search(r"(^|\s)--[a-z]", text) for text in texts), (path, texts)
    done = subprocess.run(
        [sys.executable, "-m", "quantlab.cli", "sizes", "llama-7b", "--json", "whole.gguf"],
        capture_output=True,
        text=True,
    )
    assert done.stderr.endswith("Choose another name or pass --overwrite.\n")


# ── results are not lost ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_no_encoding_loses_a_result(work, encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "quantlab.cli"]
    for arguments in (["quantize", "whole.gguf", f"{encoding}.gguf", "Q4_0"], ["compare", "--help"]):
        done = subprocess.run([*command, *arguments], capture_output=True, env=environment, check=True)
        assert len(done.stdout) > 100 and b"not allowed" not in done.stderr
    assert Path(f"{encoding}.gguf").exists()


def test_file_names_are_printed_byte_by_byte(work):
    name = b"\xff.gguf"
    shutil.copy("whole.gguf", os.fsdecode(name))
    done = subprocess.run([sys.executable, "-m", "quantlab.cli", "inspect", name], capture_output=True, check=True)
    assert done.stdout


def test_a_closed_pipe_does_not_lose_the_file(work):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "quantlab.cli", "sizes", "llama-7b", "--json", "sizes.json"]
    subprocess.run(command, stdout=write, stderr=subprocess.DEVNULL)
    os.close(write)
    assert is_report(Path("sizes.json"))
