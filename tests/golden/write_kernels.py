"""Write kernels.json: digests of what ggml's own C functions make of the rows of tests/rows.py.

Run by hand, with libggml-python installed: `PYTHONPATH=tests python tests/golden/write_kernels.py`.
"""

import json
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import ggml_library
import naive
import rows


def digest(array):
    return sha256(array.tobytes()).hexdigest()


def main():
    ggml = ggml_library.library()
    x, importances = rows.every_kind(512), rows.importances(512)
    encoded, decoded = {}, {}
    for qtype in naive.ENCODERS:
        plain = ggml_library.quantize(x, qtype)
        encoded[qtype] = {"plain": digest(plain)}
        if qtype in naive.WEIGHTED:
            for kind, weights in importances.items():
                encoded[qtype][kind] = digest(ggml_library.quantize(x, qtype, weights))
        if qtype != "Q8_1":  # ggml has no decoder for it
            decoded[qtype] = digest(ggml_library.dequantize(plain, qtype, 512))
    golden = {
        "library": f"libggml-python {version('libggml-python')}",
        "ggml": f"{ggml.ggml_version().decode()} {ggml.ggml_commit().decode()}",
        "functions": "ggml_quantize_chunk, quantize_row_q8_1_ref, quantize_row_q8_K_ref, dequantize_row_*",
        "input": {"rows": "every_kind(512)", "imatrix": "importances(512)", "sha256": digest(x)},
        "encoded": encoded,
        "decoded": decoded,
    }
    Path(__file__).with_name("kernels.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
