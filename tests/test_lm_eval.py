"""Log-likelihoods for lm-evaluation-harness, with the harness's own classes where it is installed."""

import json
import tomllib
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import quantlab as ql
from quantlab.evaluate import likelihood
from quantlab.evaluate.likelihood import Likelihood
from quantlab.evaluate.logits import logits

ROOT = Path(__file__).parents[1]
needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed (extra lm-eval)")

PAIRS = [
    ("The weights of the", " model"),
    ("The weights of the", " x"),
    ("A block of ", "weights has one scale"),  # the space belongs to the continuation
    ("", "The model"),
    ("<s>The weights", " are"),  # a BOS that is there already is not put there twice
    ("", "<s>The"),
    ("Short", " " + "words and more words " * 8),
]


@pytest.fixture(scope="module")
def tiny():
    return Likelihood("tiny", progress=False)


def asked(*items) -> list[SimpleNamespace]:
    """Requests as the harness makes them."""
    return [SimpleNamespace(args=item if isinstance(item, tuple) else (item,)) for item in items]


def exact(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The same from the logits of one window."""
    found = logits(model, np.array([*context, *continuation[:-1]])).astype(np.float64)[len(context) - 1 :]
    ln_p = found - np.log(np.exp(found).sum(-1, keepdims=True))
    greedy = bool((found.argmax(-1) == continuation).all())
    return float(ln_p[np.arange(len(continuation)), continuation].sum()), greedy


def test_continuations_have_the_likelihoods_of_single_windows(tiny):
    found = tiny.loglikelihood(asked(*PAIRS))
    for pair, (value, greedy) in zip(PAIRS, found, strict=True):
        expected, is_greedy = exact(ql.open("tiny"), *tiny._pair(*pair))
        assert value == pytest.approx(expected, abs=1e-4)  # float32 sums beside float64 ones
        assert greedy == is_greedy
    assert {greedy for _, greedy in found} == {True, False}


def test_contexts_and_continuations_are_cut_as_the_harness_cuts_them(tiny):
    bos = 1
    encode = tiny._encode
    assert tiny._pair("The weights", " are") == (
        encode("The weights"),
        encode("The weights are")[len(encode("The weights")) :],
    )
    assert tiny._pair("The weights ", "are") == tiny._pair("The weights", " are")
    assert tiny._pair("<s>The weights", " are") == tiny._pair("The weights", " are")
    assert tiny._pair("", "The")[0] == [bos]
    assert tiny._pair("", "<s>The") == ([bos], encode("The", add_bos=False))


def test_groups_by_memory_and_length_change_nothing(tiny, monkeypatch):
    together = tiny.loglikelihood(asked(*PAIRS))
    monkeypatch.setattr(likelihood, "ROWS_AT_ONCE", 1)
    monkeypatch.setattr(likelihood, "allowed_bytes", lambda memory: 1)
    assert len(tiny._groups([(0,) * 9, (0,) * 8])) == 2
    assert tiny.loglikelihood(asked(*PAIRS)) == together


def test_one_pass_serves_continuations_that_differ_in_their_last_token(tiny, monkeypatch):
    seen = []
    run = Likelihood._run
    monkeypatch.setattr(Likelihood, "_run", lambda self, group, *rest: seen.append(group) or run(self, group, *rest))
    found = tiny.loglikelihood(asked(("The weights of the", " model"), ("The weights of the", " x"), ("The", " end")))
    assert len(found) == 3
    assert [len(group) for group in seen] == [2]


def test_too_long_contexts_lose_their_beginning():
    short = Likelihood("tiny", progress=False, max_length=8)
    (found,) = short.loglikelihood(asked(("One two three four five six seven eight nine", " ten")))
    context, continuation = short._pair("One two three four five six seven eight nine", " ten")
    assert len(context) + len(continuation) > 9
    row = [*context, *continuation][-9:]
    assert found[0] == pytest.approx(exact(ql.open("tiny"), row[: -len(continuation)], continuation)[0], abs=1e-4)


def test_rolling_windows_score_each_token_once():
    short = Likelihood("tiny", progress=False, max_length=8)
    text = "The weights of a block share a scale. " * 3
    ids = short._encode(text)
    windows = short._windows(ids)
    assert [token for _, part in windows for token in part] == ids
    assert windows[0][0] == [1]
    assert {len(before) + len(after) for before, after in windows[1:]} == {9}
    found, empty = short.loglikelihood_rolling(asked(text, ""))
    assert found == pytest.approx(sum(exact(ql.open("tiny"), *window)[0] for window in windows), abs=1e-3)
    assert empty == exact(ql.open("tiny"), [1], [1])[0] or empty == pytest.approx(exact(ql.open("tiny"), [1], [1])[0])


def test_the_entry_point_names_the_class():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["lm_eval.models"]
    module, name = points["quantlab"].split(":")
    assert f"class {name}(" in (ROOT / (module.replace(".", "/") + ".py")).read_text()


@needs_harness
def test_the_harness_runs_a_made_task(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import_module("quantlab.evaluate.lm_eval")
    lm_eval, tasks = import_module("lm_eval"), import_module("lm_eval.tasks")
    rows = [{"question": c, "choices": [" the the the", c2], "answer": 1} for c, c2 in PAIRS[:1] + PAIRS[-1:]]
    (tmp_path / "made.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "made.yaml").write_text(
        f"task: made\ndataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/made.jsonl\n"
        f"  cache_dir: {tmp_path}\noutput_type: multiple_choice\ntest_split: train\ndoc_to_text: question\n"
        "doc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    manager = tasks.TaskManager(include_path=str(tmp_path))
    options = {"model_args": "path=tiny,progress=False", "tasks": ["made"], "task_manager": manager}
    results = lm_eval.simple_evaluate(model="quantlab", bootstrap_iters=0, **options)
    direct = Likelihood("tiny", progress=False)
    likely = [
        np.argmax([v for v, _ in direct.loglikelihood(asked(*((row["question"], " " + c) for c in row["choices"])))])
        for row in rows
    ]
    assert results["results"]["made"]["acc,none"] == np.mean(np.array(likely) == 1)
    assert results["config"]["mode"] == "float"


# ---- bad input


def test_generating_is_refused(tiny):
    with pytest.raises(NotImplementedError, match="generate_until: quantlab scores texts only. Choose tasks of type"):
        tiny.generate_until(asked("The"))


@pytest.mark.parametrize("pair", [("The", ""), ("", ""), ("", "<s>")])
def test_a_continuation_without_tokens_is_refused(tiny, pair):
    with pytest.raises(ValueError, match="continuation .*: n_tokens=0, must be 1 to max_length=512"):
        tiny.loglikelihood(asked(pair))


def test_a_continuation_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="n_tokens=.*, must be 1 to max_length=2"):
        Likelihood("tiny", max_length=2).loglikelihood(asked(("The", " weights of all the blocks")))


@pytest.mark.parametrize("max_length", [0, 513])
def test_a_length_beyond_the_context_is_refused(max_length):
    with pytest.raises(ValueError, match=f"max_length={max_length}, must be 1 to 512, the model's context"):
        Likelihood("tiny", max_length=max_length)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"bos_id": None, "eos_id": None}, "has neither BOS nor EOS"),
        ({"add_eos": True}, "ends every text with EOS, which must not precede a continuation"),
    ],
)
def test_vocabularies_that_cannot_serve_are_refused(monkeypatch, changed, text):
    model = ql.open("tiny")
    monkeypatch.setitem(vars(model), "vocab", replace(model.vocab, **changed))
    with pytest.raises(ValueError, match=text):
        Likelihood(model)
