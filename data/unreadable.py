"""Images that cannot be read, left out before a run: what "on_bad_image": "skip" asks for."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.checks import some
from data.images import Paths, read_image
from data.records import ImageData, Split
from utils.errors import DataError
from utils.runtime import available_cpus

log = logging.getLogger(__name__)


def readable(data: ImageData) -> tuple[ImageData, list[str]]:
    """(the data set without image files that cannot be read, their paths). Every file is decoded once; arrays are left
    as they are.

    Raises DataError when a class, or a domain, is left without training or test images.
    """
    halves, bad = {"train": data.train, "test": data.test}, []
    for half, split in [(half, split) for half, split in halves.items() if split.in_files]:
        paths = [path for path in split.images if isinstance(path, Path)]
        with ThreadPoolExecutor(available_cpus()) as pool:
            bar = {"desc": f"{data.name}: reading", "leave": False, "disable": None}
            good = np.array(list(tqdm(pool.map(_can_be_read, paths), total=len(paths), **bar)), dtype=bool)
        bad += [str(paths[row]) for row in np.flatnonzero(~good)]
        halves[half] = _without(half, split, paths, good, data)
    if bad:
        log.warning("%s: left out %d images that cannot be read: %s", data.name, len(bad), some(bad))
    return replace(data, train=halves["train"], test=halves["test"]), bad


def _can_be_read(path: Path) -> bool:
    try:
        read_image(path)
    except DataError:
        return False
    return True


def _without(half: str, split: Split, paths: list[Path], good: np.ndarray, data: ImageData) -> Split:
    rows = np.flatnonzero(good)
    lost = [data.class_names[label] for label in sorted(set(split.labels.tolist()) - set(split.labels[rows].tolist()))]
    if split.domains is not None:
        gone = set(split.domains.tolist()) - set(split.domains[rows].tolist())
        lost += [data.domain_names[domain] for domain in sorted(gone)]
    if lost:
        raise DataError(f"{data.name}: no image of {some(lost)} in {half} can be read. Replace the files")
    domains = None if split.domains is None else split.domains[rows]
    return Split(Paths(paths[row] for row in rows), split.labels[rows], domains)
