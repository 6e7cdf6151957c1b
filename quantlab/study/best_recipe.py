"""The result of choosing: a type for every tensor, what it was chosen by, and what it was measured to do."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from quantlab.files.model import Model
from quantlab.files.output import beside, check_output, is_report, is_stream, replacing
from quantlab.result import Result
from quantlab.transform.job import FLOATS
from quantlab.transform.mixture import Recipe


@dataclass(frozen=True, repr=False)
class BestRecipe(Result, Recipe):
    """The recipe with the least predicted damage under a size limit.

    Attributes
    ----------
    types : dict[str, str]
        GGUF tensor name → ggml type; tensors that are not in it stay as they are.
    rows : tuple of dict
        One per group: `group`, `layer`, `kind`, `qtype`, `n_weights`, `bytes`, `delta_kld`, `error`.
    bytes, limit : int
        Tensor data of the whole model, header and padding aside, and what was allowed.
    n_weights : int
        Weights of the whole model.
    predicted : float or None
        KL divergence from the base on the calibration text, nats per token: that of the sensitivity's starting point
        and all `delta_kld`; None where no damage was measured.
    ftype : str
        The mixture whose size was asked for, else the next in size: what llama-quantize is told beside the recipe, and
        what the file calls itself.
    provenance : dict
        What it was made from: calibration, criterion, rule set, constraints.
    measured : dict or None
        Of a recipe of `quantlab.exchange`: the divergence on `chunks` of the calibration text `before` and `after` the
        exchanges (`after_se`), the number of exchanges `tried`, and the `steps` that were kept.
    """

    rows: tuple[dict, ...]
    bytes: int
    limit: int
    n_weights: int
    predicted: float | None
    ftype: str
    provenance: dict
    measured: dict | None = None
    _look = {"na_rep": ""}
    _indent = 1

    @property
    def name(self) -> str:
        """Name in comparisons, with the criterion if it is not the default."""
        criterion = self.provenance.get("criterion", "kld")
        return "recipe" if criterion == "kld" else f"recipe by {criterion}"

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * self.bytes / self.n_weights

    def _document(self) -> dict[str, Any]:
        figures = {"bytes": self.bytes, "limit": self.limit, "bpw": self.bpw, "predicted_kld": self.predicted}
        figures |= {"measured_kld": self.measured and self.measured["after"], "exchanges": self.measured}
        return {"protocol": self.provenance | figures | {"ftype": self.ftype}, "rows": self.rows}

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the recipe as a ``--tensor-type-file``, and its origin into ``<path>.json``.

        Raises
        ------
        FileExistsError
            If one of the two exists and `overwrite` is false; an older report may always be replaced.
        """
        path = Path(path)
        origin = beside(path, ".json")
        if is_stream(path):
            return super().save(path)
        check_output(origin, overwrite=overwrite, own=is_report)
        super().save(path, overwrite=overwrite)
        with replacing(origin, overwrite=overwrite, own=is_report) as part:
            part.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    def command(
        self,
        path: str | Path,
        source: str = "model.gguf",
        imatrix: str | Path | None = None,
        text=None,
        *,
        requantize: bool = False,
    ) -> str:
        """Return the call that applies the recipe in `path`: of llama-quantize, or of quantlab for refined bytes.

        `requantize` says that it changes the type of quantized tensors (see `requantizes`).
        """
        options = ["--allow-requantize"] * requantize + (["--imatrix", str(imatrix)] if imatrix else [])
        if self.provenance["calibration"].get("refined"):
            words = ["quantlab", "refine", source, self.ftype, "--recipe", str(path), "-f"]
            return shlex.join([*words, str(text or self.provenance["calibration"]["text"]), *options])
        target = f"{Path(source).stem}-{Path(path).stem}.gguf"
        return shlex.join(["llama-quantize", *options, "--tensor-type-file", str(path), source, target, self.ftype])

    def requantizes(self, base: Model) -> bool:
        """Tell whether the recipe changes the type of a tensor that is quantized in `base`, such as MXFP4 experts."""
        return any(base.tensor(name).qtype not in (*FLOATS, qtype) for name, qtype in self.types.items())

    def _lines(self) -> list[str]:
        size = f"{self.bytes} of {self.limit} bytes, {self.bpw:.4f} bits per weight"
        if self.predicted is None:
            return [f"{size}, weighted error {sum(row['error'] for row in self.rows):.6g}"]
        lines = [f"{size}, predicted KLD {self.predicted:.5f}"]
        if self.measured is None:
            return lines
        before, after = self.measured["before"], self.measured["after"]
        steps = f"{self.measured['tried']} exchanges tried, {len(self.measured['steps'])} steps kept"
        chunks = f"on {self.measured['chunks']} chunks"
        return [f"{lines[0]}, measured {after:.5f}", f"{steps}: measured KLD {before:.5f} → {after:.5f} {chunks}"]

    def _shown(self) -> pd.DataFrame:
        """Return the types by layer and kind, if the groups are single tensors."""
        frame = self.to_frame()
        if frame["group"].nunique() == len(self.types) and frame["layer"].notna().all():
            return frame.pivot(index="layer", columns="kind", values="qtype")
        return frame.set_index("group")[["qtype", "bytes", "error" if self.predicted is None else "delta_kld"]]
