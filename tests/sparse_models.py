"""GGUF files of any size that take no room: a true header, and a hole where the weights would be."""

from pathlib import Path

import numpy as np

from quantlab.arch import tensor_shapes
from quantlab.files.gguf_file import TensorSpec, pack_header
from quantlab.transform.mixture import choose_types


def metadata_of(shape) -> dict:
    """What llama.cpp needs to load such a model and to talk to it."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"▁w{i}" for i in range(shape.n_vocab - len(tokens))]
    types = np.ones(shape.n_vocab, np.int32)
    types[:3], types[3:259] = (2, 3, 3), 6
    return {
        "general.architecture": "llama",
        "llama.context_length": np.uint32(32768),
        "llama.embedding_length": np.uint32(shape.n_embd),
        "llama.block_count": np.uint32(shape.n_layer),
        "llama.feed_forward_length": np.uint32(shape.n_ff),
        "llama.attention.head_count": np.uint32(shape.n_head),
        "llama.attention.head_count_kv": np.uint32(shape.n_head_kv),
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "llama.rope.dimension_count": np.uint32(shape.n_embd // shape.n_head),
        "llama.vocab_size": np.uint32(shape.n_vocab),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(shape.n_vocab, np.float32),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": np.uint32(2),
    }


def sparse_gguf(path: Path, shape, ftype: str, **more) -> Path:
    """Write a file of `ftype` whose weights are all zero; `more` is metadata of the architecture."""
    shapes = tensor_shapes(shape)
    types = {name: choice.qtype for name, choice in choose_types(shape, shapes, ftype).items()}
    specs = [TensorSpec(name, dims, types[name]) for name, dims in shapes.items()]
    header = pack_header(metadata_of(shape) | {f"llama.{key}": value for key, value in more.items()}, specs)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(-(-spec.nbytes // 32) * 32 for spec in specs))
    return path
