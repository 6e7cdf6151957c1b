"""Small models of made weights for tests, the same on every machine: only integer arithmetic goes into them."""

import zlib
from pathlib import Path

import ml_dtypes
import numpy as np

from quantlab.arch import Hparams, tensor_shapes
from quantlab.files.checkpoint import open_checkpoint
from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.files.imatrix_file import ImportanceMatrix, write_imatrix

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
WIDE = dict(n_vocab=320, n_embd=256, n_ff=512, n_layer=8, n_head=8, n_head_kv=2)
NARROW = dict(n_vocab=320, n_embd=96, n_ff=72, n_layer=2, n_head=4, n_head_kv=4)  # rows that fit no super-block


def shape_of(**values) -> Hparams:
    """Hyper-parameters of a Llama."""
    return Hparams(**{"arch": "llama"} | values)


def made_weights(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Weights like those of a layer: a sum of four uniform integers, with a few columns of outliers."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    values = rng.integers(-2048, 2048, (4, *shape)).sum(axis=0).astype(np.float32) / np.float32(1 << 17)
    values[..., ::29] *= 4
    return values


def metadata_of(shape) -> dict:
    """The keys that llama.cpp needs to load such a model for quantizing."""
    return {
        "general.architecture": "llama",
        "general.name": "made",
        "llama.context_length": np.uint32(128),
        "llama.embedding_length": np.uint32(shape.n_embd),
        "llama.block_count": np.uint32(shape.n_layer),
        "llama.feed_forward_length": np.uint32(shape.n_ff),
        "llama.attention.head_count": np.uint32(shape.n_head),
        "llama.attention.head_count_kv": np.uint32(shape.n_head_kv),
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "general.file_type": np.uint32(1),
        "llama.vocab_size": np.uint32(shape.n_vocab),
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(shape.n_vocab)],
    }


def made_gguf(path: Path, hparams: dict = WIDE, qtype: str = "F16", *, tied: bool = False, seed: int = 0) -> Path:
    """Write a model to one GGUF file, tensors in a converter's order."""
    shape = shape_of(**hparams)
    shapes = tensor_shapes(shape)
    if tied:
        del shapes["output.weight"]
    specs, data = _tensors(shapes, qtype, seed)
    write_gguf(path, metadata_of(shape), specs, data)
    return path


def gguf_of(path: Path, folder: Path) -> Path:
    """Write a checkpoint's weights as F16 under made metadata: only other weights make another file."""
    model = open_checkpoint(folder, "f16")
    specs = [TensorSpec(tensor.name, tensor.shape, tensor.qtype) for tensor in model]
    write_gguf(path, metadata_of(model.hparams), specs, (tensor.load() for tensor in model))
    return path


def made_shards(folder: Path, hparams: dict = WIDE) -> Path:
    """Write a model to two GGUF files, the tensors backwards; return the first."""
    shape = shape_of(**hparams)
    specs, data = _tensors(dict(reversed(tensor_shapes(shape).items())), "F16", 0)
    paths = [folder / f"made-{i + 1:05d}-of-00002.gguf" for i in range(2)]
    half = len(specs) // 2
    for i, (path, part) in enumerate(zip(paths, (slice(0, half), slice(half, None)), strict=True)):
        split = {"split.no": np.uint16(i), "split.count": np.uint16(2), "split.tensors.count": np.int32(len(specs))}
        write_gguf(path, split | (metadata_of(shape) if i == 0 else {}), specs[part], data[part])
    return paths[0]


def made_imatrix(path: Path, hparams: dict = WIDE, *, legacy: bool = False) -> Path:
    """Write an importance matrix for such a model; it has no entries for the ends, as llama-imatrix's have none."""
    shapes = {n: s for n, s in tensor_shapes(shape_of(**hparams)).items() if n.startswith("blk.") and len(s) == 2}
    sums = {n: np.abs(made_weights(n, (1, s[-1]), seed=1)) * np.float32(4096) for n, s in shapes.items()}
    counts = {n: np.full(1, 3 * 512, np.float32) for n in shapes}
    matrix = ImportanceMatrix(sums, counts, 3, 512, ("made.txt",))
    return write_imatrix(matrix, path, legacy=legacy)


def _tensors(shapes: dict, qtype: str, seed: int) -> tuple[list[TensorSpec], list[np.ndarray]]:
    specs = [TensorSpec(n, s, qtype if len(s) > 1 else "F32") for n, s in shapes.items()]
    return specs, [made_weights(s.name, s.shape, seed).astype(DTYPES[s.qtype]) for s in specs]
