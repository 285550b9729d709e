"""What a reader downloads and unpacks: no empty folders where it fails, and a mark while it is at work.

Readers take a folder that exists for a whole data set, so that one whose unpacking was killed would be read as a
smaller one.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def leaving_no_empty_folders(root: Path) -> Iterator[None]:
    """Readers make folders before they find that there is nothing to put into them: such go again."""
    there = {path.name for path in root.iterdir()} if root.is_dir() else None
    try:
        yield
    finally:
        made = [path for path in root.iterdir() if path.name not in (there or ())] if root.is_dir() else []
        for folder in [path for path in made if path.is_dir()]:
            for inner, _, _ in os.walk(folder, topdown=False):
                with suppress(OSError):  # not empty
                    os.rmdir(inner)
        if there is None:
            with suppress(OSError):
                root.rmdir()


def cut_off(root: Path, name: str) -> Path | None:
    """The mark of a download that did not come to its end; one that is at work in another process is waited for."""
    with suppress(OSError), _mark(root, name).open("rb") as opened:
        _lock(opened)
        if _mark(root, name).exists():
            return _mark(root, name)
    return None


@contextmanager
def marked(root: Path, name: str, found: Callable[[], bool]) -> Iterator[None]:
    """Around a download into `root`. The mark stays where it was killed, or failed and left what `found` takes for the
    set."""
    root.mkdir(parents=True, exist_ok=True)
    mark = _mark(root, name)
    with mark.open("ab") as opened:
        _lock(opened)
        try:
            yield
        except BaseException:
            if not found():
                mark.unlink(missing_ok=True)
            raise
        mark.unlink(missing_ok=True)


def _mark(root: Path, name: str) -> Path:
    return root / f".{name}.part"


def _lock(opened: IO[bytes]) -> None:
    """Until it is closed. No lock where there is no fcntl (Windows), or where the file system has none."""
    with suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(opened, fcntl.LOCK_EX)
