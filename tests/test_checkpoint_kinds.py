"""What is no plain model is called by its name: adapters, packed weights, weights that were not gathered."""

import json

import numpy as np
import pytest
from checkpoints import tensors, write_checkpoint, write_safetensors, write_torch

import quantlab as ql
from quantlab.files.checkpoint import open_checkpoint
from quantlab.files.checkpoint_kinds import packed_by
from quantlab.files.checkpoint_metadata import read_config, rope_factors

pytestmark = pytest.mark.filterwarnings("ignore:.*pre-tokenizer .* is not in llama.cpp's list")
LORA = {"peft_type": "LORA", "base_model_name_or_path": "org/base"}


def edit(path, **changes):
    table = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(table | changes))


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "awq"}}, "AWQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
        ({"quantization_config": {"group_size": 64, "bits": 4, "mode": "affine"}}, "MLX"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_the_configuration_names_the_quantizer(tmp_path, table, name):
    src = write_checkpoint(tmp_path / "m", "llama1")
    edit(src / "config.json", **table)
    with pytest.raises(ValueError, match=f"config.json: is a {name} checkpoint, its weights are quantized already"):
        ql.open(src)


@pytest.mark.parametrize(
    ("ends", "name"),
    [
        ((".qweight", ".qzeros", ".scales", ".g_idx"), "GPTQ"),
        ((".qweight", ".qzeros", ".scales"), "AWQ"),
        ((".weight", ".weight.absmax", ".weight.quant_map", ".weight.quant_state.bitsandbytes__nf4"), "bitsandbytes"),
        ((".weight", ".SCB"), "bitsandbytes"),
        ((".weight", ".scales", ".biases"), "MLX"),
        ((".weight", ".bias"), None),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_the_names_of_the_tensors_do_too(tmp_path, ends, name, form):
    layer = "model.layers.0.self_attn.q_proj"
    assert packed_by([f"{layer}{end}" for end in ends], {}) == name
    if name is None:
        return
    src = write_checkpoint(tmp_path / "m", "llama1", "F32", form=form)
    weights = tensors("llama1") | {f"{layer}{end}": np.ones(4, np.float32) for end in ends}
    path = src / ("model.safetensors" if form == "safetensors" else "pytorch_model.bin")
    (write_safetensors if form == "safetensors" else write_torch)(path, weights)
    with pytest.raises(ValueError, match=f"{path.name}: is a {name} checkpoint"):
        ql.open(src)


def test_the_folder_of_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA))
    write_safetensors(
        tmp_path / "adapter_model.safetensors", {"base_model.model.x.lora_A.weight": np.ones((2, 2), np.float32)}
    )
    message = "adapter_config.json says that this is a LoRA adapter of 'org/base', not a model. Merge it into its base"
    with pytest.raises(ValueError, match=message):
        ql.open(tmp_path)
    with pytest.raises(ValueError, match=message):
        ql.convert(tmp_path / "adapter_model.safetensors", progress=False)


def test_an_adapter_beside_its_base(tmp_path):
    src = write_checkpoint(tmp_path / "m", "llama1")
    (src / "adapter_config.json").write_text(json.dumps({"peft_type": ["x"], "base_model_name_or_path": 7}))
    with pytest.raises(ValueError, match="adapter_config.json says that this is an adapter, not a model"):
        ql.open(src)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_that_were_not_gathered(tmp_path, form):
    src = write_checkpoint(tmp_path / "m", "llama1", "F32", form=form)
    weights = {name: x[:0] if ".1." in name else x for name, x in tensors("llama1").items()}
    if form == "safetensors":
        write_safetensors(src / "model.safetensors", weights)
        message = r"model.safetensors: 'model.layers.1.input_layernorm.weight', .* and 6 more without any values: "
    else:
        write_torch(src / "pytorch_model.bin", weights)
        message = r"pytorch_model.bin: a tensor without any values: "
    with pytest.raises(ValueError, match=f"{message}the weights were partitioned when they were saved"):
        ql.open(src)


# ---- configurations that would give another model


@pytest.mark.parametrize("name", ["llama1", "qwen2", "qwen3"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_pytorch_tanh", "silu2", ["silu"], 1])
def test_another_activation_is_refused(tmp_path, name, activation):
    src = write_checkpoint(tmp_path / "m", name)
    edit(src / "config.json", hidden_act=activation)
    with pytest.raises(ValueError, match=r"hidden_act=.*, must be silu, as llama.cpp computes every \w+ model"):
        ql.open(src)
    assert len(open_checkpoint(src, as_llama_cpp=True)) == len(ql.open(write_checkpoint(tmp_path / "n", name)))


@pytest.mark.parametrize("activation", ["silu", "swish", None])
def test_the_same_activation_by_any_name(tmp_path, activation):
    src = write_checkpoint(tmp_path / "m", "llama1")
    edit(src / "config.json", hidden_act=activation)
    assert len(ql.open(src)) == 21


# theta, head_dim, original context, factor, low and high factor → SHA-256 of what the converter's lines give in torch
FACTORS = [
    ((5e5, 64, 512, 8.0, 1.0, 4.0), "495fb9d8848a4297"),
    ((5e5, 128, 8192, 8.0, 1.0, 4.0), "8b516af9cb5db26e"),
    ((5e5, 64, 8192, 32.0, 1.0, 4.0), "d25a6d176d931306"),
    ((1e4, 64, 512, 8.0, 1.0, 4.0), "e6dca01d24d4432b"),
    ((1e6, 128, 4096, 4.0, 1.0, 4.0), "c6a28f073dd499a8"),
    ((5e5, 80, 2048, 16.0, 1.0, 8.0), "a12d674f23fb501e"),
    ((5e5, 32, 256, 8.0, 1.0, 4.0), "fde0fce45b1e938a"),
    ((5e6, 64, 1024, 3.3, 0.5, 3.7), "eff1970bd7a04364"),
]


@pytest.mark.parametrize(("numbers", "digest"), FACTORS)
def test_llama_3s_factors_are_those_of_the_converter(tmp_path, numbers, digest):
    import hashlib

    theta, head_dim, n_ctx, factor, low, high = numbers
    src = write_checkpoint(tmp_path / "m", "llama3")
    rope = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high}
    rope |= {"original_max_position_embeddings": n_ctx}
    edit(src / "config.json", rope_theta=theta, head_dim=head_dim, rope_scaling=rope)
    found = rope_factors(read_config(src))["rope_freqs.weight"]
    assert found.dtype == np.float32 and found.shape == (head_dim // 2,)
    assert hashlib.sha256(found.tobytes()).hexdigest().startswith(digest)
