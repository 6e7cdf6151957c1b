"""Models of many architectures for the tests of file to file: headers that llama.cpp's converter wrote, made weights.

`golden/families.json` holds the header of a small checkpoint of each family, and SHA-256 digests of what llama-quantize
makes of the file that `family_gguf` writes for it.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from made_models import made_weights

from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.files.imatrix_file import ImportanceMatrix, write_imatrix
from quantlab.transform.rules import is_quantizable

FAMILIES = Path(__file__).parent / "golden" / "families.json"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
RUNS = {"Q4_K_M": ("Q4_K_M", ""), "Q2_K": ("Q2_K", ""), "Q3_K_L.gguf": ("Q3_K_L", "gguf"), "Q4_0.dat": ("Q4_0", "dat")}


def families() -> dict:
    """Read the headers and the digests."""
    return json.loads(FAMILIES.read_text())["families"]


def header_of(model) -> dict:
    """Return a model's architecture, its keys and its tensors, as JSON can hold them."""
    arch = model.metadata["general.architecture"]
    keys = {key: pack(value) for key, value in model.metadata.items() if key.startswith(f"{arch}.")}
    return {"arch": arch, "keys": keys, "tensors": [[t.name, list(t.shape), t.qtype] for t in model]}


def pack(value):
    """Write a number of the metadata with its type."""
    return value if isinstance(value, str | bool) else [value.dtype.name, value.tolist()]


def unpack(value):
    """Read what `pack` wrote."""
    if isinstance(value, str | bool):
        return value
    dtype, number = value
    return np.array(number, dtype) if isinstance(number, list) else np.dtype(dtype).type(number)


def family_gguf(path: Path, family: dict) -> Path:
    """Write a file with a family's header and made weights."""
    metadata = {"general.architecture": family["arch"], "general.file_type": np.uint32(32)}
    metadata |= {key: unpack(value) for key, value in family["keys"].items()}
    specs = [TensorSpec(name, tuple(shape), qtype) for name, shape, qtype in family["tensors"]]
    write_gguf(path, metadata, specs, (made_weights(s.name, s.shape).astype(DTYPES[s.qtype]) for s in specs))
    return path


def family_imatrix(path: Path, family: dict, *, legacy: bool) -> Path:
    """Write an importance matrix for it, in which the second expert of every layer was never chosen."""
    sums, counts = {}, {}
    for name, shape, _ in family["tensors"]:
        if name.startswith("blk.") and is_quantizable(name, tuple(shape)):
            n = shape[-3] if len(shape) > 2 else 1
            counts[name] = np.arange(512, 512 + n).astype(np.float32)
            counts[name][1:2] = 0
            sums[name] = np.abs(made_weights(name, (n, shape[-1]), seed=1)) * counts[name][:, None]
    return write_imatrix(ImportanceMatrix(sums, counts, 3, 512, ("made.txt",)), path, legacy=legacy)
