"""The page of a report: its JSON → one HTML file that loads nothing from elsewhere and runs no script."""

from collections.abc import Iterable, Sequence
from math import expm1
from os.path import commonprefix
from pathlib import Path

from quantlab.quants.ggml_types import FAMILIES, GGML_TYPES
from quantlab.study.report_plot import size_kld
from quantlab.study.report_text import escaped, name, number, percent, probability, size, with_error

MOST = 24  # variants of which any two are shown; of more, each and the next in size
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_SURE = 0.01  # p below which a difference is coloured


def page(report: dict) -> str:
    """Return the page.

    Parameters
    ----------
    report : dict
        The JSON of a `Report`.
    """
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    report = _with_short_names(report)
    sections = [part for part in (make(report) for make in _SECTIONS) if part]
    links = "".join(f'<a href="#{key}">{escaped(title)}</a>' for key, title, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{escaped(title)}</h2>{text}</section>' for key, title, text in sections)
    version = escaped(report["protocol"]["versions"].get("quantlab", ""))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(_POLICY)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        f"<title>{escaped(report['protocol']['base'])}: quantized files, measured</title>"
        f"<style>{style}</style></head>\n<body><main>{_header(report, links)}{body}"
        f"<footer>Made by quantlab {version}. All figures are in the JSON beside this page.</footer>"
        "</main></body></html>\n"
    )


def _with_short_names(report: dict) -> dict:
    """Leave out what the names of all variants begin with, up to a hyphen, dot or space; `prefix` holds it."""
    names = list(dict.fromkeys(row["variant"] for row in report["rows"]))
    base, *others = names
    prefix = commonprefix(others)[: max(map(commonprefix(others).rfind, "-. ")) + 1] if len(others) > 1 else ""
    short = {old: old[len(prefix) :] for old in others}
    if len(prefix) < 4 or not all(short.values()) or base in short.values():
        return report | {"prefix": ""}

    def renamed(rows: Iterable[dict]) -> list[dict]:
        keys = ("variant", "a", "b")
        return [row | {key: short.get(row[key], row[key]) for key in keys if key in row} for row in rows]

    parts = {key: renamed(report[key]) for key in ("rows", "confidence", "pairs", "files")}
    said = report["continuation"]
    parts["continuation"] = said | {"rows": renamed(said["rows"])} if "rows" in said else said
    return report | parts | {"prefix": prefix}


def _texts(report: dict) -> list[str]:
    return [text["text"] for text in report["protocol"]["texts"]]


def _rows(report: dict, text: str) -> list[dict]:
    """The variants' rows on one text, the base first, then from large to small."""
    base, *others = [row for row in report["rows"] if row["text"] == text]
    return [base, *sorted(others, key=lambda row: -row["bytes"])]


def _table(head: Sequence[str], rows: Iterable[str], label: str) -> str:
    """A table in a box that scrolls; the cells of the head are HTML."""
    top = "".join(cell if cell.startswith("<th") else f'<th scope="col">{cell}</th>' for cell in head)
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(label)}">'
    return f"{box}<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def _left(title: str) -> str:
    """The head of a column of text."""
    return f'<th scope="col" class="text">{title}</th>'


def _row(title: str, cells: Iterable[str], kind: str = "") -> str:
    """A row; cells that are not `<td …>` already become one."""
    inner = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
    return f'<tr{f" class={kind}" if kind else ""}><th scope="row">{title}</th>{inner}</tr>'


def _titled(variant: str) -> str:
    """A name that may be cut short on a narrow screen, whole for a pointer over it."""
    return f'<span title="{escaped(variant)}">{name(variant)}</span>'


# ── sections ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _header(report: dict, links: str) -> str:
    texts, protocol = _texts(report), report["protocol"]
    base, *others = _rows(report, texts[0])
    scored = sum(_rows(report, text)[0]["n_scored"] for text in texts)
    best = min(others, key=lambda row: row["kld_mean"])
    least = min(others, key=lambda row: row["bytes"])
    n, on = len(others), "one text" if len(texts) == 1 else f"{len(texts)} texts"
    facts = [
        ("base", f"{size(base['bytes'])}<small>{number(base['bpw'])} bits per weight</small>"),
        ("smallest", f"{size(least['bytes'])}<small>{name(least['variant'])}</small>"),
        ("least divergence", f"{number(best['kld_mean'])}<small>{name(best['variant'])}, nats per token</small>"),
        ("tokens scored", f"{scored:,}<small>on {on}, by each file</small>"),
    ]
    tiles = "".join(f"<div><dt>{title}</dt><dd>{value}</dd></div>" for title, value in facts)
    what = "one quantized variant" if n == 1 else f"{n} quantized variants"
    return (
        f'<header><p class="eyebrow">Quantization report</p><h1>{name(protocol["base"])}</h1>'
        f'<p class="lede">{what[0].upper()}{what[1:]}, measured side by side with the base, token by token. The '
        f"KL divergence says how far a variant's predictions are from the base's. Zero means the same predictions.</p>"
        f'<nav aria-label="Sections">{links}</nav></header><dl class="facts">{tiles}</dl>'
    )


def _summary(report: dict) -> tuple[str, str, str]:
    text = _texts(report)[0]
    base, *others = _rows(report, text)
    most = max(row["kld_mean"] for row in others) or 1
    head = ["variant", "size", "KL divergence", "its 99th<br>percentile", "perplexity", "same most<br>probable token"]
    lines = [_row(_titled(base["variant"]), _summary_cells(base, None), "base")]
    for row in others:
        tag = '<span class="tag">front</span>' if row["on_front"] else ""
        lines.append(_row(_titled(row["variant"]) + tag, _summary_cells(row, most)))
    note = (
        f"Measured on {name(text)}. Errors are standard errors over tokens. A variant is on the front if no other is "
        "smaller and diverges less."
    )
    if report["prefix"]:
        note += f" All names begin with {name(report['prefix'])}, which is left out."
    return "summary", "Sizes and damage", f'{_table(head, lines, "Sizes and damage")}<p class="note">{note}</p>'


def _summary_cells(row: dict, most: float | None) -> list[str]:
    sizes = f"{size(row['bytes'])}<small class=soft>{row['bpw']:.2f} bits/weight</small>"
    ppl = with_error(row["ppl"], row["ppl_se"])
    if most is None:
        return [sizes, "–", "–", ppl, "–"]
    share = 100 * max(0.0, row["kld_mean"]) / most
    meter = f'<span class="meter" style="--w:{share:.1f}%"></span>'
    change = f"<small class=soft>{_change(row['ln_ratio'])} ± {percent(row['ln_ratio_se'], 2)}</small>"
    kld = with_error(row["kld_mean"], row["kld_se"]) + meter
    return [sizes, kld, number(row["kld_p99"]), ppl + change, percent(row["same_top_p"])]


def _change(ln_ratio: float) -> str:
    """The change of the perplexity that a difference of logarithms is."""
    return percent(expm1(ln_ratio), 2, signed=True)


def _front(report: dict) -> tuple[str, str, str] | None:
    rows = _rows(report, _texts(report)[0])[1:]
    pictures = size_kld(rows, width=860, height=440, name="wide") + size_kld(rows, width=380, height=420, name="narrow")
    if not pictures:
        return None
    caption = (
        f"KL divergence on {name(_texts(report)[0])} against size, on a logarithmic scale. Filled dots are on the "
        "front. Bars are one standard error."
    )
    return "front", "Size against divergence", f"<figure>{pictures}<figcaption>{caption}</figcaption></figure>"


def _by_text(report: dict) -> tuple[str, str, str] | None:
    texts = _texts(report)
    if len(texts) < 2:
        return None
    rows = {text: {row["variant"]: row for row in _rows(report, text)} for text in texts}
    protocols = {text["text"]: text for text in report["protocol"]["texts"]}
    head = ["variant", *(f"{name(text)}<br>{_rows(report, text)[0]['n_scored']:,} tokens" for text in texts)]
    tables = []
    order = [row["variant"] for row in _rows(report, texts[0])]
    for title, cell in (("KL divergence", _kld_cell), ("Perplexity", _ppl_cell)):
        lines = [
            _row(_titled(v), [cell(rows[text][v]) for text in texts], "" if i else "base")
            for i, v in enumerate(order)
            if i or cell is _ppl_cell
        ]
        tables.append(f"<h3>{title}</h3>{_table(head, lines, title)}")
    chats = [name(text) for text in texts if protocols[text]["name"] == "answers"]
    note = ""
    if chats:
        note = (
            f"<p class=note>{', '.join(chats)}: chat turns, rendered by the model's own chat template. Only the "
            "assistant's answers are scored.</p>"
        )
    return "texts", "By text", "".join(tables) + note


def _kld_cell(row: dict) -> str:
    return with_error(row["kld_mean"], row["kld_se"])


def _ppl_cell(row: dict) -> str:
    change = f"<small class=soft>{_change(row['ln_ratio'])}</small>" if row["ln_ratio"] else ""
    return with_error(row["ppl"], row["ppl_se"]) + change


def _confidence(report: dict) -> tuple[str, str, str]:
    parts = []
    for text in _texts(report):
        rows = [row for row in report["confidence"] if row["text"] == text]
        order = [row["variant"] for row in _rows(report, text)[1:]]
        bins = [row for row in rows if row["variant"] == rows[0]["variant"]]
        head = ["variant"]
        head += [f"{_edge(b['low'])}–{_edge(b['high'])}<br>{percent(b['share'], 0)} of tokens" for b in bins]
        lines = [_row(_titled(v), [_heat(row) for row in rows if row["variant"] == v]) for v in order]
        parts.append(f"{_under(report, text)}{_table(head, lines, f'By confidence, {text}')}")
    intro = (
        "<p>The mean KL divergence of the tokens where the base's most probable token has a probability in a given "
        "range. Below it stands which part of the whole divergence these tokens make up; it also gives the colour.</p>"
    )
    return "confidence", "By the base's confidence", intro + "".join(parts)


def _edge(value: float) -> str:
    return f"{100 * value:g}{'' if value < 1 else ' %'}"


def _heat(row: dict) -> str:
    if row["kld_mean"] is None:
        return '<td class="same">–</td>'
    part = max(0.0, row["part"] or 0.0)
    return (
        f'<td class="heat" style="--a:{min(0.5, 0.75 * part):.3f}">{number(row["kld_mean"])}'
        f"<small class=soft>{percent(row['part'], 0)}</small></td>"
    )


def _under(report: dict, text: str) -> str:
    """A heading for a text where there are several."""
    return f"<h3>{name(text)}</h3>" if len(_texts(report)) > 1 else ""


def _pairs(report: dict) -> tuple[str, str, str] | None:
    if not report["pairs"]:
        return None
    parts = [f"{_under(report, text)}{_pairs_of(report, text)}" for text in _texts(report)]
    intro = (
        "<p>By how much the KL divergence of the variant in a row is below (−) or above (+) that of the variant in a "
        "column, with the standard error and p of a paired sign-flip test, both over the chunks of the text. Colour "
        f"marks p &lt; {_SURE}.</p>"
    )
    return "pairs", "Any two variants", intro + "".join(parts)


def _pairs_of(report: dict, text: str) -> str:
    found = {}
    for row in report["pairs"]:
        if row["text"] == text:
            found |= _both_ways(row)
    order = [row["variant"] for row in _rows(report, text)[1:]]
    if len(order) <= MOST:
        head = ["variant", *(f"{_titled(v)}" for v in order)]
        lines = [_row(_titled(a), [_pair(found, a, b) for b in order]) for a in order]
        return _table(head, lines, f"Any two variants, {text}")
    lines = [
        _row(_titled(b), [f'<td class="text">{_titled(a)}</td>', _pair(found, b, a)])
        for a, b in zip(order[:-1], order[1:], strict=True)
    ]
    note = f'<p class="note">Each is compared with the next larger one. The JSON has all {len(found) // 2:,} pairs.</p>'
    return _table(["variant", _left("the next larger"), "difference"], lines, f"Neighbours, {text}") + note


def _both_ways(row: dict) -> dict[tuple[str, str], tuple]:
    """Change of the divergence, its error and p: from a to b, and from b to a."""
    a, b, p = row["a"], row["b"], row["p"]
    if row["less"] is None:
        return {(a, b): (None, None, p), (b, a): (None, None, p)}
    ratio, error = 1 - row["less"], row["less_se"]
    found = {(b, a): (ratio - 1, error, p), (a, b): (None, None, p)}
    if ratio > 0:
        found[a, b] = (1 / ratio - 1, None if error is None else error / ratio**2, p)
    return found


def _pair(found: dict, a: str, b: str) -> str:
    """Return the comparison of variant a with variant b."""
    if a == b:
        return '<td class="self"></td>'
    change, error, p = found.get((a, b), (None, None, None))
    is_sure = p is not None and p < _SURE and change is not None
    kind = "same" if not is_sure else "less" if change < 0 else "more"  # pyright: ignore[reportOptionalOperand]
    return f'<td class="{kind}">{_changed(change, error)}<small class=soft>{probability(p)}</small></td>'


def _changed(change: float | None, error: float | None) -> str:
    """A change with its error; one of more than ten times as a factor."""
    if change is not None and change >= 9:
        return f"{change + 1:,.0f} ×"
    if error is None or change is None or error < 0.0005:
        return percent(change, 0, signed=True)
    end = f' <span class="se">± {100 * error:.{0 if error > 0.005 else 1}f}</span>'
    return percent(change, 0, signed=True) + end


def _floor(report: dict) -> tuple[str, str, str]:
    protocol, text = report["protocol"], _texts(report)[0]
    rows = _rows(report, text)
    intro = (
        "<p>Variants are measured with activations in float32. llama.cpp's CPU code rounds them before every product, "
        "to a type that depends on the type of the weights. The floor is the KL divergence of the base itself under "
        f"that rounding alone, on the first {protocol['floor_tokens']:,} tokens of {name(text)}. Differences far "
        "below it cannot be seen when a file is run there.</p>"
    )
    lines = []
    for i, row in enumerate(rows):
        times = row["kld_mean"] / row["kld_floor"] if i and row["kld_floor"] > 0 else None
        ratio = "–" if times is None else f"{times:,.{1 if times < 100 else 0}f} ×"
        kld = number(row["kld_mean"]) if i else "–"
        lines.append(_row(_titled(row["variant"]), [number(row["kld_floor"]), kld, ratio], "" if i else "base"))
    head = ["variant", "floor", "KL divergence", "divergence<br>over floor"]
    noise = rows[0].get("kld_noise")
    more = "" if noise is None else f"<p>Products were computed in halves, which alone gives {number(noise)}.</p>"
    return "floor", "Noise floor of the measurement", intro + more + _table(head, lines, "Noise floor")


def _continuation(report: dict) -> tuple[str, str, str]:
    said, title = report["continuation"], "What the files write"
    if "rows" not in said:
        return "writes", title, f"<p>No continuations. {escaped(said['reason'])}</p>"
    items = []
    place = {row["variant"]: i for i, row in enumerate(_rows(report, _texts(report)[0]))}
    base, *others = sorted(said["rows"], key=lambda row: place.get(row["variant"], 0))
    for row in [base, *others]:
        start = _word_start(row["text"], row["same"])
        same, rest = row["text"][:start], row["text"][start:]
        same = same if rest and not same.strip() else same.lstrip()
        if row is base:
            words, note = escaped(row["text"].lstrip()), "the base"
        elif row["n_same"] == max(base["n_tokens"], row["n_tokens"]):
            words, note = f'<span class="same">{escaped(same)}</span>', f"all {row['n_tokens']} tokens the same"
        else:
            first, after = _first_word(rest)
            words = f'<span class="same">{escaped(same)}</span><mark>{escaped(first)}</mark>{escaped(after)}'
            note = f"differs after {row['n_same']} of {base['n_tokens']} tokens"
        items.append(f"<li><b>{name(row['variant'])} <small>{escaped(note)}</small></b><q><bdi>{words}</bdi></q></li>")
    intro = (
        f"<p>llama.cpp continues this text, always with the most probable token. The first word that differs from the "
        f"base's is marked.</p><pre><bdi>{escaped(said['prompt'])}</bdi></pre>"
    )
    return "writes", title, f'{intro}<ul class="said">{"".join(items)}</ul>'


def _word_start(text: str, place: int) -> int:
    """Return where the word begins that a place is in the middle of; the place itself elsewhere."""
    if not 0 < place < len(text) or not text[place].isalnum():
        return place
    return next((i + 1 for i in range(place - 1, -1, -1) if not text[i].isalnum()), 0)


def _first_word(text: str) -> tuple[str, str]:
    """Split a text after its first word."""
    start = len(text) - len(text.lstrip())
    stop = next((i for i in range(start, len(text)) if text[i].isspace()), len(text))
    return text[:stop], text[stop:]


def _files(report: dict) -> tuple[str, str, str]:
    head = ["variant", _left("types, by share of the weights"), "size of tensors", _left("made from")]
    lines = []
    kinds = {"base": "the base", "file": "a file", "ftype": "made in memory", "recipe": "a recipe, made in memory"}
    kinds["refined"] = "refined in memory"
    for row in report["files"]:
        made = kinds.get(row["kind"], escaped(row["kind"]))
        made = name(row["file"]) if row["file"] else made
        if row["imatrix"]:
            made += f"<small class=soft>matrix: {name(row['imatrix'])}</small>"
        mix = "".join(f'<i style="width:{100 * s:.2f}%;background:{_colour(q)}"></i>' for q, s in row["types"].items())
        words = " · ".join(f"{escaped(q)} {percent(s, 1)}" for q, s in row["types"].items() if s >= 0.0005)
        types = f'<td class="text wrap"><div class="mix" aria-hidden="true">{mix}</div><small>{words}</small></td>'
        lines.append(_row(_titled(row["variant"]), [types, size(row["bytes"]), f'<td class="text">{made}</td>']))
    return "files", "What is in the files", _table(head, lines, "Types")


def _colour(qtype: str) -> str:
    """A colour for a type: that of its family, lighter for fewer bits."""
    kind = GGML_TYPES.get(qtype)
    if kind is None:
        return "#888"
    colour = FAMILIES[kind.family].colour
    colour = "#8a8a8a" if not colour.startswith("#") else colour
    bits = min(8.0, max(1.0, kind.bpw))
    return f"color-mix(in oklab, {colour} {40 + 7.5 * bits:.0f}%, white)"


def _how(report: dict) -> tuple[str, str, str]:
    protocol = report["protocol"]
    facts = [("base", name(protocol["base"])), ("mode", f"{protocol['mode']} on {protocol['device']}")]
    facts += [("precision", protocol["precision"]), ("mixture rules", protocol["rules"])]
    facts += [("versions", ", ".join(f"{k} {v}" for k, v in protocol["versions"].items()) + f", {protocol['machine']}")]
    how = "".join(f"<dt>{title}</dt><dd>{v if title == 'base' else escaped(v)}</dd>" for title, v in facts)
    texts = [
        _row(
            name(text["text"]),
            [f'<td class="text">{escaped(text["name"])}</td>', f"{text['chunks']:,}", f"{text['n_ctx']:,}"]
            + [f"{_rows(report, text['text'])[0]['n_scored']:,}", f'<td class="text">{escaped(text["bos"])}</td>'],
        )
        for text in protocol["texts"]
    ]
    head = ["text", _left("protocol"), "chunks", "tokens of<br>a chunk", "tokens<br>scored", _left("BOS")]
    commands = "".join(
        f"<h3>{name(item['what'])}</h3><pre>{escaped(item['command'])}</pre>" for item in report["commands"]
    )
    return (
        "how",
        "How it was measured",
        f'<dl class="how">{how}</dl>{_table(head, texts, "Texts")}<h3>Commands</h3>'
        f"<p class=note>They give the same figures on the same inputs.</p>{commands}",
    )


def _inputs(report: dict) -> tuple[str, str, str]:
    rows = [
        _row(
            name(item["name"]),
            [f'<td class="text">{name(item["role"])}</td>', f"{item['bytes']:,}"]
            + [f'<td class="text"><code>{escaped(item["sha256"])}</code></td>'],
        )
        for item in report["inputs"]
    ]
    head = ["file", _left("used as"), "bytes", _left("SHA-256")]
    return "inputs", "Inputs", _table(head, rows, "Inputs")


_WORDS = {
    "KL divergence": "How many nats per token the variant's distribution over the next token is from the base's, on "
    "average. It sees every change of the prediction, while perplexity only sees the token that came.",
    "99th percentile": "One token in a hundred diverges by more.",
    "Perplexity": "The exponential of the mean negative logarithm of the probability of the token that came. Its error "
    "is large, but a variant's and the base's are made on the same tokens: the change is known far better.",
    "Same most probable token": "How often the variant and the base find the same token most probable.",
    "Paired test": "The differences of two variants, chunk by chunk, have their signs changed at random. p is how "
    "often the mean is then as far from zero as it was. With few chunks p cannot become small.",
    "Front": "Variants to choose among: every other one is larger and diverges at least as much as one of them.",
}


def _glossary(report: dict) -> tuple[str, str, str]:
    words = "".join(f"<dt>{escaped(word)}</dt><dd>{escaped(text)}</dd>" for word, text in _WORDS.items())
    return "words", "Words", f'<dl class="words">{words}</dl>'


_SECTIONS = (_summary, _front, _by_text, _confidence, _pairs, _floor, _continuation, _files, _how, _inputs, _glossary)
