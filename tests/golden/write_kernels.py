"""Write kernels.json: digests of what ggml's own C functions make of the rows of tests/rows.py.

Run by hand with a library of the newest llama.cpp, built without -march so that it fuses nothing (the source package
llama-cpp-python has it, and cmake builds `ggml-base` so):

    PYTHONPATH=tests python tests/golden/write_kernels.py llama-cpp-python-0.3.36 …/libggml-base.so
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

import naive
import rows

from quantlab.lab import ggml_library
from quantlab.quants.ggml_types import GGML_TYPES


def digest(array):
    return sha256(array.tobytes()).hexdigest()


def main(source, path):
    ggml = ggml_library.open_library(path)
    ggml_library.library = lambda: ggml
    x, importances = rows.every_kind(512), rows.importances(512)
    encoded, decoded = {}, {}
    for qtype in [*naive.ENCODERS, *rows.NEWER]:
        record, values = GGML_TYPES[qtype], rows.for_type(qtype, 512)
        made = {"plain": ggml_library.quantize(values, qtype)} if record.encoder else {}
        for kind, weights in importances.items() if record.weighted_encoder else ():
            made[kind] = ggml_library.quantize(values, qtype, weights)
        encoded[qtype] = {kind: digest(data) for kind, data in made.items()}
        if qtype != "Q8_1":  # ggml has no decoder for it
            data = made.get("plain", made.get("squares"))
            decoded[qtype] = digest(ggml_library.dequantize(data, qtype, 512))
    commit = ggml.ggml_commit().decode().removesuffix("-dirty")
    golden = {
        "library": source,
        "ggml": f"{ggml.ggml_version().decode()} {commit}",
        "functions": "ggml_quantize_chunk, quantize_row_q8_1_ref, quantize_row_q8_K_ref, dequantize_row_*",
        "input": {"rows": "every_kind(512)", "imatrix": "importances(512)", "sha256": digest(x)},
        "encoded": encoded,
        "decoded": decoded,
    }
    Path(__file__).with_name("kernels.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
