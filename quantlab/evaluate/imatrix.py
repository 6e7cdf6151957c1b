"""The importance matrix: how large the inputs of every weight matrix are, column by column, on a text.

During a forward pass over the text, the inputs x of each product with weights are squared and added up per column:

    text ─ chunks ─ embeddings ─ layer 0 ─ layer 1 ─ … ─ last layer
                                   │ Σ x² of q,k,v · attn_output · gate,up · ffn_down

All tokens of every chunk count, those too that a perplexity would not score. q, k and v have the same inputs, and so
have gate and up.

Source: llama-imatrix (tools/imatrix/imatrix.cpp of llama.cpp), whose chunks, columns and counts these are.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numba import njit
from tqdm.auto import tqdm

from quantlab.evaluate import fused
from quantlab.evaluate.budget import fit
from quantlab.evaluate.check import check_model
from quantlab.evaluate.dense import Matrix, Workers
from quantlab.evaluate.llama import MODES, Layer, Llama, layer_weights
from quantlab.evaluate.protocol import Windows, cut
from quantlab.evaluate.sweep import Sweep
from quantlab.evaluate.variants import as_is
from quantlab.files.bundled import model_path, read_text
from quantlab.files.imatrix_file import ImportanceMatrix, merge, read_imatrix
from quantlab.files.model import Model
from quantlab.files.model import open as open_model
from quantlab.files.progress import announce

# field of a Layer -> the tensors that its product stacks
KINDS = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "attn_output": ("attn_output",),
    "gate_up": ("ffn_gate", "ffn_up"),
    "ffn_down": ("ffn_down",),
}


def imatrix(
    model,
    text="sampled",
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    process_output: bool = False,
    in_files: Sequence[str | Path | ImportanceMatrix] = (),
    mode: str = "float",
    memory: str | int | None = None,
    progress: bool = True,
) -> ImportanceMatrix:
    """Collect the importance matrix of a model on a text.

    Parameters
    ----------
    model : str, Path or Model
        A GGUF file, a checkpoint folder, a bundled model's name, or an opened model; best the unquantized one.
    text : str, Path or Text
        What to calibrate on: a file, a bundled text's name, or a name that `datasets` loads.
    n_ctx : int
        Tokens per chunk.
    chunks : int, optional
        Chunks at most; default: the whole text.
    process_output : bool
        Collect for `output.weight` too.
    in_files : sequence of str, Path or ImportanceMatrix
        Matrices of the same model to be added to the new one.
    mode : str
        `float`: activations in float32. `ggml-cpu`: rounded before each product as ggml's CPU code does.
    memory : str or int, optional
        Memory to stay within, such as `8GiB`; default: three quarters of the machine's.
    progress : bool
        Say what the run will take, and show a progress bar.

    Returns
    -------
    ImportanceMatrix
        Sums are added up in float64 and rounded once; they do not depend on the number of threads.

    Raises
    ------
    FileNotFoundError
        If model, text or a file to be added is not there.
    ValueError
        If the architecture is not known here, the text is too short, the memory too small, an option out of range, a
        matrix to be added is of another model, or an activation is not finite.

    Examples
    --------
    >>> matrix = imatrix("tiny", chunks=1, progress=False)
    >>> matrix.sums["blk.0.ffn_down.weight"].shape, matrix.counts["blk.0.ffn_down.weight"]
    ((1, 512), array([512.], dtype=float32))
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode}, must be one of {', '.join(MODES)}.")
    opened = model if isinstance(model, Model) else open_model(model_path(model))
    check_model(opened)
    text = read_text(text)
    windows, _ = cut(text, opened.vocab, n_ctx=n_ctx, chunks=chunks, name="llama.cpp", mode=mode, rules="current")
    windows = Windows(windows.tokens, windows.tokens, 0)  # every position counts
    earlier = [read_imatrix(item) if isinstance(item, str | Path) else item for item in in_files]
    _check_same_model(earlier, opened)
    sums = _collect(opened, windows, mode, process_output, memory, progress)
    for name, values in sums.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{opened.path}: {name}: its inputs are not all finite. Check the model with inspect.")
    n_chunks = len(windows.tokens)
    counts = {name: np.full(1, n_chunks * n_ctx, np.float32) for name in sums}
    collected = ImportanceMatrix(sums, counts, n_chunks, n_ctx, (text.name,))
    return merge([*earlier, collected], chunk_size=n_ctx) if earlier else collected


def _check_same_model(earlier: Sequence[ImportanceMatrix], model: Model) -> None:
    """Refuse matrices of other models before the pass over this one."""
    shapes = model.shapes
    for matrix in earlier:
        for name, sums in matrix.sums.items():
            if name not in shapes:
                raise ValueError(f"in_files: {name} is no tensor of {model.path}. Give matrices of this model.")
            if sums.shape != (1, shapes[name][-1]):
                raise ValueError(
                    f"in_files: {name}: shape={sums.shape}, must be {(1, shapes[name][-1])}. "
                    "Give matrices of this model."
                )


def _collect(
    model: Model, windows: Windows, mode: str, process_output: bool, memory, progress: bool
) -> dict[str, np.ndarray]:
    """Do the pass and return the sums [shape=(1, n_per_row), dtype=float32] by tensor name."""
    variant = as_is(model)
    steps = model.hparams.n_layer
    with Workers() as workers:
        budget = fit([variant], windows, workers, memory, keep_states=False)
        if progress:
            announce(f"importance matrix over {windows.tokens.size} tokens: {budget}")
        bar_format = "{desc}{percentage:3.0f}%|{bar}| {rate_fmt} [{elapsed}<{remaining}]"
        shown = dict(unit="tokens", unit_scale=1 / steps, disable=not progress, bar_format=bar_format)
        with tqdm(total=steps * windows.tokens.size, **shown) as bar:
            return _Collection([variant], windows, mode, budget, workers, "", None, bar).collect(process_output)


class _Collection(Sweep):
    """The evaluator's pass over one model, for the inputs of its products instead of its scores."""

    def collect(self, process_output: bool) -> dict[str, np.ndarray]:
        """Return the sums of every layer's tensors, and on request the output matrix's."""
        factors = self.base.tensor("rope_freqs.weight").floats() if "rope_freqs.weight" in self.base else None
        self.llama = _Observer(self.hparams, self.windows.tokens.shape[1], self.mode, self.workers, factors)
        sums: dict[str, np.ndarray] = {}
        memory = np.empty(max(layer_weights(self.base, i) for i in range(self.hparams.n_layer)), np.float32)
        qkv = np.empty((self.budget.chunks_at_once * self.windows.tokens.shape[1], self.llama.qkv_width), np.float32)
        self._embed()
        for index in range(self.hparams.n_layer):
            self._layer(index, memory, qkv)
            for field, total in self.llama.take().items():
                sums |= {f"blk.{index}.{kind}.weight": total for kind in KINDS[field]}
        if process_output and "output.weight" in self.base:
            norm = self.base.tensor("output_norm.weight").floats()
            self.workers.map(lambda chunks: self._output_inputs(norm, chunks), self._batches())
            sums["output.weight"] = self.llama.take()["output"]
        self.states.close(delete=True)
        return sums

    def _output_inputs(self, norm: np.ndarray, chunks: slice) -> None:
        """Add up what the output matrix gets from some chunks."""
        x = self.states.read(0, chunks).reshape(-1, self.hparams.n_embd)
        normed = np.empty_like(x)
        fused.rms_norm(x, norm, self.llama.eps, normed)
        self.llama.observe("output", normed)


class _Observer(Llama):
    """A forward pass that adds up the squared inputs of every product with weights."""

    def __init__(self, *args):
        super().__init__(*args)
        self._layer: Layer | None = None
        self._partial: dict[str, list[np.ndarray]] = {}

    def forward(self, layer: Layer, x: np.ndarray, qkv: np.ndarray, first: int = 0) -> None:
        """Apply one layer in place."""
        self._layer = layer
        super().forward(layer, x, qkv, first)

    def product(self, x: np.ndarray, matrix: Matrix, out: np.ndarray) -> None:
        """Compute out = x · weightᵀ, having looked at x."""
        self.observe(next(field for field in KINDS if getattr(self._layer, field) is matrix), x)
        super().product(x, matrix, out)

    def observe(self, field: str, x: np.ndarray) -> None:
        """Add up the squares of a block of rows; called by several threads at once."""
        total = np.zeros(x.shape[1])
        _add_squares(x, total)
        self._partial.setdefault(field, []).append(total)

    def take(self) -> dict[str, np.ndarray]:
        """Return the sums so far, rounded to float32, and begin anew."""
        partial, self._partial = self._partial, {}
        # sorted by size, so that the sum is the same whichever thread came first
        return {f: np.sort(np.stack(t), axis=0).sum(axis=0)[None].astype(np.float32) for f, t in partial.items()}


@njit(nogil=True, cache=True)
def _add_squares(x, total):
    """total[j] += Σ x[:, j]², in float64."""
    for r in range(x.shape[0]):
        for j in range(x.shape[1]):
            total[j] += np.float64(x[r, j]) * np.float64(x[r, j])
