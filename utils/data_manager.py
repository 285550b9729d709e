"""A data set as a sequence of tasks: class-incremental or, when the data set has domains, domain-incremental.

Labels are remapped once: new label = position of the original class in the class order, so that task t owns the
range [known_classes, total_classes).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from data import sources
from data.batched import BATCHED, Resident, apply
from data.image_cache import cached
from data.images import read_image, stored_size
from data.layouts import Options
from data.records import ImageData, Split
from data.splits import cache_root
from data.transforms import Transform, as_tensor
from utils.config import RunConfig
from utils.errors import ConfigError
from utils.seed import mix, mix_rows

log = logging.getLogger(__name__)

Mode = Literal["train", "test"]


def class_order(num_classes: int, seed: int, shuffle: bool) -> np.ndarray:
    """(C,): order[j] is the original class that becomes new label j (the field's legacy numpy generator)."""
    return np.random.RandomState(seed).permutation(num_classes) if shuffle else np.arange(num_classes)


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
class Batch:
    """Which images to fetch. seed, mixed with an image's row, seeds that image's augmentation draws."""

    rows: np.ndarray
    seed: int = 0


class View(Dataset):
    """Images of one task under one transform. Fetching takes a `Batch` and gives
    (images uint8 (B, 3, s, s), labels int64 (B,)).

    beside: another transform whose images follow those of the first along the channels: (B, 6, s, s).
    """

    def __init__(
        self,
        split: Split,
        rows: np.ndarray,
        labels: np.ndarray,
        transform: Transform,
        resident: Resident | None = None,
        beside: Transform | None = None,
    ):
        self._beside = None if beside is None else View(split, rows, labels, beside, resident)
        self._split, self._rows, self._transform, self._resident = split, rows, transform, resident
        self.labels = labels  # (N,) new labels
        arrays = split.images if isinstance(split.images, np.ndarray) else None
        # The images themselves, when fetching is nothing but copying.
        self._plain = arrays if arrays is not None and transform.is_identity_on(arrays) else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self.__getitems__(Batch(np.array([index])))
        return images[0], labels[0]

    def __getitems__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = self._fetch(batch)
        if self._beside is None:
            return images, labels
        return torch.cat([images, self._beside.__getitems__(batch)[0]], dim=1), labels

    def _fetch(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        rows, labels = self._rows[batch.rows], torch.from_numpy(self.labels[batch.rows])
        if self._plain is not None:
            return as_tensor(self._plain, rows), labels
        if not self._transform.random:
            return torch.stack([self._transform(self._read(row)) for row in rows]), labels
        # The transforms draw from torch's global generator: lend it to them, seeded image by image.
        before = torch.get_rng_state()
        images = []
        for row in rows:
            torch.default_generator.manual_seed(mix(batch.seed, int(row)))
            images.append(self._transform(self._read(row)))
        torch.set_rng_state(before)
        return torch.stack(images), labels

    def _read(self, row: int) -> np.ndarray | Image.Image:
        image = self._split.images[row]
        return read_image(image) if isinstance(image, Path) else image

    @property
    def image_bytes(self) -> int:
        """Of one image as a batch holds it."""
        return 3 * self._transform.size**2 * (1 if self._beside is None else 2)

    @property
    def on_device(self) -> bool:
        """Whether batches are made on the device, by `fetch_on`."""
        return self._resident is not None

    def fetch_on(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """As `__getitems__`, from images that lie on the device."""
        images, labels = self._fetch_on(batch, device)
        if self._beside is None:
            return images, labels
        return torch.cat([images, self._beside.fetch_on(batch, device)[0]], dim=1), labels

    def _fetch_on(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._resident is not None
        rows, labels = self._rows[batch.rows], torch.from_numpy(self.labels[batch.rows])
        images = self._resident.on(device)[torch.from_numpy(rows).to(device, non_blocking=True)]
        if self._plain is not None:
            return images.permute(0, 3, 1, 2).contiguous(), labels
        recipe, size = BATCHED[self._transform.name], self._transform.size
        return apply(images, recipe, size, mix_rows(batch.seed, rows)), labels

    @property
    def cheap(self) -> bool:
        """Whether a batch is a copy from memory, so that loader processes would only slow it down."""
        return self._plain is not None


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

    def view(self, mode: Mode, beside: Mode | None = None) -> View:
        """beside: the same images under another transform, as further channels."""
        second = None if beside is None else self.transforms[beside]
        return View(self.split, self.rows, self.labels, self.transforms[mode], self.resident, second)


@dataclass(frozen=True)
class Task:
    """One step of the stream.

    index: 0-based. known_classes: classes seen before this task; total_classes: with it.
    classes: the labels that occur in this task: the new ones, or, in a domain-incremental stream, all of them.
    domain: its name in a domain-incremental stream, else None.
    train_so_far: training images of this and all earlier tasks, for upper bounds and probes only.
    val: training images that "validation" keeps apart, else None.
    stream: all tasks, for evaluation on those seen (`seen`) and for the number of classes to come.
    """

    index: int
    num_tasks: int
    known_classes: int
    total_classes: int
    classes: range
    domain: str | None
    train: TaskData
    test: TaskData
    train_so_far: TaskData
    val: TaskData | None = None
    stream: "Sequence[Task]" = field(default=(), repr=False, compare=False)

    @property
    def seen(self) -> "list[Task]":
        """This task and all earlier ones."""
        return [*self.stream[: self.index], self]

    @property
    def num_classes(self) -> int:
        """Classes of the whole stream."""
        return self.stream[len(self.stream) - 1].total_classes if self.stream else self.total_classes


class DataManager(Sequence[Task]):
    """The tasks of a config, in order.

    Raises ConfigError when protocol and data do not fit, DataError when the data are missing or damaged.
    """

    def __init__(self, config: RunConfig, image_size: int):
        folder = cache_root(config.cache_root)
        options = Options(config.split, config.strict_data, cache=folder)
        self.data: ImageData = sources.load(config.dataset, config.data_root, options)
        self.domain_incremental = bool(self.data.domain_names)
        self._test_all = config.dil_eval == "all"
        self.image_size = image_size
        self._transforms: dict[Mode, Transform] = {
            "train": Transform(config.train_transform, image_size),
            "test": Transform(config.test_transform, image_size),
        }
        faults = [*_protocol_faults(config, self.data), *_transform_faults(self._transforms, self.data)]
        if faults:
            raise ConfigError(f"dataset {config.dataset}", faults)
        if config.shuffle and self.data.natural_order:
            log.warning('%s: published protocol uses natural order, "shuffle" is true', config.dataset)
        self.data = cached(in_domain_order(self.data, config.domain_order), config.cache, config.cache_size, folder)
        classes = self.data.num_classes
        shuffle = config.shuffle and not self.domain_incremental
        self.class_order = class_order(classes, config.order_seed, shuffle)
        self.task_sizes = [classes] if self.domain_incremental else _sizes(config, classes)
        to_new = label_map(self.class_order)
        self._splits: dict[Mode, Split] = {"train": self.data.train, "test": self.data.test}
        self._residents = {
            half: Resident(split.images)
            for half, split in self._splits.items()
            if config.augment_on == "device" and isinstance(split.images, np.ndarray)
        }
        self._labels = {half: to_new[split.labels] for half, split in self._splits.items()}
        self._held_out = _held_out(self.data.train, config.validation, config.seeds[0])
        self._evaluate_on = config.evaluate_on
        shared = self.domain_incremental and self.data.test.domains is None and config.evaluate_on == "test"
        self._shared_test = self._rows_of("test", np.arange(len(self.data.test))) if shared else None

    def __len__(self) -> int:
        return len(self.data.domain_names) or len(self.task_sizes)

    def __getitem__(self, index):  # type: ignore[override]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        known, total = self._bounds(index)
        val = self._task_data("train", index, index, held_out=True) if self._held_out.any() else None
        test = self._task_data("test", index, index) if self._shared_test is None else self._shared_test
        if val is not None and self._evaluate_on == "val":
            test = val
        return Task(
            index=index,
            num_tasks=len(self),
            known_classes=known if not self.domain_incremental or index == 0 else total,
            total_classes=total,
            classes=range(known, total),
            domain=self.data.domain_names[index] if self.domain_incremental else None,
            train=self._task_data("train", index, index),
            test=test,
            train_so_far=self._task_data("train", 0, index),
            val=val,
            stream=self,
        )

    def tested_after(self, task: Task) -> Sequence[Task]:
        """The tasks whose test images count once `task` is learned."""
        return self[:] if self._test_all else self[: task.index + 1]

    def _bounds(self, index: int) -> tuple[int, int]:
        if self.domain_incremental:
            return 0, self.data.num_classes
        ends = np.cumsum(self.task_sizes)
        return int(ends[index] - self.task_sizes[index]), int(ends[index])

    def _task_data(self, half: Mode, first: int, last: int, held_out: bool = False) -> TaskData:
        """The images of tasks first..last of one half, in file order; of training images those that are held out, or
        the others."""
        split, labels = self._splits[half], self._labels[half]
        if self.domain_incremental:
            assert split.domains is not None
            chosen = (split.domains >= first) & (split.domains <= last)
        else:
            chosen = (labels >= self._bounds(first)[0]) & (labels < self._bounds(last)[1])
        if half == "train":
            chosen &= self._held_out == held_out
        return self._rows_of(half, np.flatnonzero(chosen))

    def _rows_of(self, half: Mode, rows: np.ndarray) -> TaskData:
        labels, resident = self._labels[half][rows], self._residents.get(half)
        return TaskData(self._splits[half], rows, labels, self._transforms, resident)


def training_batches(
    count: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1, start: int = 0
) -> list[Batch]:
    """This process's share of each batch of an epoch, from batch `start` on.

    The order depends on (seed, epoch) alone. Each global batch is cut into `world` parts, so that any number of
    processes sees the same batches; a part that would be empty repeats the batch's first image, with weight 0
    (see `loss_weight`).
    """
    order = np.random.RandomState(mix(seed, epoch) % (1 << 32)).permutation(count)
    batches = []
    for first in range(start * batch_size, count, batch_size):
        rows = order[first : first + batch_size]
        part = np.array_split(rows, world)[rank]
        batches.append(Batch(part if len(part) else rows[:1], mix(seed, epoch)))
    return batches


def loss_weight(count: int, batch_size: int, step: int, rank: int, world: int) -> float:
    """Factor that makes the mean over processes of local mean losses the mean over the global batch."""
    size = min(batch_size, count - step * batch_size)
    local = len(np.array_split(np.empty(size), world)[rank])
    return local * world / size


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


def _transform_faults(transforms: Mapping[Mode, Transform], data: ImageData) -> Iterator[str]:
    """Sentences for recipes that crop more than there is, by the size of the first training image."""
    first = data.train.images[0]
    try:
        size = stored_size(first) if isinstance(first, Path) else first.shape[1::-1]
    except (OSError, Image.DecompressionBombError):  # what is wrong with the file is said when it is read
        return
    for mode, transform in transforms.items():
        try:
            with torch.random.fork_rng(devices=[]):
                transform(Image.new("RGB", size))
        except ValueError:
            yield (
                f'"{mode}_transform": {transform.name} cannot cut {transform.size} x {transform.size} pixels from '
                f'the {size[0]} x {size[1]} of {data.name}: give "image_size", or a transform that resizes (--list)'
            )


def _protocol_faults(config: RunConfig, data: ImageData):
    """Sentences for protocol keys that do not fit the data set."""
    classes, name = data.num_classes, data.name
    if config.augment_on == "device":
        if not isinstance(data.train.images, np.ndarray):
            yield f'"augment_on" must be "host" for {name}: its images are files of many sizes, not one array'
        for key in ("train_transform", "test_transform"):
            if getattr(config, key) not in BATCHED:
                yield f'"{key}": {getattr(config, key)} has no form for "augment_on": "device"; choose "host"'
    if data.domain_names:
        for key in ("init_cls", "increment", "task_sizes"):
            if getattr(config, key) is not None:
                yield f'"{key}" has no meaning for {name}: its tasks are {len(data.domain_names)} domains; drop the key'
        if config.shuffle:
            yield f'"shuffle" must be false for {name}: the classes of a domain-incremental stream have no order'
        if config.domain_order is not None and sorted(config.domain_order) != sorted(data.domain_names):
            yield f'"domain_order" must hold each domain of {name} once: {", ".join(data.domain_names)}'
        return
    if config.domain_order is not None:
        yield f'"domain_order" has no meaning for {name}: it has no domains; drop the key'
    if config.dil_eval == "all":
        yield f'"dil_eval": "all" has no meaning for {name}: classes not yet seen cannot be recognised; drop the key'
    if config.task_sizes is not None:
        if sum(config.task_sizes) != classes:
            yield f'"task_sizes" adds up to {sum(config.task_sizes)}, but {name} has {classes} classes'
    elif config.increment is None:
        yield f'missing key "increment": classes of each task; {name} has {classes} (or give "task_sizes")'
    elif (config.init_cls or config.increment) > classes:
        key = "init_cls" if config.init_cls else "increment"
        yield f'"{key}" is {getattr(config, key)}, but {name} has only {classes} classes'
