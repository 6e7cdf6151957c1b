"""The front of recipes (damage against size), and recipes judged on another text."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from quantlab.evaluate.perplexity import Comparison, compare
from quantlab.evaluate.refine import refine
from quantlab.evaluate.refined_variants import MARK
from quantlab.files.bundled import TextLike
from quantlab.files.imatrix_file import MatrixLike, as_matrix
from quantlab.files.model import ModelLike
from quantlab.files.model import open as open_model
from quantlab.result import Result
from quantlab.study.best_recipe import BestRecipe
from quantlab.study.damage_cache import json_digest, matrix_digests
from quantlab.study.menu import open_menu
from quantlab.study.sensitivity import Sensitivity
from quantlab.transform.mixture import Recipe

_SHOWN = "variant bytes bpw predicted_kld measured_kld kld_mean kld_se against less less_se".split()


@dataclass(frozen=True, repr=False)
class Front(Result):
    """The best recipes from the smallest size to the largest, and the ftypes for comparison.

    Attributes
    ----------
    protocol : dict
        What the damages were measured on.
    rows : tuple of dict
        `variant` (`recipe` or a ftype), `bytes`, `bpw`, `predicted_kld` (nats per token; None for a ftype with a change
        that was not measured), by size.
    recipes : tuple of BestRecipe
        Those of the rows called `recipe`.
    """

    protocol: dict
    rows: tuple[dict, ...]
    recipes: tuple[BestRecipe, ...]

    _look = {"index": False, "float_format": "{:.5g}".format}


def front(sensitivity: Sensitivity | str | Path, model: ModelLike, *, points: int = 24, **options) -> Front:
    """Find the best recipes for sizes from the smallest to the largest.

    Parameters
    ----------
    sensitivity, model
        As for `quantlab.recipe`.
    points : int
        Sizes, each larger than the last by the same factor; those of the ftypes come in addition.
    **options
        keep, min_type, max_type, exclude, imatrix, rules as for `quantlab.recipe`.

    Raises
    ------
    FileNotFoundError, ValueError
        As `quantlab.recipe`; and if `points` is less than 2.
    """
    if points < 2:
        raise ValueError(f"points={points}, must be at least 2. Give more points.")
    menu = open_menu(sensitivity, model, **options)
    ends = [menu.fixed + sum(f(row["bytes"] for row in rows) for rows in menu.groups.values()) for f in (min, max)]
    stock = {name: size for name, size in menu.ftypes().items() if ends[0] <= size}
    limits = sorted({*np.geomspace(ends[0], ends[1], points).astype(np.int64).tolist(), ends[1], *stock.values()})
    recipes = {recipe.bytes: recipe for recipe in map(menu.best, limits)}
    rows = [("recipe", size, recipe.predicted) for size, recipe in recipes.items()]
    rows += [(name, size, menu.predicted(menu.types_of(name))) for name, size in stock.items()]
    rows.sort(key=lambda row: (row[1], row[0]))
    per_weight = 8 / menu.base.n_weights
    names = ("variant", "bytes", "bpw", "predicted_kld")
    table = tuple(dict(zip(names, (n, size, size * per_weight, kld), strict=True)) for n, size, kld in rows)
    return Front(menu.sensitivity.protocol, table, tuple(recipes.values()))


@dataclass(frozen=True, repr=False)
class Judgement(Result):
    """Recipes and the ftypes of their size, measured on a text.

    Attributes
    ----------
    comparison : Comparison
        All that was measured.
    rows : tuple of dict
        `variant`, `bytes`, `bpw`, `predicted_kld` and, of a recipe of `quantlab.exchange`, `measured_kld` (both on the
        calibration text), `kld_mean`, `kld_se`, and for a recipe `against` which variant its KLD is `less`, as a
        fraction, with `less_se`, the error over chunks, paired; None where the other does no damage, or there is one
        chunk only.
    """

    comparison: Comparison
    rows: tuple[dict, ...]

    _look = {"index": False, "na_rep": "", "float_format": "{:.5g}".format}

    @property
    def helped(self) -> bool:
        """True if every recipe does less damage than the ftype it is compared with."""
        return all(row["less"] is None or row["less"] > 0 for row in self.rows if row["against"])

    def to_frame(self) -> pd.DataFrame:
        """Return the rows as a table; a column of exchanges only where a recipe has been through them."""
        frame = super().to_frame()
        has_exchanges = "measured_kld" in frame and frame["measured_kld"].notna().any()
        return frame[[column for column in _SHOWN if column != "measured_kld" or has_exchanges]]

    def _document(self) -> dict:
        """Return the measured figures of each variant, with the rows' own."""
        document = json.loads(self.comparison.to_json())
        document["rows"] = [row | own for row, own in zip(document["rows"], self.rows, strict=True)]
        return document

    def _lines(self) -> list[str]:
        p = self.comparison.protocol
        noise = self.comparison.rows[0].get("kld_noise")
        noise = "" if noise is None else f", KLD of halves alone {noise:.2g}"
        return [f"{p.text}: {p.chunks} chunks of {p.n_ctx} tokens, protocol {p.name}, mode {p.mode}{noise}"]


def judge(
    recipes: BestRecipe | Sequence[BestRecipe],
    model: ModelLike,
    text: TextLike = "primer",
    *,
    against: Sequence[BestRecipe] | None = None,
    imatrix: MatrixLike | None = None,
    calibrate_on: TextLike | Sequence[TextLike] | None = None,
    **options,
) -> Judgement:
    """Measure recipes, and the ftype nearest in size to each, on another text.

    Recipes that were chosen by refined damages are refined, and their ftypes too.

    Parameters
    ----------
    recipes : BestRecipe or sequence of them
    model : str, Path or Model
    text : str, Path or Text
        What to judge on.
    against : sequence of BestRecipe, optional
        Hold each recipe against one of these (default: against its ftype).
    imatrix : str, Path or ImportanceMatrix, optional
        The matrix that the recipes were made with; recipes and ftypes are quantized with it alike.
    calibrate_on : str, Path or Text, optional
        What to refine with (default: the text that the recipes name).
    **options
        n_ctx, chunks, protocol, mode, device, device_memory, memory, scratch, progress as for `quantlab.compare`.

    Raises
    ------
    FileNotFoundError, ValueError
        As `quantlab.compare`; and if no recipe is given, one was made with another matrix, or only some were chosen by
        refined damages.
    """
    recipes = [recipes] if isinstance(recipes, BestRecipe) else list(recipes)
    if not recipes:
        raise ValueError("recipes: must be at least one. Make one with quantlab.recipe.")
    matrix = as_matrix(imatrix)
    digest = None if matrix is None else json_digest(matrix_digests(matrix.entries))
    if against is not None and len(against) != len(recipes):
        raise ValueError(f"against={len(against)} recipes, must be as many as are judged, {len(recipes)}.")
    for recipe in [*recipes, *(against or [])]:
        if recipe.provenance["calibration"]["imatrix"] != digest:
            raise ValueError(
                f"imatrix={digest and digest[:8]}: must be the matrix that the recipe was made with. Give the same."
            )
    held = [recipe.ftype for recipe in recipes] if against is None else list(against)
    others = list(dict.fromkeys(held)) if against is None else held
    rules, said = recipes[0].provenance["rules"], [recipe.provenance["calibration"] for recipe in recipes]
    refined = {bool(calibration.get("refined")) for calibration in said}
    options |= {"imatrix": matrix, "rules": rules}
    if len(refined) > 1:
        raise ValueError("recipes: some are chosen by refined damages, some are not. Judge them apart.")
    if refined == {True}:
        measured = _compare_refined(model, [*others, *recipes], text, calibrate_on or said[0]["text"], options)
    else:
        measured = compare(model, [*others, *recipes], text, **options)
    chunks = by_chunk(measured)
    names = [row["variant"] for row in measured.rows[1:]]
    theirs = [names[others.index(other)] for other in held] if against is None else names  # pyright: ignore[reportArgumentType]
    kept = ("variant", "bytes", "bpw", "kld_mean", "kld_se")
    rows = [{key: row[key] for key in kept} for row in measured.rows]
    for row in rows:
        row |= dict.fromkeys(("predicted_kld", "measured_kld", "against", "less", "less_se"))
    for row, recipe, other in zip(rows[1 + len(others) :], recipes, theirs, strict=False):
        less, error = (None if math.isnan(x) else x for x in reduction(chunks[row["variant"]], chunks[other]))
        row |= {"predicted_kld": recipe.predicted, "measured_kld": recipe.measured and recipe.measured["after"]}
        row |= {"against": recipe.ftype if against is None else other, "less": less, "less_se": error}
        if against is None:  # else the pairs have equal sizes, and their names tell them apart
            row["variant"] = f"{row['variant'].partition('#')[0]} {row['bpw']:.2f} bpw"
    return Judgement(measured, tuple(rows))


def _compare_refined(model, variants: Sequence[str | BestRecipe], text, calibrate_on, options: dict) -> Comparison:
    """Compare ftypes and recipes with refined bytes; those of recipes in files that last as long."""
    how = {key: options[key] for key in ("n_ctx", "imatrix", "rules", "memory", "progress") if key in options}
    with TemporaryDirectory(prefix="quantlab-", ignore_cleanup_errors=True) as folder:
        specs = []
        for i, one in enumerate(variants):
            if isinstance(one, BestRecipe):
                made = {"ftype": one.ftype, "recipe": one, "text": calibrate_on, "allow_requantize": True} | how
                one = f"{one.name}{MARK}={refine(model, Path(folder) / f'{i}.gguf', **made)}"
            specs.append(one if "=" in one else one + MARK)
        return compare(model, specs, text, calibrate_on=calibrate_on, **options)


def judge_refined(
    path: str | Path, model: ModelLike, text: TextLike = "primer", *, imatrix: MatrixLike | None = None, **options
) -> Judgement:
    """Measure a refined file and the ordinary file of the same types.

    Parameters
    ----------
    path : str or Path
        The file that `quantlab.refine` wrote.
    model, text, **options
        As for `judge`.
    imatrix : str, Path or ImportanceMatrix, optional
        Importance matrix for the ordinary file.

    Returns
    -------
    Judgement
        The base, the ordinary bytes (made in memory) and the refined ones.

    Raises
    ------
    FileNotFoundError, ValueError
        As `quantlab.compare`.
    """
    ordinary = Recipe({tensor.name: tensor.qtype for tensor in open_model(path)})
    measured = compare(model, [ordinary, path], text, imatrix=imatrix, **options)
    names = (measured.rows[0]["variant"], "ordinary", "refined")
    chunks = list(by_chunk(measured).values())
    kept = ("bytes", "bpw", "kld_mean", "kld_se")
    rows = [{"variant": name} | {key: row[key] for key in kept} for name, row in zip(names, measured.rows, strict=True)]
    for row in rows:
        row |= {"predicted_kld": None, "against": None, "less": None, "less_se": None}
    less, error = (None if math.isnan(x) else x for x in reduction(chunks[2], chunks[1]))
    rows[2] |= {"against": "ordinary", "less": less, "less_se": error}
    return Judgement(measured, tuple(rows))


def by_chunk(comparison: Comparison) -> dict[str, np.ndarray]:
    """Return the mean KLD of each chunk alone [shape=(n_chunks,), nats], by variant."""
    frame = comparison.running
    found = {}
    for name, rows in frame.groupby("variant", sort=False):
        rows = rows.sort_values("chunk")
        found[name] = np.diff(rows["kld_mean"] * rows["chunk"], prepend=0.0)
    return found


def reduction(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Return the fraction by which `ours` has a smaller mean than `theirs`, with its paired error.

    Nothing is less than nothing: both are NaN where `theirs` is 0.

    Examples
    --------
    >>> reduction(np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 6.0]))
    (0.5, 0.0)
    """
    if theirs.mean() == 0:
        return float("nan"), float("nan")
    ratio = ours.mean() / theirs.mean()
    if len(ours) < 2:
        return float(1 - ratio), float("nan")
    spread = (ours - ratio * theirs).std(ddof=1) / np.sqrt(len(ours))
    return float(1 - ratio), float(spread / theirs.mean())
