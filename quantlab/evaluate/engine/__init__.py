"""Engines: each computes whole layers in one kind of arithmetic on one kind of device.

An engine is a class in a file of this folder that derives from `Engine`. It is found by the modes and devices that it
names. It owns the form of its weights, its scratch memory, and its estimate of time and memory; the pass over a model
(`forward_pass`) knows only what is written here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from quantlab import quants

if TYPE_CHECKING:
    from quantlab.evaluate.budget import Budget


@dataclass(frozen=True)
class Stored:
    """A stored tensor.

    Attributes
    ----------
    data : np.ndarray
        As `LazyTensor.load` and `quants.quantize` give it: floats of the tensor's shape, or bytes.
    qtype : str
    shape : tuple of int
    is_expert : bool
        Whether this is one matrix of a stack.
    """

    data: np.ndarray
    qtype: str
    shape: tuple[int, ...]
    is_expert: bool = False

    def floats(self, rows: slice = slice(None)) -> np.ndarray:
        """Return some rows as float32 (already float32: a view)."""
        data = self.data[rows]
        if data.dtype == np.float32:
            return data
        shape = (len(data), *self.shape[1:]) if len(self.shape) > 1 else self.shape
        return quants.dequantize(data.view(np.uint8), self.qtype, shape)

    def expert(self, index: int) -> Stored:
        """Return one matrix of a stack."""
        return Stored(self.data[index], self.qtype, self.shape[1:], is_expert=True)


@dataclass(frozen=True)
class ExpertInputs:
    """Inputs of the products of all experts of a layer.

    Attributes
    ----------
    x : np.ndarray [shape=(n, n_in)]
        Rows, in the engine's form.
    rows : np.ndarray [shape=(n_seen,), dtype=int64]
        Expert by expert the rows of `x` that it sees.
    ends : np.ndarray [shape=(n_expert + 1,), dtype=int64]
        Expert e sees `rows[ends[e] : ends[e + 1]]`.
    """

    x: Any
    rows: np.ndarray
    ends: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Number of rows of each expert."""
        return np.diff(self.ends)


@dataclass(frozen=True)
class Choice:
    """A choice of engine and device as plain data, for other processes; call it to get the engine."""

    engine: type[Engine]
    mode: str
    device: str  # one of the engine's devices
    precision: str  # how products are computed
    hardware: str = ""  # name of the card
    options: Mapping[str, Any] = field(default_factory=dict)  # what the engine is made with, beside model and `n_ctx`
    versions: Mapping[str, str] = field(default_factory=dict)  # package → version, of what only this engine uses

    def __call__(self, model, n_ctx: int) -> Engine:
        return self.engine(model, n_ctx, **self.options)  # pyright: ignore[reportCallIssue]

    @property
    def place(self) -> str:
        """The device, with the card's name."""
        return f"{self.device}{self.hardware and f' ({self.hardware})'}"

    @property
    def described(self) -> str:
        """The place, and the versions that only this engine depends on."""
        return ", ".join([self.place, *(f"{package} {version}" for package, version in self.versions.items())])

    def recorded(self, protocol):
        """Return the protocol with device, precision and versions."""
        versions = {**protocol.versions, **self.versions}
        return replace(protocol, device=self.place, precision=self.precision, versions=versions)


def joined(biases: Sequence[Stored | None], matrices: Sequence[Stored]) -> np.ndarray:
    """Join the biases of matrices as float32 (no bias: zeros)."""
    pairs = zip(biases, matrices, strict=True)
    return np.concatenate([np.zeros(m.shape[:-1], np.float32) if b is None else b.floats() for b, m in pairs], -1)


# `read(name)` gives a tensor of one layer by its name there, such as `ffn_down.weight`; None where there is none
Read = Callable[[str], Stored | None]


def stacked(parts: Sequence[Stored]) -> list[Stored]:
    """Return matrices and all those of stacks in one list."""
    return [one for part in parts for one in (_each(part) if len(part.shape) > 2 else [part])]


def _each(stack: Stored) -> list[Stored]:
    """Return the matrices of a stack."""
    return [stack.expert(i) for i in range(stack.shape[0])]


def needed(read: Read, name: str) -> Stored:
    """Return a tensor that no layer is without."""
    stored = read(name)
    if stored is None:
        raise ValueError(f"{name}: missing, the layer needs it. Convert the model again.")
    return stored


# `observe(field, inputs)` sees the inputs of a product; it may return `read` for new weights of that product
Observe = Callable[[str, Any], Read | None]


class Engine(ABC):
    """The base class of engines, which compute the layers of one model.

    Use as a context manager. The fields of a layer's products are those of its description: `attn_qkv`,
    `attn_output`, `ffn_in`, `ffn_down`; the product after the last layer is `output`.

    Parameters
    ----------
    model : Model
        Gives hyper-parameters and what belongs to no layer, such as `rope_freqs.weight`.
    n_ctx : int
        Tokens of a chunk.
    """

    modes: ClassVar[tuple[str, ...]]
    devices: ClassVar[tuple[str, ...]]
    ahead: int = 0  # layers that may be loaded, by another thread, while one is computed

    @classmethod
    def automatic(cls) -> str | None:
        """Return the device that `auto` chooses (None: this engine has none on this machine)."""
        return cls.devices[0]

    @classmethod
    def choose(cls, mode: str, device: str, device_memory: str | int | None) -> Choice:
        """Return the engine's choice for `mode` on `device`.

        Raises
        ------
        ValueError, ImportError, OSError
            If the device, or what drives it, is not there.
        """
        if device_memory is not None:
            raise ValueError(
                f"device_memory={device_memory}, is for graphics cards, but the device is {device}. "
                f"Give memory instead."
            )
        return Choice(cls, mode, device, "float32" if mode == "float" else mode)

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *exc): ...

    @abstractmethod
    def plan(
        self, variants: Sequence, windows, memory: str | int | None, keep_states: bool, observed: bool = False
    ) -> Budget:
        """Return the `Budget` of a pass over `variants`, cut to stay within `memory`.

        Raises
        ------
        ValueError
            If the pass does not fit.
        """

    def empty_states(self, shape: tuple[int, ...]) -> Any:
        """Return an array for hidden states in memory, in this engine's best place and form."""
        return np.empty(shape, np.float32)

    def wait(self) -> None:
        """Wait until all work given to `forward` is done."""
        return None

    def embed(self, table: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the hidden states [*places.shape, n_embd] before the first layer.

        `table` holds those of the tokens that occur, float32; `places` says which of its rows each token has.
        """
        return table[places]

    @abstractmethod
    def load(self, read: Read, index: int) -> Any:
        """Return the weights of layer `index` in this engine's form, valid until the next call.

        What the layer does with them: `layer_at` of its architecture, and the model's hyper-parameters `at` the index.
        """

    @abstractmethod
    def forward(self, layer: Any, states: np.ndarray, first: int = 0, observe: Observe | None = None) -> None:
        """Apply a layer in place.

        Parameters
        ----------
        layer
            What `load` returned.
        states : np.ndarray [shape=(n_chunks, n_ctx, n_state), dtype=float32, C-contiguous]
        first : int
            Position of each chunk from which on the result is wanted.
        observe : callable, optional
            Called before each product, with its field and its inputs [n_chunks * n_ctx, n_in] in this engine's form,
            for experts `ExpertInputs`, in the order of the layer. What it returns replaces the weights of this product
            in `layer`.
        """

    @abstractmethod
    def load_output(self, norm: Stored, matrix: Stored) -> Any:
        """Return the weights after the last layer in this engine's form, and release the layers' weights."""

    @abstractmethod
    def output_inputs(self, norm: Stored, states: np.ndarray) -> Any:
        """Return the inputs [-1, n_embd] of the product `output`, in this engine's form."""

    @abstractmethod
    def logits(self, output: Any, states: np.ndarray) -> np.ndarray:
        """Return the logits [*states.shape[:-1], n_vocab, dtype=float32]."""

    @abstractmethod
    def score(self, outputs: Sequence, states: Sequence[np.ndarray], targets: np.ndarray) -> list:
        """Score positions of some chunks for the base (first) and some variants.

        Parameters
        ----------
        outputs : sequence
            What `load_output` returned, of each.
        states : sequence of np.ndarray [shape=(n_chunks, n_scored, n_embd), dtype=float32]
            Hidden states after the last layer.
        targets : np.ndarray [shape=(n_chunks, n_scored), dtype=int32]

        Returns
        -------
        list of TokenScores
            Of each, compared with the base.
        """

    @abstractmethod
    def arithmetic(self) -> str:
        """Return everything that the last bits of results depend on, apart from model and text."""

    @abstractmethod
    def column_squares(self, inputs: Any) -> np.ndarray:
        """Return the sums of squares of each column of the inputs of a product.

        Returns
        -------
        np.ndarray [shape=(1, n_in) or, for `ExpertInputs`, (n_expert, n_in), dtype=float64]
        """


@cache
def engines() -> tuple[type[Engine], ...]:
    """Return all engines, in the order of their files."""
    modules = [import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__)]
    return tuple(
        item
        for module in modules
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Engine) and item.__module__ == module.__name__
    )


def find(mode: str, device: str = "cpu", device_memory: str | int | None = None) -> Choice:
    """Return the engine that computes in `mode` on `device`.

    Parameters
    ----------
    mode : str
    device : str
        `auto` takes a graphics card where the extra `gpu` and a card are there, and the CPU elsewhere.
    device_memory : str, int or None
        Memory of the card to stay within.

    Raises
    ------
    ValueError
        If there is none.
    ImportError, OSError
        If the device lacks its package, its driver or itself.

    Examples
    --------
    >>> find("float").engine.__name__, find("ggml-cpu").engine.__name__
    ('CpuEngine', 'GgmlEngine')
    """
    here = [engine for engine in engines() if mode in engine.modes]
    if not here:
        raise ValueError(f"mode={mode}, must be one of {', '.join(_names(engines(), 'modes'))}. Choose one of them.")
    if device == "auto":
        there = [name for engine in here if (name := engine.automatic())]
        if not there:
            raise ValueError(f"mode={mode}, needs a graphics card, none is usable here. Choose mode=float.")
        device = min(there, key=lambda name: name == "cpu")
    for engine in here:
        if device in engine.devices:
            return engine.choose(mode, device, device_memory)
    others = "" if mode == "float" else " Or choose mode=float."
    raise ValueError(f"device={device}, must be one of {', '.join(_names(here, 'devices'))} in mode {mode}.{others}")


def _names(of: Sequence[type[Engine]], kind: str) -> list[str]:
    """Return the modes or devices of some engines, each once."""
    return list(dict.fromkeys(name for engine in of for name in getattr(engine, kind)))
