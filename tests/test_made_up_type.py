"""Adding a type is local: one record and one module of kernels in a copy of the package make it known everywhere."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_models import made_gguf

ROOT = Path(__file__).parents[1]
SMALL = dict(n_vocab=32, n_embd=64, n_ff=64, n_layer=1, n_head=4, n_head_kv=4)
RECORD = """
    GgmlType(
        "MADE", 200, 64, 34, "low-bit", **_kernels("made", "made"),
        fallback="Q8_0", halves=(0,), codes=(Bits(2, 34, 32, 4),), levels=(*range(-7, 0), 0, 1, *range(2, 9)),
        is_candidate=True,
    ),
"""
KERNELS = '''
"""A made-up type: blocks of 64 weights, a float16 scale and codes of 4 bits from a table."""

import numpy as np


def encode_made(x, out):
    """Round to the nearest of the levels -7 to 8 under the scale that the largest weight asks for."""
    _encode(x, np.abs(x), out)


def encode_made_imatrix(x, importance, out):
    """The same; the scale follows from the largest weight of those that matter."""
    _encode(x, np.where(importance > 0, np.abs(x), 0), out)


def _encode(x, size, out):
    blocks, half = x.reshape(-1, 64), np.float32(7)
    d = (size.reshape(-1, 64).max(axis=1) / half).astype(np.float16)
    scale = np.where(d == 0, np.float32(1), d.astype(np.float32))[:, None]
    codes = np.clip(np.rint(blocks / scale) + 7, 0, 15).astype(np.uint8)
    data = out.reshape(-1, 34)
    data[:, :2] = d.view(np.uint8).reshape(-1, 2)
    data[:, 2:] = codes[:, :32] | codes[:, 32:] << 4


def decode_made(data, out):
    """Levels times scale."""
    blocks = data.reshape(-1, 34)
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32)
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    out.reshape(-1, 64)[:] = (codes - 7) * d
'''
EVERYWHERE = """
import inspect, json, sys
import matplotlib
matplotlib.use("Agg")
import numpy as np
import quantlab as ql
from quantlab.quants.codebook import code_values
from quantlab.lab import blocks, errors
from quantlab.study import plots
from quantlab.transform.mixture import choose_types

x = np.random.default_rng(1).standard_normal((4, 256)).astype(np.float32)
importance = (np.arange(256) % 2).astype(np.float32)
data = ql.quants.quantize(x, "MADE")
restored = ql.quants.dequantize(data, "MADE", x.shape)
first, step = ql.quants.grid(data, "MADE")
codes = ql.quants.codes(data, "MADE")
model = ql.open(sys.argv[2])
shapes = {"blk.0.ffn_down.weight": (8, 64), "blk.0.ffn_up.weight": (8, 96), "blk.0.attn_k.weight": (8, 50)}
chosen = choose_types(model.hparams, shapes, "Q4_0", tensor_types=[("blk", "made")])
zoo = errors.together(errors.by_type(errors.matrices(model)[:1], ["MADE"]))
ax = plots.snr_against_bits(zoo, {})
out = ql.quantize(model.path, sys.argv[1], ftype="Q8_0", tensor_types=[("weight", "MADE")])
written = ql.open(out)
print(json.dumps({
    "error": float(np.abs(restored - x).max()),
    "grid": bool(np.allclose(first + step * code_values("MADE")[codes], restored.reshape(first.shape), atol=1e-6)),
    "histogram": int(ql.quants.code_histogram(data, "MADE").sum()),
    "weighted": ql.quants.quantize(x, "MADE", importance).tobytes() != data.tobytes(),
    "table": ql.quants.types().loc["MADE"].to_dict() | {"bpw": float(ql.quants.types().loc["MADE", "bpw"])},
    "chosen": {name: choice.qtype for name, choice in chosen.items()},
    "points": [text.get_text() for text in ax.texts],
    "legend": [text.get_text() for text in ax.get_legend().get_texts()],
    "candidates": list(inspect.signature(ql.sensitivity).parameters["types"].default),
    "bits": blocks.budget(["MADE"]).loc["MADE"].to_dict(),
    "file": dict(written.qtypes),
    "read": bool(np.isfinite(written.tensor("blk.0.ffn_down.weight").floats()).all()),
    "same": ql.verify(out, model.path).verdict,
}, default=str))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run Python in a folder with a copy of the package that has one more type."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(ROOT / "quantlab", folder / "quantlab", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("data", "notebooks", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    made_gguf(folder / "model.gguf", SMALL, "F32")
    records = folder / "quantlab" / "quants" / "ggml_types.py"
    text = records.read_text(encoding="utf-8")
    end = text.index(")  # fmt: skip\nGGML_TYPES = ")
    records.write_text(text[:end] + RECORD + text[end:], encoding="utf-8")
    (folder / "quantlab" / "quants" / "made.py").write_text(KERNELS, encoding="utf-8")

    def run(*arguments: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"PYTHONPATH": str(folder), "NUMBA_DISABLE_JIT": "1"}  # nothing here asks for speed
        return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    done = run("-c", EVERYWHERE, str(tmp_path_factory.mktemp("out") / "made.gguf"), "model.gguf")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_it_quantizes_and_decodes(found):
    assert 0 < found["error"] < 0.5
    assert found["weighted"] and found["grid"]
    assert found["histogram"] == 4 * 256


def test_it_falls_back(found):
    assert list(found["chosen"].values()) == ["F16", "MADE", "Q8_0"]


def test_it_is_in_the_table(found):
    assert found["table"]["bpw"] == 4.25
    assert [found["table"][key] for key in ("can_encode", "can_decode", "uses_imatrix")] == [True] * 3


def test_it_is_plotted(found):
    assert "MADE" in found["points"]
    assert "types of one and two bits (one scale per block)" in found["legend"]
    assert found["bits"]["code"] == 4.0


def test_it_is_a_candidate(found):
    assert found["candidates"] == sorted(found["candidates"], key=found["candidates"].index)
    assert found["candidates"].index("Q3_K") < found["candidates"].index("MADE") < found["candidates"].index("Q4_K")


def test_files_have_it(found):
    assert found["file"]["MADE"] == 9 and "Q8_0" not in found["file"]
    assert found["read"]


def test_the_command_line_knows_it(run, tmp_path):
    command = ("-m", "quantlab.cli", "quantize", "model.gguf", str(tmp_path / "a.gguf"), "Q8_0", "--tensor-type")
    done = run(*command, "attn_v=made", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "MADE" in run(*command, "attn_v=nothing").stderr


def test_it_can_be_verified(found):
    assert found["same"] == "identical"
