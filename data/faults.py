"""What a config asks of a data set that it cannot give, in sentences."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.batched import BATCHED
from data.checks import some
from data.images import stored_size
from data.records import ImageData
from data.transforms import Transform
from utils.config import RunConfig
from utils.errors import DataError


def transform_faults(transforms: Mapping[Any, Transform], data: ImageData) -> Iterator[str]:
    """Sentences for recipes that crop more than there is, by the smallest image, whose size stands in its head."""
    for mode, transform in transforms.items():
        images = data.test.images if mode == "test" else data.train.images
        if not len(images) or _cuts(transform, (1, 1)):
            continue  # it resizes first
        size = min(_image_sizes(images), key=min, default=None)
        if size is not None and not _cuts(transform, size):
            yield (
                f'"{mode}_transform": {transform.name} cannot cut {transform.size} x {transform.size} pixels from '
                f'the {size[0]} x {size[1]} of {data.name}: give "image_size", or a transform that resizes'
            )


def _cuts(transform: Transform, size: tuple[int, int]) -> bool:
    try:
        with torch.random.fork_rng(devices=[]):
            transform(Image.new("RGB", size))
    except ValueError:
        return False
    return True


def _image_sizes(images: Sequence[Any] | np.ndarray) -> Iterator[tuple[int, int]]:
    """(width, height) of each image; of one where all lie in an array. What is wrong with a file is said when it is
    read."""
    if isinstance(images, np.ndarray):
        yield images.shape[2], images.shape[1]
        return
    for path in images:
        with suppress(DataError):
            yield stored_size(path) if isinstance(path, Path) else path.shape[1::-1]


def validation_faults(config: RunConfig, data: ImageData, held_out: np.ndarray) -> Iterator[str]:
    """A sentence where a class keeps no image apart: what is chosen on the others would be no number for it."""
    if not config.validation:
        return
    labels = np.asarray(data.train.labels)
    lacking = sorted(set(labels.tolist()) - set(labels[held_out].tolist()))
    if lacking:
        names = ", ".join(data.class_names[c] for c in lacking[:5])
        found = f"{len(lacking)} classes have one training image each, none to keep apart"
        yield f'"validation": {found} ({names}): drop it'


def _order_faults(order: Sequence[int], classes: int, name: str) -> Iterator[str]:
    given, wanted = Counter(order), set(range(classes))
    problems = [
        f"{what} {some(sorted(numbers))}"
        for what, numbers in (
            ("lacks", wanted - set(given)),
            ("holds twice", {number for number, count in given.items() if count > 1}),
            ("holds", set(given) - wanted),
        )
        if numbers
    ]
    if problems:
        yield f'"class_order" must hold each class of {name}, 0..{classes - 1}, once: it {"; it ".join(problems)}'


def protocol_faults(config: RunConfig, data: ImageData) -> Iterator[str]:
    """Sentences for protocol keys that do not fit the data set."""
    classes, name = data.num_classes, data.name
    if config.on_bad_image == "skip" and not (data.train.in_files or data.test.in_files):
        yield f'"on_bad_image" has no effect for {name}: its images are no files; drop the key'
    if config.augment_on == "device":
        if not isinstance(data.train.images, np.ndarray):
            yield f'"augment_on" must be "host" for {name}: its images are files, or of many sizes, not one array'
        for key in ("train_transform", "test_transform"):
            recipe = config.recipes["train" if key == "train_transform" else "test"]
            if recipe not in BATCHED:
                yield f'"{key}": {recipe} has no form for "augment_on": "device"; choose "host"'
    if data.domain_names:
        for key in ("init_cls", "increment", "task_sizes"):
            if getattr(config, key) is not None:
                yield f'"{key}" has no meaning for {name}: its tasks are {len(data.domain_names)} domains; drop the key'
        if config.class_order is not None:
            yield f'"class_order" has no meaning for {name}: the classes of a domain-incremental stream have no order'
        elif config.shuffle:
            yield f'"shuffle" must be false for {name}: the classes of a domain-incremental stream have no order'
        if config.domain_order is not None and sorted(config.domain_order) != sorted(data.domain_names):
            yield f'"domain_order" must hold each domain of {name} once: {", ".join(data.domain_names)}'
        return
    if config.domain_order is not None:
        yield f'"domain_order" has no meaning for {name}: it has no domains; drop the key'
    if config.dil_eval == "all":
        yield f'"dil_eval": "all" has no meaning for {name}: classes not yet seen cannot be recognised; drop the key'
    if config.class_order is not None:
        yield from _order_faults(config.class_order, classes, name)
    if config.task_sizes is not None:
        if sum(config.task_sizes) != classes:
            yield f'"task_sizes" adds up to {sum(config.task_sizes)}, but {name} has {classes} classes'
    elif config.increment is None:
        yield f'missing key "increment": classes of each task; {name} has {classes} (or give "task_sizes")'
    elif (config.init_cls or config.increment) > classes:
        key = "init_cls" if config.init_cls else "increment"
        yield f'"{key}" is {getattr(config, key)}, but {name} has only {classes} classes'
