"""Write a trained model as a Hugging Face Llama folder, and read one back."""

import json
from pathlib import Path
from shutil import copyfile

import torch
from safetensors.torch import load_file, save_file

from model import Llama, Shape
from quantlab.files.output import replacing

TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
    "legacy": True,
}


def config_of(shape: Shape) -> dict:
    """Return the ``config.json`` that describes a shape to Hugging Face's LlamaConfig."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.n_vocab,
        "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff,
        "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head,
        "num_key_value_heads": shape.n_head_kv,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.n_ctx,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_eps,
        "rope_theta": shape.rope_base,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }


def export(model: Llama, tokenizer: Path, folder: Path) -> Path:
    """Write ``config.json``, ``model.safetensors`` in BF16 and the tokenizer's files, in place of what is there.

    Parameters
    ----------
    model : Llama
        The trained model.
    tokenizer : Path
        Its ``tokenizer.model``.
    folder : Path
        The folder to write into; it is made if it is not there.

    Returns
    -------
    Path
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    with replacing(folder / "model.safetensors", overwrite=True) as part:
        save_file(weights, part, metadata={"format": "pt"})
    for name, value in (("config.json", config_of(model.shape)), ("tokenizer_config.json", TOKENIZER_CONFIG)):
        with replacing(folder / name, overwrite=True) as part:
            part.write_text(json.dumps(value, indent=2) + "\n")
    with replacing(folder / "tokenizer.model", overwrite=True) as part:
        copyfile(tokenizer, part)
    return folder


def load(folder: Path) -> Llama:
    """Read the model that `export` wrote, its weights as float32.

    Parameters
    ----------
    folder : Path
        A folder with ``config.json`` and ``model.safetensors``.

    Returns
    -------
    Llama
        The model.

    Raises
    ------
    FileNotFoundError
        If a file is missing.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file. Give the folder of a trained model.")
    config = json.loads((folder / "config.json").read_text())
    model = Llama(
        Shape(
            n_vocab=config["vocab_size"],
            n_ctx=config["max_position_embeddings"],
            n_embd=config["hidden_size"],
            n_ff=config["intermediate_size"],
            n_layer=config["num_hidden_layers"],
            n_head=config["num_attention_heads"],
            n_head_kv=config["num_key_value_heads"],
            rms_eps=config["rms_norm_eps"],
            rope_base=config["rope_theta"],
        )
    )
    model.load_state_dict({name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()})
    return model
