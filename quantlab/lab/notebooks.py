"""Run a bundled notebook with parameters: a thin wrapper over papermill that checks the parameters first.

What a run leaves lies in one folder: the executed notebook, an HTML copy, and what the notebook itself writes to `out`.
"""

import ast
import base64
import difflib
import hashlib
import io
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.files.bundled import how_to_install, notebooks_dir, runs_dir
from quantlab.files.output import is_picture, replacing

_LARGE_PICTURE = 100_000  # bytes
_WIDGET = "application/vnd.jupyter.widget-view+json"
_NO_KERNEL = "<p><em>In JupyterLab, a control appears here while the notebook's kernel runs.</em></p>"


def names() -> list[str]:
    """Return the sorted names of the bundled notebooks, without the index."""
    return sorted(path.stem for path in notebooks_dir().glob("*.ipynb") if path.stem != "index")


def results(out: str | Path, name: str) -> Path:
    """Make and return the folder for a notebook's results: `out`, or its own in the runs folder."""
    folder = Path(out) if str(out) else runs_dir() / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_parameters(path: str | Path) -> dict[str, Any]:
    """Read a YAML file of parameters, as papermill's `-f` takes it: `KEY: VALUE` lines.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it does not hold keys and values.
    """
    import yaml

    if not Path(path).is_file():
        ready = sorted((notebooks_dir() / "params").glob("*.yaml"))
        raise FileNotFoundError(f"{path}: no such file. Choose one of: {', '.join(map(str, ready))}")
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a YAML file of lines `KEY: VALUE`. Check the file.")
    return found


def run(name: str, parameters: Mapping[str, Any] | None = None, *, overwrite: bool = False) -> Path:
    """Run a bundled notebook and return the folder of its results.

    Parameters
    ----------
    name : str
        A name of `names()`.
    parameters : mapping
        Values for the notebook's parameters. A string is read as the type that the notebook declares: `8` for an int,
        `Q4_K_M,Q2_K` for a list. `out` names the folder of the results.
    overwrite : bool
        Whether the results of a finished run, or other files in `out`, may be replaced.

    Returns
    -------
    Path
        Folder with `<name>.ipynb`, `<name>.html` and the notebook's own files. Unless `out` is given, it lies in the
        runs folder. Its name has the notebook's name, the parameters that are not the default, and a digest of all
        parameters: `size_ppl_table-model=smollm2-0e3bb1a7`. A run of the same parameters that did not finish is
        repeated there.

    Raises
    ------
    FileNotFoundError
        If there is no such notebook.
    FileExistsError
        If the folder holds a finished run or other files, and `overwrite` is false.
    ValueError
        If a parameter is unknown or its value has another type, or a cell of the notebook fails.
    ImportError
        If papermill is not installed.
    """
    if name not in names():
        raise FileNotFoundError(f"{name}: no such notebook. Choose one of: {', '.join(names())}")
    try:
        import papermill
    except ImportError:
        raise ImportError(f"{name}: needs papermill. Run: {how_to_install('lab')}") from None
    given = dict(parameters or {})
    source = notebooks_dir() / f"{name}.ipynb"
    declared = papermill.inspect_notebook(source)
    values = _checked(name, given, declared)
    defaults = {key: ast.literal_eval(of["default"]) for key, of in declared.items()}
    folder = Path(values.get("out") or runs_dir() / _folder_name(name, values, defaults))
    executed = folder / f"{name}.ipynb"
    _prepare(folder, executed, values, defaults, overwrite)
    try:
        how = {"progress_bar": sys.stderr.isatty(), "extra_arguments": ["--IPKernelApp.log_level=CRITICAL"]}
        papermill.execute_notebook(source, executed, {**values, "out": str(folder)}, kernel_name="python3", **how)
    except papermill.PapermillExecutionError as error:
        raise ValueError(
            f"{name}: cell {error.exec_count} failed with {error.ename}: {error.evalue} See {executed}"
        ) from None
    _write_html(executed)
    return folder


def picture(name: str, folder: Path, path: str | Path, *, overwrite: bool = False) -> Path:
    """Write the first figure of an executed notebook as PNG, in 256 colours if it would be larger than 100 kB.

    `run` executed the notebook `name` in `folder`. With `overwrite`, any file may be replaced, else only a picture of
    quantlab.

    Raises
    ------
    FileExistsError
        If such a file exists and `overwrite` is false.
    ValueError
        If the notebook shows no figure.
    """
    import nbformat
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    cells = nbformat.read(folder / f"{name}.ipynb", as_version=4).cells
    figures = [
        output.data for cell in cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    if not figures:
        raise ValueError(f"{name}: shows no figure. Look at {folder / name}.ipynb.")
    data = base64.b64decode(figures[0]["image/png"])
    image = Image.open(io.BytesIO(data))
    if len(data) >= _LARGE_PICTURE:
        image = image.convert("RGB").quantize(256)
    said = PngInfo()
    said.add_text("Software", "quantlab")  # by which a later run recognizes it
    with replacing(path, overwrite=overwrite, own=is_picture) as part:
        image.save(part, "PNG", optimize=True, pnginfo=said)
    return Path(path)


def _folder_name(name: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return a folder name: the notebook, its changed parameters as far as they fit, a digest of all."""
    run = _all_but_out(values, defaults)
    told = [f"{key}={_in_a_name(value)}" for key, value in run.items() if value != defaults[key]]
    readable = "-".join([name, *told]).encode()[:100].decode(errors="ignore")
    return f"{readable}-{hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:8]}"


def _all_but_out(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parameters that identify a run, in the notebook's order, without `out`."""
    return {key: values.get(key, default) for key, default in defaults.items() if key != "out"}


def _in_a_name(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.,]+", "-", text).strip("-.")


def _prepare(folder: Path, executed: Path, values: Mapping, defaults: Mapping, overwrite: bool) -> None:
    """Make the folder of a run; refuse one with other files, but not that of an unfinished run."""
    page = executed.with_suffix(".html")  # is written last
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        earlier = _parameters_of(executed)
        if earlier is None or _all_but_out(earlier, defaults) != _all_but_out(values, defaults):
            raise FileExistsError(
                f"{folder}: holds other files. Choose another folder with out, or pass overwrite=True."
            )
        if page.exists():
            raise FileExistsError(
                f"{folder}: holds a finished run of these parameters. Pass overwrite=True to repeat it."
            )
    folder.mkdir(parents=True, exist_ok=True)
    page.unlink(missing_ok=True)


def _parameters_of(executed: Path) -> dict[str, Any] | None:
    """Return the parameters of an executed notebook (None: it does not exist)."""
    try:
        return dict(json.loads(executed.read_text(encoding="utf-8"))["metadata"]["papermill"]["parameters"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _checked(name: str, given: Mapping[str, Any], declared: Mapping[str, Mapping]) -> dict[str, Any]:
    """Return the given values in the types that the notebook declares."""
    values = {}
    for key, value in given.items():
        if key not in declared:
            near = difflib.get_close_matches(key, declared, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name}: parameter={key}, must be one of: {', '.join(declared)}.{hint}")
        kind = declared[key]["inferred_type_name"]
        complaint = f"{name}: {key}={value}, must be {kind}."
        values[key] = _read(value, kind, complaint) if isinstance(value, str) else value
        if not _fits(values[key], kind):
            raise ValueError(complaint)
        if kind == "float":
            values[key] = float(values[key])  # 1 and 1.0 are one run
    return values


def _read(text: str, kind: str, complaint: str) -> Any:
    """Read a string as a value of the declared type."""
    if kind == "str":
        return text
    if kind.startswith("list[") and not text.startswith("["):
        inner = kind[len("list[") : -1]
        return [_read(part.strip(), inner, complaint) for part in text.split(",") if part.strip()]
    try:
        value = ast.literal_eval(text.capitalize() if kind == "bool" else text)
    except (ValueError, SyntaxError):
        raise ValueError(complaint) from None
    if not _fits(value, kind):
        raise ValueError(complaint)
    return value


def _fits(value: Any, kind: str) -> bool:
    """Tell whether a value has the declared type."""
    if kind.startswith("list["):
        return isinstance(value, list) and all(_fits(item, kind[len("list[") : -1]) for item in value)
    wanted = {"str": str, "int": int, "float": (int, float), "bool": bool}[kind]
    return isinstance(value, wanted) and (kind == "bool" or not isinstance(value, bool))


def _write_html(executed: Path) -> None:
    """Write the HTML copy of an executed notebook beside it, without widgets."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [shown for output in cell.outputs if (shown := _on_a_page(output))]
    html, _ = HTMLExporter(exclude_input_prompt=True, exclude_output_prompt=True).from_notebook_node(notebook)
    executed.with_suffix(".html").write_text(html, encoding="utf-8")


def _on_a_page(output):
    """Return an output for a page: without messages and progress bars, with a sentence for sliders."""
    from nbformat.v4 import new_output

    if output.get("name") == "stderr":
        return None
    if _WIDGET not in output.get("data", {}):
        return output
    is_value = output.output_type == "execute_result"  # a progress bar is none
    return new_output("display_data", {"text/html": _NO_KERNEL}) if is_value else None
