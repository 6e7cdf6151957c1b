"""arch/: records say what a model is; an added file is an added architecture."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checkpoints
import pytest

import quantlab as ql
from quantlab.arch import Hparams, architectures, find, find_class, tensor_shapes
from quantlab.files import bundled

PACKAGE = Path(ql.__file__).parent
SMALL = Hparams(arch="llama", n_layer=2, n_embd=64, n_head=4, n_head_kv=2, n_ff=96, n_vocab=320, n_ff_exp=32)
SMALL = replace(SMALL, n_expert_shared=1, n_dense=1, n_lora_kv=32, head_dim_mla=24, head_dim_v=8)
SMALL = replace(SMALL, n_ff_shexp=48, ssm_conv=4, ssm_state=16, ssm_groups=2, ssm_heads=4, ssm_inner=64)

# a llama whose tensors have other names, with a norm after attention
MADE_UP = '''
"""A made-up architecture."""

from quantlab.arch.llama import EMBEDDING, ENDS, FEED_FORWARD, matrix, norm
from quantlab.arch.record import Architecture, Layer

ARCH = Architecture(
    name="made-up",
    classes=("MadeUpForCausalLM",),
    tensors=(
        EMBEDDING,
        *FEED_FORWARD,
        matrix("mix_k", "n_kv n_embd", "mixer.key", "", heads="n_head_kv"),
        matrix("mix_out", "n_embd n_q", "mixer.out", ""),
        norm("mix_post_norm", "n_embd", "mixer.after"),
        matrix("mix_q", "n_q n_embd", "mixer.query", "", heads="n_head"),
        matrix("mix_v", "n_kv n_embd", "mixer.value", ""),
        *ENDS,
    ),
    layer=Layer(
        attn_qkv=("mix_q", "mix_k", "mix_v"), attn_output=("mix_out",), attn_post_norm="mix_post_norm", rope="pairs"
    ),
    defaults={"made-up": {"max_position_embeddings": 2048, "head_dim": 0}},
)
'''
NAMES = {"self_attn.q_proj": "mixer.query", "self_attn.k_proj": "mixer.key", "self_attn.v_proj": "mixer.value"}
NAMES |= {"self_attn.o_proj": "mixer.out"}
USE = """
import sys
from pathlib import Path
import numpy as np
import quantlab as ql
from quantlab.arch import Hparams, tensor_shapes
from quantlab.transform.plan import plan

assert ql.__file__.startswith(sys.argv[1]), ql.__file__
file = ql.convert("made", "made.gguf", outtype="f32", progress=False)
model = ql.open(file)
assert model.hparams.arch == "made-up"
assert tensor_shapes(model.hparams).keys() == set(model.names)
written = plan(file, "q8.gguf", ftype="Q8_0").bytes_written
assert ql.quantize(file, "q8.gguf", ftype="Q8_0").stat().st_size == written
options = dict(chunks=1, n_ctx=64, progress=False)
plain = ql.perplexity(file, "primer.md", **options).ppl
assert ql.perplexity("made", "primer.md", **options).ppl == plain
bare = ql.perplexity("bare", "primer.md", **options).ppl
assert plain != bare  # the added norm counts
matrix = ql.imatrix(file, "primer.md", **options)
assert matrix.sums["blk.1.mix_q.weight"].shape == (1, 64)
found = ql.sensitivity(file, "primer.md", types=["Q8_0"], groups="kind", chunks=1, n_ctx=64, progress=False)
print(*(row["kind"] for row in found.rows))
"""


def write_made_up(folder, scale):
    """Write a checkpoint of the made-up architecture; `scale` is the weight of its added norm."""
    checkpoints.write_checkpoint(folder, "llama1", dtype="F32")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MadeUpForCausalLM"], "model_type": "made-up"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {}
    for name, values in checkpoints.tensors("llama1").items():
        part = next((part for part in NAMES if part in name), None)
        weights[name.replace(part, NAMES[part]) if part else name] = 0.15 * values
    for i in range(checkpoints.N_LAYER):
        after = weights[f"model.layers.{i}.input_layernorm.weight"]
        weights[f"model.layers.{i}.mixer.after.weight"] = 0 * after + scale
    checkpoints.write_weights(folder, weights, 1, "safetensors")


@pytest.mark.slow  # a copy of the package compiles its kernels again
def test_an_added_architecture_is_converted_planned_evaluated_and_studied(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "quantlab", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "quantlab" / "arch" / "made_up.py").write_text(MADE_UP)
    write_made_up(tmp_path / "made", 1)
    write_made_up(tmp_path / "bare", 2)
    shutil.copy(bundled.data_dir() / "text" / "primer.md", tmp_path / "primer.md")
    command = [sys.executable, "-c", USE, str(tmp_path)]
    settings = os.environ | {"PYTHONPATH": ".", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == "token_embd mix_q mix_k mix_v mix_out ffn_gate ffn_up ffn_down output".split()


def test_an_architecture_is_found_by_name_and_by_class():
    assert list(architectures()) == sorted(architectures())
    assert {"llama", "qwen2", "qwen3"} <= architectures().keys()
    for record in architectures().values():
        assert find(record.name) is record
        assert all(find_class(name) is record for name in record.classes)
    assert find("gpt2") is find_class("GPT2LMHeadModel") is None


@pytest.mark.parametrize("record", architectures().values(), ids=lambda record: record.name)
def test_a_record_is_whole(record):
    """Every part of a layer is a tensor, every matrix is used, every size is a hyper-parameter."""
    hparams = replace(SMALL, arch=record.name, n_expert=4 if any(t.role == "experts" for t in record.tensors) else 0)
    hparams = record.complete(replace(hparams, n_layer=4))  # of all kinds
    layered = [tensor for tensor in record.tensors if tensor.is_layered and tensor.role != "bias"]
    kinds = {tensor.name.split(".")[2]: tensor for tensor in layered}
    assert all(kinds[kind].role == "norm" for kind in record.layer.norms.values())
    multiplied = ("matrix", "router", "experts")
    assert sorted(record.matrices()) == sorted(k for k, tensor in kinds.items() if tensor.role in multiplied)
    dimensions = {"experts": (3,)} | dict.fromkeys(("embedding", "output", "router"), (2,))
    dimensions["matrix"] = (2, 3) if record.layer.latent_k else (2,)  # that has one for each head
    for name, tensor, shape in record.expand(hparams):
        assert len(shape) in dimensions.get(tensor.role, (1, 2)) and all(shape)
        assert record.tensor(name) is tensor


def test_heads_may_be_wider_than_their_share_of_the_embedding():
    shapes = tensor_shapes(replace(SMALL, head_dim=32))
    assert shapes["blk.0.attn_q.weight"] == (128, 64)
    assert shapes["blk.0.attn_v.weight"] == (64, 64)
    assert shapes["blk.1.attn_output.weight"] == (64, 128)


def test_sizes_may_differ_between_layers():
    shapes = tensor_shapes(replace(SMALL, n_ff=(96, 192), n_head_kv=(2, 4)))
    assert [shapes[f"blk.{i}.ffn_up.weight"] for i in (0, 1)] == [(96, 64), (192, 64)]
    assert [shapes[f"blk.{i}.attn_k.weight"] for i in (0, 1)] == [(32, 64), (64, 64)]
    assert replace(SMALL, n_ff=(96, 192)).varies == ("n_ff",)


def test_a_tied_model_has_no_output_matrix():
    assert "output.weight" in tensor_shapes(SMALL)
    assert "output.weight" not in tensor_shapes(replace(SMALL, tied_embeddings=True))


def test_shapes_of_an_unknown_architecture_are_refused():
    with pytest.raises(ValueError, match="architecture=gpt2, must be one of .*llama, .* Give a GGUF file"):
        tensor_shapes(replace(SMALL, arch="gpt2"))
