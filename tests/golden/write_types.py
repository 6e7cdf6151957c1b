"""Write types.json: which type each tensor gets, from llama.cpp's own golden files for twelve models.

`python tests/golden/write_types.py FOLDER` reads FOLDER/*.schema (`tests/snapshots` of llama.cpp, MIT licence). They
name, per ftype, the tensors whose type differs from the base type. Row lengths are those of the models' published
configurations under the converter's tensor names; only what does not divide into blocks changes an answer.
"""

import json
import re
import sys
from pathlib import Path

# file -> general.architecture, row length of each kind of tensor ("" for the rest), more kinds with three dimensions
MODELS = {
    "deepseek-v3.1": ("deepseek2", {"": 7168, "attn_k_b": 128, "attn_output": 16384, "attn_q_b": 1536,
                                    "ffn_down": 18432, "ffn_down_exps": 2048, "ffn_down_shexp": 2048}, ["attn_k_b"]),
    "gemma-3-4b-it": ("gemma3", {"": 2560, "attn_output": 2048, "ffn_down": 10240}, []),
    "glm-4.6v": ("glm4moe", {"": 4096, "attn_output": 12288, "ffn_down": 10944, "ffn_down_exps": 1408,
                             "ffn_down_shexp": 1408}, []),
    "gpt-oss-120b": ("gpt-oss", {"": 2880, "attn_output": 4096}, []),
    "meta-llama-3.1-70b-instruct": ("llama", {"": 8192, "ffn_down": 28672}, []),
    "nvidia-nemotron-3-nano-30b-a3b": ("nemotron_h_moe", {"": 2688, "attn_output": 4096, "ssm_out": 4096,
                                                          "ffn_down_exps": 1856, "ffn_down_shexp": 3712}, []),
    "qwen3-0.6b": ("qwen3", {"": 1024, "attn_output": 2048, "ffn_down": 3072}, []),
    "qwen3-14b": ("qwen3", {"": 5120, "ffn_down": 17408}, []),
    "qwen3-coder-next": ("qwen3next", {"": 2048, "attn_output": 4096, "ssm_out": 4096, "ffn_down_exps": 512,
                                       "ffn_down_shexp": 512}, []),
    "qwen3.5-397b-a17b": ("qwen35moe", {"": 4096, "attn_output": 8192, "ssm_out": 8192, "ffn_down_exps": 1024,
                                        "ffn_down_shexp": 1024}, []),
    "qwen3.6-27b": ("qwen35", {"": 5120, "attn_output": 6144, "ssm_out": 6144, "ffn_down": 17408}, []),
    "step-3.5-flash": ("step35", {"": 4096, "attn_output": 8192, "ffn_down": 11264, "ffn_down_exps": 1280,
                                  "ffn_down_shexp": 1280}, []),
}  # fmt: skip
SOURCE = "tests/snapshots/*.schema of llama.cpp (MIT licence); rows from the models' published configurations"


def runs(numbers: list[int]) -> str:
    """Write 0 1 2 3 7 as "0-3 7", -1 as nothing."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers) - {-1}):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def split(name: str) -> tuple[str, int]:
    """Return the kind and the layer of a tensor, -1 outside of layers."""
    found = re.fullmatch(r"blk\.(\d+)\.(.*)\.weight", name)
    return (found[2], int(found[1])) if found else (name, -1)


def read(path: Path) -> dict:
    """Read one golden file."""
    arch, rows, stacks = MODELS[path.stem]
    lines = path.read_text(encoding="utf-8").splitlines()
    sizes = {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", lines[1])}
    keys = ("n_embd", "n_layer", "n_head", "n_head_kv", "n_expert")
    model = {"arch": arch} | {key: sizes.get(key, 0) for key in keys}
    layers: dict[str, set[int]] = {}
    ftypes: dict[str, dict] = {}
    for line in lines[2:]:
        if line.startswith("["):
            name, base = line[1:].split("] ")
            section = ftypes[name] = {"base": base.upper()}
        elif line:
            kind, layer = split(line.split()[0])
            layers.setdefault(kind, set()).add(layer)
            section.setdefault(kind, {}).setdefault(line.split()[1].upper(), []).append(layer)
    for kind in [kind for kind in layers if kind.startswith(("ffn_gate", "ffn_up"))]:
        layers[kind] |= layers[kind.replace("gate", "down").replace("up", "down")]  # counted in every layer
    for section in ftypes.values():
        for kind, types in section.items():
            if kind != "base":
                section[kind] = {qtype: runs(numbers) for qtype, numbers in types.items()}
    model["tensors"] = {
        kind: {"row": rows.get(kind, rows[""]), "experts": kind.endswith("_exps") or kind in stacks,
               "layers": runs(list(numbers))}
        for kind, numbers in sorted(layers.items())
    }  # fmt: skip
    return model | {"ftypes": ftypes}


if __name__ == "__main__":
    models = {path.stem: read(path) for path in sorted(Path(sys.argv[1]).glob("*.schema"))}
    text = json.dumps({"source": SOURCE, "models": models}, separators=(",", ":")).replace('"ftypes"', '\n"ftypes"')
    (Path(__file__).parent / "types.json").write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")
