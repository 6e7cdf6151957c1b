"""Variants `FTYPE+refined` of a comparison: files that exist as long as the comparison."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from quantlab.evaluate.refine import refine
from quantlab.evaluate.variants import split_label
from quantlab.files.bundled import read_text
from quantlab.files.model import Model

MARK = "+refined"


def is_refined(spec) -> bool:
    """Tell whether a variant is a ftype with refined bytes."""
    return isinstance(spec, str) and spec.lower().endswith(MARK)


@contextmanager
def refined_variants(base: Model, specs: Sequence, text, calibrate_on, *, scratch=None, **options) -> Iterator[list]:
    """Refine the marked variants; yield all variants, with files in their place.

    Parameters
    ----------
    base : Model
    specs : sequence of str, Path or Recipe
        As for `quantlab.compare`.
    text, calibrate_on : str, Path or Text
        What to judge on, or a list of that; what to refine with.
    scratch : str or Path, optional
        Refused: a comparison that resumes needs the same files again.
    **options
        n_ctx, imatrix, rules, memory, progress as for `quantlab.refine`.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        As `quantlab.refine`; and if the two texts are the same.
    """
    marked = [spec for spec in specs if is_refined(spec)]
    if not marked:
        yield list(specs)
        return
    if scratch is not None:
        raise ValueError(f"{marked[0]}: cannot resume from scratch={scratch}. Refine to a file first, or leave it out.")
    judged_on = text if isinstance(text, list) else [text]
    if any(read_text(item).text == read_text(calibrate_on).text for item in judged_on):
        raise ValueError(f"{marked[0]}: calibrate_on={calibrate_on}, is the text to judge on. Choose another.")
    found = []
    with TemporaryDirectory(prefix="quantlab-", ignore_cleanup_errors=True) as folder:
        for i, spec in enumerate(specs):
            if is_refined(spec):
                label, ftype = split_label(spec[: -len(MARK)])
                how = {"ftype": ftype, "text": calibrate_on, "allow_requantize": True} | options
                path = refine(base, Path(folder) / f"{i}.gguf", **how)
                spec = f"{label or ftype.upper() + MARK}={path}"
            found.append(spec)
        yield found
