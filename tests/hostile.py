"""Strangers' files: small good ones of each kind to be spoiled, and what a reader owes us then.

A reader takes any bytes and either reads them or raises ValueError or OSError with one printable line that names the
file. `test_hostile_files.py` holds every reader to that with a few hundred spoiled files, `fuzz_readers.py` for hours.

A checkpoint's folder travels as one JSON text, {"file name": table, or text whose characters are the bytes}.
"""

import base64
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from checkpoints import (
    meta_tensors,
    write_checkpoint,
    write_meta,
    write_safetensors,
    write_torch,
    write_torch_legacy,
)
from made_models import NARROW, made_imatrix, metadata_of, shape_of
from spoil import (
    spoil_checkpoint,
    spoil_gguf,
    spoil_imatrix,
    spoil_safetensors,
    spoil_shards,
    spoil_tokenizer,
    spoil_torch,
)

import quantlab as ql
from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.files.imatrix_file import merge, read_imatrix
from quantlab.files.model import Model
from quantlab.files.safetensors_file import read_safetensors
from quantlab.files.torch_zip import read_torch
from quantlab.transform.inspect import inspect

MAX_LINE = 2000  # characters of an error, without the file's name
TEXT = "the other  theatre, in 2024\n\n is not <s> that of <|im_end|> naïve — 🦙 \0"


@dataclass(frozen=True)
class Reader:
    """`seeds` makes good files, `spoil` changes one, `read` writes it into an empty folder and reads it."""

    seeds: Callable[[Path], list[bytes]]
    spoil: Callable[[bytes, Random], bytes]
    read: Callable[[Path, bytes], None]


def attempt(folder: Path, ask: Callable[[], Any], named: str | None = None) -> Any:
    """Return what `ask` returns, None where it refuses as it should; `named` (the folder) must stand in the line."""
    try:
        return ask()
    except (ValueError, OSError) as error:
        line, named = str(error), named or str(folder)
        assert named in line, f"does not name {named}: {line[:300]!r}"
        assert line.isprintable(), f"is not one printable line: {line[:300]!r}"
        assert len(line.replace(named, "")) <= MAX_LINE, f"has {len(line)} characters: {line[:300]!r}"
        return None


# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def gguf_seeds(folder: Path) -> list[bytes]:
    """Small models with a vocabulary of either kind, and one with every type of value."""
    shape = shape_of(**NARROW | {"n_vocab": 8, "n_embd": 32, "n_ff": 32, "n_layer": 1})
    spm = {"model": "llama", "tokens": ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁", "<0x0A>"]}
    spm |= {"scores": -np.arange(8, dtype=np.float32), "token_type": np.array([2, 3, 3, 1, 1, 1, 1, 6], np.int32)}
    bpe = {"model": "gpt2", "pre": "smollm", "tokens": ["a", "b", "ab", "Ġ", "c", "<|im_end|>", "d", "e"]}
    bpe |= {"merges": ["a b"], "token_type": np.array([1] * 8, np.int32), "bos_token_id": np.uint32(5)}
    rope = {"rope.scaling.type": "yarn", "rope.scaling.factor": np.float32(4), "rope.freq_base": np.float32(1e4)}
    values = {"x.u8": np.uint8(7), "x.i64": np.int64(-1), "x.f64": np.float64(0.1), "x.bool": True, "x.text": "é"}
    values |= {"x.floats": np.ones(2, np.float32), "x.nested": [["a"], ["b"]], "general.alignment": np.uint32(32)}
    seeds = []
    for vocab, more in ((spm, values), (bpe, {f"llama.{key}": value for key, value in rope.items()})):
        metadata = metadata_of(shape) | more | {f"tokenizer.ggml.{key}": value for key, value in vocab.items()}
        specs = [TensorSpec("token_embd.weight", (8, 32), "Q8_0"), TensorSpec("output_norm.weight", (32,), "F32")]
        specs += [TensorSpec("blk.0.attn_q.weight", (2, 256), "Q4_K"), TensorSpec("x", (2, 3, 32), "F16")]
        data = [np.zeros(spec.nbytes, np.uint8) for spec in specs]
        write_gguf(folder / "seed.gguf", metadata, specs, data)
        seeds.append((folder / "seed.gguf").read_bytes())
    return seeds


def read_gguf(folder: Path, raw: bytes) -> None:
    """Open it, look into it, take its vocabulary and its weights."""
    path = folder / "a.gguf"
    path.write_bytes(raw)
    _use(folder, attempt(folder, lambda: ql.open(path)))
    found = attempt(folder, lambda: inspect(path))
    if found is not None:
        assert str(found) and found._repr_html_() and json.loads(found.to_json())


def _use(folder: Path, model: Model | None) -> None:
    """Ask everything of a model that a word of the command line asks."""
    if model is None:
        return
    assert repr(model) and model._repr_html_() and model.tensors is not None
    attempt(folder, lambda: model.hparams), model.ftype
    vocab = attempt(folder, lambda: model.vocab)
    if vocab is not None:
        assert vocab.digest
        for special in (False, True):
            ids = attempt(folder, lambda special=special: vocab.encode(TEXT, parse_special=special))
            assert ids is None or isinstance(vocab.decode(ids), str)
    for tensor in model:
        rows = min(tensor.nrows, 4) if tensor.shape[-1] < 1 << 20 else 0
        attempt(folder, lambda tensor=tensor, rows=rows: tensor.floats(0, rows), named=tensor.name)


def shard_seeds(folder: Path) -> list[bytes]:
    """One model in two files."""
    files = []
    for i in range(2):
        keys = {"split.no": np.uint16(i), "split.count": np.uint16(2), "split.tensors.count": np.int32(2)}
        path = folder / "seed.gguf"
        write_gguf(
            path,
            {"general.architecture": "llama"} | keys,
            [TensorSpec(f"x{i}", (32,), "F32")],
            [np.zeros(32, np.float32)],
        )
        files.append(path.read_bytes())
    return [struct.pack("<Q", len(files[0])) + files[0] + files[1]]


def read_shards(folder: Path, raw: bytes) -> None:
    """Open two shards from either."""
    at = int.from_bytes(raw[:8], "little")
    paths = [folder / f"m-{i + 1:05d}-of-00002.gguf" for i in range(2)]
    for path, part in zip(paths, (raw[8 : 8 + at], raw[8 + at :]), strict=True):
        path.write_bytes(part)
    for path in paths:
        _use(folder, attempt(folder, lambda path=path: ql.open(path)))


# ── importance matrices ──────────────────────────────────────────────────────────────────────────────────────────────


def imatrix_seeds(folder: Path) -> list[bytes]:
    """One matrix in both formats."""
    shape = NARROW | {"n_embd": 32, "n_ff": 32, "n_layer": 1}
    paths = [made_imatrix(folder / f"seed{legacy}", shape, legacy=legacy) for legacy in (False, True)]
    return [path.read_bytes() for path in paths]


def read_matrix(folder: Path, raw: bytes) -> None:
    """Read a matrix and derive its weights."""
    path = folder / "a.imatrix"
    path.write_bytes(raw)
    matrix = attempt(folder, lambda: read_imatrix(path))
    if matrix is not None:
        assert all(np.isfinite(weights).all() for weights in matrix.entries.values())
        merged = attempt(folder, lambda: merge([matrix]), named="the sum exceeds")
        assert merged is None or merged.sums.keys() == matrix.sums.keys()


# ── safetensors ──────────────────────────────────────────────────────────────────────────────────────────────────────


def safetensors_seeds(folder: Path) -> list[bytes]:
    """Three tensors of three types."""
    write_safetensors(folder / "seed", {"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)})
    return [(folder / "seed").read_bytes()]


def read_tensors(folder: Path, raw: bytes) -> None:
    """Read a safetensors file and every row of it."""
    path = folder / "a.safetensors"
    path.write_bytes(raw)
    _use_stored(folder, attempt(folder, lambda: read_safetensors(path)))


def _use_stored(folder: Path, tensors: dict | None) -> None:
    for tensor in (tensors or {}).values():
        assert tensor.rows(0, tensor.nrows).shape == (tensor.nrows, tensor.shape[-1])


# ── torch ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def torch_seeds(folder: Path) -> list[bytes]:
    """Two tensors, one of them a transposed view, in both forms."""
    weights = {"a": np.ones((2, 3), np.float32), "b": np.ones((4, 2), np.float16).T}
    write_torch(folder / "seed.zip", weights)
    write_torch_legacy(folder / "seed.old", weights)
    return [(folder / "seed.zip").read_bytes(), (folder / "seed.old").read_bytes()]


def read_pickle(folder: Path, raw: bytes) -> None:
    """Read a torch file and every row of it."""
    path = folder / "a.bin"
    path.write_bytes(raw)
    _use_stored(folder, attempt(folder, lambda: read_torch(path)))


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────────────

MAX_DATA = 1 << 30  # bytes of a shard; they are a hole in the file


def _pack(folder: Path) -> bytes:
    """Return a folder as one JSON text; of weights the headers alone."""
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        if path.suffix == ".json":
            files[path.name] = json.loads(raw)
        elif path.suffix == ".safetensors":
            files[path.name] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        else:
            files[path.name] = raw.decode("latin-1")
    return json.dumps(files).encode()


def _unpack(folder: Path, raw: bytes) -> None:
    """Write a folder that `_pack` packed, as far as its names are names and its texts bytes."""
    for name, content in json.loads(raw).items():
        path = folder / (Path(name.replace("\0", "0")).name[:100] or "nameless")
        if isinstance(content, str) and not name.endswith(".json"):
            path.write_bytes(content.encode("latin-1", "replace"))
        elif path.suffix == ".safetensors":
            header = json.dumps(content).encode()
            with open(path, "wb") as file:
                file.write(struct.pack("<Q", len(header)) + header)
                file.truncate(8 + len(header) + _data_bytes(content))
        else:
            path.write_text(json.dumps(content))


def _data_bytes(header: Any) -> int:
    """Bytes of data that a header speaks of."""
    entries = header.values() if isinstance(header, dict) else ()
    ends = [entry.get("data_offsets") for entry in entries if isinstance(entry, dict)]
    ends = [end[1] for end in ends if isinstance(end, list) and len(end) == 2 and type(end[1]) is int]
    return min(max([0, *ends]), MAX_DATA)


def checkpoint_seeds(folder: Path) -> list[bytes]:
    """A folder of each architecture and tokenizer, one with an index, and one of Meta's with tiktoken's vocabulary."""
    packed = []
    for name in ("llama2", "llama3", "yi", "smollm", "llama_hf", "qwen2", "qwen3"):
        source = write_checkpoint(folder / name, name, n_shards=1 + (name == "llama2"))
        packed.append(_pack(source))
        shutil.rmtree(source)
    source = write_meta(folder / "meta")
    (source / "consolidated.00.pth").unlink()
    weights = {name: value.astype(np.float16) for name, value in meta_tensors("llama1").items()}
    write_safetensors(source / "consolidated.safetensors", weights)
    files = json.loads(_pack(source))
    shutil.rmtree(source)
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    files["tokenizer.model"] = "".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(ranks))
    return [*packed, json.dumps(files).encode()]


def read_folder(folder: Path, raw: bytes) -> None:
    """Open a checkpoint's folder and use it."""
    try:
        _unpack(folder, raw)
    except (ValueError, RecursionError, AttributeError):  # no packed folder
        return
    _use(folder, attempt(folder, lambda: ql.open(folder)))


READERS = {
    "gguf": Reader(gguf_seeds, spoil_gguf, read_gguf),
    "shards": Reader(shard_seeds, spoil_shards, read_shards),
    "imatrix": Reader(imatrix_seeds, spoil_imatrix, read_matrix),
    "safetensors": Reader(safetensors_seeds, spoil_safetensors, read_tensors),
    "torch": Reader(torch_seeds, spoil_torch, read_pickle),
    "tokenizer": Reader(checkpoint_seeds, spoil_tokenizer, read_folder),
    "checkpoint": Reader(checkpoint_seeds, spoil_checkpoint, read_folder),
}
