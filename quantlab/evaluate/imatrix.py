"""The importance matrix: the mean squared inputs of every weight matrix, by column, on a text.

During a forward pass over the text, the inputs x of each product with weights are squared and added up per column:

    text ─ chunks ─ embeddings ─ layer 0 ─ layer 1 ─ … ─ last layer
                                   │ Σ x² of q,k,v · attn_output · gate,up · ffn_down

All tokens of every chunk count, those too that a perplexity would not score. q, k and v have the same inputs, and so
have gate and up.

Source: llama-imatrix (tools/imatrix/imatrix.cpp of llama.cpp), whose chunks, columns and counts these are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from quantlab import arch
from quantlab.evaluate.check import check_model
from quantlab.evaluate.engine import Choice, Engine, ExpertInputs, find
from quantlab.evaluate.forward_pass import ForwardPass
from quantlab.evaluate.protocol import Windows, cut
from quantlab.evaluate.variants import as_is
from quantlab.files.bundled import TextLike, read_text
from quantlab.files.imatrix_file import ImportanceMatrix, merge, read_imatrix
from quantlab.files.model import Model, ModelLike, as_model
from quantlab.files.progress import announce
from quantlab.transform.job import n_experts


def imatrix(
    model: ModelLike,
    text: TextLike = "sampled",
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    process_output: bool = False,
    in_files: Sequence[str | Path | ImportanceMatrix] = (),
    mode: str = "float",
    device: str = "auto",
    device_memory: str | int | None = None,
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
        `float`: activations in float32. `half`: rounded to halves. `ggml-cpu`: rounded as ggml's CPU code does.
    device : str
        As for `perplexity`.
    device_memory : str or int, optional
        Memory of the card to stay within.
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
    choice = find(mode, device, device_memory)
    opened = as_model(model)
    check_model(opened)
    text = read_text(text)
    windows, _ = cut(text, opened.vocab, n_ctx=n_ctx, chunks=chunks, name="llama.cpp", mode=mode, rules="current")
    windows = Windows(windows.tokens, windows.tokens, 0)  # every position counts
    earlier = [item if isinstance(item, ImportanceMatrix) else read_imatrix(item) for item in in_files]
    _check_same_model(earlier, opened)
    found = _collect(opened, windows, choice, process_output, memory, progress)
    sums, counts = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    for name, values in sums.items():
        if not np.isfinite(values).all():
            raise ValueError(f"{opened.path}: {name}: its inputs are not all finite. Check the model with inspect.")
    n_chunks = len(windows.tokens)
    collected = ImportanceMatrix(sums, counts, n_chunks, n_ctx, (text.name,))
    return merge([*earlier, collected], chunk_size=n_ctx) if earlier else collected


def _check_same_model(earlier: Sequence[ImportanceMatrix], model: Model) -> None:
    """Refuse matrices of other models before the pass over this one."""
    shapes = model.shapes
    for matrix in earlier:
        for name, sums in matrix.sums.items():
            if name not in shapes:
                raise ValueError(f"in_files: {name} is not a tensor of {model.path}. Give matrices of this model.")
            n_mat = n_experts(shapes[name])
            if len(sums) not in (1, n_mat) or sums.size != n_mat * shapes[name][-1]:
                raise ValueError(
                    f"in_files: {name}: shape={sums.shape}, must be {(n_mat, shapes[name][-1])}. "
                    "Give matrices of this model."
                )


def _collect(
    model: Model, windows: Windows, choice: Choice, process_output: bool, memory, progress: bool
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Run the pass; return sums [shape=(n_mat, n_per_row)] and counts [shape=(n_mat,)] by tensor name."""
    n_layer = model.hparams.n_layer
    with choice(model, windows.tokens.shape[1]) as engine:
        budget = engine.plan([as_is(model)], windows, memory, keep_states=False, observed=True)
        if progress:
            announce(f"importance matrix over {windows.tokens.size} tokens: {budget}")
        bar_format = "{desc}{percentage:3.0f}%|{bar}| {rate_fmt} [{elapsed}<{remaining}]"
        shown: dict[str, Any] = dict(unit="tokens", unit_scale=1 / n_layer, disable=not progress, bar_format=bar_format)
        with tqdm(total=n_layer * windows.tokens.size, **shown) as bar:
            consumer = _Importance(model, engine, process_output)
            return ForwardPass([as_is(model)], windows, engine, budget, bar).run(consumer)


class _Importance:
    """A consumer of a `ForwardPass` that adds up the squared inputs of every product with weights."""

    def __init__(self, model: Model, engine: Engine, process_output: bool):
        self._model, self._engine = model, engine
        self._process_output = process_output and "output.weight" in model
        self._record = arch.known(model.hparams.arch)
        self._found: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def observe(self, variant: int, layer: int, field: str, inputs) -> None:
        """Add up the squares of the inputs of one product, for each of its matrices."""
        squares = self._engine.column_squares(inputs)
        counts = inputs.counts if isinstance(inputs, ExpertInputs) else np.array([len(inputs)])
        for name in self._record.layer_at(self._model.hparams, layer).products[field]:
            self._add(f"blk.{layer}.{name}.weight", squares, counts)

    def _add(self, tensor: str, squares: np.ndarray, counts: np.ndarray) -> None:
        sums, seen = self._found.get(tensor, (0, 0))
        self._found[tensor] = sums + squares, seen + counts

    def output(self, forward_pass: ForwardPass) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return sums and counts by tensor, rounded to float32 (output matrix: on request)."""
        if self._process_output:
            norm, _ = forward_pass.weights.output(forward_pass.variants[0])
            for chunks in forward_pass.batches():
                inputs = self._engine.output_inputs(norm, forward_pass.last_states(0, chunks))
                self._add("output.weight", self._engine.column_squares(inputs), np.array([len(inputs)]))
        return {name: (s.astype(np.float32), n.astype(np.float32)) for name, (s, n) in self._found.items()}
