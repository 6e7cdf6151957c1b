"""Speed of refining: one made layer of Llama-7B's width, beside the speed of products measured in the same run.

    python tests/bench_refine.py [--chunks N] [--ftype F] [--sweeps N]

Counted are the operations that the method needs (`operations`), not those that are done.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import made_models
import numpy as np
from tqdm.auto import tqdm

import quantlab as ql
from quantlab.arch import tensor_shapes
from quantlab.evaluate.engine.cpu import CpuEngine, peak
from quantlab.evaluate.refine import auto_damping
from quantlab.evaluate.refinement import Refinement
from quantlab.evaluate.variants import resolve
from quantlab.files.gguf_file import TensorSpec, write_gguf

WIDE = {"n_vocab": 320, "n_embd": 4096, "n_ff": 11008, "n_layer": 1, "n_head": 32, "n_head_kv": 32}
N_CTX = 512


def operations(model, n_tokens: int, sweeps: int) -> float:
    """Floating-point operations of one layer: N tokens, R rows, n columns.

    Two streams 4 N R n in all; for each field moments 3 N n² and factor 2 n³; target 4 R n², feedback R n², each sweep
    4 R n².
    """
    shapes = [tensor.shape for tensor in model if len(tensor.shape) == 2 and tensor.name.startswith("blk.")]
    fields = [model.tensor(f"blk.0.{name}.weight").shape[1] for name in ("attn_q", "attn_output", "ffn_up", "ffn_down")]
    done = sum(4 * n_tokens * rows * n + (5 + 4 * sweeps) * rows * n * n for rows, n in shapes)
    return done + sum(3 * n_tokens * n * n + 2 * n**3 for n in fields)


def made_layer(path: Path) -> Path:
    """Write the model to a file, one tensor in memory at a time."""
    shape = made_models.shape_of(**WIDE)
    shapes, rng = tensor_shapes(shape), np.random.default_rng(0)

    def weights(name: str) -> np.ndarray:
        if "norm" in name:
            return np.ones(shapes[name], np.float32)
        return (rng.standard_normal(shapes[name], np.float32) / np.float32(shapes[name][-1] ** 0.5)).astype(np.float16)

    specs = [TensorSpec(name, size, "F32" if "norm" in name else "F16") for name, size in shapes.items()]
    write_gguf(path, made_models.metadata_of(shape), specs, (weights(spec.name) for spec in specs))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--ftype", default="Q4_K_M")
    parser.add_argument("--sweeps", type=int, default=2)
    options = parser.parse_args()
    tokens = np.random.default_rng(1).integers(3, WIDE["n_vocab"], (options.chunks, N_CTX)).astype(np.int32)
    ql.refine("tiny", Path(tempfile.mkdtemp()) / "a.gguf", ftype=options.ftype, chunks=2, progress=False)  # compiles
    with tempfile.TemporaryDirectory() as folder:
        model = ql.open(made_layer(Path(folder) / "wide.gguf"))
        (variant,) = resolve(model, [options.ftype])
        with CpuEngine(model, N_CTX) as engine, tqdm(disable=True) as bar:
            best = peak(engine.workers)
            how = {"sweeps": options.sweeps, "damping": auto_damping(model, tokens), "bar": bar}
            start, cpu = time.perf_counter(), time.process_time()
            Refinement(variant, tokens, engine, **how).run(lambda name, data: None)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
            best = max(best, peak(engine.workers))
    work = operations(model, tokens.size, options.sweeps)
    print(
        f"refine, one 4096-wide layer, {options.chunks} chunks, {options.sweeps} sweeps: {work / 1e12:.1f} TFLOP in "
        f"{seconds:.0f} s ({cpu:.0f} s of CPU), {work / seconds / 1e9:.0f} GFLOP/s, {work / seconds / best:.0%} of one "
        f"large product's {best / 1e9:.0f}; {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )


if __name__ == "__main__":
    main()
