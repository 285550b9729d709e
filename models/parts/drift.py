"""Drift: how far the features of classes have moved from what a learner has stored of them, and what that costs.

    shift_c   |mean of the test features of class c - stored mean of class c|
    between   median over classes of the distance to the nearest other stored mean
    ratio     mean over old classes of shift_c / between: near 0 a slow learner; above 1 classes lie as far from
          their own stored means as from others

Beside it, what two classifiers reach on the same features: the nearest stored mean, and the nearest present one (the
mean of the test features themselves, so an upper bound of what better statistics would give).

Features are those that evaluation computes anyway: frozen values, or what the network's head reads. All stays on the
device, and the host waits once. Letters: B images of a batch, N kept, G stored means, C classes seen, D width.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.stream import TaskInfo
from models.parts.state import parts_of
from utils.runtime import Runtime

if TYPE_CHECKING:  # a part imports no learner
    from models.base import Learner

log = logging.getLogger(__name__)

ROOM = 256 * 2**20  # bytes of features kept; where there are more, every second image, every third, ...
MOVED = (
    "features of old classes have moved {ratio:.2f} times the distance between class means: what is stored of them is "
    "out of date. Train the backbone more slowly (its learning rate, fewer epochs)"
)
UNLIKE = (
    "test images of old classes lie {ratio:.2f} times the distance between class means from what is stored of them, "
    "though these features never change: classes lie closer together than training and test images"
)
BLOCK = 4096  # rows compared at a time
DIGITS = 4  # significant ones: features that a resumed run computes in other batches differ in their last bits


@dataclass(frozen=True)
class StoredMeans:
    """means (G, D) of the classes labels (G,); known (G,): which are filled, default all.

    of: what is stored of a feature, (n, D') -> (n, D); default: the feature. unit: means are brought to unit length.
    names: frozen values that make up the features, side by side; (): what the network's head reads. apart: what a ratio
    above 1 means here, and what to do; default: that features have moved, or, of frozen values, that they cannot have.
    """

    means: Tensor
    labels: Tensor
    known: Tensor | None = None
    of: Callable[[Tensor], Tensor] | None = None
    unit: bool = False
    names: tuple[str, ...] = ()
    apart: str = ""

    @property
    def words(self) -> str:
        return self.apart or (UNLIKE if self.names else MOVED)


@dataclass(frozen=True)
class Drift:
    """shift (C,): NaN for a class without a stored mean or test images. between: NaN with fewer than two means.
    nearest_stored, nearest_present: accuracy in percent on images of the classes that have both. words: what a ratio
    above 1 means."""

    shift: np.ndarray
    between: float
    nearest_stored: float
    nearest_present: float
    words: str


def stored_means(learner: "Learner") -> StoredMeans | None:
    """As the learner says in `_stored_means()`, else of its first part that has `stored_means(frozen_names)`."""
    if (own := getattr(learner, "_stored_means", None)) is not None:
        return own()
    for part in (*learner.children(), *(part for _, part in parts_of(learner))):
        if (found := getattr(part, "stored_means", None)) is not None:
            means: StoredMeans = found(tuple(learner.frozen_names))
            return means if len(means.labels) else None
    return None


class Features:
    """Collects the features of an evaluation. stored: None where there is nothing to compare them with."""

    def __init__(self, stored: StoredMeans | None, images: int, ahead: np.ndarray | None = None):
        """images: how many will come. ahead (N,): which of all lie in domains that are still to come, by position: what
        is stored knows nothing of them."""
        self.stored = stored
        self._ahead = ahead if ahead is not None and ahead.any() else None
        self._images, self._seen = images, 0
        self._rows: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._read: Tensor | None = None  # by the head, in this batch
        self._fits = stored is not None

    @contextmanager
    def watching(self, head: object) -> Iterator[None]:
        """Inside, what the head reads is noted."""
        if self.stored is None or self.stored.names or not isinstance(head, nn.Module):
            yield
            return
        hook = head.register_forward_pre_hook(self._note)
        try:
            yield
        finally:
            hook.remove()

    def _note(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._read is None and inputs and isinstance(inputs[0], Tensor):
            self._read = inputs[0].detach()

    def add(self, frozen: Mapping[str, Tensor], targets: Tensor, positions: np.ndarray | None = None) -> None:
        """After a prediction: its frozen values by name, labels (B,), positions (B,) among all images."""
        if self.stored is None or not self._fits:
            return
        found, self._read = self._read, None
        if names := self.stored.names:
            values = [frozen[name].flatten(1) for name in names if name in frozen]
            found = torch.cat(values, dim=1) if len(values) == len(names) else None
        self._fits = found is not None and found.shape[1] == self._width()
        if found is not None and self._fits:
            if self._ahead is not None and positions is not None:
                here = torch.from_numpy(np.flatnonzero(~self._ahead[positions])).to(targets.device, non_blocking=True)
                found, targets = found[here], targets[here]
            every = max(1, -(-self._images * found.shape[1] * 4 // ROOM))
            first = -self._seen % every
            self._seen += len(targets)
            self._rows.append(found[first::every].float())
            self._targets.append(targets[first::every])

    def _width(self) -> int:
        assert self.stored is not None
        return int(self.stored.means.shape[1])

    def drift(self, classes: int, runtime: Runtime) -> Drift | None:
        """Over all processes; None where nothing is stored, or what is stored is of other features."""
        if self.stored is None or not all(runtime.gather(self._fits)):
            return None
        like = self.stored.means
        rows = torch.cat(self._rows) if self._rows else like.new_empty(0, self._width(), dtype=torch.float32)
        targets = torch.cat(self._targets) if self._targets else self.stored.labels[:0]
        return _drift(self.stored, rows, targets, classes, runtime)


def _drift(stored: StoredMeans, rows: Tensor, targets: Tensor, classes: int, runtime: Runtime) -> Drift:
    """rows (N, D) with labels targets (N,)."""
    rows = stored.of(rows) if stored.of is not None else rows
    known = torch.ones_like(stored.labels, dtype=torch.bool) if stored.known is None else stored.known
    means = stored.means.double()
    kept, has_mean = _means(means * known[:, None], known, stored.labels, classes)
    sums, counts = _sums(rows.double(), torch.ones_like(targets), targets, classes)
    counts = runtime.reduce_sum(counts)  # of all processes: one may have no image of a class
    present = runtime.reduce_sum(sums) / counts.clamp(min=1)[:, None]
    if stored.unit:
        kept, present = F.normalize(kept, dim=1), F.normalize(present, dim=1)
    has = has_mean & (counts > 0)
    apart = torch.cdist(kept, kept).masked_fill(~has_mean, torch.inf)
    apart = apart.fill_diagonal_(torch.inf).amin(dim=1)
    right = rows.new_zeros(3, dtype=torch.float64)
    for some, labels in zip(rows.split(BLOCK), targets.split(BLOCK), strict=True):
        counted = has[labels]
        by_stored = torch.cdist(some, means.to(some)).masked_fill(~known, torch.inf).argmin(dim=1)
        by_present = torch.cdist(some, present.to(some)).masked_fill(~has, torch.inf).argmin(dim=1)
        both = (stored.labels[by_stored] == labels, by_present == labels, torch.ones_like(counted))
        right += (torch.stack(both) & counted).sum(dim=1)
    shift = (present - kept).norm(dim=1)
    numbers = torch.cat([shift, apart, has.double(), has_mean.double(), runtime.reduce_sum(right)]).cpu().numpy()
    moved, nearest, compared, stands = numbers[:-3].reshape(4, classes)
    stored_right, present_right, total = numbers[-3:]
    finite = nearest[(stands > 0) & np.isfinite(nearest)]
    return Drift(
        shift=np.where(compared > 0, moved, np.nan),
        between=float(np.median(finite)) if len(finite) else float("nan"),
        nearest_stored=100 * stored_right / total if total else float("nan"),
        nearest_present=100 * present_right / total if total else float("nan"),
        words=stored.words,
    )


def _sums(rows: Tensor, weights: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(n, D), (n,), (n,) -> sums (C, D) and counts (C,)."""
    sums = rows.new_zeros(classes, rows.shape[1]).index_add_(0, labels, rows)
    return sums, rows.new_zeros(classes).index_add_(0, labels, weights.to(rows))


def _means(rows: Tensor, known: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(C, D), and (C,): which classes have one. A class measured in several domains has the mean of their means."""
    sums, counts = _sums(rows, known, labels, classes)
    return sums / counts.clamp(min=1)[:, None], counts > 0


def noted(drift: Drift | None, newest: tuple[int, int, int] | None, task: TaskInfo) -> dict[str, Any]:
    """What result.json says of a task. newest: (predictions that fall on the task's classes, images of them, images);
    None where the task brings no classes of its own. Nothing is old in the first task: its ratio is null."""
    found: dict[str, Any] = dict.fromkeys(KEYS)
    if drift is not None:
        old = drift.shift[: task.known_classes if task.domain is None else task.total_classes * (task.index > 0)]
        ratios = old / drift.between if drift.between > 0 else np.full(len(old), np.nan)
        measured = ratios[np.isfinite(ratios)]
        found |= {
            "shift": [_rounded(value) for value in drift.shift],
            "between": _rounded(drift.between),
            "ratio": _rounded(measured.mean()) if len(measured) else None,
            "largest_ratio": _rounded(measured.max()) if len(measured) else None,
            "nearest_stored": _rounded(drift.nearest_stored),
            "nearest_present": _rounded(drift.nearest_present),
        }
    if newest is not None:
        predicted, own, images = newest
        found |= {
            "newest_predicted": _rounded(100 * predicted / images),
            "newest_expected": _rounded(100 * own / images),
        }
    return found


KEYS = (
    "shift", "between", "ratio", "largest_ratio", "nearest_stored", "nearest_present",
    "newest_predicted", "newest_expected",
)  # fmt: skip


def following(notes: Sequence[dict[str, Any]], task: int, note: dict[str, Any]) -> list[dict[str, Any]]:
    """Notes of the tasks before, then this one; nothing is known of tasks that an older version evaluated."""
    before = list(notes[:task])
    return [*before, *(dict.fromkeys(KEYS) for _ in range(task - len(before))), note]


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if np.isfinite(value) else None


def say(found: Mapping[str, Any], task: TaskInfo, drift: Drift | None) -> None:
    """One line in the log, from the second task on; a warning above a ratio of 1. found: what is noted of `drift`."""
    if task.index == 0:
        return
    parts = []
    if found["ratio"] is not None:
        parts.append(f"drift {found['ratio']:.2f} (largest {found['largest_ratio']:.2f}) of the distance between means")
    if found["nearest_stored"] is not None:
        parts.append(f"nearest stored mean {found['nearest_stored']:.1f}  present {found['nearest_present']:.1f}")
    if found["newest_predicted"] is not None:
        parts.append(f"newest task {found['newest_predicted']:.1f} % of predictions, {found['newest_expected']:.1f} % "
                     "of images")  # fmt: skip
    if parts:
        log.info("task %d/%d  %s", task.index + 1, task.num_tasks, "  ".join(parts))
    if drift is not None and found["ratio"] is not None and found["ratio"] > 1:
        log.warning("task %d: %s", task.index + 1, drift.words.format(ratio=found["ratio"]))
