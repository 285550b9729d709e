"""Tables in four forms: what is escaped, aligned, and too long for a page."""

import csv
import io

import pytest

from utils.tables import PAGE, Table, number, with_std

TABLE = Table(
    "A & B, 50 %", ["name_of", "value"], [["a|b", "-1.50"], ["x, y", "90.00 ± 1.00"]], frozenset({1}), ["n_1"]
)


def test_text_is_aligned():
    assert TABLE.render("text").splitlines() == [
        "A & B, 50 %", "", "name_of         value", "-------  ------------", "a|b             -1.50",
        "x, y     90.00 ± 1.00", "", "n_1",
    ]  # fmt: skip


def test_markdown_escapes_bars():
    lines = TABLE.render("markdown").splitlines()
    assert lines[2:5] == ["| name_of | value |", "|---|---:|", "| a\\|b | -1.50 |"]


def test_csv_is_read_back():
    assert list(csv.reader(io.StringIO(TABLE.render("csv")))) == [list(TABLE.headers), *map(list, TABLE.rows)]


def test_latex_escapes_and_has_a_minus():
    text = TABLE.render("latex")
    assert r"\caption{A \& B, 50 \%}" in text and r"name\_of & value \\" in text
    assert r"a|b & $-$1.50 \\" in text and r"90.00 $\pm$ 1.00" in text and r"n\_1" in text


@pytest.mark.parametrize("rows, kind", [(PAGE, "tabular"), (PAGE + 1, "longtable")])
def test_latex_of_more_than_a_page(rows, kind):
    text = Table("c", ["a"], [["1"]] * rows).render("latex")
    assert text.count(rf"\begin{{{kind}}}") == text.count(rf"\end{{{kind}}}") == 1
    assert text.count(r"\toprule") == (1 if kind == "tabular" else 2)


def test_numbers():
    assert (number(None), number(1.005), number(0.5, signed=True), with_std(90, None)) == ("", "1.00", "+0.50", "90.00")
    assert with_std(90.0, 0.126) == "90.00 ± 0.13"
