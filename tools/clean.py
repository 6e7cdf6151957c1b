"""From documentation pages, docstrings and Markdown to paragraphs of plain English.

Each reader takes one file's text and returns its paragraphs in order: headings as ``## Title``, list items as
``- item``, code, tables, signatures and formulas left out. `is_prose` then decides which paragraphs read as English
sentences.
"""

import ast
import inspect
import re
from html.parser import HTMLParser

_SKIP = {
    "pre",
    "table",
    "dt",
    "script",
    "style",
    "nav",
    "header",
    "footer",
    "head",
    "form",
    "svg",
    "math",
    "button",
    "aside",
}
_BLOCK = {
    "p",
    "li",
    "dd",
    "div",
    "section",
    "article",
    "blockquote",
    "ul",
    "ol",
    "dl",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "br",
}
_ASIDE = re.compile(
    r"sidebar|related|footer|toctree|contents|sphx-glr|headerlink|navheader|navfooter|toc\b|breadcrumb|highlight"
)
_VOID = {"br", "img", "hr", "input", "meta", "link", "col", "area", "base", "embed", "source", "track", "wbr"}
_COMMON = set(
    "the a an of to in is are and or that it for be with as this by on if not can you will from which when has have "
    "was at than then but its their there each one into".split()
)
_SUBJECT = re.compile(
    r"weight|bits?\b|bytes?\b|quanti[sz]|precision|round|float|matri|memory|errors?\b|compress|models?\b|scal(e|ing)|tensor|"
    r"blocks?\b|layer|files?\b|numbers?\b|values?\b|perplexity|probabilit|distribut|entropy|divergence|token|vector|column|"
    r"rows?\b|averag|mean\b|squar|varian|norm|loss|bandwidth|processor|cache|integer|zero|measur|trained|training|language|"
    r"storage|store[sd]?\b|smaller|larger|exact|approximat"
)


class _Page(HTMLParser):
    """Collect the text of block elements, with what is inside skipped elements left out."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.paragraphs, self.text, self.mark, self.skipped, self.open = [], [], "", 0, []

    def handle_starttag(self, tag, attrs):
        if tag in _VOID:
            if tag == "br":
                self.text.append(" ")
            return
        names = " ".join(value or "" for key, value in attrs if key in ("class", "role"))
        math = "math" in names.split() and tag in ("span", "div")
        skip = tag in _SKIP or math or (tag not in ("html", "body", "main") and bool(_ASIDE.search(names)))
        self.open.append((tag, skip))
        self.skipped += skip
        if tag in _BLOCK:
            self.flush()
            self.mark = (
                "## " if re.fullmatch(r"h[1-6]", tag) else "- " if tag == "li" else self.mark if tag == "p" else ""
            )
        elif tag in ("code", "tt") and not self.skipped:
            self.text.append("`")
        if math:
            self.text.append("\0")  # a formula stood here: the sentence is incomplete

    def handle_endtag(self, tag):
        if tag in ("code", "tt") and not self.skipped:
            self.text.append("`")
        if tag in _BLOCK:
            self.flush()
        while self.open and any(tag == name for name, _ in self.open):
            name, skip = self.open.pop()
            self.skipped -= skip
            if name == tag:
                break

    def handle_data(self, data):
        if not self.skipped:
            self.text.append(data)

    def flush(self):
        """End the paragraph that is being collected."""
        text = " ".join("".join(self.text).replace("¶", "").split())
        if text and "\0" not in text:
            self.paragraphs.append(self.mark + re.sub(r"`+", "`", text))
            self.mark = ""
        self.text = []


def html_paragraphs(text: str) -> list[str]:
    """Return the paragraphs of an HTML page.

    Parameters
    ----------
    text : str
        The page.

    Returns
    -------
    list of str
        Headings, list items and paragraphs, in order.
    """
    page = _Page()
    page.feed(text)
    page.close()
    page.flush()
    return page.paragraphs


def markdown_paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a Markdown file, hard line breaks joined."""
    text = re.sub(r"^---\n.*?\n---\n", "", text, flags=re.S)
    text = re.sub(r"(```|~~~).*?(\1|\Z)", "\n\n", text, flags=re.S)
    text = re.sub(r"<!--.*?-->|<[^>\n]+>", "", text, flags=re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", text)
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("|") and not line.startswith("    ")]
    text = re.sub(r"^\s*([-*+]|\d+\.)\s+", "\n\n- ", "\n".join(lines), flags=re.M)
    text = re.sub(r"^\s*#+\s*(.*)$", r"\n\n## \1\n\n", text, flags=re.M)
    text = re.sub(r"(\*\*|__)(\S(?:.*?\S)?)\1", r"\2", text)
    return _paragraphs(text)


def python_paragraphs(text: str) -> list[str]:
    """Return the paragraphs of all docstrings of a Python source file."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return []
    found = []
    for node in ast.walk(tree):
        # not only docstrings proper: PyTorch and others attach their documentation as plain string constants
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and len(node.value) > 80
            and " " in node.value
        ):
            found += rst_paragraphs(inspect.cleandoc(node.value))
    return found


def rst_paragraphs(text: str) -> list[str]:
    """Return the paragraphs of reStructuredText as docstrings use it (NumPy's and Google's sections included)."""
    text = re.sub(r"(```).*?(\1|\Z)", "\n\n", text, flags=re.S)
    text = re.sub(r"^.*\n\s*[-=~^\"*#+]{4,}\s*$", "\n", text, flags=re.M)  # section titles
    text = re.sub(r"^(\s*)(>>>|\.\.\.|\.\. |:\w+).*$", "\n", text, flags=re.M)
    text = re.sub(r"^\s*\*{0,2}[\w., ]+\*{0,2} : .*$", "\n", text, flags=re.M)  # `x : array_like`
    text = re.sub(r"^\s*`{0,2}\w+`{0,2}\s*(\([^)]*\))?:[ \n]\s*", "\n\n", text, flags=re.M)  # `x (int): …`
    text = re.sub(r":[\w:.+-]+:`~?([^`<]*?)(\s*<[^`]*>)?`", lambda m: "`" + m[1].split(".")[-1] + "`", text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`_*", r"\1", text)
    text = re.sub(r"\[([^\]\n]*)\]\([^)\n]*\)", r"\1", text)
    text = re.sub(r"\s?\[\w+\]_", "", text).replace("``", "`").replace("::", ":")
    text = re.sub(r"\*\*(\S(?:.*?\S)?)\*\*", r"\1", text)
    text = re.sub(r"^\s*[-*+]\s+", "\n\n- ", text, flags=re.M)
    return _paragraphs(text)


def _paragraphs(text: str) -> list[str]:
    """Split at blank lines; join the lines of each part."""
    return [joined for part in re.split(r"\n\s*\n", text) if (joined := " ".join(part.split()))]


def is_prose(paragraph: str) -> bool:
    """Tell whether a paragraph reads as English sentences rather than code, a list of names or a formula."""
    text = paragraph.removeprefix("- ")
    words = text.split()
    if (
        len(words) < 7
        or len(text) > 4000
        or text[-1] not in ".:!?)"
        or not text[0].isalpha()
        and text[0] not in "`\"'("
    ):
        return False
    if re.search(r"\\[a-z]+|[{}|<>=]{2}|https?:|@|\{|\$|==|->|_{2}|\w\(\w*,", text):
        return False
    if sum(c.isalpha() or c == " " for c in text) < 0.88 * len(text) or not text.isascii() and _foreign(text) > 0.02:
        return False
    if text.count("`") > 0.4 * len(words) or sum(c.isupper() for c in text) > 0.15 * len(text):
        return False
    return sum(word.strip(".,;:()`").lower() in _COMMON for word in words) >= 0.22 * len(words)


def is_explanation(paragraph: str) -> bool:
    """Tell whether a paragraph of prose explains something about data or numbers without naming any code."""
    if len(paragraph) < 150 or re.search(r"[`_*#/<>\\]|[a-z][A-Z]|\.\w|\w\(|[A-Z]{5}|e\.g|\d{4}", paragraph):
        return False
    words = paragraph.split()
    common = sum(word.strip(".,;:()").lower() in _COMMON for word in words)
    return common >= 0.36 * len(words) and bool(_SUBJECT.search(paragraph.lower()))


def _foreign(text: str) -> float:
    """Share of characters outside ASCII."""
    return sum(ord(c) > 127 for c in text) / len(text)


def plain(paragraph: str) -> str:
    """Spell typographic characters with their plain counterparts and close the gaps that removed markup left."""
    table = {"“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " ", "…": "...", "‐": "-", "‑": "-", "\u200b": ""}
    text = paragraph.translate(str.maketrans(table))
    text = re.sub(r"\(\s*\)|\[\d+\]", "", text)
    return " ".join(re.sub(r" +([.,;:)])", r"\1", text).split())


def document(paragraphs: list[str], seen: set[int]) -> str:
    """Join a file's prose into one text.

    Parameters
    ----------
    paragraphs : list of str
        What a reader returned.
    seen : set of int
        Digests of the paragraphs met before, which are left out; it grows by those that are kept.

    Returns
    -------
    str
        Paragraphs set apart by empty lines; a heading stays if prose follows it.
    """
    kept, heading = [], None
    for text in map(plain, paragraphs):
        if text.startswith("## "):
            text = re.sub(r"^## [\d.]+ ", "## ", text)
            heading = (
                text if text.isascii() and 1 < len(text.split()) < 14 and "`" not in text and "(" not in text else None
            )
            continue
        digest = hash(re.sub(r"[\W\d]+", " ", text.lower()))
        if digest in seen or not is_prose(text):
            continue
        seen.add(digest)
        if heading:
            kept.append(heading)
            heading = None
        kept.append(text)
    return "\n\n".join(kept)
