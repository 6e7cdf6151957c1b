"""Made weights of a published shape through the real convert and quantize paths: times, speed, memory, sizes.

`python tests/scale.py llama-7b` (and `yi-34b --layers 12`) writes a sharded checkpoint, converts it to an F16 file,
quantizes both, compares the bytes, and removes everything. Where the disk has no room for that, as for the 160 GB of
`yi-34b`, or with `--count`, every weight is made when it is asked for and what would be written is only counted.
"""

import argparse
import filecmp
import json
import resource
import shutil
import struct
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path
from statistics import NormalDist

import ml_dtypes
import numpy as np
from numba import njit

from quantlab import quants
from quantlab.files import bundled, checkpoint
from quantlab.files.byte_range import StoredTensor
from quantlab.files.gguf_file import TensorSpec, write_gguf
from quantlab.transform.convert import convert
from quantlab.transform.plan import MIB, plan
from quantlab.transform.quantize import quantize
from quantlab.transform.slabs import row_ranges

SHARD = 4 << 30  # bytes of weights per safetensors file
POOL, RUN = 1 << 18, 64  # weights that are drawn once, and how many of them follow each other in a tensor
MEASURED = 16 << 20  # weights per type in the measurement of the kernels' own speed
GOLDEN = Path(__file__).parent / "golden"


# ---- weights from (tensor name, position)


def normal_pool() -> np.ndarray:
    """The bits of POOL quantiles of a normal distribution, of the spread of a trained layer's weights, shuffled."""
    quantile = NormalDist(0, 0.02).inv_cdf
    values = np.array([quantile((i + 0.5) / POOL) for i in range(POOL)], np.float32)
    return np.random.default_rng(0).permutation(values).astype(ml_dtypes.bfloat16).view(np.uint16)


@njit(cache=True, nogil=True)
def fill(out, key, first, pool):
    """Fill `out` with runs of the pool, from run `first` on: 64 mixed bits say where it begins and which bits turn."""
    for i in range(out.size // RUN):
        z = (key + np.uint64(first + i)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
        start, turned = np.int64(z % np.uint64(POOL - RUN)), np.uint16(z >> np.uint64(48)) & np.uint16(0x8007)
        for j in range(RUN):
            out[i * RUN + j] = pool[start + j] ^ turned  # the sign and the last three bits of all


class Made:
    """The bytes of a tensor of made BF16 weights, in the place of a stretch of a file."""

    pool = normal_pool()

    def __init__(self, name: str, shape: tuple[int, ...]):
        self.key = np.uint64(zlib.crc32(name.encode())) << np.uint64(32)
        self.nbytes = 2 * int(np.prod(shape))

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return bytes `start:stop`; both are at whole runs, as rows of these shapes begin."""
        stop = self.nbytes if stop is None else stop
        if start % (2 * RUN) or stop % (2 * RUN):
            raise ValueError(f"bytes {start}:{stop}, must be multiples of {2 * RUN}. Choose another shape.")
        out = np.empty((stop - start) // 2, np.uint16)
        fill(out, self.key, start // (2 * RUN), self.pool)
        return out.view(np.uint8)


def made_checkpoint(shape: dict) -> dict[str, StoredTensor]:
    """Return the tensors of a Hugging Face checkpoint of this shape, in the order of its files."""
    n_embd, n_ff = shape["n_embd"], shape["n_ff"]
    n_kv = n_embd // shape["n_head"] * shape["n_head_kv"]
    layer = {
        "input_layernorm": (n_embd,),
        "mlp.down_proj": (n_embd, n_ff),
        "mlp.gate_proj": (n_ff, n_embd),
        "mlp.up_proj": (n_ff, n_embd),
        "post_attention_layernorm": (n_embd,),
        "self_attn.k_proj": (n_kv, n_embd),
        "self_attn.o_proj": (n_embd, n_embd),
        "self_attn.q_proj": (n_embd, n_embd),
        "self_attn.v_proj": (n_kv, n_embd),
    }
    shapes = {"model.embed_tokens.weight": (shape["n_vocab"], n_embd)}
    for i in range(shape["n_layer"]):
        shapes |= {f"model.layers.{i}.{part}.weight": dims for part, dims in layer.items()}
    shapes |= {"model.norm.weight": (n_embd,), "lm_head.weight": (shape["n_vocab"], n_embd)}
    return {name: StoredTensor(name, "BF16", dims, Made(name, dims)) for name, dims in shapes.items()}


def stand_in(shape: dict) -> None:
    """Let the made weights of this shape stand where the files' would, in any folder that has a configuration."""
    checkpoint.index_weights = lambda _: made_checkpoint(shape)


def write_config(folder: Path, shape: dict) -> None:
    """Write configuration and tokenizer; the vocabulary is padded to the embedding."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape["n_embd"],
        "intermediate_size": shape["n_ff"],
        "num_hidden_layers": shape["n_layer"],
        "num_attention_heads": shape["n_head"],
        "num_key_value_heads": shape["n_head_kv"],
        "vocab_size": shape["n_vocab"],
        "max_position_embeddings": shape["n_ctx"],
        "rms_norm_eps": shape["rms_eps"],
        "rope_theta": shape["rope_base"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(GOLDEN / "tiny_spm.model", folder / "tokenizer.model")


def write_shards(folder: Path, tensors: dict[str, StoredTensor]) -> int:
    """Write the tensors as sharded safetensors; return the number of files."""
    groups: list[list[StoredTensor]] = [[]]
    for tensor in tensors.values():
        if sum(t.data.nbytes for t in groups[-1]) + tensor.data.nbytes > SHARD:
            groups.append([])
        groups[-1].append(tensor)
    weight_map = {}
    for i, group in enumerate(groups):
        part = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        header, offset = {}, 0
        for tensor in group:
            end = offset + tensor.data.nbytes
            header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        raw = json.dumps(header).encode()
        with open(folder / part, "wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            for tensor in group:
                for start in range(0, tensor.data.nbytes, 64 << 20):
                    file.write(tensor.data.read(start, min(start + (64 << 20), tensor.data.nbytes)))
        weight_map |= {tensor.name: part for tensor in group}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return len(groups)


# ---- measuring


class Count:
    """Counts what is written to it."""

    nbytes = 0

    def write(self, block) -> None:
        """Add the length of a block of bytes."""
        self.nbytes += len(block)


def kernel_seconds(job) -> tuple[float, float]:
    """Measure the kernels alone on weights in memory; return the times that all steps' decoders and encoders need."""
    work: dict[str, int] = {}
    for step in job.steps:
        if not step.is_kept:
            work[step.choice.qtype] = work.get(step.choice.qtype, 0) + step.tensor.n_weights
    source = max(job.steps, key=lambda step: step.tensor.n_weights).tensor
    rows = source.rows(0, min(MEASURED // source.shape[-1], source.nrows))
    floats = quants.dequantize(rows.view(np.uint8), source.qtype, rows.shape)
    decode = partial(quants.dequantize, rows.view(np.uint8), source.qtype, rows.shape, out=floats)
    decoding, encoding = best_time(decode) * sum(work.values()), 0.0
    for qtype, n_weights in work.items():
        out = quants.quantize(floats, qtype)  # memory that is there, and what is compiled
        encoding += best_time(partial(quants.quantize, floats, qtype, out=out)) * n_weights
    return decoding / floats.size, encoding / floats.size


def best_time(call) -> float:
    """Return the shortest of three times of a call."""
    return min(timed(call)[0] for _ in range(3))


def say_share(alone: tuple[float, float], seconds: float) -> None:
    """Print the time of the kernels alone, and the speed of quantizing as a share of theirs."""
    print(
        f"kernels alone: decoders {alone[0]:.1f} s, encoders {alone[1]:.1f} s; quantizing ran at "
        f"{sum(alone) / seconds:.1%} of the speed of both, {alone[1] / seconds:.1%} of the encoders'"
    )


def say(what: str, seconds: float, n_weights: int, n_bytes: int) -> None:
    """Print one stage: time, speed, size, most memory so far."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    speed = n_weights / seconds / 1e6
    print(
        f"{what:<34} {seconds:8.1f} s {speed:8.1f} Mw/s {n_bytes / MIB:11.2f} MiB   ru_maxrss {rss:6.0f} MiB",
        flush=True,
    )


def timed(call) -> tuple[float, object]:
    """Return the time of a call and its result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def in_memory(folder: Path, shape: dict, ftype: str) -> None:
    """Convert and quantize into a counter; nothing is on the disk but the configuration."""
    stand_in(shape)
    model = checkpoint.open_checkpoint(folder, "f16")
    specs = [TensorSpec(tensor.name, tensor.shape, tensor.qtype) for tensor in model]
    print(f"{len(model)} tensors, {model.n_weights:,} weights, tensor data {model.nbytes / MIB:.2f} MiB", flush=True)
    rows = (  # of each tensor, a few at a time
        (t.rows(start, stop) for start, stop in row_ranges(t)) for t in model
    )
    count = Count()
    seconds, _ = timed(lambda: write_gguf(count, model.metadata, specs, rows))
    say("made BF16 → F16, counted", seconds, model.n_weights, count.nbytes)
    planned = plan(model, Count(), ftype=ftype)
    alone = kernel_seconds(planned.job)
    count = Count()
    seconds, _ = timed(lambda: quantize(model, count, ftype=ftype))
    data = sum(step.spec.nbytes for step in planned.job.steps)
    say(f"F16 → {ftype}, counted", seconds, model.n_weights, data)
    say_share(alone, seconds)


def on_disk(folder: Path, shape: dict, ftype: str) -> None:
    """Write a sharded checkpoint, convert it, quantize the F16 file and the checkpoint itself, compare."""
    tensors = made_checkpoint(shape)
    n_weights = sum(tensor.data.nbytes for tensor in tensors.values()) // 2
    seconds, n_files = timed(lambda: write_shards(folder, tensors))
    say(f"made checkpoint, {n_files} shards", seconds, n_weights, 2 * n_weights)
    seconds, f16 = timed(lambda: convert(folder, folder / "f16.gguf", outtype="f16", progress=False))
    say("checkpoint → F16 file", seconds, n_weights, f16.stat().st_size)
    alone = kernel_seconds(plan(f16, folder / "two.gguf", ftype=ftype).job)
    seconds, two = timed(lambda: quantize(f16, folder / "two.gguf", ftype=ftype))
    say(f"F16 file → {ftype}", seconds, n_weights, two.stat().st_size)
    say_share(alone, seconds)
    f16.unlink()
    seconds, one = timed(lambda: quantize(folder, folder / "one.gguf", ftype=ftype, via="f16"))
    say(f"checkpoint → {ftype}, via f16", seconds, n_weights, one.stat().st_size)
    print("both ways give the same bytes:", filecmp.cmp(one, two, shallow=False))


def main() -> None:
    """Run one shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=bundled.shapes())
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--ftype", default="Q5_K_M")
    parser.add_argument("--count", action="store_true", help="write nothing, count the bytes")
    parser.add_argument("--folder", help="where the files go for the time; default: the system's folder for such")
    options = parser.parse_args()
    shape = bundled.shape(options.shape)
    shape["n_layer"] = options.layers or shape["n_layer"]
    with tempfile.TemporaryDirectory(prefix="quantlab-scale-", dir=options.folder) as folder:
        n_bytes = sum(tensor.data.nbytes for tensor in made_checkpoint(shape).values())
        fits = 3 * n_bytes < shutil.disk_usage(folder).free  # checkpoint, F16 file, two outputs
        way = on_disk if fits and not options.count else in_memory
        how = f"{shape['n_layer']} layers, {options.ftype}, {way.__name__.replace('_', ' ')}"
        print(f"{shape['name']}, {how}; Python {sys.version.split()[0]}", flush=True)
        write_config(Path(folder), shape)
        way(Path(folder), shape, options.ftype)


if __name__ == "__main__":
    main()
