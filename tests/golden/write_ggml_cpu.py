"""Write ggml_cpu.json: what llama-perplexity says of made models, whose arithmetic mode `ggml-cpu` follows.

`python tests/golden/write_ggml_cpu.py FOLDER`, llama.cpp's programs, built for AVX-512 as for `write_perplexity.py`.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import dense_models  # noqa: E402
import expert_models  # noqa: E402

import quantlab as ql  # noqa: E402
from quantlab.files.bundled import data_dir  # noqa: E402

FTYPES = {"qwen3moe": ("F16", "Q4_K_M"), "mixtral": ("F32", "Q2_K", "Q3_K_M"), "gpt-oss": ("F16", "MXFP4_MOE")}
FTYPES |= {"gemma2": ("Q8_0",), "gemma3": ("F32", "Q8_0"), "mistral3": ("Q8_0",)}
OPTIONS = "-c 512 -t 1 --chunks 2".split()


def run(name: str, *options: str | Path) -> str:
    """Run a program; return all that it says."""
    done = subprocess.run([Path(sys.argv[1]) / name, *options], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def write_model(folder: Path, name: str) -> Path:
    """Write the checkpoint of a family, one with experts as wide as super-blocks are."""
    if name in expert_models.FAMILIES:
        return expert_models.write_model(folder, name, **expert_models.WIDE)
    return dense_models.write_model(folder, name)


def perplexity(model: Path) -> float:
    """Return the estimate; the program ends before its log is whole at times."""
    while True:
        said = run("llama-perplexity", "-m", model, "-f", data_dir() / "text" / "primer.md", *OPTIONS)
        if found := re.search(r"Final estimate: PPL = ([\d.]+) ", said):
            return float(found[1])


if __name__ == "__main__":
    results = {}
    for name, ftypes in FTYPES.items():
        with tempfile.TemporaryDirectory() as folder:
            made = write_model(Path(folder) / "made", name)
            base = ql.convert(made, outtype="f32", as_llama_cpp=True, progress=False)
            results[name] = {}
            for ftype in ftypes:
                file = base if ftype == "F32" else Path(folder) / f"{ftype}.gguf"
                if file != base:
                    run("llama-quantize", base, file, ftype, "1")
                results[name][ftype] = perplexity(file)
    version = run("llama-perplexity", "--version").splitlines()[0]
    about = f"llama-perplexity -m FILE -f primer.md {' '.join(OPTIONS)}, {version}"
    text = json.dumps({"about": about, "results": results}, indent=1)
    Path(__file__).with_name("ggml_cpu.json").write_text(text + "\n")
