"""The map of the course, read off the notebooks themselves: question, time, what comes before, picture."""

import base64
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from quantlab.files.bundled import notebooks_dir
from quantlab.lab.notebooks import names

_SPAN = r"((?:about |less than |under )?(?:a few|half a|an?|two|three|\d+) (?:second|minute)s?(?: or two)?)"
_TIMES = (re.compile(_SPAN + r" on 2 cores"), re.compile(_SPAN))  # the surer one first
_BEFORE = re.compile(r"^Before it: (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Course:
    """The notebooks in an order in which they can be read.

    Attributes
    ----------
    rows : tuple of dict
        `notebook`, `question`, `time` (with its defaults, on 2 cores), `before` (names of notebooks that it builds on),
        `picture` (a file, None if there is none).
    """

    rows: tuple[dict, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a table."""
        return pd.DataFrame(self.rows)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("", "notebook", "its question", "time", "before it"))
        return f"<table><tr>{head}</tr>{''.join(map(_as_html, self.rows))}</table>"


def course() -> Course:
    """Read the map of the course off the bundled notebooks.

    Returns
    -------
    Course
        Every notebook but the map itself; each stands after those that it builds on.

    Raises
    ------
    ValueError
        If notebooks build on each other in a circle, or on one that is not there.
    """
    rows = {name: _row(name) for name in names() if name != "index"}
    ordered: list[dict] = []
    while rows:
        done = {row["notebook"] for row in ordered}
        ready = [name for name, row in rows.items() if set(row["before"]) <= done]
        if not ready:
            raise ValueError(
                f"{', '.join(rows)}: before={[r['before'] for r in rows.values()]}, must be other notebooks."
            )
        ordered += [rows.pop(name) for name in ready]
    return Course(tuple(ordered))


def _row(name: str) -> dict:
    """What the first cell of a notebook says."""
    path = notebooks_dir() / f"{name}.ipynb"
    first = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    picture = path.parent / "pictures" / f"{name}.png"
    before = _BEFORE.search(first)
    time = next((found[1] for pattern in _TIMES if (found := pattern.search(first))), "")
    return {
        "notebook": name,
        "question": first.splitlines()[0].removeprefix("# "),
        "time": time,
        "before": re.findall(r"\[(\w+)\]", before[1]) if before else [],
        "picture": picture if picture.is_file() else None,
    }


def _as_html(row: dict) -> str:
    """A row with its picture inside, so that the page needs no other file."""
    name, picture = row["notebook"], ""
    if row["picture"]:
        data = base64.b64encode(Path(row["picture"]).read_bytes()).decode()
        picture = f'<img src="data:image/png;base64,{data}" style="min-width:240px;width:240px" alt="{name}">'
    link = f'<a href="{name}.ipynb">{name}</a>'
    cells = (picture, link, html.escape(row["question"]), row["time"], ", ".join(row["before"]))
    return "<tr>" + "".join(f'<td style="text-align:left">{cell}</td>' for cell in cells) + "</tr>"
