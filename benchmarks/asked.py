"""What the commands of this folder are asked: a fault is one sentence and status 2, before anything is measured."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models.base import LEARNERS


def add_learners(parser: argparse.ArgumentParser, variants: Iterable[str] = (), help: str = "default: all") -> None:
    """LEARNER ...: registered ones, or these variants."""
    others = list(variants)

    def known(name: str) -> str:
        if name not in [*LEARNERS, *others]:
            raise argparse.ArgumentTypeError(LEARNERS.unknown(name) + "".join(f", {other}" for other in others))
        return name

    parser.add_argument("learners", nargs="*", metavar="LEARNER", type=known, help=help)


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" is no whole number of at least 1')
    return int(text)


def kept(text: str) -> Any:
    """The figures that a file holds."""
    try:
        return json.loads(Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"'{text}' holds no figures: {error}") from None


def new_file(text: str) -> Path:
    """A file that can be written: its folder is there."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' cannot be written: it is a folder")
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"'{text}' cannot be written: there is no folder '{path.parent}'")
    return path
