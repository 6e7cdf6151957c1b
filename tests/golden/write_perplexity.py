"""Write llama_perplexity_tiny.json: what llama-perplexity says of the bundled model on the primer.

`python tests/golden/write_perplexity.py FOLDER`, llama.cpp's programs, after the model or the primer changed.
The programs must be built for AVX-512: the order of sums, and so the figures' last digits, differ on AVX2.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import quantlab as ql
from quantlab.files.bundled import data_dir, model_path

TOOLS = Path(sys.argv[1]).absolute()
GOLDEN = Path(__file__).with_name("llama_perplexity_tiny.json")
FTYPES = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K".split()
FTYPES += ["IQ3_S", "IQ4_XS", "IQ4_NL"]
CHUNKS = "8"
TEXT = data_dir() / "text" / "primer.md"
NAMES = {  # label -> key of the value, key of what follows ±
    "Mean PPL(Q)": ("ppl", "ppl_se"),
    "Mean PPL(base)": ("ppl_base", "ppl_base_se"),
    "Mean ln(PPL(Q)/PPL(base))": ("ln_ratio", "ln_ratio_se"),
    "Mean PPL(Q)-PPL(base)": ("delta_ppl", "delta_ppl_se"),
    "Cor(ln(PPL(Q)), ln(PPL(base)))": ("nll_correlation", None),
    "Mean KLD": ("kld_mean", "kld_se"),
    "Maximum KLD": ("kld_max", None),
    "99.9% KLD": ("kld_p999", None),
    "99.0% KLD": ("kld_p99", None),
    "95.0% KLD": ("kld_p95", None),
    "90.0% KLD": ("kld_p90", None),
    "Median KLD": ("kld_median", None),
    "10.0% KLD": ("kld_p10", None),
    "5.0% KLD": ("kld_p05", None),
    "1.0% KLD": ("kld_p01", None),
    "Mean Δp": ("dp_mean", "dp_mean_se"),
    "RMS Δp": ("dp_rms", "dp_rms_se"),
    "Same top p": ("same_top_p", "same_top_se"),
}


def run(name: str, *options: str | Path) -> str:
    """Run a program; return all that it says."""
    done = subprocess.run([TOOLS / name, *options], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def figures(said: str) -> dict[str, float]:
    """Read the statistics of llama-perplexity --kl-divergence; percent become fractions."""
    found = {}
    for label, value, percent, error, percent_error in re.findall(
        r"^ *(\S.*?) *: +(-?[\d.]+)(%?)(?: ± +([\d.]+))?( %)?", said, re.MULTILINE
    ):
        keys = NAMES.get(" ".join(label.split()), ())
        scale = 1e-2 if percent or percent_error else 1
        for key, number in zip(keys, (value, error), strict=False):
            if key:
                found[key] = round(float(number) * scale, 9)
    return found


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    f16 = ql.convert(model_path("tiny"), folder / "F16.gguf", outtype="f16")
    base, protocol = folder / "base.kld", ("-c", "512", "-t", "1")
    said = run("llama-perplexity", "-m", f16, "-f", TEXT, *protocol, "--chunks", CHUNKS, "--kl-divergence-base", base)
    system = re.search(r"system_info: .*? \| (CPU : .*?) \|? *$", said, re.MULTILINE)[1]
    chunks = int(re.search(r"over (\d+) chunks", said)[1])
    running = [float(value) for value in re.findall(r"\[\d+\]([\d.]+),", said)]  # the last is cut off at times

    def measure(ftype: str) -> dict[str, float]:
        variant = folder / f"{ftype}.gguf"
        run("llama-quantize", f16, variant, ftype, "1")
        said = ""
        while "Same top p:" not in said:  # the program ends before its log is whole at times
            said = run("llama-perplexity", "-m", variant, *protocol, "--kl-divergence", "--kl-divergence-base", base)
        return figures(said)

    with ThreadPoolExecutor(4) as pool:
        results = dict(zip(FTYPES, pool.map(measure, FTYPES), strict=True))

f16 = {"ppl": results["Q8_0"]["ppl_base"], "ppl_se": results["Q8_0"]["ppl_base_se"]}
f16["running_ppl"] = running[: chunks - 1] + [round(f16["ppl"], 4)]
version = run("llama-perplexity", "--version").split("\n")[0].strip()
about = {
    "model": "data/models/tiny converted to F16",
    "model_sha256": hashlib.sha256((model_path("tiny") / "model.safetensors").read_bytes()).hexdigest(),
    "text": "primer.md",
    "text_sha256": hashlib.sha256(TEXT.read_bytes()).hexdigest(),
    "n_ctx": 512,
    "chunks": chunks,
    "tool": f"llama-perplexity, llama.cpp of llama-cpp-python 0.3.36, {version}, {system}",
    "commands": [
        "llama-perplexity -m F16.gguf -f TEXT -c 512 --chunks 8 --kl-divergence-base base.kld",
        "llama-quantize F16.gguf FTYPE.gguf FTYPE",
        "llama-perplexity -m FTYPE.gguf -c 512 --kl-divergence --kl-divergence-base base.kld",
    ],
}
GOLDEN.write_text(json.dumps({"about": about, "results": {"F16": f16} | results}, indent=1) + "\n")
