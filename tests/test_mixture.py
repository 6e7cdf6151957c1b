"""Types chosen for tensors, against llama.cpp's own golden files."""

import json
from pathlib import Path

import pytest

from quantlab.arch import Hparams, tensor_shapes
from quantlab.transform.ftypes import ALL_FTYPES
from quantlab.transform.mixture import (
    FTYPES,
    Recipe,
    choose_types,
    find_ftype,
    find_qtype,
    fitting,
    in_file_order,
    parse_tensor_type,
    read_tensor_types,
)
from quantlab.transform.rules import CurrentRules

GOLDEN = json.loads((Path(__file__).parent / "golden" / "types.json").read_text())["models"]
HPARAMS = dict(arch="llama", n_vocab=512, n_embd=512, n_ff=1024, n_layer=32, n_head=8, n_head_kv=2)


def hparams(**changes):
    return Hparams(**HPARAMS | changes)


def qtypes(ftype, names=None, **options):
    model = hparams(**options.pop("hparams", {}))
    shapes = options.pop("shapes", None) or tensor_shapes(model)
    choices = choose_types(model, shapes, ftype, **options)
    return [choices[name].qtype for name in names] if names else {name: c.qtype for name, c in choices.items()}


def layers(kind, n=32):
    return [f"blk.{i}.{kind}.weight" for i in range(n)]


def numbers(runs):
    """Read "0-3 7" as 0 1 2 3 7."""
    ends = [run.split("-") for run in runs.split()]
    return [i for end in ends for i in range(int(end[0]), int(end[-1]) + 1)]


def golden_shapes(model):
    """Shape of every tensor that a golden file names."""
    shapes = {}
    for kind, tensor in GOLDEN[model]["tensors"].items():
        names = [f"blk.{i}.{kind}.weight" for i in numbers(tensor["layers"])] if tensor["layers"] else [kind]
        shapes |= dict.fromkeys(names, (4, 64, tensor["row"]) if tensor["experts"] else (64, tensor["row"]))
    return shapes


def expected(section, shapes):
    """Spell a golden section out: tensor name → type."""
    types = dict.fromkeys(shapes, section["base"])
    for kind, value in section.items():
        for qtype, runs in value.items() if kind != "base" else ():
            types |= {f"blk.{i}.{kind}.weight": qtype for i in numbers(runs)} if runs else {kind: qtype}
    return types


@pytest.mark.parametrize("model", GOLDEN)
def test_types_of_every_tensor_equal_llama_cpp(model):
    keys = ("arch", "n_embd", "n_layer", "n_head", "n_head_kv", "n_expert")
    golden, shapes = Hparams(**{key: GOLDEN[model][key] for key in keys}), golden_shapes(model)
    sections = GOLDEN[model]["ftypes"]
    assert len(sections) == 33 and sections.keys() <= ALL_FTYPES.keys()
    for ftype, section in sections.items():
        choices = types_of(ALL_FTYPES[ftype], golden, shapes)
        assert choices == expected(section, shapes), ftype


def types_of(ftype, hparams, shapes):
    """Type of every tensor by the current rules, for a ftype whose bytes may have no encoder here."""
    rules = CurrentRules(ftype.name, hparams, shapes, imatrix=False)
    if not ftype.is_quantized:
        return dict.fromkeys(shapes, ftype.qtype)
    types = {name: rules.wanted(name, shapes[name], ftype.qtype, None) for name in rules.order(shapes)}
    return {name: fitting(qtype, shapes[name][-1], rules.fallback) for name, qtype in types.items()}


def test_2023_rules_differ_where_the_rules_changed():
    old, new = qtypes("Q2_K", rules="2023-12"), qtypes("Q2_K")
    changed = {name.split(".", 2)[-1] for name in new if old[name] != new[name]}
    assert changed == {"attn_v.weight", "ffn_gate.weight", "ffn_up.weight"}
    assert qtypes("Q3_K_M", layers("ffn_down"), rules="2023-12") == ["Q5_K"] * 2 + ["Q4_K"] * 30
    assert qtypes("Q4_K_S", layers("ffn_down", 5), rules="2023-12", hparams={"n_layer": 8})[3:] == ["Q5_K", "Q4_K"]


def test_an_override_shifts_the_pattern_of_later_layers():
    plain = qtypes("Q4_K_M", layers("attn_v"))
    shifted = qtypes("Q4_K_M", layers("attn_v"), tensor_types=[(r"blk\.0\.attn_v", "Q4_K")])
    assert plain[:5] == ["Q6_K"] * 4 + ["Q4_K"]
    assert shifted[:6] == ["Q4_K"] + ["Q6_K"] * 4 + ["Q4_K"]


def test_keep_order_lets_the_order_of_the_file_decide():
    model = hparams()
    shapes = dict(reversed(tensor_shapes(model).items()))
    choices = choose_types(model, shapes, "Q3_K_M", keep_order=True)
    assert list(choices) == list(shapes)
    assert [choices[name].qtype for name in ("blk.31.attn_v.weight", "blk.0.attn_v.weight")] == ["Q5_K", "Q4_K"]


def test_order_is_layer_then_name_with_the_rest_first():
    names = ["blk.10.a.weight", "token_embd.weight", "blk.2.b.weight", "blk.2.a.weight", "output.weight"]
    assert in_file_order(names) == [names[4], names[1], names[3], names[2], names[0]]


def test_an_importance_matrix_changes_the_first_down_projections_of_q4_0_and_q5_0():
    assert qtypes("Q4_0", layers("ffn_down", 5), imatrix=True) == ["Q4_1"] * 4 + ["Q4_0"]
    assert qtypes("Q5_0", layers("ffn_down", 5), imatrix=True) == ["Q5_1"] * 4 + ["Q5_0"]
    assert qtypes("Q4_0", layers("ffn_down", 5), imatrix=True, rules="2023-12") == ["Q4_0"] * 5


@pytest.mark.parametrize(
    ("ftype", "rules", "qtype"),
    [("Q2_K", "current", "Q4_0"), ("Q3_K_S", "current", "Q4_0"), ("Q3_K_S", "2023-12", "Q4_1")]
    + [("Q4_K_S", "current", "Q5_0"), ("Q5_K_S", "current", "Q5_1"), ("Q6_K", "current", "Q8_0")],
)
def test_rows_that_do_not_fit_fall_back(ftype, rules, qtype):
    choices = choose_types(hparams(), {"blk.0.attn_q.weight": (512, 576)}, ftype, rules=rules)
    choice = choices["blk.0.attn_q.weight"]
    assert (choice.qtype, choice.wanted, choice.why) == (qtype, FTYPES[ftype].qtype, "base + fallback")


def test_rows_of_no_multiple_of_32_become_f16():
    assert qtypes("Q4_K_M", shapes={"blk.0.attn_q.weight": (64, 72), "output.weight": (64, 72)}) == {
        "blk.0.attn_q.weight": "F16",
        "output.weight": "F16",
    }


def test_output_of_rows_that_fit_no_super_block_is_q8_0():
    assert qtypes("Q4_K_M", ["output.weight"], shapes={"output.weight": (64, 576)}) == ["Q8_0"]
    assert qtypes("Q4_0", ["output.weight"], shapes={"output.weight": (64, 576)}) == ["Q8_0"]


def test_a_tied_embedding_is_treated_as_output():
    tied = {"token_embd.weight": (64, 512)}
    assert qtypes("Q4_K_M", shapes=tied) == {"token_embd.weight": "Q6_K"}
    assert qtypes("Q4_K_M", shapes=tied, rules="2023-12") == {"token_embd.weight": "Q4_K"}
    assert qtypes("Q4_K_M", shapes=tied, output_tensor_type="q8_0") == {"token_embd.weight": "Q8_0"}
    both = dict(output_tensor_type="Q8_0", token_embedding_type="Q5_K")
    assert qtypes("Q4_K_M", shapes=tied, **both) == {"token_embd.weight": "Q5_K"}


def test_options_for_single_tensors():
    ends = ["token_embd.weight", "output.weight"]
    assert qtypes("Q4_K_M", ends, token_embedding_type="Q2_K", output_tensor_type="F16") == ["Q2_K", "F16"]
    assert qtypes("Q4_K_M", ends, leave_output_tensor=True) == ["Q4_K", "F16"]
    assert set(qtypes("Q4_K_M", pure=True).values()) == {"Q4_K", "F32"}
    first_wins = [("ATTN_V", "Q8_0"), ("attn", "Q5_0")]
    assert qtypes("Q4_K_M", ["blk.3.attn_v.weight", "blk.3.attn_k.weight"], tensor_types=first_wins) == ["Q8_0", "Q5_0"]


def test_copy_keeps_every_type():
    source = {"token_embd.weight": "Q4_1", "output_norm.weight": "F32"}
    shapes = {"token_embd.weight": (64, 512), "output_norm.weight": (512,)}
    assert qtypes("COPY", shapes=shapes, source=source) == source


@pytest.mark.parametrize("ftype", FTYPES.values(), ids=str)
def test_ftypes_are_found_by_name_alias_and_number(ftype):
    assert find_ftype(ftype.name.lower()) is ftype
    assert ftype.number is None or find_ftype(ftype.number) is find_ftype(str(ftype.number)) is ftype
    assert ftype.alias is None or find_ftype(ftype.alias) is ftype


def test_a_recipe_fits_each_tensor_alone_and_survives_a_file(tmp_path):
    recipe = Recipe({"output.weight": "Q8_0", "blk.1.attn_v.weight": "Q3_K"})
    assert Recipe.load(recipe.save(tmp_path / "recipe.txt")) == recipe
    chosen = qtypes("Q4_K_S", tensor_types=recipe.tensor_types())
    assert (chosen["output.weight"], chosen["blk.1.attn_output.weight"]) == ("Q8_0", "Q4_K")
    assert (chosen["blk.1.attn_v.weight"], chosen["blk.11.attn_v.weight"]) == ("Q3_K", "Q4_K")


def test_a_tensor_type_file_is_split_at_white_space(tmp_path):
    (tmp_path / "types.txt").write_text("attn_v=q6_k\n  ffn_(up|gate)=Q3_K blk.0=f16\n")
    assert read_tensor_types(tmp_path / "types.txt") == [
        ("attn_v", "q6_k"),
        ("ffn_(up|gate)", "Q3_K"),
        ("blk.0", "f16"),
    ]


def test_bad_input():
    with pytest.raises(ValueError, match=r"ftype=smollm2, must be one of .* If in doubt, take Q4_K_M.$"):
        find_ftype("smollm2")
    with pytest.raises(ValueError, match=r"ftype=Q4_KM, must be one of .* Did you mean Q4_K_M\?"):
        find_ftype("Q4_KM")
    with pytest.raises(ValueError, match=r"ftype=q5, must be one of .* Did you mean Q5_K_M\?"):
        find_ftype("q5")
    with pytest.raises(ValueError, match="ftype=4bit, must be one of .* If in doubt, take Q4_K_M."):
        find_ftype("4bit")
    with pytest.raises(ValueError, match=r"tensor type: type=Q4K.* Did you mean Q4_K\?"):
        find_qtype("Q4K")
    with pytest.raises(ValueError, match="rules=2024, must be one of current 2023-12"):
        qtypes("Q4_0", rules="2024")
    with pytest.raises(ValueError, match="architecture=qwen3, must be one of llama.* Use the current rules"):
        qtypes("Q4_0", rules="2023-12", hparams={"arch": "qwen3"}, shapes={"output.weight": (32, 32)})
    with pytest.raises(ValueError, match="ffn_up_exps.weight: has 3 dimensions, which rules=2023-12"):
        qtypes("Q4_0", rules="2023-12", shapes={"blk.0.ffn_up_exps.weight": (8, 32, 32)})
    with pytest.raises(ValueError, match="blk.9.ffn_down_exps.weight: layer=9, must be within 0:2"):
        shapes = {"blk.9.ffn_down_exps.weight": (8, 32, 32)}
        qtypes("Q4_0", hparams={"n_layer": 2, "n_expert": 8}, shapes=shapes)
    with pytest.raises(ValueError, match="ffn_gate_inp.weight: type=Q4_K, must stay F32"):
        shapes = {"blk.0.ffn_gate_inp.weight": (8, 256), "blk.0.ffn_up_exps.weight": (8, 32, 256)}
        qtypes("Q4_0", shapes=shapes, tensor_types=[("ffn_gate_inp", "Q4_K")])
    with pytest.raises(ValueError, match="ftype=Q2_K_S: rules=2023-12, must be current"):
        qtypes("Q2_K_S", rules="2023-12")
    with pytest.raises(ValueError, match=r"ftype=99, must be one of 0 1 32 .*, or a name such as Q4_K_M."):
        find_ftype(99)
    with pytest.raises(ValueError, match=r"name=\[\[:digit:\]\], must be a regular expression"):
        qtypes("Q4_0", tensor_types=[("[[:digit:]]", "Q4_0")])
    with pytest.raises(ValueError, match=r"tensor type: name=\(, must be a regular expression"):
        qtypes("Q4_0", tensor_types=[("(", "Q4_0")])
    with pytest.raises(ValueError, match="tensor types: ftype=F16, must be a quantized one"):
        qtypes("F16", tensor_types=[("attn", "Q4_0")])
    with pytest.raises(ValueError, match="tensor type=attn_v, must be NAME=TYPE"):
        parse_tensor_type("attn_v")


def test_a_bad_tensor_type_file_is_named(tmp_path):
    for raw in (b"\xff\xfe=", b"\x1b[2J=Q6_K"):
        (tmp_path / "types.txt").write_bytes(raw)
        with pytest.raises(ValueError, match=r"types\.txt: must be a text of NAME=TYPE entries"):
            read_tensor_types(tmp_path / "types.txt")
    (tmp_path / "types.txt").write_text("attn_v Q6_K")
    with pytest.raises(ValueError, match=r"types\.txt: tensor type=attn_v, must be NAME=TYPE"):
        read_tensor_types(tmp_path / "types.txt")


def test_a_recipe_file_of_expressions_is_refused(tmp_path):
    (tmp_path / "types.txt").write_text("attn_v=Q6_K")
    with pytest.raises(ValueError, match="name=attn_v, must be one tensor's name"):
        Recipe.load(tmp_path / "types.txt")
