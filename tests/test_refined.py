"""transform/refined.py: refined files are told from files of other weights."""

import numpy as np
import pytest
from test_verify import rewritten

import quantlab as ql
from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.quants.block_numbers import pack, unpack
from quantlab.transform.refined import PREFIX


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


@pytest.mark.parametrize("change", [_zeros, _another_row, _other_scale, _mirrored])
@pytest.mark.parametrize("name", ["blk.3.ffn_down.weight", "output.weight", "blk.0.attn_q.weight"])
def test_tampered_blocks_are_found(path, tmp_path, change, name):
    """One block of one row is enough."""
    tensor = ql.open(path).tensor(name)
    data, size = tensor.load().copy(), ql.quants.block_bytes(tensor.qtype)
    rows = data.view(np.uint8).reshape(tensor.nrows, -1)
    row = tensor.nrows - 30  # of the output no byte's, which all look alike
    rows[row, :size] = change(rows, tensor.qtype)[row, :size]
    found = ql.verify(rewritten(path, tmp_path / "b.gguf", **{name.replace(".", "_"): data}), "tiny")
    assert found.verdict == "other" and len(found.misfits) == 1
    assert found.misfits[0].startswith(f"{name}: the block in row {row}, weights 0:256, is ")


def test_an_untouched_tensor_must_be_identical(path, tmp_path):
    data = ql.open(path).tensor("token_embd.weight").load().copy()
    data.view(np.uint8).reshape(-1)[100] ^= 1
    found = ql.verify(rewritten(path, tmp_path / "b.gguf", token_embd_weight=data), "tiny")
    assert found.verdict == "other" and found.misfits[0].startswith("token_embd.weight: 1 of ")


def test_a_refined_file_of_another_model_is_other(path, tmp_path):
    data = ql.open("tiny").tensor("blk.5.ffn_up.weight").load()[::-1].copy()
    found = ql.verify(path, rewritten("tiny", tmp_path / "b.gguf", blk_5_ffn_up_weight=data))
    assert found.verdict == "other" and found.misfits[0].startswith("blk.5.ffn_up.weight: the block in row ")
