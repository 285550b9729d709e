"""A table for people, in four forms: aligned text, Markdown, CSV, LaTeX (booktabs)."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Form = Literal["text", "markdown", "csv", "latex"]
FORMS: tuple[Form, ...] = ("text", "markdown", "csv", "latex")
SUFFIXES: dict[str, Form] = {".txt": "text", ".md": "markdown", ".csv": "csv", ".tex": "latex"}
PAGE = 45  # rows that fit on one
_ESCAPED = str.maketrans(
    {"&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}",
     "^": r"\textasciicircum{}", "\\": r"\textbackslash{}", "±": r"$\pm$", "−": r"$-$"}
)  # fmt: skip


@dataclass(frozen=True)
class Table:
    """caption: a sentence, the protocol in it. rows: texts, as many as headers. numeric: columns aligned to the
    right. notes: below the table."""

    caption: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    notes: Sequence[str] = ()

    def render(self, form: Form) -> str:
        return {"text": self._text, "markdown": self._markdown, "csv": self._csv, "latex": self._latex}[form]()

    def _text(self) -> str:
        widths = [max(len(row[column]) for row in (self.headers, *self.rows)) for column in range(len(self.headers))]

        def line(cells: Sequence[str]) -> str:
            padded = [
                cell.rjust(width) if number in self.numeric else cell.ljust(width)
                for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return "  ".join(padded).rstrip()

        rule = "  ".join("-" * width for width in widths)
        return "\n".join([self.caption, "", line(self.headers), rule, *map(line, self.rows), *self._notes("")]) + "\n"

    def _markdown(self) -> str:
        def line(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        rule = ["---:" if number in self.numeric else "---" for number in range(len(self.headers))]
        lines = [f"**{self.caption}**", "", line(self.headers), "|" + "|".join(rule) + "|", *map(line, self.rows)]
        return "\n".join([*lines, *self._notes("- ")]) + "\n"

    def _csv(self) -> str:
        """Captions and notes left out: for programs."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.headers, *self.rows])
        return text.getvalue()

    def _latex(self) -> str:
        """A floating table; one that is longer than a page goes over several. Needs booktabs, and longtable then."""
        columns = "".join("r" if number in self.numeric else "l" for number in range(len(self.headers)))

        def line(cells: Sequence[str]) -> str:
            return " & ".join(map(_latex_cell, cells)) + r" \\"

        caption, notes = (text.translate(_ESCAPED) for text in (self.caption, " ".join(self.notes)))
        below = [rf"\par\medskip\parbox{{\linewidth}}{{\footnotesize {notes}}}"] if notes else []
        head, body = [r"\toprule", line(self.headers), r"\midrule"], [*map(line, self.rows), r"\bottomrule"]
        if len(self.rows) <= PAGE:
            return "\n".join([
                "% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{caption}}}",
                rf"\begin{{tabular}}{{{columns}}}", *head, *body, r"\end{tabular}", *below, r"\end{table}",
            ]) + "\n"  # fmt: skip
        return "\n".join([
            "% needs \\usepackage{booktabs,longtable}", rf"\begin{{longtable}}{{{columns}}}",
            rf"\caption{{{caption}}}\\", *head, r"\endfirsthead", *head, r"\endhead", *body, r"\end{longtable}", *below,
        ]) + "\n"  # fmt: skip

    def _notes(self, bullet: str) -> list[str]:
        return ["", *(bullet + note for note in self.notes)] if self.notes else []


def _latex_cell(cell: str) -> str:
    """With a minus that is none of the hyphens."""
    text = cell.translate(_ESCAPED)
    return f"$-${text[1:]}" if text[:1] == "-" and text[1:2].isdigit() else text


def number(value: float | None, signed: bool = False) -> str:
    """Two decimals; nothing for None."""
    return "" if value is None else f"{value:+.2f}" if signed else f"{value:.2f}"


def with_std(mean: float | None, std: float | None) -> str:
    """91.53 ± 0.21, or the mean alone."""
    return number(mean) + ("" if std is None or mean is None else f" ± {std:.2f}")
