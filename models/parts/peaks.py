"""The peak of memory in what surrounds training, before a run: a pass of two images, and what parts answer beforehand.

    held         weights, buffers, and what parts will hold once the whole stream has been learned; on a card also the
                 images that lie there ("augment_on": "device")
    statistics   held + a pass without gradients + what parts take for a while
    alignment    held + what parts take for a while
    evaluation   held + frozen values and scores of a batch + on a CPU the values that are stored of test images

A module or another part of a learner may answer `held_bytes(tasks)`, what it will hold on the device beside its tensors
of now, default its `expected_bytes`; and `passing_bytes(tasks)`, {stage: what it takes there for a while}.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from data.stream import Task
from models.parts.costs import answering

if TYPE_CHECKING:  # a part imports no learner
    from models.base import Learner

# Where memory is short -> the key that helps.
WAYS = {
    "training": "batch_size",
    "statistics": "test_batch_size",
    "alignment": "ca_samples",
    "evaluation": "test_batch_size",
}


class Live(TorchDispatchMode):
    """Inside, the bytes of all tensors that are made and not yet gone; peak: the most there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(storage) for storage in _storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if id(storage) not in given and id(storage) not in self._sizes:
                self._sizes[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, id(storage))
        return made

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    return (value.untyped_storage() for value in tree_iter(values) if isinstance(value, Tensor))


def peaks(learner: "Learner", tasks: Sequence[Task], pixels: Tensor) -> dict[str, int]:
    """{stage: bytes} of the learner in evaluation mode. pixels: two images of the stream, in [0, 1], on the device."""
    held, passing = held_bytes(learner, tasks), passing_bytes(learner, tasks)
    size = learner.config.test_batch_size
    found = {}
    if passing["statistics"]:
        features = _pass_bytes(learner, learner.features, pixels, min(size, largest(tasks)[0]))
        found["statistics"] = held + features + passing["statistics"]
    if passing["alignment"]:
        found["alignment"] = held + passing["alignment"]
    tested = {id(task.test): len(task.test) for task in tasks}
    names, values = learner.frozen_names, list[dict[str, Tensor]]()

    def scores(images: Tensor) -> None:
        values.append(learner.frozen(images, names) if names else {})
        learner.predict(images, values[-1])

    found["evaluation"] = held + _pass_bytes(learner, scores, pixels, min(size, sum(tested.values())))
    if learner.runtime.device.type == "cpu":
        each = sum(value.numel() * value.element_size() for value in values[0].values())
        found["evaluation"] += min(each * sum(tested.values()), int(learner.config.frozen_gib * 2**30))
    return found


def held_bytes(learner: "Learner", tasks: Sequence[Task]) -> int:
    """What lies on the device once these tasks are learned, as far as it is known beforehand."""
    now = sum(value.numel() * value.element_size() for value in (*learner.parameters(), *learner.buffers()))
    owners = list(answering(learner))
    known = [getattr(owner, "held_bytes", getattr(owner, "expected_bytes", None)) for owner in owners]
    return now + resident_bytes(learner, tasks) + sum(answer(tasks) for answer in known if answer is not None)


def resident_bytes(learner: "Learner", tasks: Sequence[Task]) -> int:
    """Of the data set's images on a card; a CPU reads them where they are."""
    halves = [half for task in tasks for half in (task.train, task.test)]
    found = {id(half.resident): half.resident.nbytes for half in halves if half.resident is not None}
    return 0 if learner.runtime.device.type == "cpu" else sum(found.values())


def passing_bytes(learner: "Learner", tasks: Sequence[Task]) -> Counter[str]:
    """{stage: what parts take for a while}."""
    found: Counter[str] = Counter()
    for owner in answering(learner):
        if hasattr(owner, "passing_bytes"):
            found.update(owner.passing_bytes(tasks))
    return found


def shortage(needed: dict[str, int], learner: "Learner") -> str | None:
    """The sentence for stages that need more than the device has; None where all fit."""
    device = learner.runtime.device
    room = learner.runtime.device_memory()
    if device.type == "cpu":  # what the weights take is gone from it already
        room += sum(value.numel() * value.element_size() for value in learner.parameters())
    short = [stage for stage, size in needed.items() if size > room]
    if not short:
        return None
    ways = dict.fromkeys(WAYS[stage] for stage in short if WAYS[stage] in type(learner.config).model_fields)
    most = max(needed[stage] for stage in short)
    need = f"{' and '.join(short)} {'needs' if len(short) == 1 else 'need'} up to {most / 2**20:,.0f} MiB"
    return f"{need}, more than the {room / 2**20:,.0f} MiB of {device}: lower {' and '.join(ways)}"


def largest(tasks: Sequence[Task]) -> tuple[int, int]:
    """(training images of the largest task, of its largest class)."""
    return (
        max(len(task.train) for task in tasks),
        max(int(np.bincount(task.train.labels).max()) for task in tasks),
    )


def _pass_bytes(learner: "Learner", function: Callable[[Tensor], Any], pixels: Tensor, count: int) -> int:
    """Of a pass over `count` images without gradients, by the peaks of one and of two; their pixels included."""
    peak = []
    for some in (pixels[:1], pixels[:2]):
        with torch.no_grad(), learner.runtime.autocast(), Live() as live:
            function(some.clone())
        peak.append(live.peak)
    return max(0, peak[0] + (count - 1) * (peak[1] - peak[0]))
