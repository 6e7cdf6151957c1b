"""Measured exchanges: never worse, the same again, within size, constraints, count and time."""

import json
from dataclasses import replace

import numpy as np
import pytest

import quantlab as ql
from quantlab.files.bundled import read_text
from quantlab.study import exchange as exchanges
from quantlab.study.front import judge
from quantlab.study.menu import open_menu
from quantlab.transform.mixture import Recipe

SHORT = dict(chunks=1, n_ctx=64, progress=False)
TENSORS = [f"blk.{i}.{kind}.weight" for i in (5, 6, 7) for kind in ("attn_v", "ffn_down")] + ["output.weight"]
LIMIT = 9_850_000  # 2.6 bits for each weight of these tensors


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("damages")


@pytest.fixture(scope="module")
def measured(cache):
    """A few late tensors, so that a pass over all exchanges is short."""
    groups = {name: [name] for name in TENSORS}
    return ql.sensitivity("tiny", groups=groups, types=["Q1_0", "TQ2_0", "Q2_K", "Q4_K"], cache=cache, **SHORT)


@pytest.fixture(scope="module")
def best(measured):
    return ql.recipe(measured, "tiny", target_size=LIMIT, max_type={"weight": "Q4_K"})


@pytest.fixture(scope="module")
def better(best, measured, cache):
    return ql.exchange(best, measured, "tiny", exchanges=24, cache=cache, progress=False)


def kld(types):
    return ql.compare("tiny", [Recipe(types)], "sampled", **SHORT | {"chunks": 4}).rows[1]["kld_mean"]


def test_it_is_never_worse_and_what_is_said_was_measured(best, better):
    assert better.measured["after"] <= better.measured["before"]
    assert better.measured["before"] == kld(best.types)
    assert better.measured["after"] == kld(better.types)
    assert better.bytes <= best.limit == better.limit == LIMIT and better.ftype == best.ftype
    figures = [better.measured["before"], *(step["after"] for step in better.measured["steps"])]
    assert figures == sorted(figures, reverse=True) and figures[-1] == better.measured["after"]
    assert 0 < better.measured["tried"] <= 24 and better.measured["chunks"] == 4


def test_exchanges_help_where_damages_do_not_add_up(better):
    assert better.measured["steps"] and better.measured["after"] < better.measured["before"]
    assert "exchanges tried" in str(better) and f"measured {better.measured['after']:.5f}" in str(better)
    said = json.loads(better.to_json())["protocol"]
    assert said["measured_kld"] == better.measured["after"] and said["predicted_kld"] == better.predicted


def test_the_same_again_without_a_cache(best, better, measured):
    again = ql.exchange(best, measured, "tiny", exchanges=24, cache=False, progress=False)
    assert again == better


def test_number_and_time_only_cut_the_sequence(best, better, measured, cache):
    less = ql.exchange(best, measured, "tiny", exchanges=8, cache=cache, progress=False)
    assert less.measured["steps"] == better.measured["steps"][: len(less.measured["steps"])]
    none = ql.exchange(best, measured, "tiny", minutes=0, cache=cache, progress=False)
    assert none.types == best.types and none.measured["tried"] == 0
    assert none.measured["after"] == none.measured["before"] == better.measured["before"]


def test_constraints_hold(measured, cache):
    keep = {"blk.7.ffn_down.weight": "Q4_K"}
    bound = ql.recipe(measured, "tiny", target_size=LIMIT, keep=keep, exclude=["TQ2_0"])
    moved = ql.exchange(bound, measured, "tiny", exchanges=16, cache=cache, progress=False)
    assert moved.types["blk.7.ffn_down.weight"] == "Q4_K" and "TQ2_0" not in moved.types.values()
    assert moved.provenance["constraints"] == bound.provenance["constraints"]


def test_proposals_fit_and_begin_with_the_most_promising(measured, best):
    estimates = exchanges._Estimates(open_menu(measured, "tiny"))
    at = dict.fromkeys(estimates.rows, 1)
    proposals = estimates.proposals(at, 1000)
    assert all(one.bytes <= 1000 and 1 <= len(one.groups) == len(one.moves) <= 2 for one in proposals)
    assert (np.diff([estimates.of(one, at) for one in proposals]) >= 0).all()
    believed = estimates.of(proposals[0], at)
    estimates.correct(proposals[0], at, believed + 1.0)
    assert estimates.of(proposals[0], at) == pytest.approx(believed + 1.0)


def test_refined_bytes_are_exchanged(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(read_text("sampled").text[:6000])
    groups = {name: [name] for name in ("blk.7.attn_v.weight", "blk.7.ffn_down.weight")}
    options = {"cache": tmp_path, "progress": False}
    found = ql.sensitivity("tiny", text, types=["Q2_K", "Q4_K"], groups=groups, refined=True, chunks=1, **options)
    best = ql.recipe(found, "tiny", target_size=11_310_000, max_type={"weight": "Q4_K"})
    moved = ql.exchange(best, found, "tiny", text, exchanges=2, **options)
    assert moved.measured["after"] <= moved.measured["before"] and moved.measured["tried"] >= 1
    command = moved.command("r.txt", text=text)
    assert command.startswith("quantlab refine model.gguf") and command.endswith(f"--recipe r.txt -f {text}")
    assert moved.command("r.txt").endswith("-f text.txt")


@pytest.mark.long
def test_a_recipe_for_refined_files_is_judged_refined():
    found = ql.sensitivity(
        "tiny", groups="kind", types=["Q2_K", "Q3_K", "Q4_K"], refined=True, chunks=2, progress=False
    )
    best = ql.recipe(found, "tiny", like="Q3_K_S")
    base, theirs, ours = judge(best, "tiny", "primer", chunks=4, progress=False).rows
    assert theirs["variant"] == "Q3_K_S+refined" and ours["variant"] == "recipe+refined"
    assert 0 < ours["kld_mean"] < theirs["kld_mean"]


def test_bad_input(measured, best, tmp_path):
    with pytest.raises(ValueError, match="exchanges=-1, minutes=None: must be 0 or more"):
        ql.exchange(best, measured, "tiny", exchanges=-1)
    with pytest.raises(ValueError, match="exchanges=48, minutes=-1: must be 0 or more"):
        ql.exchange(best, measured, "tiny", minutes=-1)
    with pytest.raises(ValueError, match="text=primer: the sensitivity was measured on another text"):
        ql.exchange(best, measured, "tiny", "primer")
    lost = replace(measured, protocol=measured.protocol | {"text": str(tmp_path / "lost.txt")})
    with pytest.raises(FileNotFoundError, match="lost.txt: the sensitivity's text is not here"):
        ql.exchange(best, lost, "tiny")
    errors = replace(measured, protocol=measured.protocol | {"text": None})
    with pytest.raises(ValueError, match="sensitivity: holds errors of weights alone"):
        ql.exchange(best, errors, "tiny")
