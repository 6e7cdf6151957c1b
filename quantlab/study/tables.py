"""Tables as DataFrames: size/ppl, published against exact and measured figures, grids of runs."""

import ast
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from quantlab.evaluate.engine.cpu import SHARE_OF_PEAK, peak
from quantlab.evaluate.engine.workers import Workers
from quantlab.evaluate.perplexity import Comparison, compare
from quantlab.evaluate.refined_variants import MARK, is_refined
from quantlab.files.bundled import data_dir, is_shape, shape, shapes
from quantlab.files.model import Model
from quantlab.files.model import open as open_model
from quantlab.quants import block_size
from quantlab.result import Result
from quantlab.transform import mixture
from quantlab.transform.mixture import find_ftype, is_quantizable
from quantlab.transform.plan import SizeTable, sizes

__all__ = ["SizePpl", "beside_published", "both_rules", "collect", "measured", "pareto", "published", "size_ppl"]
__dir__ = __all__.copy  # what `dir` and completion show

# the rows of llama.cpp's table of 2023, widest first; BF16 is as large as F16 there
FTYPES = [name for name, ftype in mixture.FTYPES.items() if "2023-12" in ftype.rules and name != "BF16"]
_MEASURED = ("ppl", "ppl_se", "delta_ppl", "delta_ppl_se", "kld_mean", "kld_se")
_UNITS = {"MiB": 2**20, "GiB": 2**30, "GB": 10**9}
_LARGE = 10**8  # weights; a model from here on is measured on 16 chunks unless more are asked for
_LARGE_CHUNKS = 16


# ── published figures ───────────────────────────────────────────────────────────────────────────────────────────────


def published(model: str | None = None, rules: str | None = None) -> pd.DataFrame:
    """Read the published perplexities and sizes, each row with its protocol and source.

    Parameters
    ----------
    model : str, optional
        Only this model's rows, by the name in its shape: `LLaMA-7B`.
    rules : str, optional
        Only rows of this rule set, and rows whose source does not say.

    Returns
    -------
    pd.DataFrame
        Columns of `data/published.csv`; `size` is text, with the digits that were published.
    """
    frame = pd.read_csv(data_dir() / "published.csv", dtype={"size": str, "rules": str}, keep_default_na=True)
    if model is not None:
        frame = frame[frame["model"] == model]
    if rules is not None:
        frame = frame[frame["rules"].isna() | (frame["rules"] == rules)]
    return frame.reset_index(drop=True)


def beside_published(table: SizeTable) -> pd.DataFrame:
    """Compare exact sizes with the published ones of the same model and rule set.

    Parameters
    ----------
    table : SizeTable
        `sizes("llama-7b", rules="2023-12")`, for instance.

    Returns
    -------
    pd.DataFrame
        `ftype`, `exact` and `published` (both in `unit`), `agrees` (whether the exact size rounds to the published
        one), `published is` (what the published figure is where it does not agree), `source`.
    """
    exact = table.to_frame().set_index("ftype")["bytes"]
    found = published(table.model, table.rules)
    found = found[found["size"].notna() & found["ftype"].isin(exact.index)].copy()
    found["exact"] = [exact[name] / _UNITS[unit] for name, unit in zip(found["ftype"], found["size_unit"], strict=True)]
    digits = [len(size.partition(".")[2]) for size in found["size"]]
    rounded = [f"{value:.{n}f}" for value, n in zip(found["exact"], digits, strict=True)]
    found["agrees"] = found["size"] == rounded
    triples = zip(found["agrees"], found["exact"], found["size"], strict=True)
    found["published is"] = ["" if agrees else _other_rounding(x, float(size)) for agrees, x, size in triples]
    found = found.rename(columns={"size": "published", "size_unit": "unit"})
    order = [ftype for ftype in exact.index if ftype in set(found["ftype"])]
    found = found.sort_values("ftype", key=lambda column: column.map(order.index), kind="stable")
    return found[["ftype", "exact", "published", "unit", "agrees", "published is", "source"]].reset_index(drop=True)


def _other_rounding(exact: float, figure: float) -> str:
    """Name the rounding that turns an exact size into a published figure (empty text: none)."""
    if round(exact, 1) == figure:
        return "one decimal, padded with a zero"
    if math.ceil(exact) == figure:
        return "rounded up to a whole number"
    return "another size"


def _published_delta_ppl(model: str, rules: str) -> dict[str, float]:
    """Return the published perplexity above F16's, by ftype (empty: no published model)."""
    found = published(model, rules)
    base = found.loc[(found["ftype"] == "F16") & found["ppl"].notna(), "ppl"]
    if base.empty:
        return {}
    delta = found["delta_ppl"].fillna(found["ppl"] - base.iloc[0])
    return {ftype: value for ftype, value in zip(found["ftype"], delta, strict=True) if not math.isnan(value)}


def _published_name(model: Model) -> str:
    """Return the published model with this name and shape (empty text: none)."""
    name = str(model.metadata.get("general.name") or model.path.stem)
    for candidate in map(shape, shapes()):
        keys = ("n_vocab", "n_embd", "n_ff", "n_layer", "n_head", "n_head_kv")
        same_shape = all(getattr(model.hparams, key) == candidate[key] for key in keys)
        if same_shape and _plain(name) == _plain(candidate["name"]):
            return candidate["name"]
    return ""


def _plain(name: str) -> str:
    """Return a model's name in a normalized spelling."""
    return re.sub(r"\b(v1|hf)\b|[^a-z0-9]", "", name.lower())


# ── the size/ppl table ──────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SizePpl(Result):
    """The size/ppl table of one model: each ftype with its size and damage.

    Attributes
    ----------
    model : str
        The model's name.
    protocol : dict
        How it was measured; of a model that is not there, what its sizes rest on.
    rows : tuple of dict
        `ftype`, `bytes`, `bpw`, then `ppl`, `ppl_se`, `delta_ppl` (above the base), `delta_ppl_se`, `kld_mean` (from
        the base, nats), `kld_se`, all None where nothing was measured, and `published_delta_ppl` (above F16), None
        where the model is none of the published ones.
    notes : tuple of str
        What a reader must know about these rows.
    """

    model: str
    protocol: dict
    rows: tuple[dict, ...]
    notes: tuple[str, ...] = ()
    _indent = 1

    @property
    def measured(self) -> bool:
        """True if the perplexities are measured."""
        return any(row["ppl"] is not None for row in self.rows)

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a table of plain numbers."""
        frame = pd.DataFrame(self.rows)
        numbers = frame.columns.drop("ftype")
        return frame.astype(dict.fromkeys(numbers.drop("bytes"), float))

    def _document(self) -> dict[str, Any]:
        rows = [{"variant": row["ftype"], **row} for row in self.rows]
        return {"protocol": {"model": self.model, **self.protocol}, "rows": rows, "notes": self.notes}

    def shown(self) -> pd.DataFrame:
        """Return the rows as text: sizes in MiB or GiB, numbers with their errors."""
        unit = "GiB" if max(row["bytes"] for row in self.rows) > 4 * _UNITS["GiB"] else "MiB"
        frame = pd.DataFrame(
            {
                "ftype": row["ftype"],
                unit: f"{row['bytes'] / _UNITS[unit]:.2f}",
                "bpw": f"{row['bpw']:.2f}",
                "ppl": _with_error(row["ppl"], row["ppl_se"]),
                "Δppl": _with_error(row["delta_ppl"], row["delta_ppl_se"], sign="+"),
                "KLD": _with_error(row["kld_mean"], row["kld_se"], digits=5),
                "halves alone": "" if row.get("kld_noise") is None else f"{row['kld_noise']:.1g}",
                "published Δppl": _with_error(row["published_delta_ppl"], None, sign="+"),
            }
            for row in self.rows
        )
        return frame.drop(columns=[name for name in ("halves alone", "published Δppl") if not frame[name].any()])

    def __str__(self) -> str:
        return "\n".join([self._title(), "", self.shown().to_string(index=False), "", *self.notes])

    def _repr_html_(self) -> str:
        notes = (re.sub("`(.+?)`", r"<code>\1</code>", html.escape(note)) for note in self.notes)
        return f"<p><b>{self._title()}</b></p>{self.shown().to_html(index=False)}" + "".join(
            f"<p>{note}</p>" for note in notes
        )

    def _title(self) -> str:
        if not self.measured:
            return f"{self.model}: sizes, rules {self.protocol['rules']}"
        said = self.protocol
        where = "" if said["device"] == "cpu" else f", {said['device']}, {said['precision']}"
        size = f"{said['chunks']} chunks of {said['n_ctx']} tokens"
        return f"{self.model}: {said['text']}, {size}, rules {said['rules']}{where}"


def _with_error(value: float | None, error: float | None, sign: str = "", digits: int = 4) -> str:
    if value is None:
        return ""
    value = round(value, digits) + 0.0  # -0.00001 is 0.0000, without a sign
    return f"{value:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def size_ppl(
    model: str | Path,
    text: str | Path = "primer",
    *,
    ftypes: Sequence[str] | None = None,
    calibrate_on: str | Path = "sampled",
    rules: str = "current",
    n_ctx: int = 512,
    chunks: int | None = None,
    mode: str = "float",
    device: str = "auto",
    device_memory: str | int | None = None,
    memory: str | int | None = None,
    scratch: str | Path | None = None,
) -> SizePpl:
    """Make the size/ppl table of a model: the size and the perplexity of every ftype.

    Parameters
    ----------
    model : str or Path
        A bundled or fetched model's name, a GGUF file or a checkpoint folder; or a bundled shape's name (`llama-7b`),
        whose weights are not there: then the perplexities stay empty, and a note says how to fill them.
    text : str or Path
        A bundled text's name or a file.
    ftypes : sequence of str, optional
        The rows, by default all of llama.cpp's table; COPY is the model as it is. `Q4_K_M+refined` is what `refine`
        writes.
    calibrate_on : str or Path
        What to refine with, another text than `text`.
    rules : str
        "current" or "2023-12".
    n_ctx : int
        Tokens per chunk.
    chunks : int, optional
        How many chunks are measured; by default the whole text, and 16 chunks of models of 10⁸ weights and more.
    mode, device, device_memory, memory, scratch
        As for `quantlab.compare`.

    Raises
    ------
    FileNotFoundError
        If there is neither a model nor a shape of that name, or no such text.
    ValueError
        If a ftype or rule set is unknown, or the text is too short.
    """
    names = [_row_name(ftype) for ftype in ftypes or FTYPES]
    if is_shape(model):
        if marked := [name for name in names if is_refined(name)]:
            raise ValueError(f"{marked[0]}: must have weights to refine, {model} is a shape. Give the model itself.")
        return _sizes_alone(sizes(model, rules=rules), names, text, chunks or _LARGE_CHUNKS, n_ctx)
    opened = open_model(model)
    if chunks is None and opened.n_weights >= _LARGE:
        chunks = _LARGE_CHUNKS
    variants = [name for name in names if name != "COPY"]
    where = {"mode": mode, "device": device, "device_memory": device_memory, "memory": memory}
    options = {"calibrate_on": calibrate_on, "rules": rules, "n_ctx": n_ctx, "chunks": chunks}
    comparison = compare(opened, variants, text, scratch=scratch, **options, **where)
    return measured(opened, comparison, names, rules)


def _row_name(ftype: str) -> str:
    """Return a row's name, in the spelling of its ftype."""
    if is_refined(ftype):
        return find_ftype(ftype[: -len(MARK)]).name + MARK
    return find_ftype(ftype).name


def both_rules(table: SizePpl, model: str | Path, text: str | Path = "primer", **options) -> pd.DataFrame:
    """Add the rows of the other rule set to a size/ppl table, measuring those that differ in size.

    Parameters
    ----------
    table : SizePpl
        What `size_ppl` returned for this model and text.
    model, text, **options
        As for `size_ppl`; the options are `mode`, `device`, `device_memory` and `memory`.

    Returns
    -------
    pd.DataFrame
        The columns of `SizePpl.to_frame` and `rules`, the table's own rule set first.
    """
    frame, rules = table.to_frame(), table.protocol["rules"]
    other = {"current": "2023-12", "2023-12": "current"}[rules]
    here, there = (sizes(model, rules=r).to_frame().set_index("ftype")["bytes"] for r in (rules, other))
    changed = [ftype for ftype in frame["ftype"] if ftype in there and here[ftype] != there[ftype]]
    same = frame[~frame["ftype"].isin(changed) & frame["ftype"].isin(there.index)]
    parts = [frame.assign(rules=rules), same.assign(rules=other)]
    if changed:
        n_ctx, chunks = table.protocol.get("n_ctx", 512), table.protocol.get("chunks")
        again = size_ppl(model, text, ftypes=changed, rules=other, n_ctx=n_ctx, chunks=chunks, **options)
        parts.append(again.to_frame().assign(rules=other))
    return pd.concat(parts, ignore_index=True)


def _sizes_alone(table: SizeTable, names: Sequence[str], text: str | Path, chunks: int, n_ctx: int) -> SizePpl:
    """Return the table of a model without its weights."""
    found = {row.ftype: row for row in table.rows}
    delta = _published_delta_ppl(table.model, table.rules)
    there = [found[name] for name in names if name in found]
    rows = [_row(row.ftype, row.bytes, row.bpw, {}, delta.get(row.ftype)) for row in there]
    hours = _estimated_hours(table.n_weights, chunks * n_ctx, len(rows) + 1)
    note = (
        f"{table.model} has no weights here, so its perplexities are empty. With its weights in FOLDER, run "
        f"`quantlab table FOLDER -f {text} --rules {table.rules} --chunks {chunks} -c {n_ctx}`, "
        f"about {hours:.1f} hours on this machine for these {len(rows)} rows."
    )
    return SizePpl(table.model, {"rules": table.rules}, tuple(rows), (note,))


def _estimated_hours(n_weights: int, n_tokens: int, n_variants: int) -> float:
    """Estimate the hours of a measurement from its multiplications and this machine's speed."""
    with Workers() as workers:
        per_second = SHARE_OF_PEAK * peak(workers)
    return 2 * n_weights * n_tokens * n_variants / per_second / 3600


def measured(model: Model, comparison: Comparison, names: Sequence[str], rules: str) -> SizePpl:
    """Make the table of a measured model, with the base as row COPY."""
    base, *variants = comparison.rows
    by_ftype = {"COPY": base} | dict(zip((name for name in names if name != "COPY"), variants, strict=True))
    published_delta = _published_delta_ppl(_published_name(model), rules)
    rows = []
    for ftype in names:
        found = by_ftype[ftype]
        rows.append(_row(ftype, found["bytes"], found["bpw"], found, published_delta.get(ftype)))
    notes = [*_note_on_the_base(model), *_note_on_fallbacks(model)]
    return SizePpl(base["variant"], asdict(comparison.protocol), tuple(rows), tuple(notes))


def _row(ftype: str, n_bytes: int, bpw: float, measured: Mapping[str, float], published_delta: float | None) -> dict:
    """Return one row of the table, with None for missing figures."""
    numbers = {"bpw": bpw, **{key: measured.get(key) for key in _MEASURED}, "published_delta_ppl": published_delta}
    numbers |= {key: measured[key] for key in ("kld_noise",) if key in measured}
    return {"ftype": ftype, "bytes": int(n_bytes)} | {k: None if v is None else float(v) for k, v in numbers.items()}


def _note_on_the_base(model: Model) -> list[str]:
    """Return a note if the base itself is quantized."""
    weights = Counter()
    for tensor in model:
        weights[tensor.qtype] += tensor.n_weights
    packed = [qtype for qtype, _ in weights.most_common() if block_size(qtype) > 1]
    if not packed:
        return []
    most = packed[0]
    return [
        f"The base is already quantized (its types: {', '.join(packed)}): Δppl counts from there, not from the "
        f"original weights. The {most} row says little about {most}, since packing again what was unpacked from {most} "
        f"gives back nearly the same numbers; the other rows round numbers that lie on {most}'s steps to steps of "
        f"their own, so a wider type can do worse than a narrower one."
    ]


def _note_on_fallbacks(model: Model) -> list[str]:
    """Return a note if rows are not whole super-blocks, which causes fallbacks and larger files."""
    short = sorted({t.shape[-1] for t in model if is_quantizable(t.name, t.shape) and t.shape[-1] % 256})
    if not short:
        return []
    share = sum(t.n_weights for t in model if t.shape[-1] in short and len(t.shape) > 1) / model.n_weights
    lengths = " and ".join(map(str, short))
    return [
        f"Rows of {lengths} weights are not a multiple of 256:  {share:.0%} of the weights fall back from k-quants to "
        f"legacy types, so these files are larger than their names say."
    ]


def pareto(frame: pd.DataFrame, size: str = "bytes", damage: str = "kld_mean") -> pd.DataFrame:
    """Return the rows of the Pareto front: no other row is both smaller and less damaged.

    Parameters
    ----------
    frame : pd.DataFrame
        A row per variant; rows without a damage are left out.
    size, damage : str
        The two columns, both better when smaller.

    Returns
    -------
    pd.DataFrame
        By ascending size, descending damage; of equal rows the first.

    Examples
    --------
    >>> pareto(pd.DataFrame({"bytes": [3, 1, 2], "kld_mean": [0.1, 0.3, 0.4]}))["bytes"].tolist()
    [1, 3]
    """
    ordered = frame[frame[damage].notna()].sort_values([size, damage], kind="stable")
    best_so_far = ordered[damage].cummin().shift(fill_value=math.inf)
    return ordered[ordered[damage] < best_so_far].reset_index(drop=True)


# ── a grid of notebook runs ─────────────────────────────────────────────────────────────────────────────────────────

# what figures must share to stand side by side; rules and versions may differ, they are what some grids vary
_COMPARABLE = ("name", "mode", "text", "text_sha256", "tokens_sha256", "tokenizer", "n_ctx", "chunks", "bos")


def collect(folder: str | Path) -> pd.DataFrame:
    """Collect a grid of notebook runs as one table: the parameters and the results of every run folder.

    A run folder holds an executed notebook, as `quantlab notebook` and papermill leave it, and JSON results
    (`schema`, `protocol`, `rows`). A run without such results, or one that failed, has one row, with its parameters.

    Parameters
    ----------
    folder : str or Path
        Searched with all folders below: `data/runs`.

    Returns
    -------
    pd.DataFrame
        A row per run and variant. The index says what belongs together: `protocol` (rows of one protocol are
        comparable; perplexities of two are not), `notebook`, `run` (the folder), `variant`. Columns: `failed`, the
        parameters, then the results; a parameter called as a result is becomes `parameter NAME`.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or no executed notebook in it.
    """
    folder = Path(folder)
    rows = [row for path in sorted(folder.rglob("*.ipynb")) for row in _rows_of_run(folder, path)]
    if not rows:
        raise FileNotFoundError(f"{folder}: has no executed notebook. Run one: quantlab notebook NAME -p KEY VALUE")
    frame = pd.DataFrame(rows).set_index(["protocol", "notebook", "run", "variant"])
    return frame.sort_index(level=["protocol", "notebook", "run"], sort_remaining=False, kind="stable")


def _rows_of_run(folder: Path, notebook: Path) -> list[dict]:
    """Return the rows of one run folder (not executed by papermill: none)."""
    document = json.loads(notebook.read_text(encoding="utf-8"))
    said = document.get("metadata", {}).get("papermill")
    if said is None or ".ipynb_checkpoints" in notebook.parts:
        return []
    parameters = {**_defaults(document), **said["parameters"]}
    parameters = {key: ",".join(map(str, v)) if isinstance(v, list) else v for key, v in parameters.items()}
    parameters.pop("out", None)
    failed = bool(said.get("exception")) or said.get("end_time") is None
    run = {"notebook": notebook.stem, "run": str(notebook.parent.relative_to(folder)), "failed": failed}
    found = [] if failed else _results(notebook.parent)
    if not found:
        return [{"protocol": "", "variant": "", **run, **parameters}]
    rows = []
    for protocol, results in found:
        for row in results:
            told = {f"parameter {key}" if key in row else key: value for key, value in parameters.items()}
            rows.append({"protocol": protocol, "variant": "", **run, **told, **row})
    return rows


def _defaults(notebook: Mapping) -> dict:
    """Return the literal values in the cell tagged `parameters`."""
    tagged = (cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
    lines = (line for cell in tagged for line in ast.parse("".join(cell["source"])).body)
    return {ast.unparse(s.target): ast.literal_eval(s.value) for s in lines if isinstance(s, ast.AnnAssign) and s.value}


def _results(folder: Path) -> list[tuple[str, list[dict]]]:
    """Return protocol and rows of every result in a run folder."""
    found = []
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and "schema" in document and document.get("rows"):
            protocol, rows = document.get("protocol", {}), document["rows"]
            for text in protocol.get("texts", [protocol]):  # a report has rows of several
                own = [row for row in rows if row.get("text") == text["text"]] if "texts" in protocol else rows
                found.append((_protocol_label(text), own))
    return found


def _protocol_label(protocol: Mapping) -> str:
    """Return a short label of a protocol, with a digest of all fields that must agree."""
    if "tokens_sha256" not in protocol:
        return "sizes alone"
    p = {key: protocol.get(key) for key in _COMPARABLE}
    digest = hashlib.sha256(json.dumps(p).encode()).hexdigest()[:6]
    return f"{p['text']}, {p['chunks']} × {p['n_ctx']}, {p['name']}, {p['mode']}, {digest}"
