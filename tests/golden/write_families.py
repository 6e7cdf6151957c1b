"""Write families.json: headers of converted checkpoints, and digests of what llama-quantize makes of such files.

`python tests/golden/write_families.py FOLDER LLAMA_QUANTIZE` reads FOLDER/*.gguf, small random checkpoints of each
family that llama.cpp's `convert_hf_to_gguf.py` converted.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from families import FAMILIES, RUNS, family_gguf, family_imatrix, header_of

from quantlab.files.model import open as open_model


def digests(family: dict, folder: Path, command: str) -> dict[str, str]:
    """Quantize the family's file with llama-quantize in every way of RUNS."""
    source = family_gguf(folder / "made.gguf", family)
    for suffix in ("gguf", "dat"):
        family_imatrix(folder / f"matrix.{suffix}", family, legacy=suffix == "dat")
    found = {}
    for name, (ftype, suffix) in RUNS.items():
        matrix = ["--imatrix", f"matrix.{suffix}"] if suffix else []
        subprocess.run(
            [command, *matrix, source.name, "out.gguf", ftype, "1"], cwd=folder, check=True, capture_output=True
        )
        found[name] = hashlib.sha256((folder / "out.gguf").read_bytes()).hexdigest()
    return found


if __name__ == "__main__":
    found = {}
    for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
        family = header_of(open_model(path))
        with tempfile.TemporaryDirectory() as folder:
            found[path.stem] = family | {"sha256": digests(family, Path(folder), sys.argv[2])}
    source = "headers: convert_hf_to_gguf.py; digests: llama-quantize; both of llama.cpp 0c1e57098"
    text = json.dumps({"source": source, "families": found}, separators=(",", ":"))
    FAMILIES.write_text(text.replace('},"', '},\n"').replace("],[", "],\n[") + "\n", encoding="utf-8")
