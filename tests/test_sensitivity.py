"""Damage of single changes on a small random model: against whole comparisons, wherever measured, after kills."""

import json
import os
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import llama_models
import numba
import numpy as np
import pytest

import quantlab as ql
from quantlab import quants
from quantlab.evaluate.variants import as_is, resolve, shared_layers, steps
from quantlab.files.imatrix_file import ImportanceMatrix
from quantlab.lab.more_bits import more_bits
from quantlab.study import damage, proxy
from quantlab.study.changes import kind_of
from quantlab.study.damage_cache import DamageCache, model_digest
from quantlab.study.sensitivity import Sensitivity
from quantlab.transform.mixture import Recipe, choose_types

OPTIONS = {"n_ctx": 32, "chunks": 3, "progress": False, "types": ("Q8_0", "Q4_0")}
FIGURES = ("kld_mean", "kld_se", "ln_ratio", "ln_ratio_se")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of two layers, and a text."""
    return llama_models.write_model(tmp_path_factory.mktemp("model") / "llama2", "llama2")


@pytest.fixture(scope="module")
def text(folder):
    path = folder.parent / "text.txt"
    path.write_text("".join(f"{i} sheep jumped over {i + 1} fences. " for i in range(200)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def found(folder, text, tmp_path_factory):
    """Every tensor at two types."""
    return ql.sensitivity(folder, text, cache=tmp_path_factory.mktemp("cache"), **OPTIONS)


def compared(folder, text, types, **options):
    """The row of a comparison with a recipe, measured from the first layer to the last."""
    given = {key: OPTIONS[key] for key in ("n_ctx", "chunks", "progress")}
    return ql.compare(folder, [Recipe(types)], text, **given, **options).rows[1]


def test_every_tensor_has_a_row_per_type(folder, found):
    names = [name for name, shape in ql.open(folder).shapes.items() if len(shape) > 1]
    assert {(row["group"], row["qtype"]) for row in found.rows} == {(n, q) for n in names for q in ("Q8_0", "Q4_0")}
    assert [row["group"] for row in found.rows[:4:2]] == ["token_embd.weight", "blk.0.attn_q.weight"]
    assert found.rows[-1]["group"] == "output.weight"
    assert all(row["measured"] for row in found.rows)
    assert found.start == {"kld_mean": 0, "kld_se": 0}


@pytest.mark.parametrize("name", ["token_embd", "blk.0.attn_v", "blk.1.ffn_down", "output"])
def test_a_damage_is_that_of_the_whole_comparison(folder, text, found, name):
    row = next(row for row in found.rows if row["types"] == {f"{name}.weight": "Q4_0"})
    whole = compared(folder, text, row["types"])
    assert row["kld_mean"] == whole["kld_mean"] > 0
    assert [row[f] for f in FIGURES] == pytest.approx([whole[f] for f in FIGURES], rel=1e-12)
    assert row["delta_kld"] == row["kld_mean"]
    assert row["bytes"] == ql.open(folder).tensor(f"{name}.weight").n_weights // 32 * 18


def test_around_a_recipe_everything_else_is_at_it(folder, text, tmp_path):
    start = {name: "Q4_0" for name in ql.open(folder).names if name.endswith(("ffn_up.weight", "attn_k.weight"))}
    found = ql.sensitivity(folder, text, around=Recipe(start), cache=tmp_path, **OPTIONS)
    whole = compared(folder, text, start)
    assert found.start["kld_mean"] == whole["kld_mean"]
    for name in ("blk.0.ffn_up.weight", "blk.1.attn_q.weight"):
        row = next(row for row in found.rows if row["types"] == {name: "Q8_0"})
        changed = compared(folder, text, start | row["types"])
        assert row["kld_mean"] == changed["kld_mean"]
        assert row["delta_kld"] == pytest.approx(changed["kld_mean"] - whole["kld_mean"], rel=1e-9)
    same = next(row for row in found.rows if row["types"] == {"blk.0.ffn_up.weight": "Q4_0"})
    assert same["delta_kld"] == same["delta_kld_se"] == 0


def test_groups_change_together(folder, text, found, tmp_path):
    names = [name for name in ql.open(folder).names if kind_of(name) == "ffn_down"]
    kinds = ql.sensitivity(folder, text, groups="kind", cache=tmp_path, **OPTIONS)
    row = next(row for row in kinds.rows if (row["group"], row["qtype"]) == ("ffn_down", "Q4_0"))
    assert row["kld_mean"] == compared(folder, text, dict.fromkeys(names, "Q4_0"))["kld_mean"]
    assert (row["layer"], row["kind"], row["tensors"]) == (None, "ffn_down", names)
    assert row["error"] == pytest.approx(
        sum(r["error"] for r in found.rows if r["types"].items() <= row["types"].items())
    )
    layers = ql.sensitivity(folder, text, groups="layer", cache=tmp_path, **OPTIONS).to_frame()
    assert layers["group"].unique().tolist() == ["token_embd", "blk.0", "blk.1", "output"]
    mine = ql.sensitivity(folder, text, groups={"both": names}, cache=tmp_path, **OPTIONS)
    assert [r["kld_mean"] for r in mine.rows] == [r["kld_mean"] for r in kinds.rows if r["group"] == "ffn_down"]


def test_rows_that_do_not_fit_get_what_llama_quantize_would_give(folder, text, tmp_path):
    types = ("Q2_K", "Q3_K", "Q6_K", "Q4_0")
    found = ql.sensitivity(folder, text, cache=tmp_path, groups={"a": ["output.weight"]}, **OPTIONS | {"types": types})
    assert [row["qtype"] for row in found.rows] == ["Q4_0", "Q8_0"]


# ---- wherever it is measured


def same(a, b):
    return [row for row in a.rows] == [row for row in b.rows]


@pytest.mark.parametrize("n", [1, 2])
def test_threads_do_not_matter(folder, text, found, tmp_path, n, monkeypatch):
    monkeypatch.setattr(damage, "CHANGES", n)  # nor does what is measured side by side
    assert same(found, ql.sensitivity(folder, text, threads=n, cache=tmp_path, **OPTIONS))
    assert numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS


def test_an_executor_does_not_matter(folder, text, found, tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "CHANGES", 5)
    with ThreadPoolExecutor(2) as executor:
        assert same(found, ql.sensitivity(folder, text, executor=executor, cache=tmp_path / "a", **OPTIONS))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        assert same(found, ql.sensitivity(folder, text, executor=executor, cache=False, **OPTIONS))


def test_what_was_measured_is_not_measured_again(folder, text, found, tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "CHANGES", 4)
    done = []

    def stop_after_three(task, bar=None, perform=damage.perform):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(task)
        return perform(task, bar)

    monkeypatch.setattr(damage, "perform", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        ql.sensitivity(folder, text, cache=tmp_path, **OPTIONS)
    assert len(list(tmp_path.rglob("*.json"))) == 12
    monkeypatch.undo()
    monkeypatch.setattr(damage, "CHANGES", 1)
    tasks = []
    monkeypatch.setattr(damage, "perform", lambda task, bar=None: (tasks.append(task), task.measure(bar))[1])
    assert same(found, ql.sensitivity(folder, text, cache=tmp_path, **OPTIONS))
    assert sum(isinstance(task, damage.Bundle) for task in tasks) == len(found.rows) - 12
    tasks.clear()
    assert same(found, ql.sensitivity(ql.open(folder), text, cache=tmp_path, **OPTIONS))
    assert not tasks


def test_a_damaged_entry_is_as_none(tmp_path):
    cache = DamageCache(tmp_path)
    assert cache.get({"a": 1}) is None
    cache.put({"a": 1}, {"x": 0.1})
    assert cache.get({"a": 1}) == {"x": 0.1}
    (path,) = tmp_path.rglob("*.json")
    for content in ("", "{", "[]", '{"key": {"a": 2}, "value": {}}', "\udcff"):
        path.write_text(content, encoding="utf-8", errors="surrogateescape")
        assert cache.get({"a": 1}) is None


def test_another_model_matrix_or_text_is_measured_anew(folder, text, tmp_path):
    other = llama_models.write_model(tmp_path / "other", "yi")
    assert model_digest(ql.open(folder)) != model_digest(ql.open(other))
    cache = tmp_path / "cache"
    options = {**OPTIONS, "groups": {"a": ["output.weight"]}, "cache": cache}
    first = ql.sensitivity(folder, text, **options)
    n = len(list(cache.rglob("*.json")))
    text2 = tmp_path / "two.txt"
    text2.write_text(text.read_text() + "more", encoding="utf-8")
    second = ql.sensitivity(folder, text2, **options)
    assert len(list(cache.rglob("*.json"))) == n + 2  # the errors need no text
    assert [r["kld_mean"] for r in first.rows] == [r["kld_mean"] for r in second.rows]  # the chunks are the same


class Dying:
    """A task that takes its worker with it."""

    def measure(self, bar=None):
        os.kill(os.getpid(), signal.SIGKILL)


def test_an_executor_that_lost_its_worker_is_one_error():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor, damage.tqdm(disable=True) as bar:
        with pytest.raises(OSError, match="executor: BrokenProcessPool, .* call again with a new executor"):
            damage.run([Dying(), Dying()], [1, 1], executor, bar)


class Flaky(ThreadPoolExecutor):
    """An executor whose first tasks are lost."""

    def __init__(self, n_lost):
        super().__init__(1)
        self.n_lost = n_lost

    def submit(self, task, /, *args, **kwargs):
        if self.n_lost == 0:
            return super().submit(task, *args, **kwargs)
        self.n_lost -= 1

        def lost():
            raise BrokenProcessPool

        return super().submit(lost)


def test_a_lost_task_is_given_to_another_worker(folder, text, found, tmp_path):
    with Flaky(2) as executor:
        assert same(found, ql.sensitivity(folder, text, executor=executor, cache=tmp_path, **OPTIONS))
    with Flaky(100) as executor, pytest.raises(OSError, match="executor: BrokenProcessPool"):
        ql.sensitivity(folder, text, executor=executor, cache=False, **OPTIONS)


@pytest.mark.slow
def test_with_dask_nothing_is_lost_when_a_worker_is_killed(folder, text, found, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(damage, "CHANGES", 1)
    options = dict(n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path / "dask"))
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        victim, *_ = client.run(os.getpid).values()
        executor, killed = client.get_executor(), []
        submit = executor.submit

        def submit_and_kill(task, *args):
            future = submit(task, *args)
            future.add_done_callback(lambda _: killed or killed.append(os.kill(victim, signal.SIGKILL)))
            return future

        monkeypatch.setattr(executor, "submit", submit_and_kill)
        assert same(found, ql.sensitivity(folder, text, executor=executor, cache=tmp_path / "cache", **OPTIONS))
        assert killed
        assert victim not in client.run(os.getpid).values()


def test_of_all_types_those_are_measured_that_can_be_chosen(tmp_path):
    """Of every type with blocks, with and without a matrix."""
    groups = {"v": ["blk.1.attn_v.weight"], "output": ["output.weight"]}
    matrix = ql.imatrix("tiny", chunks=1, n_ctx=64, progress=False)
    options = {"groups": groups, "n_ctx": 64, "chunks": 1, "cache": tmp_path, "progress": False}
    with_matrix, without = (ql.sensitivity("tiny", imatrix=given, **options) for given in (matrix, None))
    taken = [{row["qtype"] for row in found.rows if row["group"] == "v"} for found in (with_matrix, without)]
    needing = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
    assert taken[0] & needing and not taken[1] & needing
    assert {"IQ4_XS", "Q6_K", "Q8_0"} <= taken[0] & taken[1]
    left_out = set(without.protocol["left_out"])  # the output may have the two that have a plain encoder
    assert left_out >= needing - {"IQ2_S", "IQ3_XXS"} and "left out: " in str(without)
    assert not {"MXFP4", "NVFP4", "Q4_0", "Q5_0"} & (taken[0] | taken[1])
    less = ql.sensitivity("tiny", imatrix=matrix, exclude=["iq4_xs"], **options)
    with pytest.raises(ValueError, match="types=IQ2_XS: nothing can be changed to them. Pass an importance matrix"):
        ql.sensitivity("tiny", types=["IQ2_XS"], **options)
    assert "IQ4_XS" not in {row["qtype"] for row in less.rows} and less.protocol["excluded"] == ["IQ4_XS"]


def test_a_look_at_a_large_tensor_takes_rows_from_everywhere():
    spans = list(proxy.pieces((4096, 1024), 1 << 19))
    assert len(spans) == 16 and sum(stop - start for start, stop in spans) == 512
    assert spans[0][0] == 0 and spans[-1][1] > 3800
    for start, stop in proxy.pieces((8, 100, 64), 64 * 700):
        assert start // 100 == (stop - 1) // 100  # of one expert
    assert list(proxy.pieces((10, 64))) == [(0, 10)]


# ---- the proxy


def test_the_error_is_the_weighted_sum(rng):
    x = rng.standard_normal((7, 64)).astype(np.float32)
    weights = rng.random(64).astype(np.float32)
    by_hand = sum(
        w * d**2 for row in quants.roundtrip(x, "Q4_0", weights) - x for w, d in zip(weights, row, strict=True)
    )
    assert proxy.weighted_error(x, "Q4_0", weights) == pytest.approx(by_hand, rel=1e-5)
    assert proxy.weighted_error(x, "Q4_0") == pytest.approx(np.square(quants.roundtrip(x, "Q4_0") - x).sum(), rel=1e-5)
    assert proxy.weighted_error(x, "F32") == 0


def made_rows(n_layer, measured):
    """Rows whose damage follows the law: a scale per kind that grows with the layer, exponent 1.25; -1 is no layer."""
    rows = []
    for layer in range(-1, n_layer):
        for kind, scale in (("attn_v", -2.0), ("ffn_up", -3.0)):
            for qtype, error in (("Q2_K", 8.0 + layer), ("Q4_K", 0.5), ("Q6_K", 0.03)):
                kld = float(np.exp(scale + 0.1 * layer + 1.25 * np.log(error)))
                row = {"group": f"{layer}{kind}", "layer": layer, "kind": kind, "qtype": qtype, "error": error}
                known = measured(layer, qtype)
                rows.append(
                    row | {"measured": known, "true": kld, "delta_kld": kld if known else None, "kld_mean": None}
                )
    return rows


@pytest.mark.parametrize(
    "measured",
    [
        lambda layer, qtype: layer in (-1, 0, 4, 8),
        lambda layer, qtype: layer in (-1, 4) or qtype == "Q4_K",
    ],
    ids=["some layers", "one type"],
)
def test_calibration_finds_the_law(measured):
    rows, calibration = proxy.calibrated(made_rows(9, measured), 9)
    assert [row["delta_kld"] for row in rows] == pytest.approx([row["true"] for row in rows])
    assert calibration["exponent"] == pytest.approx(1.25)
    assert calibration["spearman"] == pytest.approx(1)
    assert calibration["factor"] == pytest.approx(1)
    assert calibration["spearman_error"] < 1


def test_a_sample_measures_little_and_predicts_the_rest(folder, text, found, tmp_path):
    options = {**OPTIONS, "types": ("Q8_0", "Q5_0", "Q4_0")}
    partly = ql.sensitivity(folder, text, sample=2, cache=tmp_path, **options)
    frame = partly.to_frame()
    assert len(frame) == 3 * len(found.rows) // 2
    # layer 0 at the second narrowest type, layer 1 and what is in no layer at all three
    assert frame[frame["layer"] == 0].query("measured")["qtype"].unique().tolist() == ["Q5_0"]
    assert frame[frame["layer"] != 0]["measured"].all()
    assert frame["delta_kld"].notna().all() and (frame["delta_kld"] > 0).all()
    known = {(row["group"], row["qtype"]): row["kld_mean"] for row in found.rows}
    for row in partly.rows:
        if row["qtype"] != "Q5_0":
            off = row["kld_mean"] / known[row["group"], row["qtype"]]
            assert off == 1 if row["measured"] else 0.2 < off < 5
    assert partly.calibration["n_held_out"] == 14
    assert "rank correlation" in str(partly)


# ---- what is shared, and the result


def test_variants_share_their_first_layers(folder):
    model = ql.open(folder)
    changes = [{}, {"output.weight": "Q8_0"}, {"blk.1.attn_q.weight": "Q8_0"}, {"blk.0.ffn_up.weight": "Q8_0"}]
    changes += [{"blk.0.ffn_up.weight": "Q8_0", "blk.1.attn_q.weight": "Q8_0"}, {"token_embd.weight": "Q8_0"}]
    variants = [as_is(model), *resolve(model, [Recipe(types) for types in changes])]
    assert shared_layers(variants) == [(0, -1), (0, 2), (0, 2), (0, 1), (0, 0), (4, 1), (0, -1)]
    assert steps(variants) == 3 + 1 + 1 + 2 + 3 + 2 + 3


def test_a_prediction_adds_up_single_changes(folder, text, found, tmp_path):
    (joint,) = ql.sensitivity(folder, text, groups="model", cache=tmp_path, **OPTIONS | {"types": ["Q8_0"]}).rows
    assert found.predict(joint["types"]) == sum(row["delta_kld"] for row in found.rows if row["qtype"] == "Q8_0")
    assert found.predict(joint["types"]) == pytest.approx(joint["delta_kld"], rel=0.2)  # nearly additive
    with pytest.raises(ValueError, match="blk.1.attn_v.weight: types=Q6_K, must be measured types"):
        found.predict(joint["types"] | {"blk.1.attn_v.weight": "Q6_K"})


def test_more_bits_go_where_they_gain_most(folder, text, tmp_path):
    found = ql.sensitivity(folder, text, cache=tmp_path, **OPTIONS | {"types": ["Q4_K", "Q6_K"]})
    frame = more_bits(ql.open(folder), found, "Q4_K_M").set_index("tensor")
    assert set(frame["narrow"]) == {"Q5_0"} and set(frame["wide"]) == {"Q8_0"}  # rows of 64 and 96
    rule = choose_types(ql.open(folder).hparams, ql.open(folder).shapes, "Q4_K_M")
    assert frame["rule"].to_dict() == {name: rule[name].qtype == "Q8_0" for name in frame.index}
    assert frame.loc[frame["measured"], "bytes"].sum() <= frame.loc[frame["rule"], "bytes"].sum()
    assert frame.loc[frame["measured"], "gain_per_kib"].min() >= frame.loc[~frame["measured"], "gain_per_kib"].min()
    kld = {row["qtype"]: row["kld_mean"] for row in found.rows if row["group"] == "blk.1.attn_v.weight"}
    assert frame.loc["blk.1.attn_v.weight", "gain"] == kld["Q5_0"] - kld["Q8_0"]
    assert frame.loc["blk.1.attn_v.weight", "bytes"] == 32 * 2 * (34 - 22)


def test_a_result_is_kept_and_read(found, tmp_path):
    path = found.save(tmp_path / "a.json")
    assert Sensitivity.load(path) == found
    document = json.loads(path.read_text())
    assert document["schema"] == 1 and document["protocol"]["chunks"] == 3
    assert "tensors" not in found.to_frame()
    assert found._repr_html_().count("<tr") == len(found.rows) + 1
    assert str(found).startswith("llama2 on text.txt: 3 chunks of 32 tokens, changes of the base")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"types": ["Q9_K"]}, "type=Q9_K, must be one of .* Did you mean"),
        ({"types": []}, "types and groups: must not be empty"),
        ({"exclude": ["Q8_0", "Q4_0"]}, "types=Q8_0,Q4_0: nothing can be changed to them"),
        ({"exclude": ["Q9"]}, "exclude: type=Q9, must be one of"),
        ({"groups": "tensor"}, "groups=tensor, must be None, layer, kind, model or a mapping"),
        ({"groups": {"a": ["blk.9.attn_q.weight"]}}, "groups: blk.9.attn_q.weight is not a tensor of"),
        ({"groups": {"a": []}}, "must not be empty"),
        ({"sample": 0}, "sample=0, must be at least 1"),
        ({"sample": 1, "groups": "kind"}, "sample=1, must be at least 1, and groups=None"),
        ({"around": "Q4"}, "ftype=Q4, must be one of"),
        ({"mode": "int"}, "mode=int, must be one of float, ggml-cpu"),
        ({"chunks": 0}, "chunks=0, must be at least 1"),
        ({"memory": "1MiB"}, "memory=1MiB, must be at least"),
        ({"threads": 0}, "threads=0, must be at least 1"),
    ],
)
def test_bad_options_are_refused(folder, text, tmp_path, options, error):
    with pytest.raises(ValueError, match=error):
        ql.sensitivity(folder, text, **{**OPTIONS, "cache": tmp_path, **options})


def test_a_sample_is_taken_of_the_base_alone(folder, text):
    with pytest.raises(ValueError, match="sample=1, .*around=None"):
        ql.sensitivity(folder, text, sample=1, around="Q4_0", **OPTIONS)


def test_a_file_is_no_starting_point(folder, text, tmp_path):
    path = ql.quantize(folder, tmp_path / "a.gguf", ftype="Q8_0")
    with pytest.raises(ValueError, match="around=.*a.gguf, must be a ftype or a recipe"):
        ql.sensitivity(folder, text, around=path, **OPTIONS)


def test_a_file_that_is_no_sensitivity(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file. Run quantlab sensitivity first"):
        Sensitivity.load(tmp_path / "nothing.json")
    for content in ("", "[]", '{"schema": 1, "rows": [{}]}', '{"schema": 2, "rows": []}', '{"schema": 1, "rows": 3}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match="a.json: is not a sensitivity"):
            Sensitivity.load(tmp_path / "a.json")


def test_a_file_with_a_part_missing_is_no_sensitivity(found, tmp_path):
    whole = json.loads(found.to_json())
    row = whole["rows"][0]
    no_bytes = {key: value for key, value in row.items() if key != "bytes"}
    for part in (
        {"protocol": {}},
        {"start": {}},
        {"rows": []},
        {"rows": [no_bytes]},
        {"rows": [row | {"delta_kld": "a"}]},
    ):
        (tmp_path / "a.json").write_text(json.dumps(whole | part))
        with pytest.raises(ValueError, match="a.json: is not a sensitivity"):
            Sensitivity.load(tmp_path / "a.json")


def test_a_cache_that_cannot_be_written_is_told_before_measuring(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(damage, "run", None)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cache=.*file: is not writable .* Choose another folder"):
        ql.sensitivity(folder, text, cache=tmp_path / "file", **OPTIONS)


def test_a_matrix_of_another_model_is_refused(folder, text):
    matrix = ImportanceMatrix({"blk.9.x": np.ones((1, 32), np.float32)}, {"blk.9.x": np.ones(1, np.float32)}, 1, 32)
    with pytest.raises(ValueError, match="imatrix: has no entry for any tensor of"):
        ql.sensitivity(folder, text, imatrix=matrix, cache=False, **OPTIONS)


def test_only_mixtures_with_the_rule_have_more_bits(folder, found):
    with pytest.raises(ValueError, match="ftype=Q4_0, must be Q4_K_M or Q5_K_M"):
        more_bits(ql.open(folder), found, "Q4_0")
    with pytest.raises(ValueError, match="blk.0.attn_q.weight: Q5_0 was not measured"):
        more_bits(ql.open(folder), found, "Q4_K_M")


def test_a_kind_without_any_damage_predicts_nothing():
    rows = [row | {"delta_kld": row["delta_kld"] and -1e-9} for row in made_rows(3, lambda layer, qtype: layer < 1)]
    rows[-1] |= {"measured": True, "delta_kld": 1e-3}
    with pytest.raises(ValueError, match="attn_v: measured damages must be above zero, none is"):
        proxy.calibrated(rows, 3)
