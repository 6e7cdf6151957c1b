"""transform/refined.py: refined files are told from files of other weights."""

import made_models
import numpy as np
import pytest
from test_verify import rewritten
from tqdm.auto import tqdm

import quantlab as ql
from quantlab import quants
from quantlab.arch import Hparams, tensor_shapes
from quantlab.evaluate import budget
from quantlab.evaluate.engine.cpu import CpuEngine
from quantlab.evaluate.refine import check_plan, ordinary
from quantlab.evaluate.refinement import Refinement
from quantlab.evaluate.variants import resolve
from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.quants.block_numbers import pack, unpack
from quantlab.study.front import judge_refined
from quantlab.transform.refined import PREFIX, limited, near


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The bundled model at Q4_K_M, refined on two chunks."""
    path = tmp_path_factory.mktemp("refined") / "a.gguf"
    return ql.refine("tiny", path, ftype="Q4_K_M", chunks=2, sweeps=1, progress=False)


def test_a_refined_file_is_refined(path):
    found = ql.verify(path, "tiny")
    assert found.verdict == "refined" and found.is_genuine and not found.misfits
    verdicts = found.tensors.set_index("name")["verdict"]
    assert verdicts["token_embd.weight"] == verdicts["output_norm.weight"] == "identical"
    matrices = [
        name for name in verdicts.index if name == "output.weight" or (name[:4] == "blk." and "norm" not in name)
    ]
    assert set(verdicts[matrices]) == {"refined"}
    assert any(note.startswith("refined: ") and "chunks 2" in note for note in found.notes)


def test_a_file_that_does_not_say_so_is_other(path, tmp_path):
    model = ql.open(path)
    kept = {key: value for key, value in model.metadata.items() if not key.startswith(PREFIX)}
    write_gguf(
        tmp_path / "b.gguf", kept, [TensorSpec(t.name, t.shape, t.qtype) for t in model], (t.load() for t in model)
    )
    assert ql.verify(tmp_path / "b.gguf", "tiny").verdict == "other"


def _zeros(data, qtype):
    return np.zeros_like(data)


def _another_row(data, qtype):
    return np.roll(data, 1, axis=0)


def _other_scale(data, qtype):
    blocks = unpack(data, qtype)
    blocks.d *= 2
    return pack(blocks)


def _mirrored(data, qtype):
    blocks = unpack(data, qtype)
    blocks.code[:] = len(blocks.grid.levels) - 1 - blocks.code
    return pack(blocks)


def changed(path, name, change):
    """Return a tensor's data with one block changed: the first of the last row but 30."""
    tensor = ql.open(path).tensor(name)
    data, size = tensor.load().copy(), ql.quants.block_bytes(tensor.qtype)
    rows = data.view(np.uint8).reshape(tensor.nrows, -1)
    row = tensor.nrows - 30  # of the output no byte's, which all look alike
    rows[row, :size] = change(rows, tensor.qtype)[row, :size]
    return data


@pytest.mark.parametrize("change", [_zeros, _another_row, _other_scale, _mirrored])
@pytest.mark.parametrize("name", ["blk.3.ffn_down.weight", "output.weight", "blk.0.attn_q.weight"])
def test_tampered_blocks_are_found(path, tmp_path, change, name):
    """One block of one row is enough."""
    data, row = changed(path, name, change), ql.open(path).tensor(name).nrows - 30
    found = ql.verify(rewritten(path, tmp_path / "b.gguf", **{name.replace(".", "_"): data}), "tiny")
    assert found.verdict == "other" and len(found.misfits) == 1
    assert found.misfits[0].startswith(f"{name}: the block in row {row}, weights 0:256, is ")


@pytest.fixture(scope="module")
def of_points(tmp_path_factory):
    """The bundled model with 2 and 3 bits a weight, codes from grids, refined on two chunks; and its matrix."""
    matrix = ql.imatrix("tiny", chunks=2, progress=False)
    path = tmp_path_factory.mktemp("points") / "a.gguf"
    options = {"imatrix": matrix, "tensor_types": [("ffn_up", "IQ2_XXS")], "chunks": 2, "sweeps": 1}
    return ql.refine("tiny", path, ftype="IQ3_XXS", progress=False, **options), matrix


def test_types_with_grids_of_points_are_refined(of_points):
    path, matrix = of_points
    verdicts = ql.verify(path, "tiny", imatrix=matrix).tensors.set_index("name")["verdict"]
    types = {tensor.name: tensor.qtype for tensor in ql.open(path) if verdicts[tensor.name] == "refined"}
    assert {"IQ2_XXS", "IQ3_XXS"} < set(types.values())
    assert len(types) == sum("norm" not in name for name in verdicts.index) - 1  # all matrices but the embeddings
    row = judge_refined(path, "tiny", "primer", imatrix=matrix, chunks=2, progress=False).rows[2]
    assert row["less"] > 0.2 and row["less"] > 5 * row["less_se"]


@pytest.mark.parametrize(
    "change, name",
    [
        (_zeros, "blk.3.ffn_up.weight"),
        (_another_row, "blk.3.ffn_up.weight"),
        (_other_scale, "blk.0.attn_q.weight"),
        (_mirrored, "blk.0.attn_q.weight"),
    ],
)
def test_tampered_points_are_found(of_points, tmp_path, change, name):
    path, matrix = of_points
    data = changed(path, name, change)
    found = ql.verify(rewritten(path, tmp_path / "b.gguf", **{name.replace(".", "_"): data}), "tiny", imatrix=matrix)
    assert found.verdict == "other" and found.misfits[0].startswith(f"{name}: the block in row ")


def test_an_untouched_tensor_must_be_identical(path, tmp_path):
    data = ql.open(path).tensor("token_embd.weight").load().copy()
    data.view(np.uint8).reshape(-1)[100] ^= 1
    found = ql.verify(rewritten(path, tmp_path / "b.gguf", token_embd_weight=data), "tiny")
    assert found.verdict == "other" and found.misfits[0].startswith("token_embd.weight: 1 of ")


def test_a_refined_file_of_another_model_is_other(path, tmp_path):
    data = ql.open("tiny").tensor("blk.5.ffn_up.weight").load()[::-1].copy()
    found = ql.verify(path, rewritten("tiny", tmp_path / "b.gguf", blk_5_ffn_up_weight=data))
    assert found.verdict == "other" and found.misfits[0].startswith("blk.5.ffn_up.weight: the block in row ")


def test_moves_are_shortened_block_by_block():
    """A move is compared with its block's weights, or with the row's blocks on average where these are larger."""
    weights, move = np.ones((2, 64), np.float32), np.full((2, 64), 0.1, np.float32)
    weights[1, :32], move[0, 32:], move[1] = 0, -2, 0.5
    found = limited(move, weights, "Q4_0", 0.3)
    assert np.array_equal(found[0, :32], move[0, :32])
    np.testing.assert_allclose(found[0, 32:], -0.3, rtol=1e-6)
    np.testing.assert_allclose(found[1], np.repeat([0.3 * 0.5**0.5, 0.3], 32), rtol=1e-6)


def test_blocks_far_from_their_weights_get_ordinary_bytes():
    weights = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    ordinary, chosen, other = (quants.quantize(x, "Q4_0") for x in (weights, 1.05 * weights, -weights))
    chosen[1, 18:] = other[1, 18:]  # the second block of the second row
    found = near(chosen, weights, "Q4_0", 0.1)
    assert np.array_equal(found[1, 18:], ordinary[1, 18:])
    assert np.array_equal(found[0], chosen[0]) and np.array_equal(found[1, :18], chosen[1, :18])
    assert not np.array_equal(chosen[0], ordinary[0])


def test_experts_are_refined_with_their_own_tokens(tmp_path):
    shape = Hparams(
        arch="qwen3moe", n_vocab=320, n_embd=256, n_ff=512, n_layer=2, n_head=4, n_head_kv=2, n_expert=4,
        n_expert_used=2, n_ff_exp=256,
    )  # fmt: skip
    known = {key.replace("llama.", "qwen3moe."): value for key, value in made_models.metadata_of(shape).items()}
    known |= {
        "general.architecture": "qwen3moe",
        "qwen3moe.expert_count": np.uint32(4),
        "qwen3moe.expert_used_count": np.uint32(2),
        "qwen3moe.expert_feed_forward_length": np.uint32(256),
    }
    specs = [TensorSpec(n, s, "F16" if len(s) > 1 else "F32") for n, s in tensor_shapes(shape).items()]
    weights = (made_models.made_weights(s.name, s.shape).astype(made_models.DTYPES[s.qtype]) for s in specs)
    write_gguf(tmp_path / "a.gguf", known, specs, weights)
    (variant,) = resolve(ql.open(tmp_path / "a.gguf"), ["Q4_K_M"])
    assert not ordinary(variant)
    tokens, written = np.random.default_rng(0).integers(0, 320, (4, 128)).astype(np.int32), {}
    stored = sum(variant.model.tensor(f"blk.1.ffn_{part}_exps.weight").nbytes for part in ("gate", "up", "down"))
    with CpuEngine(variant.model, 128) as engine, tqdm(disable=True) as bar:
        assert check_plan(variant, tokens, 1, engine, None)[0] > stored + budget.PROCESS
        how = {"sweeps": 1, "damping": 0.3, "bar": bar}
        Refinement(variant, tokens, engine, **how).run(lambda name, data: written.update({name: data}))
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
    assert sorted(written) == sorted([*(f"blk.{i}.{kind}.weight" for i in (0, 1) for kind in kinds), "output.weight"])
