"""What every word of the command line shares: help, errors, exit status, --json."""

import gc
import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import typer
from typer.testing import CliRunner

import quantlab
from quantlab import cli
from quantlab.cli import options
from quantlab.files.gguf_file import read_header


def quantlab_command(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "quantlab.cli", *arguments], capture_output=True, text=True, **options)


def test_help_names_the_words_and_imports_little():
    code = "import sys; sys.argv[1:] = ['--help']; import atexit; from quantlab.cli import main\n"
    code += "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for word in ("convert", "quantize", "perplexity", "compare", "sizes", "table", "fetch", "notebook"):
        assert f"\n  {word} " in done.stdout
    imported = set(done.stderr.split())
    assert "typer" in imported
    assert not {"numpy", "pandas", "numba", "gguf", "matplotlib"} & imported


def test_help_lists_the_words_under_titles_and_whole():
    shown = CliRunner().invoke(cli.app, ["--help"], terminal_width=80).stdout
    assert "..." not in shown.split("Read and write files:")[1]  # no line is cut off at 80 columns
    commands = typer.main.get_command(cli.app).commands.values()
    assert all(f"  {word.name} " in shown for word in commands if not word.hidden)
    shown = CliRunner().invoke(cli.app, ["quantize", "--help"]).stdout
    assert "quantize [OPTIONS] IN [OUT] FTYPE [THREADS]\n" in shown
    assert "--reuse OLD" in shown and "--imatrix FILE" in shown and "<" not in shown
    assert "--model MODEL: the same as IN," in shown


def test_version():
    assert quantlab_command("--version").stdout == f"quantlab {quantlab.__version__}\n"


@pytest.mark.parametrize("word", sorted(typer.main.get_command(cli.app).commands))
def test_every_word_has_help(word):
    command = typer.main.get_command(cli.app).commands[word]
    shown = CliRunner().invoke(cli.app, [word, "--help"], terminal_width=10_000).stdout
    assert command.help.splitlines()[0] in shown
    for option in command.params:
        assert option.help, f"{word} {option.name}"
        assert option.help in shown


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["sizes"], ["sizes", "llama-7b", "--nonsense"], ["fetch", "a", "b"]]
)
def test_wrong_usage_exits_with_2(arguments):
    done = quantlab_command(*arguments)
    assert done.returncode == 2
    assert "Error:" in done.stderr
    assert done.stdout == ""


def test_an_error_is_one_line_and_exits_with_1():
    done = quantlab_command("sizes", "no-such-shape")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("quantlab: no-such-shape: ")
    assert len(done.stderr.splitlines()) == 1


@dataclass(frozen=True)
class Result:
    """A result as every public function returns one."""

    def __str__(self) -> str:
        return "the table"

    def to_json(self) -> str:
        return '{"schema": 1}'


@pytest.fixture
def word():
    """A command line with one word, which reports a result."""
    app = typer.Typer()

    @app.command()
    def word(json: options.JsonPath = None):
        options.report(Result(), json)

    return lambda *arguments: CliRunner().invoke(app, arguments)


def test_report_prints_the_table(word):
    assert word().stdout == "the table\n"


def test_json_goes_beside_the_table_into_a_file(word, tmp_path):
    target = tmp_path / "a.json"
    target.write_text('{"schema": 1, "protocol": {}, "rows": []}')
    assert word("--json", str(target)).stdout == "the table\n"
    assert json.loads(target.read_text()) == {"schema": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_json_alone_on_standard_output(word):
    done = word("--json", "-")
    assert json.loads(done.stdout) == {"schema": 1}
    assert done.stderr == "the table\n"


def test_a_json_path_that_cannot_be_written_is_refused_at_once(tmp_path):
    for path, rule in [(tmp_path, "folder"), (tmp_path / "no" / "a.json", "folder")]:
        done = quantlab_command("sizes", "llama-7b", "--json", str(path))
        assert done.returncode == 1
        assert rule in done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a: b=1, must be 2.\n  Do this."), "a: b=1, must be 2. Do this."),
        (FileNotFoundError(2, "No such file or directory", "x.gguf"), "x.gguf: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_an_error_becomes_one_line(error, line):
    assert cli._line(error) == line


def test_quantize_says_its_plan_once_and_keeps_standard_output_clean(tmp_path):
    out = tmp_path / "out.gguf"
    done = quantlab_command("quantize", "tiny", str(out), "Q4_0", "--json", "-")
    assert done.returncode == 0 and done.stderr.count("peak memory") == 1
    assert len(json.loads(done.stdout)["rows"]) == len(read_header(out).tensors)
    done = quantlab_command("quantize", "tiny", str(out), "Q4_0", "--json", "-")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"quantlab: {out}: exists already. Choose another name or pass --overwrite.\n"


def test_interrupt_is_clean(monkeypatch, capsys):
    @cli.app.command(name="interrupted", hidden=True)
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["quantlab", "interrupted"])
    thresholds = gc.get_threshold()
    with pytest.raises(SystemExit) as left:
        cli.main()
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    cli.app.registered_commands.pop()
    assert left.value.code == 130
    assert capsys.readouterr().err == "quantlab: interrupted\n"


@pytest.mark.parametrize("arguments", [["x"], ["-p", "a"], ["-q", "a", "b"], ["-p", "a", "b", "c"]])
def test_notebook_parameters_come_in_triples(arguments):
    done = quantlab_command("notebook", "size_ppl_table", *arguments)
    assert done.returncode == 2
    assert "-p KEY VALUE" in done.stderr


def test_habits_of_llama_cpp_are_understood(monkeypatch, tmp_path):
    """-m for the model, --chunks -1 for all, -c 0 for the model's own context, threads behind the ftype."""
    from quantlab.cli import files

    run = CliRunner().invoke
    for arguments in (["-m", "llama-7b"], ["--model", "llama-7b"], ["--rules", "current", "--model=llama-7b"]):
        assert "LLaMA-7B" in run(cli.app, ["sizes", *arguments]).stdout
    seen = {}
    monkeypatch.setattr("quantlab.evaluate.perplexity.perplexity", lambda *a, **k: seen.update(k) or Result())
    assert run(cli.app, ["perplexity", "-m", "tiny", "-c", "0", "--chunks", "-1"]).exit_code == 0
    assert (seen["n_ctx"], seen["chunks"]) == (512, None)
    assert files._parts(["a", "Q4_K", "8"]) == ("a", None, "Q4_K", 8)
    assert files._parts(["a", "b", "15", "8"]) == ("a", "b", "15", 8)
    assert files._parts(["a", "./Q4_0", "Q4_K"]) == ("a", "./Q4_0", "Q4_K", None)
    for wrong in (["a"], ["a", "b", "Q4_K", "many"], ["a", "Q4_K", "8", "8"], ["a", "Q4_0", "Q4_K"]):
        assert run(cli.app, ["quantize", *wrong]).exit_code == 2
    assert run(cli.app, ["perplexity", "tiny", "--kl-divergence"]).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["quantize", "tiny"], "give IN FTYPE (for example tiny Q4_K_M)"),
        (["quantize", "tiny", "Q4_0", "Q4_K"], "give one ftype, or ./Q4_0 for a file of that name"),
        (["imatrix"], "give a model, or importance matrices with --in-file"),
        (["recipe", "tiny"], "give one, for example --like Q4_K_M"),
        (["refine", "tiny"], "give MODEL FTYPE (for example tiny Q4_K_M)"),
    ],
)
def test_wrong_usage_says_what_to_give(arguments, text):
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2 and text in " ".join(done.stderr.split())


def test_errors_name_options():
    assert options.as_options("Give a smaller n_ctx, or device=cpu.") == "Give a smaller --ctx-size, or --device cpu."
