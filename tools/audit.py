"""Whether a finished run's predictions depend on the images that they share a batch with, and what that is worth.

The test images of all tasks seen are passed again, in class order and shuffled, in batches of several sizes, in fp32
and bf16, without anything that was stored. What one image alone gives in the same precision is the measure.
"""

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trainer
from convs.backbones import NAMED, bundled_file
from convs.weights import sha256
from data.stream import TaskData
from models.base import Learner
from models.factory import saved_config
from models.parts.evaluation import MAIN, scored
from predictor import restored
from utils.config import RunConfig
from utils.folders import finished_result, single_seed
from utils.storage import expanded

COMMAND = "audit"
HELP = "does a finished run's prediction depend on the rest of its batch? data, weights, class order as they were?"

BATCHES = (1, 7, 64, 128)
ORDERS = ("by class", "shuffled")
# Largest move of an image's scores, in units of their spread, that is put down to the order of sums.
ROUNDING = {"fp32": 1e-3, "bf16": 0.1}

log = logging.getLogger(__name__)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a seed, or of a run with one")
    parser.add_argument("--data-root", metavar="DIR", help="where data sets lie")
    parser.add_argument("--device", metavar="auto|cpu|cuda|cuda:1", help="instead of the run's")
    parser.add_argument(
        "--images", type=int, metavar="N", help="at most so many, spread evenly over the classes; default: all"
    )


def main(options: argparse.Namespace) -> int:
    seed = single_seed(options.run)
    result = finished_result(seed)
    given = {"data_root": options.data_root, "device": options.device}
    given = {key: value for key, value in given.items() if value is not None}
    manager = trainer.load_data(config := saved_config(seed / "config.json", given))
    for line in provenance(manager, config, result):
        print(line)
    data = spread(TaskData.joined([task.test for task in manager.tested_after(manager[-1])]), options.images)
    rows: list[Row] = []
    for precision in ROUNDING:
        learner = restored(saved_config(seed / "config.json", given | {"precision": precision}), checkpoint_of(seed))
        rows += audit(learner, data, precision)
    print("\n".join(table(rows, len(data))))
    print(verdict(rows, len(data)))
    return 0


def checkpoint_of(seed: Path) -> Path:
    return seed / "checkpoint" / "last.pt"


def spread(data: TaskData, count: int | None) -> TaskData:
    """At most `count` of the images, as many of each class as of the others as far as they go."""
    if count is None or count >= len(data):
        return data
    seen = np.zeros(int(data.labels.max()) + 1, dtype=int)
    turn = np.empty(len(data), dtype=int)  # the place of each image among those of its class
    for index, label in enumerate(data.labels):
        turn[index] = seen[label]
        seen[label] += 1
    return data.take(np.sort(np.argsort(turn, kind="stable")[: max(count, 1)]))


@dataclass(frozen=True)
class Row:
    """One pass. accuracy: percent. other: predictions that differ from those of single images. moved: images whose
    scores differ from those of single images by more than rounding."""

    precision: str
    order: str
    batch: int
    accuracy: float
    other: int
    moved: int


def audit(learner: Learner, data: TaskData, precision: str) -> Iterator[Row]:
    """Passes of one precision; the first is of single images."""
    by_class = np.argsort(data.labels, kind="stable")
    shuffled = np.random.default_rng(0).permutation(len(data))
    single = scores_of(learner, data, by_class, 1)
    spread_of = (single.amax(dim=1) - single.amin(dim=1)).clamp(min=1e-12)
    labels = torch.from_numpy(data.labels)
    for order, name in zip((by_class, shuffled), ORDERS, strict=True):
        for batch in BATCHES:
            found = scores_of(learner, data, order, batch)
            best = found.argmax(dim=1)
            yield Row(
                precision,
                name,
                batch,
                100 * float((best == labels).double().mean()),
                int((best != single.argmax(dim=1)).sum()),
                int(((found - single).abs().amax(dim=1) > ROUNDING[precision] * spread_of).sum()),
            )


def scores_of(learner: Learner, data: TaskData, order: np.ndarray, batch: int) -> torch.Tensor:
    """(N, C): the main score of each image, by its place in `data`, when they come in this order."""
    parts = []
    for scores, _, _ in scored(learner, data.take(order), None, batch):
        parts.append(scores.get(MAIN, next(iter(scores.values()))).float().cpu())
    found = torch.empty_like(torch.cat(parts))
    found[torch.from_numpy(order)] = torch.cat(parts)
    return found


def table(rows: list[Row], images: int) -> list[str]:
    head = f"{images} images\n{'precision':<10}{'order':<10}{'batch':>6}{'accuracy':>10}{'other':>8}{'moved':>8}"
    return [head] + [
        f"{row.precision:<10}{row.order:<10}{row.batch:>6}{row.accuracy:>10.2f}{row.other:>8}{row.moved:>8}"
        for row in rows
    ]


def verdict(rows: list[Row], images: int) -> str:
    """A sentence; of fp32, in which rounding is small."""
    exact = [row for row in rows if row.precision == "fp32"]
    worst = max(exact, key=lambda row: (row.moved, row.other))
    if worst.moved == 0:
        ties = max(row.other for row in exact)
        rest = f" ({ties} predictions differ by rounding)" if ties else ""
        return f"verdict: no prediction depends on its neighbours{rest}"
    alone = exact[0].accuracy
    gain = max(exact, key=lambda row: abs(row.accuracy - alone))
    return (
        f"verdict: predictions depend on their neighbours. In batches of {worst.batch}, {worst.order}, the scores of "
        f"{worst.moved} of {images} images are not their own and {worst.other} predictions change; accuracy is "
        f"{alone:.2f} for single images and {gain.accuracy:.2f} in batches of {gain.batch}, {gain.order} "
        f"({gain.accuracy - alone:+.2f})"
    )


def provenance(manager: trainer.DataManager, config: RunConfig, result: dict[str, Any]) -> Iterator[str]:
    """A line each for data, class order and weights: as the run found them, or what is different."""
    then, now = result["data"]["hash"], manager.data.digest
    yield f"data         {'as in the run' if then == now else f'OTHER: sha256 {now[:12]} now, {then[:12]} then'}"
    same = list(manager.class_order) == result["class_order"] and manager.class_names == result["class_names"]
    yield f"class order  {'as in the run' if same else 'OTHER than in result.json'}"
    known = (result["weights"] or {}).get("sha256")
    name = config.backbone if isinstance(config.backbone, str) else ""
    bundled = bundled_file(name) if name in NAMED else None
    place = bundled if config.weights is None else expanded(config.weights)
    if known is None:
        yield "weights      the run began with none of a file"
    elif place is None or not place.is_file():
        file = "the file" if place is None else f"'{place}'"
        yield f"weights      {file} is not there any more; the checkpoint holds what the run learned"
    else:
        found = sha256(place)
        other = f"OTHER: sha256 {found[:12]} now, {known[:12]} then"
        yield f"weights      {'as in the run' if found == known else other}"
