"""A data set as a sequence of tasks: class-incremental or, when the data set has domains, domain-incremental.

Labels are remapped once: new label = position of the original class in the class order, so that task t owns the
range [known_classes, total_classes).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import torch

from data import sources
from data.batched import BATCHED, Resident, has_room
from data.faults import protocol_faults, transform_faults, validation_faults
from data.image_cache import cached
from data.layouts import Options
from data.loading import View
from data.records import ImageData, Split
from data.splits import cache_root
from data.transforms import Transform
from data.unreadable import readable
from utils.config import RunConfig
from utils.errors import ConfigError
from utils.seed import folded

log = logging.getLogger(__name__)

Mode = Literal["train", "test"]


def class_order(num_classes: int, seed: int, shuffle: bool) -> np.ndarray:
    """(C,): order[j] is the original class that becomes new label j (the field's legacy numpy generator)."""
    return np.random.RandomState(folded(seed, 32)).permutation(num_classes) if shuffle else np.arange(num_classes)


def label_map(order: np.ndarray) -> np.ndarray:
    """(C,): new label of each original class, the inverse of the order."""
    return np.argsort(order)


def split_classes(num_classes: int, init_cls: int, increment: int) -> list[int]:
    """Task sizes: init_cls, then increment while classes remain after it, the rest in the last task."""
    sizes = [init_cls]
    while sum(sizes) + increment < num_classes:
        sizes.append(increment)
    if (rest := num_classes - sum(sizes)) > 0:
        sizes.append(rest)
    return sizes


@dataclass(frozen=True)
class TaskData:
    """One half (train or test) of a task; every image can be read under either transform."""

    split: Split
    rows: np.ndarray
    labels: np.ndarray
    transforms: dict[Mode, Transform]
    resident: Resident | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, count: int) -> "TaskData":
        """The first `count` images alone."""
        return self.take(np.arange(min(count, len(self))))

    def take(self, positions: np.ndarray) -> "TaskData":
        """The images at these positions, in this order."""
        return replace(self, rows=self.rows[positions], labels=self.labels[positions])

    def sample(self, count: int, seed: int) -> "TaskData":
        """`count` of the images, drawn by the seed, in their order; all, where there are fewer."""
        return self.take(np.sort(np.random.RandomState(seed % (1 << 32)).permutation(len(self))[:count]))

    def at(self, rows: np.ndarray, labels: np.ndarray) -> "TaskData":
        """Other images of the same half, by their rows in the data set and their new labels: stored exemplars."""
        return replace(self, rows=rows, labels=labels)

    @staticmethod
    def joined(parts: "Sequence[TaskData]") -> "TaskData":
        """The images of several, all of one half, one after another."""
        first = parts[0]
        assert all(part.split is first.split for part in parts), "images of two halves do not join"
        return first.at(np.concatenate([part.rows for part in parts]), np.concatenate([part.labels for part in parts]))

    def view(self, mode: Mode, beside: Mode | None = None) -> View:
        """beside: the same images under another transform, as further channels."""
        second = None if beside is None else self.transforms[beside]
        return View(self.split, self.rows, self.labels, self.transforms[mode], self.resident, second)


@dataclass(frozen=True)
class TaskInfo:
    """What is known of a task without its images; saved with a run.

    index: 0-based. num_classes: of the whole stream; sizes: classes of every task. known_classes: classes seen before
    this task; total_classes: with it. classes: the labels that occur in it: the new ones, or, in a domain-incremental
    stream, all of them. domain: its name in a domain-incremental stream, else None.
    """

    index: int
    num_tasks: int
    num_classes: int
    sizes: tuple[int, ...]
    known_classes: int
    total_classes: int
    classes: range
    domain: str | None = None

    @property
    def info(self) -> "TaskInfo":
        """This task without its images."""
        return TaskInfo(**{entry.name: getattr(self, entry.name) for entry in fields(TaskInfo)})

    @property
    def is_last(self) -> bool:
        return self.index + 1 == self.num_tasks

    def state_dict(self) -> dict[str, Any]:
        state = {entry.name: getattr(self, entry.name) for entry in fields(TaskInfo)}
        return state | {"sizes": list(self.sizes), "classes": [self.classes.start, self.classes.stop]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "TaskInfo":
        return cls(**{**state, "sizes": tuple(state["sizes"]), "classes": range(*state["classes"])})


@dataclass(frozen=True, kw_only=True)
class Task(TaskInfo):
    """One step of the stream, with its images.

    val: training images that "validation" keeps apart, else None. stream: all tasks, for evaluation on those seen.
    """

    train: TaskData
    test: TaskData
    val: TaskData | None = None
    stream: "Sequence[Task]" = field(default=(), repr=False, compare=False)

    @property
    def seen(self) -> "list[Task]":
        """This task and all earlier ones."""
        return [*self.stream[: self.index], self]

    @property
    def train_so_far(self) -> TaskData:
        """Training images of this and all earlier tasks in file order, for upper bounds and probes only."""
        rows = np.concatenate([task.train.rows for task in self.seen])
        labels = np.concatenate([task.train.labels for task in self.seen])
        order = np.argsort(rows, kind="stable")
        return replace(self.train, rows=rows[order], labels=labels[order])


class DataManager(Sequence[Task]):
    """The tasks of a config, in order; made once.

    device: where a run will take place, for "augment_on": "auto"; default: images are made on the host.
    Raises ConfigError when protocol and data do not fit, DataError when the data are missing or damaged.
    """

    def __init__(self, config: RunConfig, image_size: int, device: torch.device | None = None):
        folder = cache_root(config.cache_root)
        options = Options(config.split, config.strict_data, cache=folder)
        self.data: ImageData = sources.load(config.dataset, config.data_root, options)
        self.domain_incremental = bool(self.data.domain_names)
        self._test_all = config.dil_eval == "all"
        self.image_size = image_size
        self._transforms = {mode: Transform(name, image_size) for mode, name in config.recipes.items()}
        self.unreadable: list[str] = []
        if config.on_bad_image == "skip":
            self.data, self.unreadable = readable(self.data)
        faults = [*protocol_faults(config, self.data), *transform_faults(self._transforms, self.data)]
        if faults:
            raise ConfigError(f"dataset {config.dataset}", faults)
        if config.class_order is None and config.shuffle and self.data.natural_order:
            log.warning('%s: published protocol uses natural order, "shuffle" is true', config.dataset)
        self.data = cached(in_domain_order(self.data, config.domain_order), config.cache, config.cache_size, folder)
        classes = self.data.num_classes
        shuffle = config.shuffle and not self.domain_incremental
        self.class_order = class_order(classes, config.order_seed, shuffle)
        if config.class_order is not None:
            self.class_order = np.array(config.class_order)
        domains = len(self.data.domain_names)
        self.task_sizes = [classes] * domains if domains else _sizes(config, classes)
        to_new = label_map(self.class_order)
        self._splits: dict[Mode, Split] = {"train": self.data.train, "test": self.data.test}
        self.augment_on = config.augment_on if config.augment_on != "auto" else self._place(device)
        self._residents = {
            half: Resident(split.images)
            for half, split in self._splits.items()
            if self.augment_on == "device" and isinstance(split.images, np.ndarray)
        }
        self._labels = {half: to_new[split.labels] for half, split in self._splits.items()}
        held_out = _held_out(self.data.train, config.validation, config.seeds[0])
        if faults := list(validation_faults(config, self.data, held_out)):
            raise ConfigError(config.dataset, faults)
        self._tasks = self._make_tasks(held_out, config)

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index):  # type: ignore[override]
        return self._tasks[index]

    def _place(self, device: torch.device | None) -> Literal["host", "device"]:
        """What "augment_on": "auto" means on a device."""
        halves = [split.images for split in self._splits.values() if isinstance(split.images, np.ndarray)]
        if device is None or device.type != "cuda" or len(halves) < len(self._splits):
            return "host"
        have_form = all(transform.name in BATCHED for transform in self._transforms.values())
        return "device" if have_form and has_room(halves, device) else "host"

    @property
    def class_names(self) -> list[str]:
        """Of the new labels, in their order."""
        return [self.data.class_names[original] for original in self.class_order]

    def tested_after(self, task: TaskInfo) -> Sequence[Task]:
        """The tasks whose test images count once `task` is learned."""
        return self[:] if self._test_all else self[: task.index + 1]

    def _make_tasks(self, held_out: np.ndarray, config: RunConfig) -> list[Task]:
        ends = np.cumsum(self.task_sizes).tolist()
        owners = {half: self._owners(half, ends) for half in self._splits}
        on_val = config.evaluate_on == "val" and held_out.any()
        shared = self.domain_incremental and self.data.test.domains is None and not on_val
        everything = self._rows_of("test", np.arange(len(self.data.test)))
        tasks = []
        for index, size in enumerate(self.task_sizes):
            domain = self.data.domain_names[index] if self.domain_incremental else None
            total = size if domain is not None else ends[index]
            own = owners["train"] == index
            val = self._rows_of("train", np.flatnonzero(own & held_out)) if held_out.any() else None
            test = everything if shared else self._rows_of("test", np.flatnonzero(owners["test"] == index))
            tasks.append(
                Task(
                    index=index,
                    num_tasks=len(self.task_sizes),
                    num_classes=self.data.num_classes,
                    sizes=tuple(self.task_sizes),
                    known_classes=total - size if domain is None or index == 0 else total,
                    total_classes=total,
                    classes=range(total - size, total),
                    domain=domain,
                    train=self._rows_of("train", np.flatnonzero(own & ~held_out)),
                    test=val if on_val and val is not None else test,
                    val=val,
                    stream=self,
                )
            )
        return tasks

    def _owners(self, half: Mode, ends: Sequence[int]) -> np.ndarray:
        """(N,): the task of each image of one half."""
        if not self.domain_incremental:
            return np.searchsorted(ends, self._labels[half], side="right")
        domains = self._splits[half].domains
        return np.zeros(len(self._labels[half]), dtype=np.int64) if domains is None else domains

    def _rows_of(self, half: Mode, rows: np.ndarray) -> TaskData:
        """These images of one half, in file order."""
        labels, resident = self._labels[half][rows], self._residents.get(half)
        return TaskData(self._splits[half], rows, labels, self._transforms, resident)


def in_domain_order(data: ImageData, order: Sequence[str] | None) -> ImageData:
    """The same images with the domains numbered in another order, a permutation of data.domain_names."""
    if order is None:
        return data
    new = np.array([order.index(name) for name in data.domain_names])
    train, test = (
        split if split.domains is None else replace(split, domains=new[split.domains])
        for split in (data.train, data.test)
    )
    return replace(data, train=train, test=test, domain_names=tuple(order))


def _sizes(config: RunConfig, classes: int) -> list[int]:
    if config.task_sizes is not None:
        return list(config.task_sizes)
    assert config.increment is not None
    return split_classes(classes, config.init_cls or config.increment, config.increment)


def _held_out(train: Split, share: float, seed: int) -> np.ndarray:
    """(N,) whether a training image is kept apart: `share` of each class (and domain), at least one, the first of them
    in one permutation of the whole set. A class with one image keeps it for training."""
    chosen = np.zeros(len(train), dtype=bool)
    if share == 0:
        return chosen
    groups = np.asarray(train.labels)
    if train.domains is not None:
        groups = groups * (int(train.domains.max()) + 1) + train.domains
    order = np.random.RandomState(seed % (1 << 32)).permutation(len(train))
    for group in np.unique(groups):
        members = order[groups[order] == group]
        if len(members) > 1:
            chosen[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return chosen
