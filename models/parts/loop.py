"""The only loops over images: fit, evaluate, and no-gradient passes over a view."""

import atexit
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from utils.data_manager import Batch, Task, View, loss_weight, training_batches
from utils.errors import TrainingError, UserError
from utils.runtime import Runtime
from utils.seed import mix

if TYPE_CHECKING:  # a part imports no learner; `fit` receives one
    from models.base import Learner


class Observer:
    """Who watches `fit`: a subclass prints, logs, saves and may stop it (by raising Interrupted); this one looks on."""

    def epoch_started(self, batches: int, done: int) -> None:
        """An epoch of so many batches begins, or goes on after `done` of them."""

    def step_done(self, fit: "Fit") -> None:
        """After each batch: nothing here may read from the device."""

    def epoch_done(self, fit: "Fit", numbers: dict[str, float]) -> None:
        """numbers: loss, lr, images_per_second, seconds, and what the learner's `after_epoch` adds."""


@dataclass
class Fit:
    """Where `fit` stands: what a checkpoint inside a task needs beside the learner and the generators."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epochs: int
    loss_sum: Tensor  # over the images of this epoch so far; stays on the device
    epoch: int = 0
    step: int = 0  # batches done in this epoch
    seen: int = 0  # images of this epoch so far, all processes
    seconds: float = 0.0  # of this epoch before it was interrupted

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "loss_sum": self.loss_sum,
            **{name: getattr(self, name) for name in ("epoch", "step", "seen", "seconds")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.loss_sum.copy_(state["loss_sum"])
        for name in ("epoch", "step", "seen", "seconds"):
            setattr(self, name, state[name])


def fit(learner: "Learner", task: Task, observer: Observer | None = None, resume: dict[str, Any] | None = None) -> None:
    """Train `learner` on the task. resume: the state of an interrupted `Fit`; the result is then the same as without
    the interruption.

    Raises TrainingError when the loss of an epoch is not a number.
    """
    epochs = learner.epochs(task)
    if epochs == 0:
        return
    runtime, view, observer = learner.runtime, learner.train_data(task), observer or Observer()
    net = runtime.wrap(learner.network)
    optimizer, scheduler = learner.make_optimizer(epochs)
    state = Fit(optimizer, scheduler, epochs, torch.zeros((), device=runtime.device))
    if resume is not None:
        state.load_state_dict(resume)
    loader = EpochLoader(view, learner.config.batch_size, runtime, mix(learner.config.seeds[0], task.index))

    def loss_and_grad(inputs: Any, targets: Tensor, weight: float) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with runtime.autocast():
            loss = learner.loss(net, inputs, targets)
        (loss if weight == 1 else loss * weight).backward()
        learner.after_backward()
        return loss.detach() * weight

    while state.epoch < epochs:
        learner.train()
        observer.epoch_started(len(loader), state.step)
        started = time.perf_counter() - state.seconds
        for images, targets, weight, size in loader.epoch(state.epoch, state.step):
            inputs, labels = learner.prepare(images, targets)
            loss = optimizer.step(partial(loss_and_grad, inputs, labels, weight))  # type: ignore[arg-type]
            learner.after_step(images, targets)
            state.loss_sum += loss * size
            state.step, state.seen = state.step + 1, state.seen + size
            state.seconds = time.perf_counter() - started
            observer.step_done(state)
        numbers = {"loss": float(runtime.reduce_sum(state.loss_sum)) / state.seen / runtime.world}
        if not np.isfinite(numbers["loss"]):
            raise TrainingError(
                f"the loss became {numbers['loss']} in task {task.index + 1}, epoch {state.epoch + 1}: "
                f"lower lrate ({learner.lrate:g}), or use precision fp32"
            )
        state.seconds = time.perf_counter() - started
        runtime.stopwatch.add("train", state.seconds)
        numbers["lr"] = optimizer.param_groups[-1]["lr"]
        numbers |= {"images_per_second": state.seen / state.seconds, "seconds": state.seconds}
        scheduler.step()
        state.epoch, state.step = state.epoch + 1, 0
        numbers |= learner.after_epoch(state.epoch)
        state.loss_sum.zero_()
        state.seen, state.seconds = 0, 0.0
        observer.epoch_done(state, numbers)


class EpochLoader:
    """Batches of an epoch, on the device, from any batch on; loader processes live as long as the loader."""

    def __init__(self, view: View, batch_size: int, runtime: Runtime, seed: int):
        self.view, self.batch_size, self.runtime, self.seed = view, batch_size, runtime, seed
        self._batches: list[Batch] = []
        self._loader = _loader(view, self._batches, runtime, batch_size)

    def __len__(self) -> int:
        return -(-len(self.view) // self.batch_size)

    def epoch(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor, float, int]]:
        """(images in [0, 1], labels, loss weight of this process's share, size of the global batch)."""
        count, size, rank, world = len(self.view), self.batch_size, self.runtime.rank, self.runtime.world
        self._batches[:] = training_batches(count, size, self.seed, epoch, rank, world, start)
        stopwatch, waited = self.runtime.stopwatch, time.perf_counter()
        for step, batch in enumerate(self._loader, start):
            images, targets = self.runtime.to_device(*_received(batch))
            stopwatch.add("data", time.perf_counter() - waited)
            yield images, targets, loss_weight(count, size, step, rank, world), min(size, count - step * size)
            waited = time.perf_counter()


@torch.inference_mode()
def evaluate(learner: "Learner", tasks: Sequence[Task], batch_size: int | None = None) -> np.ndarray:
    """Correct predictions on the test images of each task: (2, T), class-incremental and with the task known.

    A prediction is the largest of all scores; with the task known, of the task's own classes.
    """
    runtime = learner.runtime
    learner.eval()
    correct = torch.zeros(2, len(tasks), dtype=torch.float64, device=runtime.device)
    with runtime.stopwatch("eval"):
        for row, task in enumerate(tasks):
            if row and task.test is tasks[row - 1].test:  # domains that share one test set
                correct[:, row] = correct[:, row - 1]
                continue

            def count(images: Tensor, targets: Tensor, row: int = row, classes: range = task.classes) -> None:
                correct[:, row] += count_correct(learner.predict(images), targets, classes)

            for_each_batch(task.test.view("test"), count, runtime, batch_size or learner.config.test_batch_size)
        return runtime.reduce_sum(correct).cpu().numpy()


def count_correct(scores: Tensor, targets: Tensor, classes: range) -> Tensor:
    """scores (B, C), targets (B,) -> (2,): right among all classes, and right among those of the task alone."""
    within = scores[:, classes.start : classes.stop].argmax(dim=1) + classes.start
    return torch.stack([(scores.argmax(dim=1) == targets).sum(), (within == targets).sum()])


@torch.no_grad()
def for_each_batch(
    view: View,
    function: Callable[[Tensor, Tensor], None],
    runtime: Runtime,
    batch_size: int = 256,
    shuffle: int | None = None,
) -> None:
    """Call function(images in [0, 1], labels) on each batch of this process's share of the view, under autocast.

    shuffle: a seed of the order and of the augmentation; default: in order, the same augmentation in every pass.
    Sums that the function makes are to be reduced with `runtime.reduce_sum`.
    """
    rows = _pass_order(view, shuffle)[runtime.rank :: runtime.world]
    batches = [Batch(rows[first : first + batch_size], shuffle or 0) for first in range(0, len(rows), batch_size)]
    for batch in _loader(view, batches, runtime, batch_size):
        with runtime.autocast():
            function(*runtime.to_device(*_received(batch)))


def extract_features(
    features: Callable[[Tensor], Tensor],
    view: View,
    runtime: Runtime,
    batch_size: int = 256,
    shuffle: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(features (N, D), labels (N,)) of a view, in its order or that of `shuffle` (see `for_each_batch`), on the device
    of every process. Features of less than 32 bits become float32."""
    found: list[Tensor] = []

    def add(images: Tensor, _: Tensor) -> None:
        rows = features(images)
        found.append(rows.to(torch.promote_types(rows.dtype, torch.float32)))

    for_each_batch(view, add, runtime, batch_size, shuffle)
    local = torch.cat(found) if found else torch.empty(0, device=runtime.device)
    labels = torch.from_numpy(view.labels[_pass_order(view, shuffle)]).to(runtime.device)
    if runtime.world == 1:
        return local, labels
    shares = [share.to(runtime.device) for share in runtime.gather(local.cpu())]
    whole = next(share for share in shares if len(share)).new_empty(len(view), shares[0].shape[-1])
    for rank, share in enumerate(shares):
        whole[rank :: runtime.world] = share
    return whole, labels


def _pass_order(view: View, shuffle: int | None) -> np.ndarray:
    """(N,): the rows of a view in the order of a pass."""
    count = len(view)
    return np.arange(count) if shuffle is None else np.random.RandomState(shuffle % (1 << 32)).permutation(count)


class _Fetch(Dataset):
    """A view whose faults travel as values: torch would bury the sentence under a loader process's traceback."""

    def __init__(self, view: View):
        self._view = view

    def __getitems__(self, batch: Batch) -> "_Fetched":
        try:
            return self._view.__getitems__(batch)
        except UserError as error:
            return error


_Fetched = tuple[Tensor, Tensor] | UserError


def _received(batch: _Fetched) -> tuple[Tensor, Tensor]:
    if isinstance(batch, UserError):
        raise batch
    return batch


class _OnDevice:
    """The batches of a view whose images lie on the device; the list may be changed between passes."""

    def __init__(self, view: View, batches: list[Batch], device: torch.device):
        self._view, self._batches, self._device = view, batches, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self._view.fetch_on(batch, self._device) for batch in self._batches)


def _loader(view: View, batches: list[Batch], runtime: Runtime, batch_size: int) -> "DataLoader | _OnDevice":
    if view.on_device:
        return _OnDevice(view, batches, runtime.device)
    workers = runtime.workers(view.cheap)
    return DataLoader(
        _Fetch(view),
        batch_sampler=batches,  # type: ignore[arg-type]
        collate_fn=_as_is,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=runtime.prefetch(batch_size * view.image_bytes, workers) if workers else None,
        persistent_workers=workers > 0,
        pin_memory=runtime.device.type == "cuda",
        worker_init_fn=_leave_signals_to_the_parent if workers else None,
        generator=torch.Generator(),  # else every pass would draw from the run's own random stream
    )


def _as_is(batch: _Fetched) -> _Fetched:
    return batch


def _leave_signals_to_the_parent(_: int) -> None:
    """A terminal and most clusters signal the whole process group: the parent stops the run, and ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_loader_processes() -> None:
    """What is left of them when the program ends, say by an error that still holds its loader. `multiprocessing` would
    ask them to stop by the signal that they ignore, and wait for ever; torch would report each as killed, in the place
    where the reason of the end should stand."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
