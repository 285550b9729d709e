"""Evaluation: one pass over the test images of all tasks seen, under every score that a learner gives.

What a learner calls frozen (features of a network that trains no more) is computed once per image and kept, so that a
stream of T tasks does not pass its test set T (T + 1) / 2 times.

Letters: S scores, T tasks tested, C classes of the stream, B images of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data.loading import View, pass_over
from data.stream import Task, TaskData, TaskInfo
from models.parts.drift import Drift, Features, stored_means
from models.parts.finite import advice
from models.parts.frozen_store import FrozenStore
from models.parts.predictions import Keep
from utils.errors import TrainingError
from utils.runtime import Runtime

if TYPE_CHECKING:  # a part imports no learner; `evaluate` receives one
    from models.base import Learner

KINDS = ("class_il", "task_il", "top5")  # among all classes; with the task known; among the five best
MAIN = "logits"  # what the score of a learner that gives one is called


@dataclass(frozen=True)
class Evaluation:
    """names: of the scores, the main one first. correct (S, 3, T): right predictions on the test images of each task,
    by KINDS. by_class (S, C): right predictions of each class, class-incremental. images: how many were read.
    drift: of the features, where the learner stores means of them. newest: predictions of the main score that fall on
    the classes of the learner's task, images of these classes, images; None where the task brings no new classes."""

    names: tuple[str, ...]
    correct: np.ndarray
    by_class: np.ndarray
    images: int
    drift: Drift | None = None
    newest: tuple[int, int, int] | None = None

    @property
    def main(self) -> np.ndarray:
        """(3, T), of the main score."""
        return self.correct[0]


def evaluate(
    learner: "Learner",
    tasks: Sequence[Task],
    store: FrozenStore | None = None,
    batch_size: int | None = None,
    keep: Keep | None = None,
) -> Evaluation:
    """Right predictions on the test images of each task. A prediction is the largest of all scores; with the task
    known, of the task's own classes.

    store: frozen values of earlier evaluations, used and filled; default: all are computed. keep: is shown every batch
    and its scores.
    """
    runtime, tested = learner.runtime, _distinct(tasks)
    owner = np.repeat(np.arange(len(tested)), [len(task.test) for task in tested])
    data = TaskData.joined([task.test for task in tested])
    if learner.config.batch_dependent:
        order = np.argsort(data.labels, kind="stable")
        owner, data = owner[order], data.take(order)
        batch_size = batch_size or learner.config.batch_size
    counts = _Counts(tested, learner.task, runtime.device)
    features = Features(stored_means(learner), -(-len(data) // runtime.world), owner > learner.task.index)
    learner.eval()
    with runtime.stopwatch("eval"):
        with features.watching(learner.network.head):
            for scores, targets, positions in scored(learner, data, store, batch_size, features):
                if keep is not None:
                    keep(data, positions, scores)
                counts.add(scores, targets, torch.from_numpy(owner[positions]).to(runtime.device, non_blocking=True))
        counts.agree(runtime.gather(counts.names))
        correct, by_class, lost, newest = counts.totals(runtime)
        drift = features.drift(learner.task.total_classes, runtime)
    if lost:
        where = f"behind task {learner.task.index + 1} of seed {learner.config.seeds[0]}"
        raise TrainingError(f"the scores of {lost:.0f} test images are no numbers {where}: {advice(learner)}")
    column = {id(task.test): index for index, task in enumerate(tested)}
    chosen = np.ascontiguousarray(correct[..., [column[id(task.test)] for task in tasks]])
    return Evaluation(counts.names, chosen, by_class, counts.images, drift, _newest(newest, learner.task, data.labels))


def _newest(predicted: float, task: TaskInfo, labels: np.ndarray) -> tuple[int, int, int] | None:
    """As `Evaluation` has it; labels (N,) of the images."""
    own = np.isin(labels, task.classes).sum()
    return None if task.domain is not None else (int(predicted), int(own), len(labels))


@torch.inference_mode()
def scored(
    learner: "Learner",
    data: TaskData,
    store: FrozenStore | None = None,
    batch_size: int | None = None,
    features: Features | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor, np.ndarray]]:
    """({score: (B, C)}, labels (B,), positions (B,)) of this process's share of the images, batch by batch. features:
    collects those that a prediction was made from."""
    runtime, size = learner.runtime, batch_size or learner.config.test_batch_size
    view, share = data.view("test"), np.arange(len(data))[runtime.rank :: runtime.world]
    kept = store or FrozenStore(0)
    if store is not None and not learner.needs_images:
        _fill(learner, view, data, share, store, size)
    for images, targets, positions in _batches(learner, view, data, share, kept, size):
        with runtime.autocast():
            frozen = _frozen(learner, images, data, positions, kept)
            scores = learner.predict(images, frozen)
        if features is not None:
            features.add(frozen, targets, positions)
        yield scores if isinstance(scores, dict) else {MAIN: scores}, targets, positions


def _fill(learner: "Learner", view: View, data: TaskData, share: np.ndarray, store: FrozenStore, size: int) -> None:
    """Compute what the store lacks, each value for the images that lack it alone: no other image is read. It ends where
    there is no room."""
    names, rows = tuple(learner.frozen_names), data.rows[share]
    lacking = np.array([~store.there(data.split, rows, name) for name in names], dtype=bool).reshape(len(names), -1)
    for pattern in np.unique(lacking, axis=1).T:
        missing = [name for name, lacks in zip(names, pattern, strict=True) if lacks]
        chosen = share[(lacking == pattern[:, None]).all(axis=0)] if missing else share[:0]
        for images, _, positions in pass_over(view, chosen, learner.runtime, size):
            with learner.runtime.autocast():
                found = learner.frozen(images, missing)
            for name, values in found.items():
                store.put(data.split, data.rows[positions], name, values)
            if not all(store.has(data.split, data.rows[positions], name) for name in missing):
                return


def _batches(
    learner: "Learner", view: View, data: TaskData, share: np.ndarray, store: FrozenStore, size: int
) -> Iterator[tuple[Tensor | None, Tensor, np.ndarray]]:
    """As `pass_over`; without the images where stored values are all that a prediction needs."""
    names, runtime = learner.frozen_names, learner.runtime
    rows = data.rows[share]
    if learner.needs_images or not names or not all(store.has(data.split, rows, name) for name in names):
        yield from pass_over(view, share, runtime, size)
        return
    for first in range(0, len(share), size):
        positions = share[first : first + size]
        yield None, torch.from_numpy(data.labels[positions]).to(runtime.device), positions


def _frozen(
    learner: "Learner", images: Tensor | None, data: TaskData, positions: np.ndarray, store: FrozenStore
) -> Mapping[str, Tensor]:
    """Values of every frozen name, those that are missing computed and kept."""
    rows, device = data.rows[positions], learner.runtime.device
    missing = [name for name in learner.frozen_names if not store.has(data.split, rows, name)]
    found = learner.frozen(images, missing) if missing and images is not None else {}
    for name, values in found.items():
        store.put(data.split, rows, name, values)
    stored = [name for name in learner.frozen_names if name not in found]
    return {**{name: store.get(data.split, rows, name, device) for name in stored}, **found}


class _Counts:
    """Right predictions, summed on the device."""

    def __init__(self, tasks: Sequence[Task], at_hand: TaskInfo, device: torch.device):
        self.names: tuple[str, ...] = ()
        self.correct = torch.zeros(0, dtype=torch.float64, device=device)
        self.by_class = torch.zeros(0, dtype=torch.float64, device=device)
        self.lost = torch.zeros((), dtype=torch.float64, device=device)  # images whose scores are NaN
        self.images = 0
        self.newest = torch.zeros((), dtype=torch.float64, device=device)  # predictions of the task at hand's classes
        self._own = at_hand.classes
        self._shape = len(tasks), at_hand.num_classes
        foreign = torch.ones(self._shape, dtype=torch.bool)
        for row, task in enumerate(tasks):
            foreign[row, task.classes.start : task.classes.stop] = False
        self._foreign = foreign.to(device, non_blocking=True)  # (T, C): classes that a task does not have

    def add(self, scores: Mapping[str, Tensor], targets: Tensor, owner: Tensor) -> None:
        """scores {name: (B, C so far)}, targets (B,), owner (B,): each image's place among the tasks."""
        if not self.names:
            self._name(tuple(scores))
        assert self.names == tuple(scores), f"scores {tuple(scores)} in a run with {self.names}"
        self.images += len(targets)
        for row, values in enumerate(scores.values()):
            right = torch.stack(right_predictions(values, targets, self._foreign[owner, : values.shape[1]])).to(
                self.correct
            )
            self.correct[row].index_add_(1, owner, right)
            self.by_class[row].index_add_(0, targets, right[0])
        self.lost += torch.stack([values.isnan().any(dim=1) for values in scores.values()]).any(dim=0).sum()
        predicted = next(iter(scores.values())).argmax(dim=1)
        self.newest += ((predicted >= self._own.start) & (predicted < self._own.stop)).sum()

    def agree(self, names: Sequence[tuple[str, ...]]) -> None:
        """names: those of every process, one of which may have had no image."""
        if not self.names:
            self._name(next(found for found in names if found))

    def totals(self, runtime: Runtime) -> tuple[np.ndarray, np.ndarray, float, float]:
        """(correct, by_class, images whose scores are NaN, newest) over all processes; the host waits once."""
        rest = torch.stack([self.lost, self.newest])
        together = torch.cat([self.correct.flatten(), self.by_class.flatten(), rest])
        host = runtime.reduce_sum(together).cpu()
        correct, by_class, rest = host.split([self.correct.numel(), self.by_class.numel(), 2])
        lost, newest = rest.tolist()
        return correct.view(self.correct.shape).numpy(), by_class.view(self.by_class.shape).numpy(), lost, newest

    def _name(self, names: tuple[str, ...]) -> None:
        tasks, classes = self._shape
        self.names = names
        self.correct = self.correct.new_zeros(len(names), len(KINDS), tasks)
        self.by_class = self.by_class.new_zeros(len(names), classes)


def right_predictions(scores: Tensor, targets: Tensor, foreign: Tensor) -> list[Tensor]:
    """scores (B, C), targets (B,), foreign (B, C) -> (B,) booleans by KINDS."""
    within = scores.masked_fill(foreign, -torch.inf)
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices
    return [
        scores.argmax(dim=1) == targets,
        within.argmax(dim=1) == targets,
        (best == targets[:, None]).any(dim=1),
    ]


def _distinct(tasks: Sequence[Task]) -> list[Task]:
    """One task of those that share a test set (domains that are all tested on the same images)."""
    found: dict[int, Task] = {}
    for task in tasks:
        found.setdefault(id(task.test), task)
    return list(found.values())
