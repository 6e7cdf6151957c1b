"""Inputs of experts in the two streams of refining: each expert's own tokens, paired between the streams."""

import numpy as np

from quantlab.evaluate.engine import ExpertInputs


class Rows:
    """Some rows of an array, copied only where they are read.

    Parameters
    ----------
    x : np.ndarray [shape=(n, n_in)]
    rows : np.ndarray [shape=(nrows,), dtype=int64]
    """

    def __init__(self, x: np.ndarray, rows: np.ndarray):
        self._x, self._rows, self.shape = x, rows, (len(rows), x.shape[1])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index) -> np.ndarray:
        """Return a slice of the rows, or of rows and columns."""
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        return self._x[self._rows[rows], columns]


class OriginalExperts:
    """The original stream's inputs of a layer's experts.

    Parameters
    ----------
    n_tokens : int
        Of all chunks.
    """

    def __init__(self, n_tokens: int):
        self._inputs, self._n_tokens = {}, n_tokens
        self._places = np.empty(0, np.int32)  # row of each token's last input for each expert; -1: none
        self._tokens = np.empty(0, np.int64)  # of a batch, expert by expert

    def keep(self, field: str, batch: slice, inputs: ExpertInputs) -> None:
        """Keep the inputs of a batch of tokens."""
        per_token = len(inputs.x) // (batch.stop - batch.start)
        first, experts = per_token * batch.start, np.repeat(np.arange(len(inputs.counts)), inputs.counts)
        if field not in self._inputs:
            self._inputs[field] = np.empty((per_token * self._n_tokens, inputs.x.shape[1]), np.float32)
        self._inputs[field][first : first + len(inputs.x)] = inputs.x
        if field == "experts_in":
            self._tokens = batch.start + inputs.rows
            return
        if not self._places.size:
            self._places = np.full((self._n_tokens, len(inputs.counts)), -1, np.int32)
        self._places[self._tokens, experts] = first + inputs.rows

    def pair(self, field: str, expert: int, x: np.ndarray, rows: np.ndarray, tokens: np.ndarray) -> tuple[Rows, Rows]:
        """Return an expert's inputs in this stream and in the other one, for tokens whose inputs are known in both.

        `x[rows]` are its inputs of `tokens` in the other stream.
        """
        if field == "experts_in":
            return Rows(self._inputs[field], tokens), Rows(x, rows)
        places = self._places[tokens, expert]
        return Rows(self._inputs[field], places[places >= 0]), Rows(x, rows[places >= 0])

    def forget(self, field: str) -> None:
        """Release the inputs of a field."""
        self._inputs.pop(field, None)
