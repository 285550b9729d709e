"""The data sets of the literature, one row each: what they hold, where they lie, how sure we are of the counts.

A row plus a reader of its layout is a whole data set (`data/archives/`, `data/layouts.py`); nothing else knows its
name. Counts are marked by what stands behind them: L, the number of test images that every published accuracy is a
fraction of; F, counted in a file or stated by the data set's own documentation; "?", commonly quoted and never verified
here.
"""

from dataclasses import dataclass
from typing import Literal

Sure = Literal["L", "F", "?"]


@dataclass(frozen=True)
class Variant:
    """One known split of a data set. train, test: images, None when the number depends on a list.

    sure: marks of (train, test). A count marked "?" is never a reason to stop.
    """

    name: str
    train: int | None
    test: int | None
    sure: tuple[Sure, Sure] = ("F", "F")

    def matches(self, train: int, test: int) -> bool:
        return self.train in (None, train) and self.test in (None, test)

    def counts(self) -> str:
        """ "24,000/6,000"; any number: "*"."""
        return "/".join("*" if count is None else f"{count:,}" for count in (self.train, self.test))


@dataclass(frozen=True)
class Row:
    """One data set.

    layout: key of `data.layouts.LAYOUTS`.  folders: below data_root, the default first, then accepted aliases.
    expects: the layout in words.  source: official name of where to get it.  variants: the expected split first.
    test_names: folder names of the test half, the usual one first.  class_pattern: what class folders are called.
    domains: names in stream order, of a domain-incremental data set.  numeric: class folders are 0..C-1.
    natural_order: published numbers use the unshuffled class order.  seeded: whether an own 80/20 split is accepted.
    note: what a user has to know before comparing numbers.
    """

    key: str
    title: str
    classes: int
    layout: str
    folders: tuple[str, ...]
    expects: str
    source: str
    variants: tuple[Variant, ...]
    test_names: tuple[str, ...] = ("test", "val")
    class_pattern: str = ""
    domains: tuple[str, ...] = ()
    numeric: bool = False
    natural_order: bool = False
    seeded: bool = True
    note: str = ""

    @property
    def put_there(self) -> str:
        return "Put it there, or name the folder that holds both" if ":" in self.key else "Unpack what is missing there"

    @property
    def split_first(self) -> str:
        return "make these two folders" if ":" in self.key else "unpack the split archive"

    @property
    def manual(self) -> str:
        """Where the user reads about it; a folder of one's own has no section."""
        return "docs/datasets.md" if ":" in self.key else f"docs/datasets.md#{self.key}"


ROWS: dict[str, Row] = {}


def add_row(row: Row) -> None:
    """Make a data set known by its key."""
    assert row.key not in ROWS, f"{row.key} is registered twice"
    ROWS[row.key] = row
