"""Exemplars: the images of past classes that a rehearsal learner may keep (iCaRL, Rebuffi et al., 2017).

v_i = f(x_i) / (|f(x_i)| + 1e-8)             m images a class: floor(total / classes seen), or a fixed number

herding     mu = mean v_i, S = 0; pick k = 1..m: argmin over those left of |mu - (v_i + S) / k|, then S += v_i
            = argmax of 2 (mu - S / k) . v_i / k - |v_i|^2 / k^2: one product a pick, nothing is copied
means       the mean of a class's v over the exemplars kept, at unit length
scores      -|v - mean_c|^2: nearest class mean
"""

import logging
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from convs.growing import Growing
from data.loading import extract_features
from data.stream import Task, TaskData
from models.parts.drift import StoredMeans
from utils.config import Count, TrainConfig
from utils.errors import ConfigError
from utils.keys import key
from utils.runtime import Runtime
from utils.seed import mix

log = logging.getLogger(__name__)

FeatureMap = Callable[[Tensor], Tensor]
Selection = Literal["herding", "random"]


class Budget(BaseModel):
    """The value of "exemplars"."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    total: Count | None = Field(None, description="images in all, shared equally by the classes seen")
    per_class: Count | None = Field(None, description="images of each class, kept for ever")

    @model_validator(mode="after")
    def _one_of_two(self) -> "Budget":
        if (self.total is None) == (self.per_class is None):
            raise ValueError('give one of {"total": images in all} and {"per_class": images of each class}')
        return self

    def of_group(self, groups: int) -> int:
        """Images of each of so many classes."""
        if self.per_class is not None:
            return self.per_class
        assert self.total is not None
        return self.total // groups


class MemoryConfig(TrainConfig):
    """Keys of every learner that keeps exemplars."""

    exemplars: Budget = key(
        Budget(total=2000), 'images kept: {"total": N}, shared equally by the classes seen, or {"per_class": N}'
    )
    selection: Selection = key("herding", "which images of a class are kept")


class RehearsalConfig(MemoryConfig):
    """Of one with two scores: the head's and the nearest mean's."""

    predict: Literal["logits", "nme"] = key(
        "logits", "what is reported first: the head, or the nearest mean of exemplars; the other one stands beside it"
    )


class ExemplarSet(Growing):
    """Which training images are kept, as rows of the data set: nothing is copied.

    Order: classes ascending, within one in order of choice, so that a smaller share keeps the first of each. Over a
    stream of domains a class counts once in each domain.
    """

    def __init__(self, config: MemoryConfig, image_size: int, groups: int = 1):
        """groups: how many classes, or classes and domains, the stream has.

        Raises ConfigError when the budget leaves nothing for each of them.
        """
        super().__init__()
        self.config, self.image_bytes = config, 3 * image_size**2
        if config.exemplars.of_group(groups) == 0:
            total = config.exemplars.total
            raise ConfigError("exemplars", [f'"total" {total} keeps none of {groups} classes: give at least {groups}'])
        self.rows: Tensor  # (n,) of the training split
        self.labels: Tensor  # (n,)
        self.groups: Tensor  # (n,) which class, or class and domain, counted in the order of the stream
        self.means: Tensor  # (C, D) at unit length; zero for a class without exemplars
        for name in ("rows", "labels", "groups"):
            self.declare(name, dtype=torch.int64)
        self.register_buffer("means", torch.empty(0, 0))

    def __len__(self) -> int:
        return len(self.rows)

    def join(self, task: Task) -> TaskData:
        """The task's images, class by class, then the exemplars."""
        order = np.argsort(task.train.labels, kind="stable")
        return self._take(task, np.concatenate([task.train.rows[order], self.rows.cpu().numpy()]))

    def data(self, task: Task) -> TaskData:
        """The exemplars alone."""
        return self._take(task, self.rows.cpu().numpy())

    def update(self, task: Task, features_of: FeatureMap, runtime: Runtime) -> None:
        """Reduce to the share of more classes, choose of the task's, take the means by the network as it is now.

        Herding reads the task's images and the exemplars once, random choice the exemplars alone.
        """
        config, count = self.config, self.config.exemplars.of_group(_groups_seen(task))
        if (fewest := np.unique(task.train.labels, return_counts=True)[1].min()) < count:
            log.warning("task %d: %d exemplars a class, one has %d images: all are kept", task.index + 1, count, fewest)
        self._keep(first_of_each(self.groups, count))
        if config.selection == "random":
            self._add(task, task.train.take(draw(task.train.labels, count, mix(config.seeds[0], task.index))))
        joined = self.data(task) if config.selection == "random" else self.join(task)
        with runtime.stopwatch("exemplars"):
            features, labels = extract_features(features_of, joined.view("test"), runtime, config.test_batch_size)
            vectors = normalised(features)
            if config.selection == "herding":
                new = len(task.train)
                chosen = choose(vectors[:new].cpu().numpy(), joined.labels[:new], count)
                self._add(task, joined.take(chosen))
                kept = torch.from_numpy(np.concatenate([np.arange(new, len(joined)), chosen])).to(labels.device)
                vectors, labels = vectors[kept], labels[kept]
            self.means = class_means(vectors, labels, task.total_classes)

    def scores(self, features: Tensor, classes: int) -> Tensor:
        """(B, D) -> (B, C): minus the squared distance to each class's mean; a class without one scores lowest.

        A distance stays in float32 under autocast, a product of matrices would not.
        """
        scores = features.new_full((len(features), classes), -torch.inf, dtype=torch.float32)
        if len(self.means) and self.means.shape[1] == features.shape[1]:  # else the network has grown since
            found = -torch.cdist(normalised(features.float()), self.means).square()
            scores[:, : len(self.means)] = found.masked_fill(~self.means.any(dim=1), -torch.inf)
        return scores

    def beside(self, logits: Tensor, features: Tensor, first: str = "logits") -> dict[str, Tensor]:
        """Both scores, the first one first: logits (B, C), features (B, D) -> each (B, C)."""
        both = {"logits": logits, "nme": self.scores(features, logits.shape[1])}
        return {first: both[first], **both}

    def stored_means(self, names: tuple[str, ...]) -> StoredMeans:
        labels, known = torch.arange(len(self.means), device=self.means.device), self.means.any(dim=1)
        return StoredMeans(self.means, labels, known, of=normalised, unit=True, names=names)

    def stored_bytes(self) -> int:
        """Of the images, as if they were copied: what papers count."""
        return len(self) * self.image_bytes

    def expected_bytes(self, tasks: Sequence[Task]) -> int:
        count = self.config.exemplars.of_group(_groups_seen(tasks[-1]))
        sizes = [np.unique(task.train.labels, return_counts=True)[1] for task in tasks]
        return int(np.minimum(np.concatenate(sizes), count).sum()) * self.image_bytes

    def held_bytes(self, tasks: Sequence[Task]) -> int:
        """Rows, labels, groups: the images lie in the data set."""
        return 24 * self.expected_bytes(tasks) // self.image_bytes

    def _take(self, task: Task, rows: np.ndarray) -> TaskData:
        so_far = task.train_so_far
        return so_far.take(np.searchsorted(so_far.rows, rows))

    def _keep(self, chosen: Tensor) -> None:
        self.rows, self.labels, self.groups = self.rows[chosen], self.labels[chosen], self.groups[chosen]

    def _add(self, task: Task, chosen: TaskData) -> None:
        first = 0 if task.domain is None else task.index * task.total_classes
        rows, labels = torch.from_numpy(chosen.rows), torch.from_numpy(chosen.labels)
        self.append(rows=rows, labels=labels, groups=labels + first)


def normalised(features: Tensor) -> Tensor:
    """(n, D) -> v."""
    return features / (features.norm(dim=1, keepdim=True) + 1e-8)


def herd(vectors: np.ndarray, count: int) -> np.ndarray:
    """v of one class (n, D) -> (min(count, n),): which are chosen, in order.

    On the host: a pick is one small product, and numpy's costs half of torch's.
    """
    mean, scores = vectors.mean(axis=0), np.einsum("nd,nd->n", vectors, vectors) / -2
    wanted, chosen = mean.copy(), []  # k mu - S
    for _ in range(min(count, len(vectors))):
        best = int((vectors @ wanted + scores).argmax())
        scores[best] = -np.inf  # not again
        wanted += mean - vectors[best]
        chosen.append(best)
    return np.array(chosen, dtype=np.int64)


def choose(vectors: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """v (n, D) of several classes: the positions that herding chooses, classes ascending."""
    members = (np.flatnonzero(labels == label) for label in np.unique(labels))
    return np.concatenate([of_class[herd(vectors[of_class], count)] for of_class in members])


def class_means(vectors: Tensor, labels: Tensor, classes: int) -> Tensor:
    """v (n, D) -> (C, D): the mean of each class, at unit length; zero for a class without any."""
    sums = vectors.new_zeros(classes, vectors.shape[1]).index_add_(0, labels, vectors)
    return F.normalize(sums, dim=1)


def first_of_each(groups: Tensor, count: int) -> Tensor:
    """Positions of the first `count` of each group. groups (n,), each group's members side by side."""
    positions = torch.arange(len(groups), device=groups.device)
    _, sizes = groups.unique_consecutive(return_counts=True)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return positions[positions - starts < count]


def draw(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """labels (n,): positions of min(count, n_c) images of each class, drawn by the seed, classes ascending."""
    order = np.random.RandomState(seed % (1 << 32)).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    return order[first_of_each(torch.from_numpy(labels[order]), count).numpy()]


def _groups_seen(task: Task) -> int:
    return task.total_classes * (1 if task.domain is None else task.index + 1)
