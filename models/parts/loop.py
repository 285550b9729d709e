"""Learning one task, and the only loop that trains on images."""

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data.loading import EpochLoader
from data.stream import Task
from models.parts.finite import LARGE, advice, refuse_loss, refuse_not_finite, refuse_singular
from models.parts.gradient import BatchGradient, refuse_accumulation
from models.parts.stages import Progress
from models.parts.state import clear_transient
from utils.seed import mix

log = logging.getLogger(__name__)

if TYPE_CHECKING:  # a part imports no learner; `learn` receives one
    from models.base import Learner


@dataclass
class Position:
    """Where in a task a learner stands: part of a checkpoint.

    phase: "start", before_task comes next; "fit", inside stage number `stage`, whose FitState is `fit`; "fitted",
    behind its training: after_stage comes next.
    """

    phase: str = "start"
    stage: int = 0
    fit: dict[str, Any] | None = None


class Observer:
    """Who watches `learn`: a subclass prints, logs, saves and may stop it (by raising Interrupted); this one looks
    on."""

    def task_started(self) -> None:
        """`before_task` is done."""

    def stage_started(self, number: int) -> None:
        """What the stage trains is known; nothing is trained yet."""

    def epoch_started(self, batches: int, done: int) -> None:
        """An epoch of so many batches begins, or goes on after `done` of them."""

    def step_done(self, fit: "FitState") -> None:
        """After each batch: nothing here may read from the device."""

    def epoch_done(self, fit: "FitState", numbers: dict[str, float]) -> None:
        """numbers: loss, lr, images_per_second, seconds, and what the learner's `after_epoch` adds."""

    def stage_done(self, number: int) -> None:
        """Trained; `after_stage` comes next."""


@dataclass
class FitState:
    """Where `fit` stands: what a checkpoint inside a stage needs beside the learner and the generators."""

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epochs: int
    loss_sum: Tensor  # over the images of this epoch so far; stays on the device
    epoch: int = 0
    step: int = 0  # batches done in this epoch
    seen: int = 0  # images of this epoch so far, all processes
    seconds: float = 0.0  # of this epoch before it was interrupted
    warned: bool = False  # of a large loss; a resumed run may say it again

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


def learn(learner: "Learner", task: Task, observer: Observer | None = None, position: Position | None = None) -> None:
    """One task, from `before_task` to `after_task`. Hooks outside of training find the learner in evaluation mode,
    wherever an interrupted run goes on.

    position: where an interrupted task goes on; the result is then the same as without the interruption.
    Raises TrainingError when a loss, a weight or a statistic is not finite.
    """
    try:
        _learn(learner, task, observer or Observer(), position or Position())
    except torch.linalg.LinAlgError as error:
        refuse_singular(learner, error)


def _learn(learner: "Learner", task: Task, observer: Observer, position: Position) -> None:
    if position.phase == "start":
        begin(learner, task)
        observer.task_started()
    learner.task, learner.data = task.info, task
    number, resume = position.stage, position.fit
    trained = position.phase == "fitted"
    while number < len(stages := learner.stages(task)):
        learner.stage = stages[number]
        if not trained:
            observer.stage_started(number)
            fit(learner, task, number, observer, resume)
            observer.stage_done(number)
        learner.eval()
        learner.after_stage(task)
        refuse_not_finite(learner, f"stage {learner.stage.name}")
        number, resume, trained = number + 1, None, False
    learner.stage = None
    learner.eval()
    learner.after_task(task)
    refuse_not_finite(learner, "what follows training")
    clear_transient(learner)


def begin(learner: "Learner", task: Task) -> None:
    """Hand a task to the learner, up to the first stage's training."""
    learner.task, learner.data, learner.stage = task.info, task, None
    learner.eval()
    learner.before_task(task)
    learner.stage = next(iter(learner.stages(task)), None)


def fit(
    learner: "Learner",
    task: Task,
    number: int = 0,
    observer: Observer | None = None,
    resume: dict[str, Any] | None = None,
) -> None:
    """Train one stage of the task, `learner.stage`. resume: the state of an interrupted `FitState`.

    number: of the stage in its task; stages shuffle apart.
    """
    stage, observer = learner.stage, observer or Observer()
    assert stage is not None
    runtime, view = learner.runtime, learner.train_data(task)
    module: nn.Module = getattr(learner, stage.module)
    refuse_accumulation(learner)
    optimizer, scheduler = learner.make_optimizer()
    gradient = BatchGradient(learner, module, optimizer)
    state = FitState(optimizer, scheduler, stage.epochs, torch.zeros((), device=runtime.device))
    if resume is not None:
        state.load_state_dict(resume)
    seed, joined = mix(learner.config.seeds[0], *_shuffle(task.index, number)), bool(gradient.norms)
    loader = EpochLoader(view, learner.config.batch_size, runtime, seed, stage.drop_last, joined)
    while state.epoch < stage.epochs:
        learner.train()
        observer.epoch_started(len(loader), state.step)
        started = time.perf_counter() - state.seconds
        for images, targets, weight, size in loader.epoch(state.epoch, state.step):
            learner.progress = Progress(number, state.epoch, state.step)
            gradient.take(images, targets, weight)
            loss = optimizer.step(gradient)  # type: ignore[arg-type]
            learner.after_step(images, targets)
            state.loss_sum += loss * size
            state.step, state.seen = state.step + 1, state.seen + size
            state.seconds = time.perf_counter() - started
            observer.step_done(state)
        _end_epoch(learner, state, observer, started)
    learner.zero_grad(set_to_none=True)  # what is frozen from here on would keep its own for good


def _end_epoch(learner: "Learner", state: FitState, observer: Observer, started: float) -> None:
    """Read the loss, the one wait of an epoch; step the schedule; tell the learner and who watches. started: by the
    clock; an epoch's seconds end when the device is through with it."""
    runtime = learner.runtime
    numbers = {"loss": float(runtime.reduce_sum(state.loss_sum)) / state.seen / runtime.world}
    if not np.isfinite(numbers["loss"]):
        refuse_loss(learner, numbers["loss"], state.epoch + 1)
    if numbers["loss"] > LARGE and not state.warned:
        state.warned = True
        log.warning("the loss is %.1e in epoch %d: training diverges; %s", numbers["loss"], state.epoch + 1,
                    advice(learner))  # fmt: skip
    state.seconds = time.perf_counter() - started
    runtime.stopwatch.add("train", state.seconds)
    numbers["lr"] = state.optimizer.param_groups[-1]["lr"]
    numbers |= {"images_per_second": state.seen / state.seconds, "seconds": state.seconds}
    state.scheduler.step()
    state.epoch, state.step = state.epoch + 1, 0
    numbers |= learner.after_epoch(state.epoch)
    state.loss_sum.zero_()
    state.seen, state.seconds = 0, 0.0
    observer.epoch_done(state, numbers)


def _shuffle(task: int, stage: int) -> tuple[int, ...]:
    return (task,) if stage == 0 else (task, stage)
