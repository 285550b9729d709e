"""Classify images by a finished run, from its folder alone."""

import argparse
import csv
import glob
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.images import images_below
from predictor import Predictor
from utils.errors import DataError, UserError
from utils.storage import expanded

COMMAND = "predict"
HELP = "classify images by a finished run, without its data set"
AT_ONCE = 256  # images between two lines of output

log = logging.getLogger(__name__)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a seed, or of a run with one")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders, patterns (dir/*.jpg, dir/**/*.png)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write file,class,score; must not be there")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="the K best classes of each image; default 1")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:1")


def main(options: argparse.Namespace) -> int:
    """2 when an image could not be read; the others are classified all the same."""
    if options.top < 1:
        raise UserError(f"--top must be at least 1, got {options.top}")
    if options.csv is not None and options.csv.exists():
        raise UserError(f"'{options.csv}' is there already: choose another name")
    files = pictures(options.images)
    predictor = Predictor(options.run, options.device)
    rows: list[tuple[str, str, float]] = []
    faults = 0
    for first in range(0, len(files), AT_ONCE):
        some, wrong = classify(predictor, files[first : first + AT_ONCE], options.top)
        for sentence in wrong:
            log.error("%s", sentence)
        rows, faults = rows + some, faults + len(wrong)
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file", "class", "score"), *rows])
    else:
        width = max((len(row[0]) for row in rows), default=0)
        for name, label, score in rows:
            print(f"{name:<{width}}  {label}  {score:.4f}")
    return 2 if faults else 0


def classify(predictor: Predictor, files: Sequence[Path], top: int) -> tuple[list[tuple[str, str, float]], list[str]]:
    """([(file, class, score)], best first, and a sentence for each image that cannot be read)."""
    good, sentences, pixels = [], [], []
    for file in files:
        try:
            pixels.append(predictor.pixels(file))
        except DataError as error:
            sentences.append(str(error))
        else:
            good.append(file)
    scores = predictor(pixels).scores
    best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
    rows = [
        (str(file), predictor.names[column], float(values[column]))
        for file, values, columns in zip(good, scores, best, strict=True)
        for column in columns
    ]
    return rows, sentences


def pictures(places: Sequence[str]) -> list[Path]:
    """Files, folders and patterns -> the images that they stand for, in their order, each once.

    Raises UserError where a folder or pattern stands for none. A file that is named is taken whatever it is called.
    """
    found: dict[Path, None] = {}
    for place in places:
        path = expanded(place)
        if path.is_dir():
            some = images_below(path)[0]
        elif glob.has_magic(place) and not path.exists():
            some = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
        else:
            some = [path]
        if not some:
            raise UserError(f"no images in '{place}'")
        found |= dict.fromkeys(some)
    return list(found)
