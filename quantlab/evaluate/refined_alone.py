"""Refined bytes of single tensors, each as if only this tensor were quantized.

They tell what a tensor costs at a type in a refined file, one change at a time.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from quantlab.evaluate.engine import ExpertInputs
from quantlab.evaluate.engine.cpu import CpuEngine
from quantlab.evaluate.refine import auto_damping, calibration_tokens, check_plan, cpu_kind, digest_of
from quantlab.evaluate.refinement import Refinement, can_refine
from quantlab.evaluate.variants import Variant, output_name, refined_path
from quantlab.files.model import Model
from quantlab.quants.block_numbers import GRIDS
from quantlab.transform.plan import tensor_bytes
from quantlab.transform.refined import has_refined_bytes
from quantlab.transform.rules import layer_of

CHUNKS, SWEEPS = 64, 2  # as `quantlab.refine` has them


@contextmanager
def refined_alone(
    base: Model, text, imatrix: Mapping[str, np.ndarray], *, n_ctx: int, memory=None, progress: bool = True
) -> Iterator["RefinedAlone"]:
    """Yield a maker of refined bytes, whose folder exists inside the block."""
    tokens, _ = calibration_tokens(base, text, n_ctx, CHUNKS)
    with TemporaryDirectory(prefix="quantlab-", ignore_cleanup_errors=True) as folder:
        yield RefinedAlone(base, tokens, imatrix, Path(folder), memory, progress)


class RefinedAlone:
    """A maker of refined bytes of single tensors.

    Parameters
    ----------
    base : Model
    tokens : np.ndarray [shape=(n_chunks, n_ctx), dtype=int32]
        To refine with.
    imatrix : Mapping[str, np.ndarray]
        Tensor → weights per column, for experts that keep ordinary bytes.
    folder : Path
        Gets a file for each tensor and type.
    memory : str, int or None
    progress : bool

    Attributes
    ----------
    digest : str
        Everything that the bytes depend on, model, matrix and types aside.
    """

    def __init__(
        self, base: Model, tokens: np.ndarray, imatrix: Mapping[str, np.ndarray], folder: Path, memory, progress: bool
    ):
        self.base, self.tokens, self.imatrix = base, tokens, imatrix
        self.folder, self.memory, self.progress = folder, memory, progress
        said = [digest_of(tokens), SWEEPS, cpu_kind(), sorted(GRIDS)]
        self.digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def make(self, changes: Sequence[Mapping[str, str]]) -> None:
        """Write the bytes that changes need and that are not there, each a mapping of tensor to type; in one pass."""
        wanted = dict.fromkeys(pair for change in changes for pair in change.items())
        wanted = {
            (name, qtype): None
            for name, qtype in wanted
            if has_refined_bytes(self.base.tensor(name), qtype) and not refined_path(self.folder, name, qtype).exists()
        }
        if not wanted:
            return
        as_it_is = {tensor.name: tensor.qtype for tensor in self.base}
        types = dict.fromkeys(qtype for _, qtype in wanted)
        variants = [
            Variant(q, self.base, as_it_is | {name: qtype for name, qtype in wanted if qtype == q}, self.imatrix)
            for q in types
        ]
        with CpuEngine(self.base, self.tokens.shape[1]) as engine:
            check_plan(variants[0], self.tokens, SWEEPS, engine, self.memory, more=_stacks(variants[1:]))
            with tqdm(total=self.base.hparams.n_layer, unit="layer", desc="refining", disable=not self.progress) as bar:
                how = {"sweeps": SWEEPS, "damping": auto_damping(self.base, self.tokens), "bar": bar}
                _Pass(variants, self.tokens, engine, self.folder, **how).run(None)


def _stacks(variants: Sequence[Variant]) -> int:
    """Return the bytes of one layer's stacks of matrices in these variants, which are all kept until it is done."""
    found: Counter = Counter()
    for variant in variants:
        for tensor in variant.model:
            if len(tensor.shape) > 2 and variant.types[tensor.name] != tensor.qtype:
                found[layer_of(tensor.name)] += tensor_bytes(tensor.shape, variant.types[tensor.name])
    return max(found.values(), default=0)


class _Pass(Refinement):
    """One pass of the original stream, in which the tensors of several variants are refined."""

    def __init__(self, variants: Sequence[Variant], tokens: np.ndarray, engine: CpuEngine, folder: Path, **how):
        super().__init__(variants[0], tokens, engine, **how)
        self.variants, self.folder = variants, folder

    def _layer(self, index: int) -> None:
        layer = self.engine.load(lambda name: self.weights.get(self.base, f"blk.{index}.{name}"), index)

        def choose(field: str, inputs) -> None:
            self._choose_all([f"blk.{index}.{name}.weight" for name in layer.does.products[field]], inputs)

        self.engine.forward(layer, self.states.read(0, slice(0, len(self.tokens))), observe=choose)
        self.weights.forget()
        self.states.advance()

    def _output(self) -> None:
        norm, _ = self.weights.output(self.base)
        states = self.states.read(0, slice(0, len(self.tokens)))
        self._choose_all([output_name(self.model)], self.engine.output_inputs(norm, states))

    def _choose_all(self, names: Sequence[str], inputs) -> None:
        """Refine matrices of one field at every wanted type, by the second moments of their inputs."""
        wanted = [(variant, name) for variant in self.variants for name in names if can_refine(variant, name)]
        if isinstance(inputs, ExpertInputs):
            data = self._refine_stacks(wanted, inputs, lambda *_: None)
        else:
            found: Any = self._moments(names[0], inputs, None, None) if wanted else ()
            data = (self._refine(name, variant.types[name], *found) for variant, name in wanted)
        for (variant, name), bytes_ in zip(wanted, data, strict=True):
            np.save(refined_path(self.folder, name, variant.types[name]), bytes_)
