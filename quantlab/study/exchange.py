"""Measured exchanges: correct a recipe where damages of single changes do not add up.

An exchange raises one group of tensors to a larger type and lowers another to a smaller one, or moves one group to a
type that still fits. All that fit in the limit are ordered by what the estimates of their parts say, and measured in
this order, `AT_ONCE` in a pass, no two of a pass with a group in common:

    estimates ─► the most promising exchanges ─► one pass ─► what lowers the KLD is kept ─► corrected estimates ─► …

Those of a pass that lower the divergence by more than its standard error are then measured together, the best two, the
best three and so on, and the best of all is kept. The others teach something too: half of what the estimate was off
goes to each of the two groups.

Damages of single changes come from a model that is otherwise whole. In a recipe of few bits every other tensor is
damaged too, and the damages do not add up: at 1.6 bits their sum was found to be 0.57 of the whole.

The errors of two tensors may add to each other or cancel. By how much needs more text than the damages themselves: such
figures of two halves of a text agreed with a correlation of 0.3 on 8 chunks, of 0.7 on 64. So exchanges are measured on
more chunks. It differs from text to text too: on the bundled model at the size of Q4_K_M, types chosen by such figures
lowered the divergence by 2 % on more text of the same kind, and not at all on another text.
"""

import time
from collections.abc import Container, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from threadpoolctl import ThreadpoolController
from tqdm.auto import tqdm

from quantlab.evaluate.refined_alone import refined_alone
from quantlab.evaluate.variants import Variant
from quantlab.files.arguments import check_number, check_whole
from quantlab.files.bundled import read_text
from quantlab.files.model import as_model
from quantlab.study.best_recipe import BestRecipe
from quantlab.study.changes import Change
from quantlab.study.measurement import Study, open_study
from quantlab.study.menu import Menu, open_menu
from quantlab.study.sensitivity import Sensitivity

EXCHANGES = 48  # that are measured unless told otherwise
AT_ONCE = 8  # exchanges of a pass
_NEAR = 2  # a group is moved by this number of types at most
_PAIRED = 160  # moves to larger types, and to smaller ones, that are paired
_CHUNKS = 4  # times those of the sensitivity


def exchange(
    best: BestRecipe,
    sensitivity: Sensitivity | str | Path,
    model,
    text=None,
    *,
    exchanges: int = EXCHANGES,
    minutes: float | None = None,
    imatrix=None,
    device: str = "auto",
    device_memory: str | int | None = None,
    memory: str | int | None = None,
    threads: int | None = None,
    executor: Executor | None = None,
    cache: str | Path | bool = True,
    progress: bool = True,
) -> BestRecipe:
    """Measure exchanges of types in a recipe, and keep those that lower its divergence at the same size or less.

    Parameters
    ----------
    best : BestRecipe
        Of `quantlab.recipe`; its constraints hold for the exchanges too.
    sensitivity : Sensitivity or path
        What the recipe was chosen from.
    model : str, Path or Model
        The model that it was measured on.
    text : str, Path or Text, optional
        The calibration text (default: the one that the sensitivity names). Up to four times as many chunks of it are
        taken as for the sensitivity.
    exchanges : int
        Number of exchanges that are measured; 0 measures the recipe alone.
    minutes : float, optional
        Begin no pass after this time. The order of what is measured does not depend on it.
    imatrix, device, device_memory, memory, threads, executor, cache, progress
        As for `quantlab.sensitivity`.

    Returns
    -------
    BestRecipe
        With `measured`: the divergence on the calibration text before and after, never larger after. It is the same,
        bit for bit, for the same arguments, unless `minutes` cut it short.

    Raises
    ------
    FileNotFoundError
        If model, sensitivity, text or matrix is not there.
    ValueError
        If the sensitivity is of another model, matrix or text, or measured no damage.
    OSError
        As for `quantlab.sensitivity`.
    """
    check_whole(exchanges=exchanges)
    check_number(minutes=minutes)
    if exchanges < 0 or (minutes is not None and not minutes >= 0):
        raise ValueError(f"exchanges={exchanges}, minutes={minutes}: must be 0 or more. Leave them out for the usual.")
    found = sensitivity if isinstance(sensitivity, Sensitivity) else Sensitivity.load(sensitivity)
    base = as_model(model)
    constraints, rules = best.provenance["constraints"], best.provenance["rules"]
    menu = open_menu(found, base, **constraints, imatrix=imatrix, rules=rules)
    said = found.protocol
    text = _text(said, text)
    study = open_study(
        base, text, around=best, imatrix=imatrix, rules=rules, protocol=said["name"], device=device,
        device_memory=device_memory, memory=memory, threads=1 if executor is not None and threads is None else threads,
        cache=cache, n_ctx=said["n_ctx"], chunks=_CHUNKS * said["chunks"], mode=said["mode"],
    )  # fmt: skip
    if study.record.text_sha256 != said["text_sha256"]:  # pyright: ignore[reportOptionalMemberAccess]
        raise ValueError(f"text={study.record.text}: the sensitivity was measured on another text. Give that one.")  # pyright: ignore[reportOptionalMemberAccess]
    end = None if minutes is None else time.monotonic() + 60 * minutes
    with ThreadpoolController().limit(limits=1, user_api="blas"), ExitStack() as stack:
        if said.get("refined"):
            bytes_ = stack.enter_context(
                refined_alone(base, text, study.start.imatrix, n_ctx=said["n_ctx"], memory=memory, progress=progress)
            )
            study = replace(study, refined=bytes_)
        return _Search(menu, study, _Estimates(menu), executor, progress).run(best, exchanges, end)


def _text(protocol: Mapping, text):
    """The text of a calibration."""
    if protocol["text"] is None:
        raise ValueError("sensitivity: holds errors of weights alone, exchanges need damages. Measure a sensitivity.")
    if text is not None:
        return text
    try:
        return read_text(protocol["text"])
    except (FileNotFoundError, ValueError):
        raise FileNotFoundError(
            f"text={protocol['text']}: the sensitivity's text is not here. Give it as text, or exchanges=0."
        ) from None


@dataclass(frozen=True)
class _Exchange:
    """Groups and the rows that they move to."""

    moves: tuple[tuple[str, int], ...]
    bytes: int  # what the recipe gains

    @property
    def groups(self) -> set[str]:
        return {group for group, _ in self.moves}

    def __or__(self, other: "_Exchange") -> "_Exchange":
        return _Exchange(self.moves + other.moves, self.bytes + other.bytes)


class _Estimates:
    """Return the estimated divergence of each row of a menu, by group, from the smallest row on."""

    def __init__(self, menu: Menu):
        self.rows = {group: sorted(rows, key=lambda row: row["bytes"]) for group, rows in menu.groups.items()}
        self.damage = {group: [row["delta_kld"] for row in rows] for group, rows in self.rows.items()}

    def of(self, proposal: _Exchange, at: Mapping[str, int]) -> float:
        """Return what an exchange of the rows `at` is believed to add."""
        return sum(self.damage[group][i] - self.damage[group][at[group]] for group, i in proposal.moves)

    def correct(self, proposal: _Exchange, at: Mapping[str, int], measured: float) -> None:
        """Learn from a measurement."""
        share = (measured - self.of(proposal, at)) / len(proposal.moves)
        for group, i in proposal.moves:
            self.damage[group][i] += share

    def proposals(self, at: Mapping[str, int], free: int) -> list[_Exchange]:
        """List the exchanges that take `free` bytes more at most, the most promising first."""
        up, down, found = [], [], []
        for group, rows in self.rows.items():
            here = at[group]
            for i in range(max(0, here - _NEAR), min(len(rows), here + _NEAR + 1)):
                if i != here:
                    move = _Exchange(((group, i),), rows[i]["bytes"] - rows[here]["bytes"])
                    (up if move.bytes > 0 else down).append(move)
                    if move.bytes <= free:
                        found.append(move)
        # of a large model's moves the ones with the best prices: pairs of all would be too many
        up, down = (sorted(moves, key=lambda one: (self._price(one, at), one.moves))[:_PAIRED] for moves in (up, down))
        found += [a | b for a in up for b in down if a.groups != b.groups and a.bytes + b.bytes <= free]
        return sorted(found, key=lambda one: (self.of(one, at), one.bytes, one.moves))

    def _price(self, move: _Exchange, at: Mapping[str, int]) -> float:
        """Return the estimated divergence that a move adds per byte."""
        return self.of(move, at) / max(1, abs(move.bytes))


@dataclass
class _Search:
    """The search around one recipe; `at` is the row of each group that the recipe has."""

    menu: Menu
    study: Study
    estimates: _Estimates
    executor: Executor | None
    progress: bool

    def run(self, best: BestRecipe, exchanges: int, end: float | None) -> BestRecipe:
        """Measure the recipe, then exchanges until their number or the time is spent or nothing is left to try."""
        at = {group: self._row_of(group, best.types) for group in self.estimates.rows}
        (now,) = self._measure([_Exchange((), 0)], at)
        before, steps, tried, left = now, [], set(), exchanges
        with tqdm(total=exchanges, desc="exchanges", disable=not (self.progress and exchanges)) as bar:
            while left > 0 and (end is None or time.monotonic() < end):
                free = best.limit - self.menu.fixed - self._bytes(at)
                batch = _apart(self.estimates.proposals(at, free), tried, min(AT_ONCE, left))
                if not batch:
                    break
                tried.update(one.moves for one in batch)
                left -= len(batch)
                bar.update(len(batch))
                kept, damage = self._best_of(batch, at, free)
                if kept is not None:
                    steps.append(self._step(kept, at, now, damage))
                    at, now, tried = at | dict(kept.moves), damage, set()
        rows = [self.estimates.rows[group][i] for group, i in at.items()]
        measured = {"chunks": self.study.record.chunks, "before": before["kld_mean"], "after": now["kld_mean"]}  # pyright: ignore[reportOptionalMemberAccess]
        measured |= {"after_se": now["kld_se"], "tried": exchanges - left, "steps": steps}
        return replace(self.menu.recipe_of(rows, best.limit), ftype=best.ftype, measured=measured)

    def _best_of(self, batch: Sequence[_Exchange], at: Mapping[str, int], free: int) -> tuple[_Exchange | None, dict]:
        """Measure exchanges, then those together that help; return the best and its damage, None where none helps."""
        results = list(zip(batch, self._measure(batch, at), strict=True))
        helping = sorted((pair for pair in results if _helps(pair[1])), key=lambda pair: pair[1]["kld_mean"])
        for one, damage in results:
            self.estimates.correct(one, at, damage["delta_kld"])
        together, joint = [], _Exchange((), 0)
        for one, _ in helping:
            if joint.bytes + one.bytes <= free:
                joint = joint | one
                together += [joint] if len(joint.moves) > len(one.moves) else []
        helping += [pair for pair in zip(together, self._measure(together, at), strict=True) if _helps(pair[1])]
        return min(helping, key=lambda pair: pair[1]["kld_mean"], default=(None, {}))

    def _measure(self, exchanges: Sequence[_Exchange], at: Mapping[str, int]) -> list[dict]:
        """Measure what exchanges do to the recipe."""
        types = self._types(at.items())
        start = Variant("recipe", self.study.base, self.study.start.types | types, self.study.start.imatrix)
        last = next(reversed(types.items()))  # nothing moved: one tensor, the last to be computed, keeps its type
        moved = [self._types(one.moves) or dict([last]) for one in exchanges]
        changes = [Change("exchange", "", types) for types in moved]
        damages = replace(self.study, start=start).measure(changes, self.executor, progress=False)
        return [damages[id(change)] for change in changes]

    def _types(self, moves: Iterable[tuple[str, int]]) -> dict[str, str]:
        return {name: qtype for group, i in moves for name, qtype in self.estimates.rows[group][i]["types"].items()}

    def _row_of(self, group: str, types: Mapping[str, str]) -> int:
        return next(i for i, r in enumerate(self.estimates.rows[group]) if r["types"].items() <= types.items())

    def _bytes(self, at: Mapping[str, int]) -> int:
        return sum(self.estimates.rows[group][i]["bytes"] for group, i in at.items())

    def _step(self, kept: _Exchange, at: Mapping[str, int], now: Mapping, damage: Mapping) -> dict:
        """A kept exchange for the record."""
        rows = self.estimates.rows
        moves = [(group, rows[group][at[group]]["qtype"], rows[group][i]["qtype"]) for group, i in kept.moves]
        return {"moves": moves, "bytes": kept.bytes, "before": now["kld_mean"], "after": damage["kld_mean"]}


def _apart(proposals: Sequence[_Exchange], tried: Container[tuple], most: int) -> list[_Exchange]:
    """Take the first proposals that were not tried, no two with a group in common."""
    taken, groups = [], set()
    for one in proposals:
        if len(taken) < most and one.moves not in tried and not groups & one.groups:
            taken.append(one)
            groups |= one.groups
    return taken


def _helps(damage: Mapping) -> bool:
    """Tell whether a measured exchange lowers the divergence by more than its standard error."""
    return damage["delta_kld"] + damage["delta_kld_se"] < 0 and damage["kld_mean"] < damage["start_kld_mean"]
