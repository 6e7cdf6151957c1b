"""Reports: figures in closed form, a page that asks for nothing and believes nobody, files that appear whole."""

import hashlib
import importlib.util
import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

import quantlab as ql
from quantlab.evaluate.engine import find
from quantlab.evaluate.metrics import TokenScores
from quantlab.evaluate.texts import cut_text, measure_texts
from quantlab.evaluate.variants import as_is, resolve
from quantlab.files.bundled import read_text
from quantlab.study.report import Report, read_reports
from quantlab.study.report_figures import EDGES, Measured, less_than, on_front, sign_tests
from quantlab.study.report_page import page
from quantlab.transform.mixture import Recipe

HOSTILE = '"><script src=//x.example/a.js></script><img src=x onerror=alert(1)>\u202e|&'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A report on three variants and two texts, without continuations."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    options = {"n_ctx": 128, "chunks": 4, "prompt": "", "progress": False}
    return ql.report("tiny", ["Q8_0", "Q4_0", "twin=Q4_0"], ["primer", "sampled"], out=out, **options), out


def measured(rng, mask=None, chunks=6):
    """Made scores of a base and two variants."""
    scores = [TokenScores.empty(chunks, 30) for _ in range(3)]
    for i, item in enumerate(scores):
        item.nll[:], item.top_p[:] = rng.exponential(size=(2, chunks, 30)) / [[[1]], [[100]]]
        item.kld[:] = i * rng.exponential(size=(chunks, 30))
    scores[0].top_p[:] = rng.uniform(size=(chunks, 30))
    return Measured("t", ("base", "a", "b"), tuple(scores), mask)


# ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("is_masked", [False, True])
def test_bins_of_confidence_add_up_to_the_whole(rng, is_masked):
    mask = rng.uniform(size=(6, 30)) < 0.5 if is_masked else None
    found = measured(rng, mask)
    rows = {row["variant"]: row for row in found.rows()}
    for name in ("a", "b"):
        bins = [row for row in found.confidence() if row["variant"] == name]
        assert [row["low"] for row in bins] == list(EDGES[:-1])
        assert sum(row["n"] for row in bins) == found.sizes.sum() == rows[name]["n_scored"]
        whole = sum(row["n"] * (row["kld_mean"] or 0) for row in bins) / found.sizes.sum()
        assert whole == pytest.approx(rows[name]["kld_mean"], rel=1e-12)
        assert sum(row["part"] for row in bins) == pytest.approx(1) == sum(row["share"] for row in bins)


def test_a_token_of_certainty_is_in_the_last_bin(rng):
    found = measured(rng)
    found.scores[0].top_p[:] = 1
    assert [row["n"] for row in found.confidence()[: len(EDGES) - 1]] == [0] * (len(EDGES) - 2) + [180]


def test_unequal_chunks_have_the_intervals_of_equal_ones_where_they_are_equal(rng):
    found = measured(rng)
    again = Measured("t", found.variants, found.scores, np.ones((6, 30), bool))
    for row, other in zip(found.rows(), again.rows(), strict=True):
        assert row.keys() == other.keys()
        assert {k: v for k, v in row.items() if isinstance(v, float)} == pytest.approx(
            {k: v for k, v in other.items() if isinstance(v, float)}, rel=1e-9, nan_ok=True
        )


def test_a_variant_does_not_differ_from_itself(rng):
    one = rng.exponential(size=20)
    assert sign_tests(np.stack([one, one])).tolist() == [[1, 1], [1, 1]]
    assert less_than(one, one, np.ones(20)) == (0, 0)


@pytest.mark.parametrize("n", [4, 12, 40])
def test_a_difference_in_every_chunk_has_the_least_p_there_is(n, rng):
    sums = rng.exponential(size=(2, n))
    sums[1] = sums[0] + 1
    p = sign_tests(sums)[0, 1]
    assert p == pytest.approx(max(2.0 ** (1 - n), 1 / 10_000))


def test_p_is_uniform_where_nothing_differs(rng):
    ps = [sign_tests(rng.standard_normal((2, 10)))[0, 1] for _ in range(400)]
    # a standard error of 400 draws is 0.025 at the middle
    assert np.mean(np.array(ps) < 0.5) == pytest.approx(0.5, abs=0.1)
    assert np.mean(np.array(ps) < 0.05) == pytest.approx(0.05, abs=0.04)


def test_a_single_chunk_has_no_test(rng):
    assert [(row["p"], row["less_se"]) for row in measured(rng, chunks=1).pairs()] == [(None, None)]
    assert less_than(np.ones(3), np.zeros(3), np.ones(3)) == (None, None)


def test_the_front_is_what_nothing_beats():
    assert on_front([4, 3, 2, 1], [1, 2, 2, 4]) == [True, False, True, True]
    assert on_front([1, 1], [2, 2]) == [True, True]


# ── reports ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rows_are_those_of_compare(made):
    report, _ = made
    compared = ql.compare("tiny", ["Q8_0", "Q4_0"], "primer", n_ctx=128, chunks=4, progress=False)
    for row, other in zip(report.rows, compared.rows, strict=False):
        assert {key: row[key] for key in other} == other
    assert pd.DataFrame(report)["variant"].tolist() == ["tiny", "Q8_0", "Q4_0", "twin"] * 2
    assert report.to_frame()["text"].tolist() == ["primer"] * 4 + ["sampled"] * 4


def test_twins_are_equal_and_others_are_not(made):
    pairs = {(row["text"], row["a"], row["b"]): row for row in made[0].pairs}
    assert len(pairs) == 6
    assert pairs["primer", "Q4_0", "twin"]["p"] == 1 and pairs["primer", "Q4_0", "twin"]["less"] == 0
    assert pairs["primer", "Q8_0", "Q4_0"]["p"] == 0.125  # of 4 chunks, no smaller one comes out
    assert pairs["primer", "Q8_0", "Q4_0"]["less"] < -1


def test_the_floor_is_that_of_the_types(made):
    base, eight, four, twin = made[0].rows[:4]
    assert 0 < base["kld_floor"] < eight["kld_floor"] < four["kld_floor"] == twin["kld_floor"] < 1e-3  # Q6_K at the end


def test_json_comes_back_as_the_same_report(made):
    report, out = made
    again = Report.load(out.with_suffix(".json"))
    assert json.loads(again.to_json()) == json.loads(report.to_json())
    assert again.to_html() == out.read_text(encoding="utf-8") == report.to_html()
    document = json.loads(report.to_json())
    assert document["schema"] == 1 and document["rows"][0]["variant"] == "tiny"
    assert {item["name"] for item in document["inputs"]} >= {"model.safetensors", "config.json", "primer.md"}
    assert document["commands"][0]["command"].startswith("quantlab report tiny Q8_0 Q4_0 twin=Q4_0 --text primer")


def test_finished_passes_are_kept_until_the_report_is_written(tmp_path):
    model, choice, scratch = ql.open("tiny"), find("float", "cpu"), tmp_path / "scratch"
    how = {"is_chat": False, "n_ctx": 64, "chunks": 2, "protocol": "llama.cpp", "rules": "current"}
    cuts = [cut_text(read_text(name), model, choice, **how) for name in ("primer", "sampled")]
    variants = [as_is(model), *resolve(model, ["Q4_0"])]
    rest = {"memory": None, "scratch": scratch, "progress": False}
    first, (kept,) = measure_texts(variants, cuts, choice, **rest)
    before = kept.stat().st_mtime_ns
    again, _ = measure_texts(variants, cuts, choice, **rest)
    for (ours, _), (theirs, _) in zip(first, again, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert all(np.array_equal(v, b.at(slice(None))[k]) for k, v in a.at(slice(None)).items())
    assert kept.stat().st_mtime_ns == before and list(scratch.iterdir()) == [kept]
    kept.write_bytes(kept.read_bytes()[:100])  # a file that is not whole counts for nothing
    measure_texts(variants, cuts, choice, **rest)
    assert kept.stat().st_size > 100
    ql.report("tiny", "Q4_0", ["primer", "sampled"], n_ctx=64, chunks=2, prompt="", scratch=scratch, progress=False)
    assert list(scratch.iterdir()) == []


def test_every_kind_of_variant_is_said_and_made(tmp_path):
    file = ql.quantize("tiny", tmp_path / "file name.gguf", ftype="Q4_0")
    Recipe({"blk.0.ffn_up.weight": "Q3_K"}).save(tmp_path / "r.txt")
    prompt = "" if importlib.util.find_spec("xllamacpp") is None else "The weights"
    given = [file, "Q8_0", f"mine={tmp_path / 'r.txt'}"]
    report = ql.report("tiny", given, n_ctx=64, chunks=2, prompt=prompt, n_predict=4, progress=False)
    assert [row["kind"] for row in report.files] == ["base", "file", "ftype", "recipe"]
    assert [row["variant"] for row in report.files][1:] == ["file name", "Q8_0", "mine"]
    assert sum(report.files[3]["types"].values()) == pytest.approx(1) and report.files[3]["types"]["Q3_K"] > 0
    lines = {item["what"]: item["command"] for item in report.commands}
    assert lines["Q8_0"] == "quantlab quantize tiny Q8_0.gguf Q8_0"
    assert lines["mine"].endswith(f"--tensor-type-file {tmp_path / 'r.txt'}") and "file name" not in lines
    assert shlex.split(lines["this report"])[2:6] == ["tiny", *map(str, given)]
    digests = {item["role"]: item["sha256"] for item in report.inputs}
    assert digests["file name"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert digests["text primer"] == read_text("primer").sha256 and "mine" in digests
    if prompt:
        rows = report.continuation["rows"]
        assert [row["variant"] for row in rows] == [row["variant"] for row in report.files]
        assert rows[0]["n_same"] == rows[0]["n_tokens"] == 4 and rows[0]["text"][: rows[0]["same"]] == rows[0]["text"]
    else:
        assert report.continuation == {"reason": "It was left out."}


def test_reports_of_several_models_are_one_table(made, tmp_path):
    path = made[1].with_suffix(".json")
    other = shutil.copy(path, tmp_path / "other.json")
    rows = read_reports([path, other])
    assert rows.columns[0] == "model" and len(rows) == 16
    assert rows["model"].unique().tolist() == ["tiny", "tiny (other)"]
    assert len(read_reports([path], what="confidence")) == 2 * 3 * (len(EDGES) - 1)
    with pytest.raises(ValueError, match="what=nothing, must be one of rows, confidence"):
        read_reports([path], what="nothing")
    with pytest.raises(FileNotFoundError, match=r"read_reports: paths=\[\], must be at least one"):
        read_reports([])


def test_plots_of_reports(made):
    path = made[1].with_suffix(".json")
    ax = ql.plots.kld_by_model(read_reports([path]).query("text == 'primer'"))
    assert ax.get_yscale() == "log" and [text.get_text() for text in ax.texts] == ["Q4_0", "twin", "Q8_0"]
    bars = ql.plots.kld_by_confidence(read_reports([path], what="confidence").query("text == 'primer'"))
    assert len(bars.patches) == 3 * (len(EDGES) - 1)
    assert sum(patch.get_width() for patch in bars.patches) == pytest.approx(3)
    with pytest.raises(ValueError, match="kld_by_model: no row has a KL divergence above 0"):
        ql.plots.kld_by_model(read_reports([path]).head(1))
    with pytest.raises(ValueError, match="kld_by_confidence: the frame has no row"):
        ql.plots.kld_by_confidence(read_reports([path], what="confidence").head(0))


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match=r"variants=\[\], must be at least one"):
        ql.report("tiny", [])
    with pytest.raises(ValueError, match=r"texts=\[\], must be at least one"):
        ql.report("tiny", "Q4_0", [])
    with pytest.raises(ValueError, match="texts: two are called primer, names must differ"):
        ql.report("tiny", "Q4_0", ["primer", "primer=sampled"])
    (tmp_path / "report.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"report.json: exists already"):
        ql.report("tiny", "Q4_0", out=tmp_path / "report.html")
    with pytest.raises(ValueError, match=r"report.json: is not the JSON of a report"):
        Report.load(tmp_path / "report.json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.open = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text):
    """Refuse a page that loads something, runs a script, or is not well-formed."""
    found = Page(text)
    assert found.open == []
    assert not found.tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "audio",
        "video",
        "use",
    }
    for tag, key, value in found.attributes:
        assert not key.startswith("on") and key not in ("src", "srcset", "action", "data", "xlink:href", "background")
        assert key != "href" or (tag == "a" and value.startswith("#"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\(|@import|https?:|//[a-z]", style)
    assert "url(" not in " ".join(value for _, key, value in found.attributes if key == "style")
    assert "default-src &#x27;none&#x27;" in text


def test_nothing_leaves_the_page(made):
    text = made[1].read_text(encoding="utf-8")
    check_page(text)
    assert text.count("<svg") == 2 and "@media print" in text and "prefers-color-scheme: dark" in text


def test_names_are_shown_without_what_all_begin_with(made):
    document = json.loads(made[0].to_json().replace('"Q8_0"', '"Model-7B-Q8_0"').replace('"Q4_0"', '"Model-7B-Q4_0"'))
    for key in ("rows", "confidence", "pairs", "files"):
        document[key] = [row for row in document[key] if "twin" not in row.values()]
    text = page(document)
    assert "All names begin with <bdi>Model-7B-</bdi>, which is left out." in text
    assert "<bdi>Q8_0</bdi>" in text and text.count("<bdi>Model-7B-Q8_0</bdi>") == 1  # above its command


def test_of_many_variants_neighbours_are_compared(made):
    document = json.loads(made[0].to_json())
    for key in ("rows", "confidence"):
        copies = [row | {"variant": f"v{i}"} for i in range(30) for row in document[key] if row["variant"] == "Q4_0"]
        document[key] += copies
    text = page(document)
    check_page(text)
    assert text.count("Each is compared with the next larger one") == 2


def test_hostile_names_stay_names(made):
    """Every text of a report replaced by one that would do harm."""
    kept = {"base", "file", "ftype", "recipe", "refined"}

    def spoil(value, key=""):
        if isinstance(value, dict):
            return {k if key != "types" else k + HOSTILE: spoil(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoil(item, key) for item in value]
        return f"{value}{HOSTILE}" if isinstance(value, str) and value not in kept else value

    document = spoil(json.loads(made[0].to_json()))
    document["continuation"] = {"prompt": HOSTILE, "n_predict": 2, "rows": []}
    document["continuation"]["rows"] = [
        {"variant": HOSTILE, "text": HOSTILE * 2, "n_same": HOSTILE, "same": i, "n_tokens": 9 + i} for i in range(2)
    ]
    for said in (document["continuation"], {"reason": HOSTILE}):
        text = page(document | {"continuation": said})
        check_page(text)
        assert "\u202e" not in text and "x.example" in text
