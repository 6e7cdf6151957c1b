"""Pages of the documentation that follow from something else: the command line, public names, notebooks, CONTRIBUTING.

mkdocs calls `on_config` and `on_files` before it builds. A page made here exists only in the site, so nothing that
could fall behind is kept.
"""

import importlib
import json
import re
from collections import Counter
from functools import cached_property
from pathlib import Path
from textwrap import indent

import griffe
import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import quantlab as ql
from quantlab.cli import app
from quantlab.cli.options import takes as as_value

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
_ROOMS = {  # module → page of the reference, in the order of the pages
    "files": ("Models on disk", "Open a GGUF file or a checkpoint."),
    "transform": ("Files to files", "Convert, quantize, look into, compare and cut files; sizes without weights."),
    "evaluate": ("Measuring", "Perplexity, divergence, importance matrices, and files refined with them."),
    "study": ("Choosing bits", "What each tensor costs at each type, and the best type for each."),
    "run": ("Running", "What runs where, and what a model says."),
}
_MODULES = {
    "quants": ("Arrays", "Numbers to bytes and back: ggml's types on NumPy arrays."),
    "tables": ("Tables", "Records to tables."),
    "plots": ("Plots", "Tables to figures; every function returns the Axes that it drew into."),
}


_parse = griffe.Docstring.parse


def _parse_with_own_types(docstring: griffe.Docstring, *args, **options) -> list[griffe.DocstringSection]:
    """Parse a docstring; parameters that share a description get their own types and defaults, not the first one's."""
    sections = _parse(docstring, *args, **options)
    signature = getattr(docstring.parent, "parameters", ())
    for section in sections:
        if section.kind is griffe.DocstringSectionKind.parameters:
            shared = Counter(item.description for item in section.value)
            for item in section.value:
                if shared[item.description] > 1 and item.name in signature:
                    item.annotation, item.value = signature[item.name].annotation, signature[item.name].default
    return sections


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Replace the folders of the navigation by the pages that are made for them."""
    griffe.Docstring.parse = _parse_with_own_types
    made = {folder: [page for page, _ in pages()] for folder, pages in _FOLDERS.items()}
    for entry in config.nav:
        for title, page in entry.items():
            if isinstance(page, str) and page in made:
                entry[title] = made[page]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for pages in _FOLDERS.values():
        for page, text in pages():
            files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "contributing.md", content=_contributing()))
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    for picture in sorted((NOTEBOOKS / "pictures").glob("*.png")):
        files.append(File.generated(config, f"pictures/{picture.name}", abs_src_path=str(picture)))
    return files


# ---- the command line


def words() -> list[tuple[str, str]]:
    """A page for each word of the command line, from its parameters, and a table of all."""
    commands = {name: word for name, word in typer.main.get_command(app).commands.items() if not word.hidden}
    rows = [f"| [{name}]({name}.md) | {_first_line(word.help)} |" for name, word in commands.items()]
    head = "# How to\n\nEach word of the command line does one job. `quantlab WORD --help` prints what its page says.\n"
    table = ["", "| word | what it does |", "|---|---|", *rows, ""]
    return [
        ("how-to/index.md", head + "\n".join(table)),
        *((f"how-to/{name}.md", _word(name, word)) for name, word in commands.items()),
    ]


def _word(name: str, word) -> str:
    """One word: its help, usage, arguments and options."""
    arguments = [p for p in word.params if p.param_type_name == "argument"]
    options = [p for p in word.params if p.param_type_name == "option" and p.name != "help"]
    context = typer.Context(word, info_name=name)
    usage = " ".join(p.metavar or p.name.upper() for p in arguments)
    parts = [f"# {name}", _text(word.help), f"```\nquantlab {name} [OPTIONS] {usage}".rstrip() + "\n```"]
    for title, parameters in (("Arguments", arguments), ("Options", options)):
        if parameters:
            rows = [f"| {_names(p, context)} | {_cell(p.help)} | {_default(p)} |" for p in parameters]
            parts.append("\n".join([f"## {title}", "", "| name | what it is | default |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _names(parameter, word: typer.Context) -> str:
    """Names of a parameter, with what it takes."""
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    takes = "" if parameter.is_flag else parameter.metavar or as_value(parameter.display_type(word))
    names = [*parameter.opts, *parameter.secondary_opts]
    return "<br>".join(f"`{f'{name} {takes}'.strip()}`" for name in names)


def _default(parameter) -> str:
    """The default, where there is one to tell."""
    value = parameter.default
    if parameter.required:
        return "required"
    return "" if value is None or value == "" or isinstance(value, bool) or callable(value) else f"`{value}`"


def _cell(text: object) -> str:
    """Plain text as a table's cell."""
    return _text(" ".join(str(text or "").split())).replace("|", "\\|")


def _text(text: str | None) -> str:
    """Help texts are plain: what Markdown would take for marks is shown."""
    return re.sub(r"([<*_\[])", r"\\\1", text or "")


def _first_line(text: str | None) -> str:
    return _cell((text or "").split("\n\n")[0])


# ---- public names


def names() -> list[tuple[str, str]]:
    """A page for each room with public functions, one for each public module, and a table of all."""
    pages, rows = [], []
    for room, (title, said) in _ROOMS.items():
        here = {name: module for name, module in ql._NAMES.items() if module.split(".")[1] == room}
        rows += [f"| [ql.{name}]({room}.md#{module}.{name}) | {_summary(ql, name)} |" for name, module in here.items()]
        owners = sorted({*here.values()})
        results = [f"{module}.{item}" for module in owners for item in _classes(module)]
        blocks = [_block(f"{module}.{name}") for name, module in here.items()] + list(map(_block, results))
        pages.append((f"reference/{room}.md", "\n\n".join([f"# {title}", said, *blocks]) + "\n"))
    for name, (title, said) in _MODULES.items():
        module = getattr(ql, name)
        rows.append(f"| [ql.{name}]({name}.md) | {said} |")
        places = [f"{getattr(module, item).__module__}.{item}" for item in module.__all__]
        page = "\n\n".join([f"# {title}", said, *map(_block, places)])
        pages.append((f"reference/{name}.md", page + "\n"))
    head = """# Reference

`import quantlab as ql` gives these names. A result prints as a table, shows as one in a notebook, and has `.to_frame()`
and `.to_json()`.
"""
    table = ["", "| name | what it does |", "|---|---|", *rows, ""]
    return [("reference/index.md", head + "\n".join(table)), *pages]


def _block(path: str) -> str:
    """What mkdocstrings replaces by the description of an object; of a class with its public methods."""
    module, name = path.rsplit(".", 1)
    item = getattr(importlib.import_module(module), name)
    methods = [] if not isinstance(item, type) else [key for key, value in vars(item).items() if _is_method(key, value)]
    return f"::: {path}" + (f"\n    options:\n      members: [{', '.join(methods)}]" if methods else "")


def _is_method(name: str, value: object) -> bool:
    return not name.startswith("_") and (callable(value) or isinstance(value, property | cached_property))


def _classes(module: str) -> list[str]:
    """Public results that are defined in a module."""
    from quantlab.files.model import LazyTensor, Model
    from quantlab.result import Result

    found = vars(importlib.import_module(module)).items()
    return [
        name
        for name, item in found
        if isinstance(item, type)
        and item.__module__ == module
        and not name.startswith("_")
        and (issubclass(item, Result) or item in (Model, LazyTensor))
    ]


def _summary(owner: object, name: str) -> str:
    """First line of a docstring."""
    return _cell((getattr(owner, name).__doc__ or "").strip().split("\n")[0])


# ---- notebooks


def tutorials() -> list[tuple[str, str]]:
    """A page for each notebook, as it is kept: text and code, and its picture; the index first."""
    order = re.findall(r"\]\((\w+)\.ipynb\)", _source(NOTEBOOKS / "index.ipynb"))
    paths = sorted(NOTEBOOKS.glob("*.ipynb"), key=lambda path: order.index(path.stem) if path.stem in order else -1)
    return [(f"tutorials/{path.stem}.md", _notebook(path)) for path in paths]


def _notebook(path: Path) -> str:
    """Text and code of a notebook, with its picture after the first text."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [_as_page(cell) for cell in cells if "".join(cell["source"]).strip()]
    picture = NOTEBOOKS / "pictures" / f"{path.stem}.png"
    if picture.exists():
        parts.insert(1, f"![{path.stem}](../pictures/{path.stem}.png)")
        run = f"Open it with `make lab`, or run it as it is: `quantlab notebook {path.stem}`."
        parts.insert(2, f'!!! note "This page is a notebook, not run here"\n    {run}')
    return "\n\n".join(parts) + "\n"


def _as_page(cell: dict) -> str:
    """A cell as Markdown, its links to notebooks and pictures as those of the site."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "code":
        block = f"```python\n{source}\n```"
        is_solution = cell["metadata"].get("jupyter", {}).get("source_hidden", False)
        return '??? example "Solution"\n' + indent(block, "    ") if is_solution else block
    source = re.sub(r"\]\((\w+)\.ipynb", r"](\1.md", source)
    source = re.sub(r"<img src=\"pictures/([\w.]+)\"[^>]*>", r"![](../pictures/\1){ width=240 }", source)
    return re.sub(r"\]\(pictures/", "](../pictures/", source)


def _source(path: Path) -> str:
    """All text of a notebook."""
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"])


# ---- files of the checkout


def _contributing() -> str:
    """CONTRIBUTING.md; what it links to in the checkout is named instead."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]+\)", r"`\1`", text)


_FOLDERS = {"tutorials/": tutorials, "how-to/": words, "reference/": names}
