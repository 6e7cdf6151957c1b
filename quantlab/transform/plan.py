"""What a quantization will cost, before it starts: the bytes of every ftype, what falls back, memory, disk and time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import pandas as pd

from quantlab.files import bundled
from quantlab.quants import block_bytes, block_size, row_bytes
from quantlab.transform.mixture import FTYPES, RULES, Choice, choose_types

MIB = 1024**2


@dataclass(frozen=True)
class SizeRow:
    """One ftype's size: bytes of tensor data (header and padding aside) and bits per weight."""

    ftype: str
    bytes: int
    bpw: float


@dataclass(frozen=True)
class SizeTable:
    """The exact size of a model in every ftype.

    Attributes
    ----------
    model : str
        The shape's or the file's name.
    rules : str
        The rule set of the mixtures.
    n_weights : int
        Weights of all tensors, norms included.
    rows : tuple[SizeRow, ...]
        From the widest ftype to the narrowest.
    """

    model: str
    rules: str
    n_weights: int
    rows: tuple[SizeRow, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a table: ftype, bytes, bpw."""
        return pd.DataFrame([asdict(row) for row in self.rows])

    def to_json(self) -> str:
        """Return the table as JSON, sizes in bytes."""
        protocol = {"model": self.model, "rules": self.rules, "n_weights": self.n_weights}
        return json.dumps({"schema": 1, "protocol": protocol, "rows": [asdict(row) for row in self.rows]})

    def _shown(self) -> pd.DataFrame:
        frame = self.to_frame()
        frame.insert(1, "MiB", (frame["bytes"] / MIB).map("{:.2f}".format))
        frame.insert(2, "GiB", (frame["bytes"] / 1024**3).map("{:.3f}".format))
        frame["bpw"] = frame["bpw"].map("{:.4f}".format)
        return frame

    def __str__(self) -> str:
        title = f"{self.model}, {self.n_weights:,} weights, rules {self.rules}"
        return f"{title}\n{self._shown().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return self._shown().to_html(index=False)


def tensor_shapes(hparams) -> dict[str, tuple[int, ...]]:
    """Derive the name and shape of every tensor of a dense Llama from its hyper-parameters.

    Parameters
    ----------
    hparams : Hparams
        Needs ``n_vocab n_embd n_ff n_layer n_head n_head_kv``.

    Returns
    -------
    dict[str, tuple[int, ...]]
        GGUF name → shape in NumPy order, in the order in which a converter writes them.

    Examples
    --------
    >>> hparams = SimpleNamespace(n_vocab=32, n_embd=8, n_ff=16, n_layer=1, n_head=2, n_head_kv=1)
    >>> tensor_shapes(hparams)["blk.0.attn_v.weight"]
    (4, 8)
    """
    n_embd, n_ff = hparams.n_embd, hparams.n_ff
    n_kv = n_embd // hparams.n_head * hparams.n_head_kv
    layer = {
        "attn_norm": (n_embd,),
        "ffn_down": (n_embd, n_ff),
        "ffn_gate": (n_ff, n_embd),
        "ffn_up": (n_ff, n_embd),
        "ffn_norm": (n_embd,),
        "attn_k": (n_kv, n_embd),
        "attn_output": (n_embd, n_embd),
        "attn_q": (n_embd, n_embd),
        "attn_v": (n_kv, n_embd),
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (hparams.n_vocab, n_embd)}
    for i in range(hparams.n_layer):
        shapes.update({f"blk.{i}.{name}.weight": shape for name, shape in layer.items()})
    return shapes | {"output_norm.weight": (n_embd,), "output.weight": (hparams.n_vocab, n_embd)}


def sizes(shape_or_file: str | Path, *, rules: str = "current") -> SizeTable:
    """Compute the exact size of a model in every ftype, without any weights.

    Parameters
    ----------
    shape_or_file : str or Path
        A bundled shape's name ("llama-7b", "yi-34b", …), a bundled model's, a GGUF file or a checkpoint folder.
    rules : str
        "current" or "2023-12".

    Returns
    -------
    SizeTable
        Bytes of tensor data as llama-quantize's log adds them up. A file's table has a COPY row for the file as it is.

    Raises
    ------
    FileNotFoundError
        If there is neither a file nor a bundled shape of that name.
    ValueError
        If the rule set is not known.

    Examples
    --------
    >>> table = sizes("llama-7b", rules="2023-12").to_frame().set_index("ftype")
    >>> int(table.loc["Q4_K_M", "bytes"])
    4080263168
    """
    model, hparams, shapes, source = _look_up(shape_or_file)
    n_weights = sum(math.prod(shape) for shape in shapes.values())
    rows = []
    for ftype in FTYPES.values():
        if rules in RULES and rules not in ftype.rules or (ftype.name == "COPY" and source is None):
            continue
        choices = choose_types(hparams, shapes, ftype.name, rules=rules, source=source)
        n_bytes = sum(tensor_bytes(shapes[name], choice.qtype) for name, choice in choices.items())
        rows.append(SizeRow(ftype.name, n_bytes, n_bytes * 8 / n_weights))
    return SizeTable(model, rules, n_weights, tuple(rows))


def _look_up(shape_or_file: str | Path):
    """Return a model's name, hyper-parameters, shapes and, where there is a file, present types."""
    name = str(shape_or_file)
    if name in bundled.shapes():
        hparams = SimpleNamespace(**bundled.shape(name))
        return hparams.name, hparams, tensor_shapes(hparams), None
    from quantlab.files import model

    path = bundled.model_path(name)
    opened = model.open(path)
    shapes = {tensor.name: tensor.shape for tensor in opened}
    return path.name, opened.hparams, shapes, {tensor.name: tensor.qtype for tensor in opened}


def fallbacks(choices: Mapping[str, Choice], shapes: Mapping[str, tuple[int, ...]]) -> pd.DataFrame:
    """Account for the tensors whose rows did not fit the type that was wanted.

    Parameters
    ----------
    choices : Mapping[str, Choice]
        What `choose_types` returned.
    shapes : Mapping[str, tuple[int, ...]]
        GGUF tensor name → shape.

    Returns
    -------
    pd.DataFrame
        One row per group: ``columns`` (row length), ``wanted``, ``qtype``, ``tensors``, ``share`` (fraction of all
        weights), ``bpw_gained`` (bits per weight that the whole model grew by). Empty where nothing fell back.
    """
    total = sum(math.prod(shape) for shape in shapes.values())
    groups: dict[tuple, list[str]] = {}
    for name, choice in choices.items():
        if choice.qtype != choice.wanted:
            groups.setdefault((shapes[name][-1], choice.wanted, choice.qtype), []).append(name)
    rows = []
    for (columns, wanted, qtype), names in sorted(groups.items()):
        n_weights = sum(math.prod(shapes[name]) for name in names)
        gained = n_weights / total * (bits_per_weight(qtype) - bits_per_weight(wanted))
        rows.append((columns, wanted, qtype, len(names), n_weights / total, gained))
    return pd.DataFrame(rows, columns=["columns", "wanted", "qtype", "tensors", "share", "bpw_gained"])


def tensor_bytes(shape: tuple[int, ...], qtype: str) -> int:
    """Return the bytes of a tensor's data, padding aside."""
    return math.prod(shape[:-1]) * row_bytes(qtype, shape[-1])


def bits_per_weight(qtype: str) -> float:
    """Return the bits that one weight takes in `qtype`, scales included."""
    return 8 * block_bytes(qtype) / block_size(qtype)
