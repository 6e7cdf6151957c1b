"""Small random checkpoints of every architecture and form, for the tests of reading and converting.

Written without torch and without the libraries that read them in earnest. `python tests/checkpoints.py FOLDER` writes
them all, so that another converter can be run on them.
"""

import hashlib
import json
import pickle
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

import quantlab

GOLDEN = Path(__file__).parent / "golden"
N_EMBD, N_FF, N_LAYER, N_HEAD, N_HEAD_KV, N_VOCAB = 64, 96, 2, 4, 2, 640
DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
TORCH_NAMES = {"BF16": "BFloat16Storage", "F16": "HalfStorage", "F32": "FloatStorage"}

LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_REGEX = LLAMA3_REGEX.replace(r"\p{N}{1,3}", r"\p{N}")

# name -> (class, model_type, tokenizer, more of the configuration)
MODELS = {
    "llama1": (
        "LlamaForCausalLM",
        "llama",
        "spm",
        {"num_key_value_heads": N_HEAD, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    ),
    "llama2": ("LlamaForCausalLM", "llama", "spm_added", {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
    "llama3": (
        "LlamaForCausalLM",
        "llama",
        "bpe_llama3",
        {
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
    ),
    "mistral": (
        "MistralForCausalLM",
        "mistral",
        "spm_added",
        {"sliding_window": 4096, "max_position_embeddings": 32768},
    ),
    "yi": ("LlamaForCausalLM", "llama", "spm_config", {"rope_theta": 5000000.0, "max_position_embeddings": 4096}),
    "smollm": ("LlamaForCausalLM", "llama", "bpe_smollm", {"tie_word_embeddings": True, "rope_theta": 100000}),
    "tinyllama": ("LlamaForCausalLM", "llama", "spm_both", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama_hf": ("LlamaForCausalLM", "llama", "spm_json", {}),
    "qwen2": (
        "Qwen2ForCausalLM",
        "qwen2",
        "bpe_qwen2",
        {
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
        },
    ),
    "qwen3": ("Qwen3ForCausalLM", "qwen3", "bpe_qwen2", {"head_dim": 32, "tie_word_embeddings": True}),
}


def tensors(name: str, seed: int = 0) -> dict[str, np.ndarray]:
    """Return the random weights of model `name`, float32, by their Hugging Face names."""
    rng = np.random.default_rng([seed, *name.encode()])
    _, model_type, _, more = MODELS[name]
    head_dim, n_kv = more.get("head_dim", N_EMBD // N_HEAD), more.get("num_key_value_heads", N_HEAD_KV)
    shapes = {"model.embed_tokens.weight": (N_VOCAB, N_EMBD), "model.norm.weight": (N_EMBD,)}
    if not more.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (N_VOCAB, N_EMBD)
    for i in range(N_LAYER):
        layer = {
            "input_layernorm.weight": (N_EMBD,),
            "post_attention_layernorm.weight": (N_EMBD,),
            "self_attn.q_proj.weight": (N_HEAD * head_dim, N_EMBD),
            "self_attn.k_proj.weight": (n_kv * head_dim, N_EMBD),
            "self_attn.v_proj.weight": (n_kv * head_dim, N_EMBD),
            "self_attn.o_proj.weight": (N_EMBD, N_HEAD * head_dim),
            "mlp.gate_proj.weight": (N_FF, N_EMBD),
            "mlp.up_proj.weight": (N_FF, N_EMBD),
            "mlp.down_proj.weight": (N_EMBD, N_FF),
        }
        if model_type == "qwen2":
            layer |= {f"self_attn.{part}_proj.bias": (layer[f"self_attn.{part}_proj.weight"][0],) for part in "qkv"}
        if model_type == "qwen3":
            layer |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
        shapes |= {f"model.layers.{i}.{part}": shape for part, shape in layer.items()}
    return {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}


def write_checkpoint(
    folder: Path, name: str, dtype: str = "BF16", n_shards: int = 1, form: str = "safetensors"
) -> Path:
    """Write model `name` as a Hugging Face folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    class_name, model_type, tokenizer, more = MODELS[name]
    config = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_size": N_EMBD,
        "intermediate_size": N_FF,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_HEAD_KV,
        "vocab_size": N_VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1})
    )
    write_tokenizer(folder, tokenizer)
    weights = {key: value.astype(DTYPES[dtype]) for key, value in tensors(name).items()}
    write_weights(folder, weights, n_shards, form)
    return folder


def write_weights(folder: Path, weights: dict[str, np.ndarray], n_shards: int, form: str) -> None:
    """Write weights in `n_shards` files, with an index where there are several."""
    write, stem, suffix = {
        "safetensors": (write_safetensors, "model", "safetensors"),
        "bin": (write_torch, "pytorch_model", "bin"),
        "legacy": (write_torch_legacy, "pytorch_model", "bin"),
    }[form]
    names = list(weights)
    weight_map = {}
    for i in range(n_shards):
        part = f"{stem}-{i + 1:05d}-of-{n_shards:05d}.{suffix}" if n_shards > 1 else f"{stem}.{suffix}"
        own = {key: weights[key] for key in names[i * len(names) // n_shards : (i + 1) * len(names) // n_shards]}
        write(folder / part, own)
        weight_map |= dict.fromkeys(own, part)
    if n_shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_safetensors(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Write a safetensors file."""
    packed = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "U8": np.uint8}
    code = {np.dtype(number): key for key, number in (DTYPES | packed).items()}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for key, value in weights.items():
        offsets = [offset, offset + value.nbytes]
        header[key] = {"dtype": code[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        offset += value.nbytes
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"".join(value.tobytes() for value in weights.values()))


def _pickled(weights: dict[str, np.ndarray], *, legacy: bool) -> bytes:
    """Return the pickle of a state dict as torch.save writes it, opcode by opcode."""
    code = {np.dtype(number): TORCH_NAMES[key] for key, number in DTYPES.items()}

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    out = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    for i, (key, value) in enumerate(weights.items()):
        strides = [stride // value.itemsize for stride in value.strides]
        out += [text(key), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        out += [
            text("storage"),
            f"ctorch\n{code[value.dtype]}\n".encode(),
            text(str(i)),
            text("cpu"),
            number(value.size),
        ]
        out += [
            b"N" if legacy else b"",
            b"tQ",
            number(0),
            b"(",
            *map(number, value.shape),
            b"t(",
            *map(number, strides),
        ]
        out += [b"t\x89ccollections\nOrderedDict\n)RtR"]
    return b"".join(out) + b"u."


def write_torch(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Write a torch file of the zip form."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", _pickled(weights, legacy=False))
        archive.writestr("archive/byteorder", "little")
        for i, value in enumerate(weights.values()):
            archive.writestr(f"archive/data/{i}", value.tobytes("A"))  # as it lies in memory
        archive.writestr("archive/version", "3\n")


def write_torch_legacy(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Write a torch file of the old form without zip."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    heads = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system)]
    keys = [str(i) for i in range(len(weights))]
    with open(path, "wb") as file:
        file.write(b"".join(heads) + _pickled(weights, legacy=True) + pickle.dumps(keys, 2))
        for value in weights.values():
            file.write(struct.pack("<q", value.size) + value.tobytes())


def write_meta(folder: Path, name: str = "llama1", dtype: str = "F16", n_parts: int = 1) -> Path:
    """Write model `name` as one of Meta's folders, in `n_parts` parts."""
    folder.mkdir(parents=True, exist_ok=True)
    params = {
        "dim": N_EMBD,
        "multiple_of": 32,
        "n_heads": N_HEAD,
        "n_layers": N_LAYER,
        "norm_eps": 1e-6,
        "vocab_size": -1,
    }
    params |= {"n_kv_heads": MODELS[name][3].get("num_key_value_heads", N_HEAD_KV), "ffn_dim_multiplier": 0.5625}
    (folder / "params.json").write_text(json.dumps(params))
    shutil.copy(GOLDEN / "tiny_spm.model", folder / "tokenizer.model")
    parts: list[dict[str, np.ndarray]] = [{} for _ in range(n_parts)]
    for key, value in meta_tensors(name).items():
        value = value.astype(DTYPES[dtype])
        along_row = key.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
        pieces = [value] * n_parts if value.ndim == 1 else np.split(value, n_parts, axis=1 if along_row else 0)
        for part, piece in zip(parts, pieces, strict=True):
            part[key] = np.ascontiguousarray(piece)
    for i, part in enumerate(parts):
        write_torch(folder / f"consolidated.{i:02d}.pth", part)
    return folder


def meta_tensors(name: str) -> dict[str, np.ndarray]:
    """Return the weights of `tensors(name)` under Meta's names, q and k in Meta's row order, for 600 tokens."""
    names = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
    }
    out = {}
    for key, value in tensors(name).items():
        meta_key = key.removeprefix("model.") if ".layers." in key else key
        for old, new in names.items():
            meta_key = meta_key.replace(old, new)
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            value = value[:600]
        out[meta_key] = value
    return out


def content_digest(path: Path) -> str:
    """Return the SHA-256 of a GGUF file's tensors, by name, and of its tokens, scores and token types."""
    model = quantlab.open(path)
    sha = hashlib.sha256()
    for name in sorted(model.names):
        tensor = model.tensor(name)
        sha.update(f"{name} {tensor.shape} {tensor.qtype}".encode() + tensor.load().tobytes())
    sha.update("\n".join(model.metadata["tokenizer.ggml.tokens"]).encode())
    sha.update(model.metadata["tokenizer.ggml.scores"].tobytes())
    sha.update(model.metadata["tokenizer.ggml.token_type"].tobytes())
    return sha.hexdigest()


def write_tokenizer(folder: Path, kind: str) -> None:
    """Write the tokenizer files of one kind."""
    config: dict = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 2048}
    if kind in ("spm", "spm_added", "spm_config", "spm_both"):
        shutil.copy(GOLDEN / "tiny_spm.model", folder / "tokenizer.model")
    if kind == "spm":
        return
    if kind == "spm_added":
        (folder / "added_tokens.json").write_text(json.dumps({"<extra_1>": 600, "<|im_end|>": 601}))
        config |= {"add_bos_token": True, "add_eos_token": False, "chat_template": "{{ bos_token }}{{ messages }}"}
    elif kind == "spm_config":
        special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        words = {"0": "<unk>", "1": "<s>", "2": "</s>", "600": "<|im_start|>", "601": "<tool>", "602": "▁spaced"}
        table = {key: {"content": text, **special} for key, text in words.items()}
        table["601"]["special"] = table["602"]["special"] = False
        config |= {
            "added_tokens_decoder": table,
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": True,
        }
        config["bos_token"] = {"__type": "AddedToken", "content": "<s>", **special}
    elif kind in ("spm_both", "spm_json"):
        (folder / "tokenizer.json").write_text(json.dumps(spm_as_json()))
        config |= {"add_bos_token": True, "pad_token": "</s>", "tokenizer_class": "LlamaTokenizer"}
        config["chat_template"] = [
            {"name": "default", "template": "{{ a }}"},
            {"name": "tool use", "template": "{{ b }}"},
        ]
    else:
        (folder / "tokenizer.json").write_text(json.dumps(bpe_json(kind)))
        specials = {"bpe_llama3": "<|begin_of_text|>", "bpe_smollm": "<|im_start|>", "bpe_qwen2": None}
        ends = {"bpe_llama3": "<|eot_id|>", "bpe_smollm": "<|im_end|>", "bpe_qwen2": "<|im_end|>"}
        config = {
            "bos_token": specials[kind],
            "eos_token": ends[kind],
            "chat_template": "{% for m in messages %}{{ m }}{% endfor %}",
        }
        config |= {"pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        if kind == "bpe_qwen2":
            config |= {"add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def spm_as_json() -> dict:
    """Return the SentencePiece vocabulary as Hugging Face writes it in a tokenizer.json."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(GOLDEN / "tiny_spm.model"))
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    pieces += [f"<reserved_{i}>" for i in range(len(pieces), N_VOCAB)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece in pieces[259:]:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocab and piece[i:] in vocab]
        merges += [(vocab[left + right], f"{left} {right}") for left, right in splits]
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    template = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    second = [{"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template,
            "pair": template + second,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [merge for _, merge in sorted(merges)],
        },
    }


def bpe_json(kind: str) -> dict:
    """Return a byte-level BPE tokenizer.json with the pre-tokenizer of one family."""
    model = json.loads((GOLDEN / "tiny_bpe.json").read_text())
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    words = {
        "bpe_llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|endoftext|>"],
        "bpe_smollm": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"],
        "bpe_qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"],
    }[kind]
    added = [
        {"id": 600 + i, "content": text, **flags, "special": text != "<tool_call>"} for i, text in enumerate(words)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if kind == "bpe_smollm":
        steps = [{"type": "Digits", "individual_digits": True}, {**byte_level, "use_regex": True}]
    else:
        regex = LLAMA3_REGEX if kind == "bpe_llama3" else QWEN2_REGEX
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        steps = [split, byte_level]
    post = {**byte_level, "trim_offsets": kind != "bpe_qwen2"}
    if kind == "bpe_llama3":
        single = [{"SpecialToken": {"id": words[0], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        pair = [*single, {"SpecialToken": {"id": words[0], "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
        special = {words[0]: {"id": words[0], "ids": [600], "tokens": [words[0]]}}
        template = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special}
        post = {"type": "Sequence", "processors": [post, template]}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if kind == "bpe_qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None if kind == "bpe_smollm" else post,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": kind == "bpe_llama3",
            **model,
        },
    }


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for model_name in MODELS:
        for model_dtype in DTYPES:
            for shards in (1, 3):
                write_checkpoint(root / f"{model_name}-{model_dtype}-{shards}", model_name, model_dtype, shards)
    for meta_dtype in DTYPES:
        for count in (1, 2):
            write_meta(root / f"meta-{meta_dtype}-{count}", "llama1", meta_dtype, count)
