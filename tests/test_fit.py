"""What a model takes to run: against the buffer sizes that llama.cpp logs, and in numbers done by hand."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import sparse_models

from quantlab.arch import Hparams, complete
from quantlab.files import bundled
from quantlab.files.bundled import model_path
from quantlab.run.compute_buffer import compute_bytes
from quantlab.run.fit import GIB, VRAM_RESERVE, Setting, fit, kv_bytes
from quantlab.transform.quantize import quantize

MIB = 1024**2
LOGGED = {"model": r"model buffer size = +([\d.]+)", "kv": r"KV buffer size = +([\d.]+)"} | {
    "compute": r"compute buffer size = +([\d.]+)",
    "output": r"output buffer size = +([\d.]+)",
}
LOAD = """
import json, os, sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.verbosity, params.warmup, params.fit_params = sys.argv[1], 5, False, sys.argv[3] == "dry"
for name, value in json.loads(sys.argv[2]).items():
    if name == "flash_attn_type":
        value = xllamacpp.llama_flash_attn_type(value)
    if name.startswith("cache_type"):
        value = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{value}")
    setattr(params, name, value)
server = xllamacpp.Server(params)  # kept: one that goes before it runs waits for ever
time.sleep(60)  # the log is written by a thread: who reads it ends the process
os._exit(0)
"""


def shape(n_vocab, n_embd, n_ff, n_layer, n_head, n_head_kv):
    sizes = dict(n_vocab=n_vocab, n_embd=n_embd, n_ff=n_ff, n_layer=n_layer, n_head=n_head, n_head_kv=n_head_kv)
    return Hparams(arch="llama", n_ctx=32768, **sizes)


YI = shape(64000, 7168, 20480, 60, 56, 8)
SHAPES = {
    "all heads with keys": shape(4000, 512, 1408, 4, 8, 8),
    "few heads with keys": shape(9000, 256, 512, 3, 8, 2),
    "wide feed-forward": shape(600, 256, 4096, 2, 4, 4),
    "narrow feed-forward": shape(1000, 1024, 2560, 3, 8, 2),
}


def log_of(path, mode: str, last: str, **options) -> str:
    """Let llama.cpp load a model until its log says `last`."""
    pytest.importorskip("xllamacpp")
    log, command = "", [sys.executable, "-c", LOAD, str(path), json.dumps(options), mode]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            log += line
            if last in line:
                process.kill()
    return log


def logged(path, **options) -> dict[str, float]:
    """Load a model with llama.cpp and add up the buffers of each kind in its log, in MiB."""
    log = log_of(path, "load", "splits = ", **options)
    found = {kind: [float(size) for size in re.findall(pattern, log)] for kind, pattern in LOGGED.items()}
    assert found["compute"], log[-2000:]
    return {kind: sum(sizes) for kind, sizes in found.items()}


def close(bytes_: int, mib: float) -> bool:
    """Equal to the two decimals of the log; buffers below 1 MiB are rounded to whole pages."""
    return bytes_ / MIB == pytest.approx(mib, rel=0.002, abs=0.02)


def check(path, n_ctx: int) -> None:
    row, log = fit(path, ftype="COPY", n_ctx=n_ctx).rows[0], logged(path, n_ctx=n_ctx)
    assert (row.bytes + row.repacked_bytes) / MIB == pytest.approx(log["model"], rel=0.05)
    assert close(row.kv_bytes, log["kv"])
    assert close(row.compute_bytes, log["compute"])
    assert close(row.output_bytes, log["output"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return {ftype: quantize("tiny", folder / f"{ftype}.gguf", ftype=ftype) for ftype in ("F16", "Q4_K_M")}


@pytest.mark.parametrize("n_ctx", [256, 512])
@pytest.mark.parametrize("ftype", ["F16", "Q4_K_M"])
def test_the_bundled_model_takes_what_llama_cpp_logs(tiny, ftype, n_ctx):
    check(tiny[ftype], n_ctx)


@pytest.mark.parametrize("n_ctx", [512, 4096])
def test_smollm2_takes_what_llama_cpp_logs(n_ctx):
    try:
        path = model_path("smollm2")
    except FileNotFoundError:
        pytest.skip("smollm2 is not fetched")
    check(path, n_ctx)


@pytest.mark.parametrize("flash_attn", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_the_compute_buffer_of_many_shapes(tmp_path, name, flash_attn):
    path = sparse_models.sparse_gguf(tmp_path / "a.gguf", SHAPES[name], "F16")
    for n_ctx, n_ubatch in [(300, 512), (8192, 128)]:
        log = logged(path, n_ctx=n_ctx, n_ubatch=n_ubatch, flash_attn_type=int(flash_attn))
        ours = compute_bytes(SHAPES[name], n_ctx=n_ctx, n_ubatch=n_ubatch, flash_attn=flash_attn)
        assert close(ours, log["compute"])


@pytest.mark.parametrize(("n_ff", "n_used"), [(4096, 2), (384, 8)])
def test_the_compute_buffer_of_experts(tmp_path, n_ff, n_used):
    counts = {"n_expert": 16, "n_expert_used": n_used}
    experts = replace(shape(1000, 1024, n_ff, 3, 8, 2), **counts)
    more = {"expert_count": np.uint32(16), "expert_used_count": np.uint32(n_used)}
    path = sparse_models.sparse_gguf(tmp_path / "a.gguf", experts, "F16", **more)
    assert close(fit(path, ftype="COPY", n_ctx=300).rows[0].compute_bytes, logged(path, n_ctx=300)["compute"])


def test_the_compute_buffer_of_a_feed_forward_that_no_model_has(tmp_path):
    narrow = shape(1000, 1024, 1024, 3, 8, 8)
    path = sparse_models.sparse_gguf(tmp_path / "a.gguf", narrow, "F16")
    assert compute_bytes(narrow, n_ctx=300) / MIB == pytest.approx(logged(path, n_ctx=300)["compute"], rel=1 / 3)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_quantized_cache(tmp_path, kind):
    path = sparse_models.sparse_gguf(tmp_path / "a.gguf", SHAPES["narrow feed-forward"], "F16")
    row = fit(path, ftype="COPY", n_ctx=2048, cache_type_k=kind, cache_type_v=kind.lower()).rows[0]
    log = logged(path, n_ctx=2048, cache_type_k=kind, cache_type_v=kind)
    assert close(row.kv_bytes, log["kv"])
    assert row.compute_bytes / MIB == pytest.approx(log["compute"], rel=0.01)


@pytest.mark.parametrize("n_ctx", [2048, 4096])
def test_yi_34b_takes_what_llama_cpp_projects(tmp_path, n_ctx):
    """llama.cpp works out what it would need without loading; the file is a hole, and the process is then ended."""
    path = sparse_models.sparse_gguf(tmp_path / "yi.gguf", YI, "Q8_0")
    log = log_of(path, "dry", "projected to use", n_ctx=n_ctx)
    row = fit("yi-34b", ftype="Q8_0", n_ctx=n_ctx).rows[0]
    assert close(row.compute_bytes, float(re.search(LOGGED["compute"], log)[1]))
    total = row.bytes + row.kv_bytes + row.compute_bytes
    assert total / MIB == pytest.approx(float(re.search(r"projected to use (\d+) MiB", log)[1]), rel=1e-4)


def test_yi_34b_by_hand():
    row = fit("yi-34b", ftype="Q8_0", n_ctx=4096).rows[0]
    assert row.kv_bytes == 60 * 4096 * (8 * 128) * 2 * 2 == 960 * MIB  # layers, cells, a row of K, K and V, F16
    assert row.output_bytes == 64000 * 4
    n_weights = 2 * 64000 * 7168 + 60 * (2 * 7168 * 7168 + 2 * 7168 * 1024 + 3 * 7168 * 20480)
    assert row.bytes == n_weights * 34 // 32 + (60 * 2 + 1) * 7168 * 4  # Q8_0: 34 bytes for 32 weights; norms in F32
    ffn = 512 * 20480 * 4  # gate, up and their product stand side by side, beside five rows of 7168
    assert row.compute_bytes == pytest.approx(3 * ffn + 5 * 512 * 7168 * 4 + 512 * 4096 * 2, rel=1e-3)


def test_layers_are_counted_from_the_output_on():
    rows = [fit("yi-34b", ftype="Q8_0", n_gpu_layers=n).rows[0] for n in (0, 1, 2, 61, 99)]
    assert rows[0].vram_bytes == 0
    layer, output = rows[0].layer_bytes[0], 64000 * 7168 * 34 // 32 + 7168 * 4
    copied = 7168 * 20480 * 34 // 32  # the largest matrix, on its way through the card
    assert rows[1].vram_bytes == VRAM_RESERVE + output + rows[0].compute_bytes + copied
    assert rows[2].vram_bytes - rows[1].vram_bytes == layer + rows[0].kv_bytes // 60
    assert rows[3] == rows[4]
    assert rows[3].ram_bytes < 1.1 * 64000 * 7168 * 34 // 32


def test_the_articles_command_on_24_gib():
    command = {"ftype": "Q8_0", "vram": "24GiB", "ram": "32GiB", "n_ctx": 2048}
    assert not fit("yi-34b", n_gpu_layers=50, **command).rows[0].fits
    best = fit("yi-34b", **command).rows[0]
    assert best.fits and 40 <= best.n_gpu_layers < 50
    assert not fit("yi-34b", **command | {"n_gpu_layers": best.n_gpu_layers + 1}).rows[0].fits


def test_the_longest_context_fits_and_one_block_more_does_not():
    there = {"ftype": "Q4_K_M", "vram": "20.2GiB", "ram": 1 * GIB, "n_gpu_layers": None}
    longest = fit("yi-34b", **there).rows[0].n_ctx_max
    assert 256 <= longest < 4096
    assert fit("yi-34b", n_ctx=longest, **there).rows[0].fits
    assert not fit("yi-34b", n_ctx=longest + 256, **there).rows[0].fits


def test_it_agrees_with_xllamacpp(tmp_path):
    xllamacpp = pytest.importorskip("xllamacpp")
    llama = shape(32000, 4096, 11008, 32, 32, 32)
    path = sparse_models.sparse_gguf(tmp_path / "7b.gguf", llama, "Q4_K_M")
    for gib in (3, 5, 8):
        card = [{"name": "CUDA", "memory_free": gib * GIB}]
        theirs = xllamacpp.estimate_gpu_layers(card, str(path), [], 2048, 512, 1, "f16").layers
        ours = fit("llama-7b", ftype="Q4_K_M", vram=f"{gib}GiB", ram="64GiB", n_ctx=2048).rows[0].n_gpu_layers
        assert theirs <= ours <= theirs + 3  # they reserve the scores of attention, which is not stored any more


def test_layers_with_a_window_keep_less():
    """1.00 MiB for the layer without a window, by llama.cpp's log, and 1.13 for six with one, by its sources."""
    sizes = {"n_layer": 7, "n_embd": 64, "n_head": 4, "n_head_kv": 2, "head_dim": 32, "n_ff": 128, "n_vocab": 640}
    gemma = complete(Hparams(arch="gemma3", window=100, **sizes))
    assert kv_bytes(gemma, Setting(4096, 512, "F16", "F16", True)) == 4096 * 256 + 6 * 768 * 256


def test_latent_attention_keeps_no_values_and_shared_keys_are_kept_once():
    """0.14 MiB of keys, none of values, by llama.cpp's log; there, layers that share keys do not have a KV cache."""
    sizes = {"n_embd": 64, "n_head": 4, "n_ff": 128, "n_vocab": 640}
    latent = {"n_head_kv": 1, "head_dim": 48, "n_rot": 16, "n_lora_kv": 32, "head_dim_mla": 48, "head_dim_v": 24}
    deepseek = complete(Hparams(arch="deepseek2", n_layer=3, **sizes, **latent))
    assert kv_bytes(deepseek, Setting(512, 512, "F16", "F16", True)) == 3 * 512 * 48 * 2 == 147456
    gemma = complete(Hparams(arch="gemma4", n_layer=7, n_kv_shared=2, window=100, n_head_kv=2, head_dim=32, **sizes))
    assert kv_bytes(gemma, Setting(4096, 512, "F16", "F16", True)) == 5 * 768 * 256


LATENT = {"n_head_kv": 1, "head_dim": 576, "n_rot": 64, "n_lora_kv": 512, "head_dim_mla": 192, "head_dim_v": 128}
LATENT |= {"arch": "deepseek2", "n_layer": 2, "n_dense": 1, "n_expert_shared": 1}
GEMMA4 = {"arch": "gemma4", "head_dim": 512, "head_dim_window": 256, "window": (512, 512, 512, 512, 0)}
NETS = {"ssm_conv": 4, "ssm_state": 128, "ssm_groups": 16, "ssm_heads": 16, "ssm_inner": 2048, "head_dim": 256}
# hyper-parameters → what the log says of a context of 4096 tokens, with flash attention and without
LOGS = {
    "DeepSeek-V2-Lite": (
        LATENT | dict(n_embd=2048, n_ff=10944, n_head=16, n_expert=64, n_expert_used=6, n_ff_exp=1408),
        (88.14, 196.01),
    ),
    "DeepSeek-V3": (
        LATENT | dict(n_embd=7168, n_ff=18432, n_head=128, n_lora_q=1536, n_expert=256, n_expert_used=8, n_ff_exp=2048),
        (410.01, 1438.01),
    ),
    "Qwen3.5-0.8B": (
        NETS | dict(arch="qwen35", n_layer=4, n_embd=1024, n_ff=3584, n_head=8, n_head_kv=2),
        (39.02, 96.02),
    ),
    "Gemma 4 E2B": (
        GEMMA4
        | dict(n_layer=35, n_embd=1536, n_ff=(6144,) * 15 + (12288,) * 20, n_head=8, n_head_kv=1)
        | dict(n_embd_layer=256, n_kv_shared=20, window=GEMMA4["window"] * 7),
        (127.03, 136.02),
    ),
    "Gemma 4 E4B": (
        GEMMA4
        | dict(n_layer=42, n_embd=2560, n_ff=10240, n_head=8, n_head_kv=2, n_embd_layer=256, n_kv_shared=18)
        | dict(window=((512,) * 5 + (0,)) * 7),
        (112.03, 154.02),
    ),
}


@pytest.mark.parametrize("name", LOGS)
def test_the_compute_buffer_of_the_widest_layer(name):
    """In MiB, as xllamacpp logs it for files of these shapes."""
    sizes, (flash, scores) = LOGS[name]
    hparams = complete(Hparams(**sizes))
    assert close(compute_bytes(hparams, n_ctx=4096), flash)
    assert compute_bytes(hparams, n_ctx=4096, flash_attn=False) / MIB == pytest.approx(scores, rel=0.11)


def test_without_flash_attention_values_take_as_much_as_in_the_widest_layer():
    """36.00 and 42.00 MiB, by xllamacpp's log."""
    gemma = complete(Hparams(**LOGS["Gemma 4 E2B"][0]))
    found = [kv_bytes(gemma, Setting(4096, 512, "F16", "F16", flash)) / MIB for flash in (True, False)]
    assert found == [36, 42]


def test_every_shape_every_type():
    for name in bundled.shapes():
        result = fit(name, vram="24GiB", ram="64GiB", n_ctx=2048)
        frame = result.to_frame()
        assert (frame["bytes"].diff().dropna() <= 0).all()
        assert set(frame["where"]) <= {"card", "card and memory", "memory", "nowhere"}


def test_what_it_shows():
    result = fit("yi-34b", ftype="Q4_K_M", vram="24GiB", ram="32GiB")
    assert "per layer" in str(result) and "card" in result._repr_html_()
    document = json.loads(result.to_json())
    assert document["schema"] == 1
    assert document["rows"][0]["ftype"] == "Q4_K_M"
    layers = result.layers()
    assert len(layers) == 60 and layers["on_card"].all()
    assert fit("yi-34b", ftype="Q4_K_M", vram="12GiB", ram="32GiB").layers()["on_card"].is_monotonic_increasing


def test_bad_input():
    for options, message in [
        ({"n_ctx": 4097}, "n_ctx=4097, must be 1 to 4096"),
        ({"n_ctx": -1}, "n_ctx=-1"),
        ({"n_ubatch": 0}, "n_ubatch=0"),
        ({"vram": "much"}, "vram=much"),
        ({"ram": "much"}, "ram=much"),
        ({"cache_type_k": "q3_k"}, "cache type=q3_k"),
        ({"cache_type_v": "q8_0", "flash_attn": False}, "needs flash attention"),
        ({"n_gpu_layers": -1}, "n_gpu_layers=-1"),
        ({"ftype": "COPY"}, "COPY needs a model file"),
        ({"ftype": "Q9"}, "ftype=Q9"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit("yi-34b", **options)
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        fit("no-such-model")


def test_given_layers_hold_for_the_longest_context_too():
    row = fit("yi-34b", ftype="Q8_0", vram="24GiB", ram="24GiB", n_gpu_layers=50).rows[0]
    assert (row.fits, row.n_ctx_max) == (False, 0)
    row = fit("yi-34b", ftype="Q8_0", vram="24GiB", ram="48GiB", n_gpu_layers=30).rows[0]
    assert row.fits and row.n_ctx_max > 0
