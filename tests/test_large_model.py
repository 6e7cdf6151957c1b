"""A model larger than memory: evaluated within a budget, killed in the middle, resumed, to the same last bit."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import quantlab as ql
from quantlab.files.bundled import data_dir
from quantlab.files.gguf_file import TensorSpec, write_gguf

ROOT = Path(__file__).parents[1]
SMALL = dict(n_vocab=4096, n_embd=256, n_ff=512, n_layer=6, n_head=4)
LLAMA_7B = dict(n_vocab=32000, n_embd=4096, n_ff=11008, n_layer=32, n_head=32)  # 13.5 GB as F16
GIB = 1 << 30

EVALUATE = """
import re, sys
import quantlab as ql
model, scratch, memory, out = sys.argv[1:]
run = dict(chunks=4, memory=memory, scratch=scratch, progress=False)
found = ql.compare(model, ["Q4_K_M", "Q8_0", "Q2_K"], "primer", **run)
open(out, "w").write(found.to_json())
# not ru_maxrss, which begins with that of the program by which this one was started
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
"""


def made_model(path, n_vocab: int, n_embd: int, n_ff: int, n_layer: int, n_head: int):
    """Write a Llama of normal weights in F16, with the bundled model's vocabulary filled up."""
    metadata = dict(ql.open(data_dir() / "models" / "tiny").metadata)
    tokens = metadata["tokenizer.ggml.tokens"]
    more = n_vocab - len(tokens)
    metadata["tokenizer.ggml.tokens"] = [*tokens, *(f"[PAD{i}]" for i in range(more))]
    metadata["tokenizer.ggml.scores"] = np.append(metadata["tokenizer.ggml.scores"], np.full(more, -1e4, np.float32))
    kinds = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = np.append(kinds, np.full(more, 5, kinds.dtype))  # 5: unused
    shape = {"vocab_size": n_vocab, "embedding_length": n_embd, "feed_forward_length": n_ff, "block_count": n_layer}
    shape |= dict.fromkeys(("attention.head_count", "attention.head_count_kv"), n_head)
    shape |= dict.fromkeys(("rope.dimension_count", "attention.key_length", "attention.value_length"), n_embd // n_head)
    metadata |= {f"llama.{key}": np.uint32(value) for key, value in shape.items()}
    square, narrow, wide, norm = (n_embd, n_embd), (n_embd, n_ff), (n_ff, n_embd), (n_embd,)
    layer = {"attn_norm": norm, "attn_q": square, "attn_k": square, "attn_v": square, "attn_output": square}
    layer |= {"ffn_norm": norm, "ffn_gate": wide, "ffn_up": wide, "ffn_down": narrow}
    shapes = {"token_embd.weight": (n_vocab, n_embd), "output_norm.weight": norm, "output.weight": (n_vocab, n_embd)}
    shapes |= {f"blk.{i}.{kind}.weight": size for i in range(n_layer) for kind, size in layer.items()}
    specs = [TensorSpec(name, size, "F32" if len(size) == 1 else "F16") for name, size in shapes.items()]
    write_gguf(path, metadata, specs, weights(shapes))


def weights(shapes):
    """Make the tensors, one after the other, from one block of normal numbers."""
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(1 << 24, np.float32) * np.float32(0.02)).astype(np.float16)
    for size in shapes.values():
        shifted = np.roll(block, int(rng.integers(len(block))))
        yield np.ones(size, np.float32) if len(size) == 1 else np.resize(shifted, size)


def evaluation(model, folder, memory: str, out) -> subprocess.Popen:
    """Start an evaluation of the model and three variants."""
    command = [sys.executable, "-c", EVALUATE, *map(str, (model, folder, memory, out))]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def kill_after_layer(run: subprocess.Popen, folder: Path, layer: int) -> None:
    """Kill a run as soon as it has left `layer` behind."""
    progress = folder / "progress.json"
    while run.poll() is None and not (progress.exists() and json.loads(progress.read_text())["layer"] >= layer):
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -9, "the run ended before it could be killed"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of memory")
@pytest.mark.parametrize(
    ("shape", "memory", "limit"),
    [(SMALL, "700MiB", 1 * GIB), pytest.param(LLAMA_7B, "4GiB", 5 * GIB, marks=pytest.mark.long)],
    ids=["small", "llama-7b"],
)
def test_stays_within_its_memory_and_survives_a_kill(tmp_path, shape, memory, limit):
    model = tmp_path / "made.gguf"
    made_model(model, **shape)
    undisturbed = evaluation(model, tmp_path / "a", memory, tmp_path / "a.json")
    assert int(undisturbed.communicate()[0]) < limit
    killed = evaluation(model, tmp_path / "b", memory, tmp_path / "b.json")
    kill_after_layer(killed, tmp_path / "b", shape["n_layer"] // 2)
    assert not (tmp_path / "b.json").exists()
    resumed = evaluation(model, tmp_path / "b", memory, tmp_path / "b.json")
    assert int(resumed.communicate()[0]) < limit
    model.unlink()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
