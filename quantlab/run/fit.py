"""Memory that a model needs in llama.cpp, and the part that fits on a graphics card: `quantlab fit`.

Four things take memory: the weights, the cache of keys and values (KV), the compute buffer and the logits. With
`--n-gpu-layers N` llama.cpp puts the output layer and the last N - 1 of the model's layers on the card, each with its
part of the KV cache; the token embedding stays in the machine's memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from quantlab.arch import architectures, find
from quantlab.files.arguments import check_whole
from quantlab.files.machine import physical_memory
from quantlab.quants import row_bytes
from quantlab.result import Result
from quantlab.run.compute_buffer import CELLS, F32, cells, compute_bytes, input_bytes
from quantlab.transform.mixture import FTYPES, choose_types, find_ftype, layer_of
from quantlab.transform.plan import look_up, parse_bytes, tensor_bytes

GIB = 1024**3
VRAM_RESERVE = 512 * 1024**2  # bytes that the card's driver takes; xllamacpp.memory leaves the same
REPACKED = ("Q4_0", "Q4_K")  # types of which llama.cpp keeps a rearranged copy where the CPU has AVX2
KV_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")


@dataclass(frozen=True)
class Setting:
    """Settings of a run: context, batch, types of the KV cache, attention."""

    n_ctx: int
    n_ubatch: int
    cache_type_k: str
    cache_type_v: str
    flash_attn: bool


@dataclass(frozen=True)
class FitRow:
    """The memory that one ftype needs, and the best way to run it.

    Attributes
    ----------
    ftype : str
        A mixture, or `COPY` for a file as it is.
    bytes, bpw : int, float
        Weights: bytes of tensor data, bits per weight.
    kv_bytes, compute_bytes, output_bytes : int
        KV cache, compute buffer of one device, logits.
    repacked_bytes : int
        A second copy of the weights of some types, which llama.cpp rearranges for the CPU. The first copy is then only
        cached file, which the system may drop: it is not counted in `ram_bytes`.
    n_gpu_layers : int
        As given, or else the most that fit (0 to layers + 1).
    vram_bytes, ram_bytes : int
        What that takes on the card (the driver's share included) and in the machine's memory.
    fits : bool
        Whether both are within what there is.
    n_ctx_max : int
        The longest context, up to the model's own, that fits with any number of layers on the card; 0 if none does.
    layer_bytes : tuple of int
        Weights of each layer.
    """

    ftype: str
    bytes: int
    bpw: float
    kv_bytes: int
    compute_bytes: int
    output_bytes: int
    repacked_bytes: int
    n_gpu_layers: int
    vram_bytes: int
    ram_bytes: int
    fits: bool
    n_ctx_max: int
    layer_bytes: tuple[int, ...]

    @property
    def where(self) -> str:
        """The place where it runs: "card", "card and memory", "memory", or "nowhere"."""
        if not self.fits:
            return "nowhere"
        if self.n_gpu_layers == 0:
            return "memory"
        return "card" if self.n_gpu_layers > len(self.layer_bytes) else "card and memory"


@dataclass(frozen=True, repr=False)
class Fit(Result):
    """The memory that a model needs to run, per ftype.

    Attributes
    ----------
    model : str
        The shape's or the file's name.
    n_layer, n_ctx_train : int
        Layers, and the context that the model was trained for.
    vram, ram : int
        Bytes that there are.
    setting : Setting
    rows : tuple[FitRow, ...]
    """

    model: str
    n_layer: int
    n_ctx_train: int
    vram: int
    ram: int
    setting: Setting
    rows: tuple[FitRow, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per ftype; sizes in bytes."""
        frame = pd.DataFrame([asdict(row) | {"where": row.where} for row in self.rows])
        return frame.drop(columns="layer_bytes")

    def layers(self, ftype: str | None = None) -> pd.DataFrame:
        """Return one row per layer of an ftype (default: the first): layer, bytes, kv_bytes, on_card."""
        row = next(row for row in self.rows if ftype in (None, row.ftype))
        first = max(self.n_layer + 1 - row.n_gpu_layers, 0)
        columns = {"layer": range(self.n_layer), "bytes": row.layer_bytes, "kv_bytes": row.kv_bytes // self.n_layer}
        return pd.DataFrame(columns).assign(on_card=lambda frame: frame["layer"] >= first)

    def _document(self) -> dict[str, Any]:
        protocol = {"model": self.model, "n_layer": self.n_layer, "n_ctx_train": self.n_ctx_train, "vram": self.vram}
        protocol |= {"ram": self.ram, "vram_reserve": VRAM_RESERVE} | asdict(self.setting)
        rows = [asdict(row) | {"where": row.where} for row in self.rows]
        return {"protocol": protocol, "rows": rows}

    def _shown(self) -> pd.DataFrame:
        frame = self.to_frame()
        scale = max(frame["bytes"].max(), 1)
        unit, divisor = ("GiB", GIB) if scale > 4 * GIB else ("MiB", 1024**2)
        names = {"bytes": "weights", "kv_bytes": "KV", "compute_bytes": "compute", "vram_bytes": "on card"}
        names |= {"ram_bytes": "in memory"}
        shown = frame[["ftype", "bpw"]].assign(bpw=frame["bpw"].map("{:.2f}".format))
        for column, name in names.items():
            shown[f"{name} {unit}"] = (frame[column] / divisor).map("{:.2f}".format)
        shown["n-gpu-layers"] = frame["n_gpu_layers"]
        shown["runs in"] = frame["where"]
        return shown.assign(**{"longest context": frame["n_ctx_max"]})

    def _lines(self) -> list[str]:
        there = f"{self.vram / GIB:.4g} GiB on the card, {self.ram / GIB:.4g} GiB in the machine"
        kv = f"KV cache {self.setting.cache_type_k}/{self.setting.cache_type_v}"
        layers = f"{self.n_layer} layers, context {self.setting.n_ctx} of {self.n_ctx_train}"
        return [f"{self.model}: {layers}, {kv}; {there}"]

    def __str__(self) -> str:
        lines = [super().__str__()]
        if len(self.rows) == 1:
            layers = self.layers() / [1, 1024**2, 1024**2, 1]
            low, high = layers["bytes"].min(), layers["bytes"].max()
            lines.append(f"per layer: weights {low:.2f} to {high:.2f} MiB, KV {layers['kv_bytes'][0]:.2f} MiB")
        return "\n".join(lines)


def fit(
    model: str | Path,
    *,
    ftype: str | int | None = None,
    vram: str | int = 0,
    ram: str | int | None = None,
    n_ctx: int | None = None,
    n_gpu_layers: int | None = None,
    cache_type_k: str = "f16",
    cache_type_v: str = "f16",
    n_ubatch: int = 512,
    flash_attn: bool = True,
    rules: str = "current",
) -> Fit:
    """Compute the memory that a model needs in llama.cpp, and its best division between card and RAM.

    Parameters
    ----------
    model : str or Path
        A bundled shape's name ("yi-34b"), a bundled model's, a GGUF file or a checkpoint.
    ftype : str or int, optional
        Only this mixture. Default: every one, and a file as it is (`COPY`).
    vram, ram : str or int
        Memory of the graphics card and of the machine: bytes, or a text such as "24GiB". Default: no card; all of this
        machine's memory.
    n_ctx : int, optional
        Tokens of context; 0 is the model's own. Default: 4096, or the model's if that is shorter.
    n_gpu_layers : int, optional
        As llama.cpp counts: 1 is the output layer alone, layers + 1 is all. Default: the most that fit.
    cache_type_k, cache_type_v : str
        Types of the KV cache: f16, q8_0, q4_0, …
    n_ubatch : int
        Most tokens that go through the model at once.
    flash_attn : bool
        llama.cpp's default where the device can.
    rules : str
        Rule set of the mixtures: "current" or "2023-12".

    Raises
    ------
    FileNotFoundError
        If there is no such model.
    ValueError
        If an option is out of range, or `n_ctx` is beyond the context of the model's training.

    Notes
    -----
    Measured for the CPU: model and KV buffers equal those that llama.cpp logs, and so does the compute buffer of the
    published shapes (within 6 % for all others whose feed-forward is 2.5 times as wide as the stream). For the card the
    compute buffer is taken to be the same; where some layers stay in memory, the largest of their matrices is added,
    which llama.cpp copies to the card to go through a prompt. That part is worked out from its sources, not measured.

    Examples
    --------
    The article of December 2023 gives for Yi-34B "76 to 85 GB" unquantized, "about 46 GB" at 8 bit and "about 21 GB"
    at 4 bit. The weights in GB:

    >>> weights = fit("yi-34b").to_frame().set_index("ftype")["bytes"] / 1e9
    >>> weights[["F16", "Q8_0", "Q4_K_M"]].round(1).tolist()
    [68.8, 36.5, 20.7]

    Its command, on one card of 24 GiB:

    >>> row = fit("yi-34b", ftype="Q8_0", vram="24GiB", ram="32GiB", n_ctx=2048, n_gpu_layers=50).rows[0]
    >>> row.fits, round(row.vram_bytes / 1024**3, 1)
    (False, 28.7)
    """
    name, hparams, shapes, source = look_up(model)
    if find(hparams.arch) is None:
        known = ", ".join(architectures())
        raise ValueError(
            f"{name}: architecture={hparams.arch}, must be one of {known}. Measure this model with llama.cpp."
        )
    check_whole(n_ctx=n_ctx, n_gpu_layers=n_gpu_layers, n_ubatch=n_ubatch)
    n_ctx = min(4096, hparams.n_ctx) if n_ctx is None else n_ctx or hparams.n_ctx
    setting = _setting(name, hparams, n_ctx, n_ubatch, cache_type_k, cache_type_v, flash_attn)
    if n_gpu_layers is not None and not 0 <= n_gpu_layers:
        raise ValueError(f"{name}: n_gpu_layers={n_gpu_layers}, must be 0 or more. Give 0 for no layer on the card.")
    there = (
        0 if vram in (0, "0") else parse_bytes(vram, "vram"),
        physical_memory() if ram is None else parse_bytes(ram, "ram"),
    )
    rows = []
    for one in [find_ftype(ftype)] if ftype is not None else FTYPES.values():
        if one.name == "COPY" and source is None or rules not in one.rules:
            continue
        choices = choose_types(hparams, shapes, one.name, rules=rules, source=source)
        weights = Weights(hparams, shapes, {tensor: choice.qtype for tensor, choice in choices.items()})
        rows.append(_row(one.name, weights, setting, there, n_gpu_layers))
    if not rows:
        raise ValueError(
            f"{name}: ftype={ftype}, must be known to rules={rules}, and COPY needs a model file. Choose another ftype."
        )
    rows.sort(key=lambda row: -row.bytes)
    return Fit(name, hparams.n_layer, hparams.n_ctx, *there, setting, tuple(rows))


def _setting(name: str, hparams, n_ctx: int, n_ubatch: int, k: str, v: str, flash_attn: bool) -> Setting:
    """Check how the model is to be run."""
    if not 1 <= n_ctx <= hparams.n_ctx:
        raise ValueError(
            f"{name}: n_ctx={n_ctx}, must be 1 to {hparams.n_ctx}, the context of its training. Choose another context."
        )
    if n_ubatch < 1:
        raise ValueError(f"{name}: n_ubatch={n_ubatch}, must be at least 1. Use 512, llama.cpp's default.")
    for kind in (k, v):
        if kind.upper() not in KV_TYPES:
            known = " ".join(KV_TYPES).lower()
            raise ValueError(f"{name}: cache type={kind}, must be one of: {known}. Choose another.")
    if not flash_attn and v.upper().startswith("Q"):
        raise ValueError(
            f"{name}: cache_type_v={v}, a quantized V cache needs flash attention. Turn flash attention on."
        )
    return Setting(n_ctx, n_ubatch, k.upper(), v.upper(), flash_attn)


class Weights:
    """The bytes of a model's weights by where they go: each layer, the token embedding, the output layer."""

    def __init__(self, hparams, shapes: Mapping[str, tuple[int, ...]], qtypes: Mapping[str, str]):
        self.hparams = hparams
        shapes = {name: shape for name, shape in shapes.items() if not _is_skipped(name, hparams)}
        sizes = {name: tensor_bytes(shape, qtypes[name]) for name, shape in shapes.items()}
        for name in ("token_embd.weight", "output_norm.weight"):
            if name not in sizes:
                raise ValueError(f"{name}: is missing from the model. Convert the checkpoint again.")
        for name in sizes:
            if name.startswith("blk.") and not 0 <= layer_of(name) < hparams.n_layer_all:
                raise ValueError(
                    f"{name}: is beyond the {hparams.n_layer} layers of the metadata. Convert the checkpoint again."
                )
        self.layers, self.repacked, self.largest = ([0] * hparams.n_layer for _ in range(3))
        for name, size in sizes.items():
            if name.startswith("blk."):
                i = layer_of(name)
                self.layers[i] += size
                self.largest[i] = max(self.largest[i], size)
                self.repacked[i] += size * _is_repacked(shapes[name], qtypes[name])
        self.total = sum(sizes.values())
        self.n_weights = sum(math.prod(shape) for shape in shapes.values())
        self.output = sizes.get("output.weight", sizes["token_embd.weight"]) + sizes["output_norm.weight"]
        self.tied = "output.weight" not in shapes  # the embedding is the output layer too: on the card as a second copy
        self.output_repacked = sum(
            sizes[name] * _is_repacked(shapes[name], qtypes[name]) for name in shapes if name == "output.weight"
        )


def _is_skipped(name: str, hparams) -> bool:
    """Tell whether llama.cpp skips a tensor, as one of a multi-token prediction layer."""
    return hparams.n_layer <= layer_of(name) < hparams.n_layer_all


def _is_repacked(shape: tuple[int, ...], qtype: str) -> bool:
    return qtype in REPACKED and len(shape) == 2 and shape[0] % 8 == 0


def kv_bytes(hparams, setting: Setting) -> int:
    """Compute the bytes of the KV cache: one row of keys and one of values per cell and layer.

    Yi-34B, context 4096, F16: 60 layers × 4096 cells × 2 × (8 heads × 128) × 2 bytes = 960 MiB. A layer with a window
    has cells for it and for the tokens of one batch; a recurrent layer has a state of one size, float32. One that uses
    keys of others has none. Values of latent attention are a part of its keys. Without flash attention, values take as
    much of each cell as in the widest layer.
    """
    layers, total = [hparams.at(i) for i in range(hparams.n_layer)], 0
    widest = max(layer.n_kv for layer in layers)
    for layer in layers:
        if layer.recurrent:
            total += 4 * (layer.ssm_state * layer.ssm_inner + (layer.ssm_conv - 1) * layer.conv_width)
            continue
        if layer.kv_shared:
            continue
        n_cells = min(setting.n_ctx, layer.window + setting.n_ubatch) if layer.window else setting.n_ctx
        row = row_bytes(setting.cache_type_k, layer.n_kv)
        if not layer.n_lora_kv:
            row += row_bytes(setting.cache_type_v, layer.n_kv if setting.flash_attn else widest)
        total += cells(n_cells) * row
    return total


class Buffers(NamedTuple):
    """Bytes of the KV cache, of the compute buffer, and of its part on the CPU with every layer on the card."""

    kv: int
    compute: int
    inputs: int


def buffers(hparams, setting: Setting) -> Buffers:
    """Compute the bytes of a run's buffers."""
    batch = {"n_ctx": setting.n_ctx, "n_ubatch": setting.n_ubatch, "flash_attn": setting.flash_attn}
    return Buffers(kv_bytes(hparams, setting), compute_bytes(hparams, **batch), input_bytes(hparams, **batch))


def needed(weights: Weights, taken: Buffers, n_gpu_layers: int) -> tuple[int, int]:
    """Compute the bytes (on the card, in the machine's memory) with `n_gpu_layers` on the card."""
    hparams = weights.hparams
    on_card = min(max(n_gpu_layers - 1, 0), hparams.n_layer)
    kv, card = taken.kv // hparams.n_layer, 0
    if n_gpu_layers > 0:
        layers = weights.layers[hparams.n_layer - on_card :]
        card = VRAM_RESERVE + sum(layers) + weights.output + on_card * kv + taken.compute
        card += max(weights.largest[: hparams.n_layer - on_card], default=0)
    memory = weights.total - sum(weights.layers[hparams.n_layer - on_card :]) + (hparams.n_layer - on_card) * kv
    if n_gpu_layers > 0 and not weights.tied:
        memory -= weights.output
    memory += taken.compute if on_card < hparams.n_layer else taken.inputs
    return card, memory + hparams.n_vocab * F32


def most_layers(weights: Weights, setting: Setting, vram: int, ram: int) -> int | None:
    """Return the largest --n-gpu-layers that fits (None: even 0 does not)."""
    taken = buffers(weights.hparams, setting)
    for n_gpu_layers in range(weights.hparams.n_layer + 1 if vram else 0, -1, -1):
        card, memory = needed(weights, taken, n_gpu_layers)
        if card <= vram and memory <= ram:
            return n_gpu_layers
    return None


def longest_context(weights: Weights, setting: Setting, vram: int, ram: int, n_gpu_layers: int | None = None) -> int:
    """Return the longest context that fits, in whole blocks of cells or the model's own (0: none).

    `n_gpu_layers` are the layers on the card (default: as many as fit).
    """
    low, high = 0, -(-weights.hparams.n_ctx // CELLS)
    while low < high:
        middle = (low + high + 1) // 2
        one = replace(setting, n_ctx=middle * CELLS)
        if n_gpu_layers is None:
            fits = most_layers(weights, one, vram, ram) is not None
        else:
            card, memory = needed(weights, buffers(weights.hparams, one), n_gpu_layers)
            fits = card <= vram and memory <= ram
        low, high = (middle, high) if fits else (low, middle - 1)
    return min(low * CELLS, weights.hparams.n_ctx)


def _row(name: str, weights: Weights, setting: Setting, there: tuple[int, int], n_gpu_layers: int | None) -> FitRow:
    """Compute one ftype's row."""
    hparams, (vram, ram) = weights.hparams, there
    best = most_layers(weights, setting, vram, ram) if n_gpu_layers is None else n_gpu_layers
    layers = min(best or 0, hparams.n_layer + 1)
    taken = buffers(hparams, setting)
    card, memory = needed(weights, taken, layers)
    return FitRow(
        ftype=name,
        bytes=weights.total,
        bpw=8 * weights.total / weights.n_weights,
        kv_bytes=taken.kv,
        compute_bytes=taken.compute,
        output_bytes=hparams.n_vocab * F32,
        repacked_bytes=sum(weights.repacked[: hparams.n_layer + 1 - max(layers, 1)])
        + (weights.output_repacked if layers == 0 else 0),
        n_gpu_layers=layers,
        vram_bytes=card,
        ram_bytes=memory,
        fits=card <= vram and memory <= ram,
        n_ctx_max=longest_context(weights, setting, vram, ram, None if n_gpu_layers is None else layers),
        layer_bytes=tuple(weights.layers),
    )
