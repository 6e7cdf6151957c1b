"""Several texts measured in as few passes over the weights as there are kinds of windows."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from quantlab.evaluate.answers import Turns, cut_answers
from quantlab.evaluate.engine import Choice
from quantlab.evaluate.metrics import TokenScores
from quantlab.evaluate.perplexity import measure, pass_key
from quantlab.evaluate.protocol import Protocol, Windows, cut
from quantlab.evaluate.scores import ScoreTokens
from quantlab.evaluate.variants import Variant
from quantlab.files.bundled import Text
from quantlab.files.model import Model
from quantlab.files.output import replacing

BEGINNING = 160  # characters


@dataclass(frozen=True)
class TextCut:
    """A text as it is evaluated: windows of a running text, or the turns of conversations."""

    name: str
    protocol: Protocol
    beginning: str  # of a running text a few words, of conversations the first question as it is rendered
    windows: Windows | None = None
    turns: Turns | None = None

    @property
    def tokens(self) -> np.ndarray:
        """The first tokens that are evaluated together [shape=(n,), dtype=int32]."""
        return self.turns.ids[0] if self.windows is None else self.windows.tokens[0]  # pyright: ignore[reportOptionalMemberAccess]


def cut_text(
    text: Text,
    model: Model,
    choice: Choice,
    *,
    is_chat: bool,
    n_ctx: int,
    chunks: int | None,
    protocol: str,
    rules: str,
) -> TextCut:
    """Cut a text; see `cut` and `cut_answers`."""
    options = {"n_ctx": n_ctx, "chunks": chunks, "mode": choice.mode, "rules": rules}
    if is_chat:
        turns = cut_answers(text, model, **options)
        return TextCut(text.name, choice.recorded(turns.protocol), turns.question, turns=turns)
    windows, record = cut(text, model.vocab, name=protocol, **options)
    return TextCut(text.name, choice.recorded(record), _few_words(text.text), windows)


def _few_words(text: str) -> str:
    """Return the beginning of a text, up to the end of a word."""
    text = text.strip()
    return text if len(text) <= BEGINNING else text[:BEGINNING].rsplit(maxsplit=1)[0]


def measure_texts(
    variants: list[Variant], cuts: Sequence[TextCut], choice: Choice, *, memory, scratch, progress
) -> tuple[list[tuple[list[TokenScores], np.ndarray | None]], list[Path]]:
    """Score the tokens of all texts under all variants.

    Running texts share one pass over the weights, conversations another.

    Parameters
    ----------
    variants : list of Variant
        The base first.
    cuts : sequence of TextCut
    choice : Choice
    memory, scratch, progress
        As for `quantlab.compare`. The scratch folder keeps the scores of finished passes too.

    Returns
    -------
    list
        For each text the scores of each variant, and for conversations which of the tokens count.
    list of Path
        Files in the scratch folder that may be deleted once the result is safe.
    """
    found: dict[int, tuple[list[TokenScores], np.ndarray | None]] = {}
    kept: list[Path] = []
    for kind in ("windows", "turns"):
        places = [i for i, item in enumerate(cuts) if getattr(item, kind) is not None]
        if not places:
            continue
        windows, masks = _joined([cuts[i] for i in places])
        record = replace(cuts[places[0]].protocol, text=kind, chunks=len(windows.tokens))
        scores = _pass(variants, windows, record, choice, memory, scratch, progress, kept)
        start = 0
        for i, mask in zip(places, masks, strict=True):
            chunks = slice(start, start + cuts[i].protocol.chunks)
            found[i] = [TokenScores(**item.at(chunks)) for item in scores], mask
            start = chunks.stop
    return [found[i] for i in range(len(cuts))], kept


def _joined(cuts: Sequence[TextCut]) -> tuple[Windows, list[np.ndarray | None]]:
    """Put the windows of several texts of one kind into one set, each with its mask."""
    if cuts[0].windows is not None:
        parts = [item.windows for item in cuts if item.windows is not None]
        tokens, targets = (np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "targets"))
        return Windows(tokens, targets, parts[0].first), [None] * len(cuts)
    width = max(4, *(item.protocol.n_ctx for item in cuts))
    tokens, masks = zip(*(item.turns.windows(width) for item in cuts), strict=True)  # pyright: ignore[reportOptionalMemberAccess]
    tokens = np.concatenate(tokens)
    return Windows(tokens, tokens[:, 1:].copy(), 0), list(masks)


def _pass(variants, windows, record, choice, memory, scratch, progress, kept: list[Path]) -> list[TokenScores]:
    """Run one pass; with a scratch folder take over the scores that a stopped run left there."""
    if scratch is None:
        return measure(variants, windows, record, choice, memory, None, progress, ScoreTokens())
    key = pass_key(variants, windows, record)[:16]
    folder = Path(scratch)
    path = folder / f"scores-{key}.npz"
    kept.append(path)
    if (scores := _load(path, len(variants), windows.targets.shape)) is not None:
        return scores
    scores = measure(variants, windows, record, choice, memory, folder / f"states-{key}", progress, ScoreTokens())
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path, overwrite=True) as part, open(part, "wb") as file:
        np.savez(file, **{f"{i}.{k}": v for i, item in enumerate(scores) for k, v in item.at(slice(None)).items()})
    return scores


def _load(path: Path, count: int, shape: tuple[int, int]) -> list[TokenScores] | None:
    """Read the scores of a finished pass; None where they are not there, or not whole."""
    names = [field.name for field in fields(TokenScores)]
    try:
        with open(path, "rb") as stored, np.load(stored) as file:
            found = [TokenScores(**{name: file[f"{i}.{name}"] for name in names}) for i in range(count)]
    except (OSError, ValueError, KeyError, BadZipFile):
        return None
    return found if all(item.nll.shape == shape for item in found) else None
