"""Today's ftypes beside the table of 2023: with a matrix, on the same text and chunks."""

import pytest

from quantlab.study import tables
from quantlab.study.today import FTYPES, with_today


def test_rows_with_a_matrix_come_after_the_table():
    table = tables.size_ppl("tiny", ftypes=["Q4_0", "COPY"], chunks=2)
    both = with_today(table, "tiny", ftypes=["IQ4_XS"])
    assert [row["ftype"] for row in both.rows] == ["Q4_0", "COPY", "IQ4_XS+imatrix"]
    assert both.rows[:2] == table.rows and both.protocol == table.protocol
    added = both.rows[2]
    assert added["bytes"] < both.rows[0]["bytes"] and 0 < added["kld_mean"] < both.rows[0]["kld_mean"]
    assert both.notes[-1] == "+imatrix: an importance matrix of 32 chunks of the text sampled."


def test_a_shape_has_sizes_alone():
    both = with_today(tables.size_ppl("llama-7b", ftypes=["Q4_K_M"]), "llama-7b")
    assert [row["ftype"] for row in both.rows] == ["Q4_K_M", *FTYPES]
    sizes = [row["bytes"] for row in both.rows[1:]]
    assert sizes == sorted(sizes, reverse=True)


def test_the_rules_of_2023_are_refused():
    with pytest.raises(
        ValueError, match="table: rules=2023-12, must be current, the only rules with today's ftypes. Leave rules out."
    ):
        with_today(tables.size_ppl("llama-7b", ftypes=["Q4_K_M"], rules="2023-12"), "llama-7b")
