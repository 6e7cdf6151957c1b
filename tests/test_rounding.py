"""transform/rounding.py and quants/fused.py: blocks of a fused build are told from blocks that somebody changed.

`golden/fused.npz` holds real blocks of such a build (see golden/write_fused.py).
"""

import os
from functools import cache
from pathlib import Path

import llvmlite.binding as llvm
import made_models
import numpy as np
import pytest

from quantlab import quants
from quantlab.files.imatrix_file import read_imatrix
from quantlab.files.model import open as open_model
from quantlab.quants.arrays import encode
from quantlab.quants.codebook import CODES, put
from quantlab.quants.fused import quantize_fused
from quantlab.quants.ggml_types import row_bytes
from quantlab.transform.rounding import COMPARED, FEW, MAX_LEFT, allowed, is_other_rounding

TENSOR = "blk.0.attn_output.weight"
CASES = [(qtype, weighted) for weighted in (False, True) for qtype in COMPARED if not (weighted and qtype == "Q8_0")]
HAS_FMA = llvm.get_host_cpu_features().get("fma", True) and not {"NUMBA_CPU_NAME", "NUMBA_DISABLE_JIT"} & {*os.environ}
needs_fma = pytest.mark.skipif(not HAS_FMA, reason="no fused multiply-add on this processor, or not used")


def key_of(qtype: str, weighted: bool) -> str:
    return f"{qtype}{'+imatrix' * weighted}"


def sample(folder: Path, weighted: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Weights and importance of the tensor that the golden blocks come from."""
    x = open_model(folder / "wide.gguf").tensor(TENSOR).floats()
    return x, read_imatrix(folder / "made.imatrix").entries[TENSOR] if weighted else None


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    made_models.made_gguf(folder / "wide.gguf")
    made_models.made_imatrix(folder / "made.imatrix")
    return folder


@cache
def golden():
    return dict(np.load(Path(__file__).parent / "golden" / "fused.npz"))


def judged(folder, qtype, weighted):
    """Ours, GCC's fused build's, and the two judgements, a row per block."""
    x, imatrix = sample(folder, weighted)
    ours = quants.quantize(x, qtype, imatrix)
    theirs = ours.reshape(-1, quants.block_bytes(qtype)).copy()
    theirs[golden()[f"{key_of(qtype, weighted)} at"]] = golden()[f"{key_of(qtype, weighted)} blocks"]
    fused, good = is_other_rounding(x, ours, theirs.reshape(ours.shape), qtype, imatrix)
    return ours.reshape(theirs.shape), theirs, fused.ravel(), good.ravel()


@needs_fma
@pytest.mark.parametrize(("qtype", "weighted"), CASES)
def test_blocks_of_a_fused_build_are_recognized(made, qtype, weighted):
    ours, theirs, fused, good = judged(made, qtype, weighted)
    differing = (ours != theirs).any(axis=1)
    assert (fused | good)[differing].all()
    assert (differing & ~fused).sum() <= max(FEW, MAX_LEFT * len(ours))


def test_some_of_the_golden_blocks_differ():
    counts = {key.split()[0]: len(value) for key, value in golden().items() if key.endswith("at")}
    assert counts["Q5_K"] > 50 and sum(count > 0 for count in counts.values()) >= 10


def with_code(block: np.ndarray, qtype: str, weight: int, change: int) -> np.ndarray:
    """A block with one code changed by a step, up or down as there is room."""
    block, codes = block[None].copy(), quants.codes(block[None], qtype).copy()
    top = (1 << sum(place.width for place in CODES[qtype])) - 1
    code = int(codes[0, weight])
    codes[0, weight] = code + change if 0 <= code + change <= top else code - change
    shift = 0
    for place in CODES[qtype]:
        put(place, block, codes >> shift & np.uint8((1 << place.width) - 1))
        shift += place.width
    return block[0]


@pytest.mark.parametrize(("qtype", "weighted"), CASES)
def test_one_code_changed_by_one_step_is_no_rounding(made, rng, qtype, weighted):
    x, imatrix = sample(made, weighted)
    ours = quants.quantize(x, qtype, imatrix)
    theirs = ours.reshape(-1, quants.block_bytes(qtype)).copy()
    for i in range(len(theirs)):
        theirs[i] = with_code(theirs[i], qtype, int(rng.integers(quants.block_size(qtype))), int(rng.choice([-1, 1])))
    fused, good = is_other_rounding(x, ours, theirs.reshape(ours.shape), qtype, imatrix)
    assert (theirs != ours.reshape(theirs.shape)).any(axis=1).all()
    share = (fused | good).mean()  # a weight between two codes can have either; a line leaves more room than scales do
    assert share < (0.01 if qtype.endswith("_K") else 0.15)


@pytest.mark.parametrize(("qtype", "weighted"), CASES)
def test_a_flipped_bit_of_a_scale_is_no_rounding(made, qtype, weighted):
    x, imatrix = sample(made, weighted)
    ours = quants.quantize(x, qtype, imatrix)
    theirs = ours.reshape(-1, quants.block_bytes(qtype)).copy()
    at = {"Q2_K": 81, "Q3_K": 109, "Q6_K": 209}.get(qtype, 1)  # the high byte of d
    theirs[:, at] ^= 4  # doubles or halves it
    fused, good = is_other_rounding(x, ours, theirs.reshape(ours.shape), qtype, imatrix)
    assert not (fused | good).any()


@pytest.mark.parametrize("qtype", COMPARED)
@pytest.mark.parametrize("scale", [1e-40, 1.0, 1e30])
def test_any_bytes_are_judged_without_a_warning(rng, qtype, scale):
    x = (rng.standard_normal((8, 256)) * scale).astype(np.float32)
    ours = np.empty((8, row_bytes(qtype, 256)), np.uint8)
    encode(x, qtype, None, ours)  # quantize() refuses what 1e30 becomes
    for theirs in (rng.integers(0, 256, ours.shape, np.uint8), np.full_like(ours, 255)):
        fused, good = is_other_rounding(x, ours, theirs, qtype, None)
        assert not fused.any() and not good.any()


def test_zeros_are_zeros_for_every_build():
    for qtype in COMPARED:
        x = np.zeros((2, 256), np.float32)
        assert np.array_equal(quantize_fused(x, qtype), quants.quantize(x, qtype))


def test_how_many_blocks_may_be_left_over():
    assert allowed(8, 8) and not allowed(9, 8)
    assert allowed(20, 1000) and not allowed(21, 1000)
