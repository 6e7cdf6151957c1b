"""The weights of a layer in the CPU engine's form."""

from dataclasses import dataclass

import numpy as np

from quantlab import arch
from quantlab.evaluate.engine import Stored


@dataclass(frozen=True)
class Matrix:
    """One or several weight matrices over the same input, side by side in one product.

    Attributes
    ----------
    parts : tuple
        Of each matrix what `CpuEngine.pack` made of it.
    widths : tuple of int
        Of each matrix its rows: columns of the product.
    """

    parts: tuple
    widths: tuple[int, ...]

    @property
    def n_out(self) -> int:
        """Columns of the product."""
        return sum(self.widths)

    def one(self, index: int) -> "Matrix":
        """Return one of the matrices."""
        return Matrix(self.parts[index : index + 1], self.widths[index : index + 1])


@dataclass
class LayerWeights:
    """The weights of one layer.

    Attributes
    ----------
    matrices : dict[str, Matrix]
        By field of the layer's description.
    biases : dict[str, np.ndarray]
        By field, where there is one.
    norms : dict[str, np.ndarray]
        By field, where there is one.
    vectors : dict[str, np.ndarray]
        What else there is, by field.
    experts : dict[str, list of Stored]
        The matrices of experts, stacked, by field.
    expert_memory : dict[str, np.ndarray]
        Where those of one expert are unpacked.
    does : Layer
        What the layer does.
    hparams : Hparams
        This layer's.
    index : int
        Which layer.
    """

    matrices: dict[str, Matrix]
    biases: dict[str, np.ndarray]
    norms: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]
    experts: dict[str, list[Stored]]
    expert_memory: dict[str, np.ndarray]
    does: arch.Layer
    hparams: arch.Hparams
    index: int


@dataclass(frozen=True)
class Output:
    """Norm and matrix after the last layer."""

    norm: np.ndarray
    matrix: Matrix
