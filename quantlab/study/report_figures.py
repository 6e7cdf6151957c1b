"""The figures of a report: token scores of several variants on one text → rows, bins of confidence, paired tests."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from quantlab.evaluate import metrics
from quantlab.evaluate.metrics import TokenScores, mean_and_error

EDGES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)  # of the bins of the base's top probability
EXACT = 12  # chunks up to which all changes of sign are tried
DRAWS = 9999  # changes of sign that are drawn for more chunks
_LEAST = 1e-300  # a quotient of sums below it is not one


@dataclass(frozen=True)
class Measured:
    """The measurements on one text.

    Attributes
    ----------
    text : str
        Its name.
    variants : tuple of str
        Names, the base first.
    scores : tuple of TokenScores
        Of each variant; arrays [n_chunks, n_scored].
    mask : np.ndarray or None [shape=(n_chunks, n_scored), dtype=bool]
        Which tokens count (default: all).
    """

    text: str
    variants: tuple[str, ...]
    scores: tuple[TokenScores, ...]
    mask: np.ndarray | None = None

    @cached_property
    def counted(self) -> tuple[TokenScores, ...]:
        """The scores of the tokens that count, in one chunk where a mask leaves chunks of unequal length."""
        if self.mask is None:
            return self.scores
        return tuple(TokenScores(**{k: v[self.mask][None] for k, v in s.at(slice(None)).items()}) for s in self.scores)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Tokens that count in each chunk [shape=(n_chunks,)]."""
        shape = self.scores[0].nll.shape
        return np.full(shape[0], shape[1]) if self.mask is None else self.mask.sum(axis=1)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Add up values [n_chunks, n_scored] of the tokens that count, chunk by chunk."""
        return values.sum(axis=1) if self.mask is None else np.where(self.mask, values, 0).sum(axis=1)

    def rows(self) -> list[dict]:
        """Return the figures of each variant, the base first."""
        found = []
        for name, scores, whole in zip(self.variants, self.counted, self.scores, strict=True):
            row = metrics.comparison_row(scores, self.counted[0])
            if self.mask is not None:
                row |= self._intervals(whole)
            found.append({"text": self.text, "variant": name, "n_scored": int(self.sizes.sum())} | row)
        return found

    def _intervals(self, scores: TokenScores) -> dict[str, float]:
        """Return bootstrap intervals over chunks of unequal length."""
        nll, base, kld = (self.sums(values) for values in (scores.nll, self.scores[0].nll, scores.kld))
        ends = {"ppl": np.exp(_interval(nll, self.sizes)), "kld": _interval(kld, self.sizes)}
        ends["ln_ratio"] = _interval(nll - base, self.sizes)
        return {f"{name}_{end}": float(v) for name, pair in ends.items() for end, v in zip(("low", "high"), pair)}  # noqa: B905

    def confidence(self, edges: Sequence[float] = EDGES) -> list[dict]:
        """Return for each variant the mean KLD of the tokens in each bin of the base's top probability.

        A bin holds what is at least its lower and below its upper edge; the last one holds its upper edge too.

        Returns
        -------
        list of dict
            `text`, `variant`, `low`, `high`, `n`, `share` of the tokens, `kld_mean`, `kld_se` (None in an empty bin),
            `part`: which fraction of the whole divergence is there.
        """
        top = self.counted[0].top_p.ravel()
        places = np.clip(np.searchsorted(edges, top, side="right") - 1, 0, len(edges) - 2)
        found = []
        for name, scores in zip(self.variants[1:], self.counted[1:], strict=True):
            kld = scores.kld.ravel()
            for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
                inside = kld[places == i]
                mean, error = mean_and_error(inside) if inside.size else (None, None)
                row = {"text": self.text, "variant": name, "low": low, "high": high, "n": inside.size}
                row |= {"share": inside.size / kld.size, "kld_mean": mean, "kld_se": error}
                found.append(row | {"part": _quotient(inside.sum(), kld.sum())})
        return found

    def pairs(self) -> list[dict]:
        """Return for any two variants by how much the second's KLD is less, and a paired test over chunks.

        Returns
        -------
        list of dict
            `text`, `a`, `b`, `less`: the fraction by which the KLD of `b` is below that of `a`, `less_se`: its error,
            paired by chunk, `p`: see `sign_tests`. None where `a` does not diverge at all, or there is one chunk.
        """
        names, sums = self.variants[1:], np.array([self.sums(scores.kld) for scores in self.scores[1:]])
        ps = sign_tests(sums)
        found = []
        for a, b in combinations(range(len(names)), 2):
            less, error = less_than(sums[b], sums[a], self.sizes)
            found.append({"text": self.text, "a": names[a], "b": names[b], "less": less, "less_se": error})
            found[-1]["p"] = None if ps is None else float(ps[a, b])
        return found


def less_than(ours: np.ndarray, theirs: np.ndarray, sizes: np.ndarray) -> tuple[float | None, float | None]:
    """Return by which fraction the sum of `ours` is below that of `theirs`, and its error, paired by chunk.

    Parameters
    ----------
    ours, theirs : np.ndarray [shape=(n_chunks,)]
        Sums over the tokens of each chunk.
    sizes : np.ndarray [shape=(n_chunks,)]
        Tokens of each chunk; a chunk without any is left out.

    Examples
    --------
    >>> less_than(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]), np.ones(3))
    (0.5, 0.0)
    """
    ours, theirs = ours[sizes > 0], theirs[sizes > 0]
    ratio = _quotient(ours.sum(), theirs.sum())
    if ratio is None:
        return None, None
    if len(ours) < 2:
        return 1 - ratio, None
    # linearized quotient of sums of clusters; its residuals add up to nothing
    spread = np.sqrt(len(ours) / (len(ours) - 1) * ((ours - ratio * theirs) ** 2).sum())
    return 1 - ratio, float(spread / theirs.sum())


def sign_tests(sums: np.ndarray) -> np.ndarray | None:
    """Test any two variants: how probable is a mean difference as far from 0, if each might have the other sign?

    Up to `EXACT` chunks all changes of sign are tried, for more `DRAWS` that are drawn by a fixed seed, so that p is at
    least 1 / (DRAWS + 1). With n chunks no p below 2 ** (1 - n) can come out.

    Parameters
    ----------
    sums : np.ndarray [shape=(n_variants, n_chunks)]
        What each variant's chunks add up to.

    Returns
    -------
    np.ndarray [shape=(n_variants, n_variants)] or None
        p of each pair; None for a single chunk.

    Examples
    --------
    >>> sign_tests(np.array([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]]))
    array([[1.   , 0.125],
           [0.125, 1.   ]])

    Source: R. A. Fisher, The Design of Experiments (1935), section 21.
    """
    count, n = sums.shape
    if n < 2:
        return None
    if n <= EXACT:
        signs = 1.0 - 2 * (np.arange(1 << n)[:, None] >> np.arange(n) & 1)
    else:
        signs = np.random.default_rng(0).integers(0, 2, (DRAWS, n)) * 2.0 - 1
        signs = np.concatenate([np.ones((1, n)), signs])  # what was observed is one of the draws
    changed, rounding = signs @ sums.T, 1e-12 * np.abs(sums).sum()
    found = np.ones((count, count))
    for a, b in combinations(range(count), 2):
        observed = abs((sums[a] - sums[b]).sum()) - rounding
        found[a, b] = found[b, a] = (np.abs(changed[:, a] - changed[:, b]) >= observed).mean()
    return found


def on_front(sizes: Sequence[int], damages: Sequence[float]) -> list[bool]:
    """Return for each variant whether no other is at most as large and does less damage, or smaller and as much.

    Examples
    --------
    >>> on_front([3, 2, 2, 1], [0.1, 0.2, 0.3, 0.4])
    [True, True, False, True]
    """
    pairs = list(zip(sizes, damages, strict=True))
    return [not any(s <= size and d <= damage and (s, d) != (size, damage) for s, d in pairs) for size, damage in pairs]


def _interval(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """95 % interval of a mean over tokens, chunks drawn with replacement."""
    sums, sizes = sums[sizes > 0], sizes[sizes > 0]
    if len(sums) < 2:
        return np.full(2, np.nan)
    draws = np.random.default_rng(0).integers(len(sums), size=(metrics.DRAWS, len(sums)))
    return np.percentile(sums[draws].sum(axis=1) / sizes[draws].sum(axis=1), [2.5, 97.5])


def _quotient(a: float, b: float) -> float | None:
    return float(a / b) if abs(b) > _LEAST else None
