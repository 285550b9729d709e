"""What a config asks for in vain, and what stream, data or machine cannot give it."""

import logging
from typing import TYPE_CHECKING

import numpy as np

from data.stream import DataManager
from utils.config import RunConfig, TrainConfig
from utils.errors import ConfigError
from utils.runtime import Runtime

if TYPE_CHECKING:  # a part imports no learner
    from models.base import Learner

log = logging.getLogger(__name__)


def remarks(config: RunConfig, manager: DataManager) -> list[str]:
    """What a config says and the run does not do, or does in vain: allowed, and said once."""
    found = []
    if isinstance(config.seed, tuple) and len(config.seed) > len(config.seeds):
        found.append(f"seed: a seed that stands twice runs once ({', '.join(map(str, config.seeds))})")
    if isinstance(config, TrainConfig) and config.scheduler == "multistep":
        late: dict[int, list[int]] = {}
        for index in range(min(2, len(manager))):
            epochs, steps = config.of_task("epochs", index), config.of_task("milestones", index)
            late.setdefault(epochs, []).extend(step for step in steps if step >= epochs)
        for epochs, steps in late.items():
            shown = ", ".join(map(str, dict.fromkeys(steps)))
            if steps:
                found.append(f"milestones: {shown} lie beyond the {epochs} epochs of a task: no effect")
    alone = [str(task.index + 1) for task in manager if len(task.classes) == 1]
    if isinstance(config, TrainConfig) and alone and not manager.domain_incremental:
        shown = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
        found.append(f"task {shown}: one class, on which a loss over the new classes alone trains nothing")
    return found


def refuse_too_few(config: RunConfig, manager: DataManager, feature_dim: int) -> None:
    """Raises ConfigError where a covariance of each class has to be factored and the images do not suffice."""
    full = getattr(config, "cov_storage", "full") == "full" and getattr(config, "ca_epochs", 0)
    fewest = min(int(np.bincount(task.train.labels)[task.classes.start :].min()) for task in manager)
    if full and getattr(config, "cov_ridge", None) == 0 and fewest <= feature_dim:
        raise ConfigError(
            "cov_ridge",
            [f"is 0 with {fewest} images of a class and {feature_dim} features: its covariance is singular. Raise it"],
        )


def refuse_stream(learner: "Learner", manager: DataManager) -> None:
    """Raises ConfigError where the method is not defined for the stream, or has too few images in it."""
    kind = "domain" if manager.domain_incremental else "class"
    if kind not in learner.streams:
        takes = " and ".join(f"{name}-incremental" for name in sorted(learner.streams))
        raise ConfigError(
            "dataset",
            [f"{manager.data.name} is a {kind}-incremental stream; {learner.config.model_name} takes {takes} ones"],
        )
    refuse_too_few(learner.config, manager, learner.network.feature_dim)


def check_processes(config: RunConfig, runtime: Runtime) -> None:
    """Raises ConfigError where several processes would change what is predicted; warns of what depends on its batch."""
    if not config.batch_dependent:
        return
    if runtime.world > 1:
        raise ConfigError(
            config.model_name,
            ["its predictions depend on their batch, as published: run it in one process, or without upstream"],
        )
    log.warning(
        "%s with upstream: predictions depend on the other images of a test batch, which come class by class, "
        "batch_size at a time; `python main.py audit RUN` says what that is worth",
        config.model_name,
    )
