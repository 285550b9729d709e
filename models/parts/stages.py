"""A stage: what is trained for how long, and how. A task has one, or several, or none."""

from dataclasses import dataclass, replace
from typing import Any

from data.stream import TaskInfo
from utils.config import INIT, TrainConfig


@dataclass(frozen=True)
class Stage:
    """module: name of the learner's attribute that is trained, looked up when the stage begins. lrate, weight_decay,
    momentum, optimizer, scheduler, milestones, lrate_decay, min_lr: as the config keys of these names. drop_last: an
    epoch's last batch is left out where it is smaller and not the only one."""

    name: str
    epochs: int
    lrate: float
    weight_decay: float
    momentum: float = 0.9
    optimizer: str = "sgd"
    scheduler: str = "constant"
    milestones: tuple[int, ...] = ()
    lrate_decay: float = 0.1
    min_lr: float = 0.0
    drop_last: bool = False
    module: str = "network"


@dataclass(frozen=True)
class Progress:
    """Where training stands: the stage's number, its epoch, the batches done in it, the part of a batch that a pass is
    at ("accumulate"); all from 0."""

    stage: int = 0
    epoch: int = 0
    step: int = 0
    part: int = 0


def stage_of(config: TrainConfig, task: TaskInfo, name: str = "train", **changes: Any) -> Stage:
    """The stage that a config describes for a task; `changes` to it."""
    schedule = {key: config.of_task(key, task.index) for key in INIT}
    rest = {key: getattr(config, key) for key in ("momentum", "optimizer", "scheduler", "min_lr", "drop_last")}
    return replace(Stage(name=name, **schedule, **rest), **changes)
