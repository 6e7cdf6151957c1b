"""The second part of the size/ppl table: the ftypes added after 2023, with an importance matrix."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantlab.evaluate.imatrix import imatrix
from quantlab.evaluate.perplexity import compare
from quantlab.files.bundled import is_shape
from quantlab.files.model import open as open_model
from quantlab.study.tables import SizePpl, measured, size_ppl

# widest first; without the types of one and two bits for models that were trained for them
FTYPES = "IQ4_NL IQ4_XS IQ3_M IQ3_S IQ3_XS IQ3_XXS IQ2_M Q2_K_S IQ2_S IQ2_XS IQ2_XXS IQ1_M IQ1_S".split()
CHUNKS = 32  # to calibrate on


def with_today(
    table: SizePpl,
    model: str | Path,
    text: str | Path = "primer",
    *,
    calibrate_on: str | Path = "sampled",
    ftypes: Sequence[str] = (),
    **options,
) -> SizePpl:
    """Add today's ftypes to a size/ppl table, with a new importance matrix.

    Parameters
    ----------
    table : SizePpl
        What `size_ppl` returned for this model and text, with today's rules.
    model, text, calibrate_on, **options
        As for `size_ppl`; the options are `mode`, `device`, `device_memory` and `memory`.
    ftypes : sequence of str
        Ftypes to add (default: the I-quants and Q2_K_S).

    Returns
    -------
    SizePpl
        The rows of `table`, then those with the matrix, called `IQ4_XS+imatrix` and so on.

    Raises
    ------
    FileNotFoundError, ValueError
        As `size_ppl`; also if the table has the rules of 2023, which do not know these ftypes.

    Examples
    --------
    >>> from quantlab.study.tables import size_ppl
    >>> with_today(size_ppl("llama-7b", ftypes=["Q4_K_M"]), "llama-7b", ftypes=["IQ4_XS"]).to_frame()["ftype"].tolist()
    ['Q4_K_M', 'IQ4_XS']
    """
    if table.protocol["rules"] != "current":
        raise ValueError(
            f"table: rules={table.protocol['rules']}, must be current, the only rules with today's ftypes. "
            f"Leave rules out."
        )
    names = list(ftypes) or FTYPES
    if is_shape(model):
        added = size_ppl(model, text, ftypes=names)
        return replace(table, rows=(*table.rows, *added.rows))
    opened, n_ctx, chunks = open_model(model), table.protocol["n_ctx"], table.protocol["chunks"]
    matrix = imatrix(opened, calibrate_on, n_ctx=n_ctx, chunks=CHUNKS, **options)
    comparison = compare(opened, names, text, imatrix=matrix, n_ctx=n_ctx, chunks=chunks, **options)
    rows = [{**row, "ftype": f"{row['ftype']}+imatrix"} for row in measured(opened, comparison, names, "current").rows]
    note = f"+imatrix: an importance matrix of {matrix.chunk_count} chunks of the text {calibrate_on}."
    return replace(table, rows=(*table.rows, *rows), notes=(*table.notes, note))
