"""Surprise of models at each token of a passage, shown as coloured text."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import pandas as pd

from quantlab.evaluate.engine import find
from quantlab.evaluate.forward_pass import ForwardPass
from quantlab.evaluate.protocol import cut
from quantlab.evaluate.scores import ScoreTokens
from quantlab.evaluate.variants import as_is, resolve
from quantlab.files.bundled import read_text
from quantlab.files.model import as_model

FULL = 8.0  # nats; from here on a token has the full colour


@dataclass(frozen=True)
class Surprise:
    """The surprise of some models at each token of a passage.

    Parameters
    ----------
    tokens : tuple of str
        The passage, token by token.
    nll : dict of str to tuple of float
        For each model, -ln of the probability that it gave to each token, in nats.
    """

    tokens: tuple[str, ...]
    nll: dict[str, tuple[float, ...]]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per token: its text, and the surprise of each model in nats."""
        return pd.DataFrame({"token": self.tokens} | self.nll)

    def __repr__(self) -> str:
        means = (f"{name}: {sum(values) / len(values):.3f} nats per token" for name, values in self.nll.items())
        return "\n".join(["".join(self.tokens), *means])

    def _repr_html_(self) -> str:
        parts = []
        for name, values in self.nll.items():
            mean = sum(values) / len(values)
            text = "".join(map(_coloured, self.tokens, values))
            parts.append(f"<p><b>{escape(name)}</b>, {mean:.2f} nats per token on average</p>")
            parts.append(f"<p style='white-space:pre-wrap;line-height:1.9;text-align:left'>{text}</p>")
        return "".join(parts)


def _coloured(token: str, nll: float) -> str:
    """Return a token as HTML, with a background that grows with the surprise."""
    style = f"background:rgba(213,94,0,{min(1, nll / FULL):.2f});border-radius:3px;padding:1px 0"
    return f"<span style='{style}' title='{nll:.2f} nats'>{escape(token)}</span>"


def surprise(
    base, variants: Sequence, text="primer", *, chunk: int = 0, first: int = 0, n_tokens: int = 80, n_ctx: int = 512
) -> Surprise:
    """Measure the surprise of a model, then of its variants, at each token of a passage.

    Parameters
    ----------
    base : str, Path or Model
    variants : sequence of str, Path or Recipe
        As for `quantlab.compare`.
    text : str, Path or Text
    chunk : int
        Chunk of the passage, from 0.
    first, n_tokens : int
        Where the passage begins among the scored tokens of the chunk, and its length.
    n_ctx : int
        Tokens per chunk, of which the second half is scored.

    Raises
    ------
    FileNotFoundError, ValueError
        As `quantlab.compare`; and if the passage does not lie within the scored tokens of the text.

    Examples
    --------
    >>> len(surprise("tiny", ["Q2_K"], n_tokens=20).tokens)
    20
    """
    opened = as_model(base)
    options = {"n_ctx": n_ctx, "name": "llama.cpp", "mode": "float", "rules": "current"}
    windows, _ = cut(read_text(text), opened.vocab, chunks=chunk + 1, **options)
    n_chunks, n_scored = windows.targets.shape
    if not (0 <= chunk < n_chunks and 0 <= first and 0 < n_tokens <= n_scored - first):
        raise ValueError(
            f"surprise: chunk={chunk}, first={first}, n_tokens={n_tokens}, must lie within {n_chunks} chunks of "
            f"{n_scored} scored tokens. Choose another passage."
        )
    models = [as_is(opened, opened.path.stem), *resolve(opened, variants)]
    with find("float")(opened, n_ctx) as engine:
        budget = engine.plan(models, windows, None, keep_states=False)
        scores = ForwardPass(models, windows, engine, budget).run(ScoreTokens())
    passage = chunk, slice(first, first + n_tokens)
    pieces = opened.vocab.pieces
    tokens = tuple(pieces[i].decode("utf-8", "replace") for i in windows.targets[passage])
    return Surprise(tokens, {m.name: tuple(s.nll[passage].tolist()) for m, s in zip(models, scores, strict=True)})
