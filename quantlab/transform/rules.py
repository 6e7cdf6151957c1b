"""Rule sets of mixtures: the tensors that may be quantized, and the type that a ftype gives each.

Names and shapes of tensors decide, and a few hyper-parameters: any architecture can be quantized. Two sets are kept,
`current` and `2023-12` (llama.cpp 948ff137, which the published tables for LLaMA-7B belong to). A rule set counts
value and down projections while it goes from tensor to tensor, so its answers depend on the order of processing.

Source: src/llama-quant.cpp of llama.cpp (current), llama.cpp at 948ff137 (2023-12).
"""

import re
from collections.abc import Iterable, Mapping

from quantlab.arch import Hparams
from quantlab.quants.ggml_types import FALLBACK, block_size, ggml_type

# matrices that stay as they are: small, and touched by everything; any name that contains one of these
_KEPT = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj",
    "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight",
    *(f"time_mix_{part}.weight" for part in (
        "first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "decay_w2", "lerp_fused",
    )),
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
)  # fmt: skip
_KEPT_WHOLE = ("position_embd.weight", "token_types.weight")
_KEPT_OF = {
    "glm5-next": (
        "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight",
        "ssm_beta.weight", "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight",
    ),
}  # fmt: skip
# part of a name -> what it is to the rules; the first that fits counts
_CATEGORIES = {
    "attn_qkv.weight": "attn_qkv", "attn_kv_b.weight": "attn_kv_b", "attn_v.weight": "attn_v",
    "attn_k.weight": "attn_k", "attn_q.weight": "attn_q", "attn_output.weight": "attn_output",
    "ffn_up": "ffn_up", "ffn_gate": "ffn_gate", "ffn_down": "ffn_down",
}  # fmt: skip
_LIKE_V = ("attn_v", "attn_qkv", "attn_kv_b")
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
# layers of models whose values get more bits, as 8 heads share them
_LAYERS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}

# architectures of which whole files were compared with llama-quantize's, see tests/golden/write_families.py
COMPARED = ("llama", "qwen2", "qwen3", "qwen3moe", "qwen3next", "qwen35", "qwen35moe", "gemma2", "gemma3", "gemma4")
COMPARED += ("gpt-oss", "phi3", "granite", "olmo2", "glm4", "cohere2", "deepseek2", "mistral3", "smollm3")

_SMALLEST = ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M", "IQ2_S", "IQ2_M")  # ftypes with rules of their own
_IQ2_S = ("IQ2_S", "IQ2_M")
_EMBEDDING_TYPES: dict[str, str] = dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"), "Q2_K")
_EMBEDDING_TYPES |= dict.fromkeys((*_IQ2_S, "IQ3_XXS"), "IQ3_S") | dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K")
_OUTPUT_OF_EIGHT = ("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M")
_OUTPUT_OF_EIGHT += ("IQ4_XS",)


def layer_of(name: str) -> int:
    """Return the layer number in a tensor's name, -1 for a tensor of no layer."""
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def in_file_order(names: Iterable[str]) -> list[str]:
    """Sort tensor names as llama-quantize writes them: tensors of no layer first, then by layer, then by name."""
    return sorted(names, key=lambda name: (layer_of(name), name))


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor has more than one row that counts as a dimension."""
    return any(n > 1 for n in shape[:-1])


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without leading ones, which GGUF does not store."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def is_quantizable(name: str, shape: tuple[int, ...], arch: str = "") -> bool:
    """Tell whether the current rules quantize a tensor: a matrix called `…weight`, not a small special one.

    Examples
    --------
    >>> is_quantizable("blk.0.ffn_down_exps.weight", (8, 64, 32)), is_quantizable("blk.0.ffn_gate_inp.weight", (8, 64))
    (True, False)
    """
    if not is_matrix(shape) or not name.endswith("weight") or name in _KEPT_WHOLE:
        return False
    return not any(part in name for part in (*_KEPT, *_KEPT_OF.get(arch, ())))


def category(name: str) -> str:
    """Return a tensor's category in the rules (default: `other`)."""
    if name == "output.weight":
        return "output"
    if name in EMBEDDINGS:
        return "embedding"
    return next((kind for part, kind in _CATEGORIES.items() if part in name), "other")


def needs_imatrix(name: str, qtype: str, ftype: str = "") -> bool:
    """Tell whether llama-quantize refuses a tensor's type without an importance matrix (`tensor_requires_imatrix`).

    Examples
    --------
    >>> needs_imatrix("blk.0.attn_q.weight", "IQ2_S"), needs_imatrix("output.weight", "IQ2_S")
    (True, False)
    """
    record = ggml_type(qtype)
    if name in (*EMBEDDINGS, "output.weight"):
        return not record.encoder
    return record.needs_imatrix or (qtype == "Q2_K" and ftype == "Q2_K_S")


def more_bits(i: int, n: int) -> bool:
    """Tell whether layer i of n gets more bits: the first and the last eighth, and every third between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


class CurrentRules:
    """The rules of llama-quantize today, for one ftype and one model.

    Parameters
    ----------
    ftype : str
        Name of the mixture.
    hparams : Hparams
    shapes : Mapping[str, tuple[int, ...]]
        Of all tensors.
    imatrix : bool
        Whether there is an importance matrix; some rules ask.
    """

    fallback = FALLBACK

    def __init__(self, ftype: str, hparams: Hparams, shapes: Mapping[str, tuple[int, ...]], imatrix: bool):
        self.ftype, self.imatrix, self.arch = ftype, imatrix, hparams.arch
        self.n_layer, self.n_expert = hparams.n_layer_all, hparams.n_expert
        first = hparams.at(0) if hparams.n_layer else hparams
        self.gqa = first.n_head // first.n_head_kv if first.n_head_kv else 0
        self.is_70b = hparams.n_layer == _LAYERS_OF_70B.get(hparams.arch)
        if hparams.arch == "llama":
            self.is_70b = self.is_70b and first.n_head != first.n_head_kv and hparams.n_expert != 8
        self.tied = "output.weight" not in shapes
        self.n_attn_v = sum(category(name) in _LIKE_V for name in shapes)
        self.i_attn_v = self.i_ffn_down = self.i_ffn_gate = self.i_ffn_up = 0

    @staticmethod
    def order(names: Iterable[str]) -> list[str]:
        """Sort names in the order of processing."""
        return in_file_order(names)

    def is_quantizable(self, name: str, shape: tuple[int, ...]) -> bool:
        """Tell whether a tensor may be quantized at all."""
        return is_quantizable(name, shape, self.arch)

    def wanted(self, name: str, shape: tuple[int, ...], base: str, output_type: str | None) -> str:
        """Return the type that the mixture gives to a tensor, and count its kind."""
        kind = category(name)
        if self.arch == "glm5-next" and any(part in name for part in ("attn_q_a", "attn_q_b", "nextn.eh_proj")):
            return "Q8_0"
        if kind == "output" or (self.tied and kind == "embedding"):
            return output_type or self._output(base, shape[-1])
        if self.ftype == "MXFP4_MOE":
            is_stack = len(shape) > 2 and shape[-3] > 1
            return "MXFP4" if is_stack and (self.arch != "bailingmoe3" or kind.startswith("ffn_")) else "Q8_0"
        if kind == "embedding":
            return _EMBEDDING_TYPES.get(self.ftype, base)
        if self.ftype in _SMALLEST:
            return self._smallest(kind, base)
        if kind in _LIKE_V:
            return self._attn_v(base)
        if kind in ("attn_k", "attn_q"):
            if kind == "attn_k" and self.n_expert == 8:
                return "Q8_0"
            return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(self.ftype, base)
        if kind == "attn_output":
            return self._attn_output(base)
        if kind == "ffn_down":
            return self._ffn_down(base, name)
        if kind in ("ffn_gate", "ffn_up"):
            return self._gate_or_up(base, kind, name)
        return base

    def _output(self, base: str, n_per_row: int) -> str:
        if self.ftype == "MXFP4_MOE" or self.arch == "falcon" or base == "Q8_0" or n_per_row % block_size(base):
            return "Q8_0"
        return "Q5_K" if self.ftype in (*_SMALLEST, "IQ3_XXS") else "Q6_K"

    def _smallest(self, kind: str, base: str) -> str:
        """Return the type of a tensor in files of one and two bits."""
        better = "IQ3_S" if self.ftype in _IQ2_S else "Q2_K"
        if kind in _LIKE_V:
            self.i_attn_v += 1
            return "Q4_K" if self.gqa >= 4 or self.n_expert >= 4 else better
        if kind == "attn_k" and self.n_expert == 8:
            return "Q4_K"
        if kind == "ffn_down":
            self.i_ffn_down += 1
            return better if self.i_ffn_down - 1 < self.n_layer // 8 else base
        if kind == "attn_output":
            if self.n_expert == 8:
                return "Q5_K"
            return {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}.get(self.ftype, base)
        return base

    def _attn_v(self, base: str) -> str:
        i, shared = self.i_attn_v, self.gqa >= 4
        self.i_attn_v += 1
        qtype = base
        match self.ftype:
            case "Q2_K":
                qtype = "Q4_K" if shared else "Q3_K"
            case "Q2_K_S" | "IQ3_XS" | "IQ3_S" if shared:
                qtype = "Q4_K"
            case "IQ3_XXS":
                qtype = "Q4_K" if shared else "IQ3_XXS" if self.imatrix else "IQ3_S"
            case "IQ3_M":
                qtype = "Q4_K"
            case "Q3_K_M":
                qtype = "Q5_K" if i < 2 else "Q4_K"
            case "Q3_K_L":
                qtype = "Q5_K"
            case "IQ4_NL" | "IQ4_XS" if shared:
                qtype = "Q5_K"
            case "Q4_K_M" | "Q5_K_M" if more_bits(i, self.n_attn_v):
                qtype = "Q6_K"
            case "Q4_K_S" if i < 4:
                qtype = "Q5_K"
        if self.is_70b and qtype in ("Q3_K", "Q4_K"):
            qtype = "Q5_K"
        return "Q8_0" if self.n_expert == 8 else qtype

    def _attn_output(self, base: str) -> str:
        if self.arch == "falcon":
            return "Q4_K" if self.ftype == "Q3_K_L" else base
        if self.n_expert == 8:
            return "Q5_K" if self.ftype in _OUTPUT_OF_EIGHT else base
        types = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
        return types.get(self.ftype, base)

    def _ffn_down(self, base: str, name: str) -> str:
        i, n = self._layer(name, self.i_ffn_down), self.n_layer
        self.i_ffn_down += 1
        is_falcon, is_first = self.arch == "falcon", i < n // 8
        match self.ftype:
            case "Q2_K":
                return "Q3_K"
            case "Q2_K_S" if is_first:
                return "Q4_K"
            case "IQ3_XXS" if not self.imatrix:
                return "Q4_K" if is_first else "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if i < n // 16 else "Q4_K" if not is_falcon or more_bits(i, n) else "Q3_K"
            case "IQ3_M" if is_first or (self.n_expert == 8 and more_bits(i, n)):
                return "Q4_K"
            case "Q3_K_L":
                return "Q4_K" if is_falcon else "Q5_K"
            case "Q4_K_M" if is_falcon:
                return "Q6_K" if i < n // 16 else "Q5_K" if more_bits(i, n) else "Q4_K"
            case "Q4_K_M" | "Q5_K_M" if more_bits(i, n):
                return "Q6_K"
            case "IQ4_NL" | "IQ4_XS" if is_first and not self.imatrix:
                return "Q5_K"
            case "Q4_K_S" if is_first and not is_falcon:
                return "Q5_K"
            case "Q4_0" | "Q5_0" if is_first and self.imatrix:
                return "Q4_1" if self.ftype == "Q4_0" else "Q5_1"
        return base

    def _gate_or_up(self, base: str, kind: str, name: str) -> str:
        counter = f"i_{kind}"
        i = self._layer(name, getattr(self, counter))
        setattr(self, counter, getattr(self, counter) + 1)
        is_middle = self.n_layer // 8 <= i < 7 * self.n_layer // 8
        return "IQ3_XXS" if self.ftype == "IQ3_XS" and is_middle else base

    def _layer(self, name: str, count: int) -> int:
        """Return a feed-forward tensor's layer number, counted or (mixture of experts) from its name."""
        if self.n_expert <= 1:
            return count
        layer = layer_of(name)
        if not 0 <= layer < self.n_layer:
            raise ValueError(
                f"{name}: layer={layer}, must be within 0:{self.n_layer}, the layers in the metadata. "
                f"Check block_count in the metadata."
            )
        return layer


class Rules2023(CurrentRules):
    """The rules of December 2023, for one ftype and one model; values as by `CurrentRules`, but for shared heads."""

    fallback = FALLBACK | {"Q3_K": "Q4_1"}
    architectures = ("llama", "falcon", "gpt2", "gptj", "gptneox", "mpt", "baichuan", "starcoder", "persimmon")
    architectures += ("refact", "bloom", "stablelm", "qwen")

    def __init__(self, ftype: str, hparams: Hparams, shapes: Mapping[str, tuple[int, ...]], imatrix: bool):
        if hparams.arch not in self.architectures:
            known = ", ".join(self.architectures)
            raise ValueError(
                f"architecture={hparams.arch}, must be one of {known} under rules=2023-12. Use the current rules."
            )
        stacked = next((name for name, shape in shapes.items() if len(shape) > 2 and shape[-3] > 1), None)
        if stacked is not None:
            raise ValueError(f"{stacked}: has 3 dimensions, which rules=2023-12 do not know. Use the current rules.")
        self.ftype, self.is_falcon, self.n_expert = ftype, hparams.arch == "falcon", hparams.n_expert
        self.is_70b = hparams.arch == "llama" and hparams.n_layer == 80 and hparams.n_head != hparams.n_head_kv
        self.n_attn_v = sum("attn_v.weight" in name or "attn_qkv.weight" in name for name in shapes)
        self.n_ffn_down = sum("ffn_down.weight" in name for name in shapes)
        self.gqa = self.i_attn_v = self.i_ffn_down = 0

    @staticmethod
    def order(names: Iterable[str]) -> list[str]:
        """Return names in the order of processing: that of the input file."""
        return list(names)

    def is_quantizable(self, name: str, shape: tuple[int, ...]) -> bool:
        """Tell whether a tensor may be quantized at all."""
        return is_matrix(shape) and name.endswith("weight") and "ffn_gate_inp.weight" not in name

    def wanted(self, name: str, shape: tuple[int, ...], base: str, output_type: str | None) -> str:
        """Return the type that the mixture gives to a tensor, and count its kind."""
        if name == "output.weight":
            return output_type or ("Q8_0" if base == "Q8_0" or self.is_falcon or shape[-1] % 256 else "Q6_K")
        if "attn_v.weight" in name:
            return self._attn_v(base)
        if "attn_k.weight" in name and self.n_expert == 8:
            return "Q8_0"
        if "ffn_down.weight" in name:
            return self._ffn_down(base, name)
        if "attn_output.weight" in name:
            types = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
            return ({"Q3_K_L": "Q4_K"} if self.is_falcon else types).get(self.ftype, base)
        if "attn_qkv.weight" in name:
            return {"Q3_K_M": "Q4_K", "Q3_K_L": "Q4_K", "Q4_K_M": "Q5_K", "Q5_K_M": "Q6_K"}.get(self.ftype, base)
        if self.ftype == "Q2_K" and ("ffn_gate.weight" in name or "ffn_up.weight" in name):
            return "Q3_K"
        return base

    def _ffn_down(self, base: str, name: str) -> str:
        i, n = self.i_ffn_down, self.n_ffn_down
        self.i_ffn_down += 1
        match self.ftype:
            case "Q2_K":
                return "Q3_K"
            case "Q3_K_M":
                return "Q5_K" if i < 2 else "Q4_K" if not self.is_falcon or more_bits(i, n) else "Q3_K"
            case "Q3_K_L":
                return "Q4_K" if self.is_falcon else "Q5_K"
            case "Q4_K_M" if self.is_falcon:
                return "Q6_K" if i < 2 else "Q5_K" if more_bits(i, n) else "Q4_K"
            case "Q4_K_M" | "Q5_K_M" if more_bits(i, n):
                return "Q6_K"
            case "Q4_K_S" if i < 4 and not self.is_falcon:
                return "Q5_K"
        return base


RULE_SETS = {"current": CurrentRules, "2023-12": Rules2023}
