"""What is not finite ends a run where it arises, with its name and what to do."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.parts.state import parts_of
from utils.config import INIT, RunConfig, TrainConfig
from utils.errors import TrainingError

if TYPE_CHECKING:  # a part imports no learner
    from models.base import Learner

LARGE = 1e5  # a mean cross entropy this large says that training diverges


def refuse_not_finite(learner: "Learner", when: str) -> None:
    """Raises TrainingError naming the first weight or statistic that holds NaN or an infinity. The host waits once.

    when: behind what, say "stage train".
    """
    values = {name: value for name, value in _quantities(learner) if value.is_floating_point() and value.numel()}
    if not values:
        return
    device = learner.runtime.device
    sound = torch.stack([_finite(value).to(device, non_blocking=True) for value in values.values()])
    if not bool(sound.all()):
        name = next(name for name, fine in zip(values, sound.tolist(), strict=True) if not fine)
        raise TrainingError(f"{name} is not finite {_place(learner)}, behind {when}: {advice(learner)}")


def refuse_loss(learner: "Learner", loss: float, epoch: int) -> None:
    """Raises TrainingError for the loss of an epoch that is no number."""
    raise TrainingError(f"the loss became {loss} {_place(learner)}, epoch {epoch}: {advice(learner)}")


def refuse_singular(learner: "Learner", error: Exception) -> None:
    """Raises TrainingError for a matrix that cannot be factored."""
    ridges = [name for name in type(learner.config).model_fields if "ridge" in name or "shrink" in name]
    ways = [f"raise {name} ({getattr(learner.config, name)})" for name in ridges]
    way = " or ".join(ways) or advice(learner)
    raise TrainingError(f"a matrix is singular {_place(learner)} ({str(error).splitlines()[0][:150]}): {way}") from None


def advice(learner: "Learner") -> str:
    """What may help where the learner stands: in a stage its rate; behind it the rates of what comes there."""
    config = learner.config
    training = set(TrainConfig.model_fields) - set(RunConfig.model_fields)
    if learner.stage is not None:
        first = (
            INIT["lrate"] if learner.task.index == 0 and getattr(config, INIT["lrate"], None) is not None else "lrate"
        )
        ways = [f"lower {first} ({learner.stage.lrate:g})"]
    else:
        rates = [name for name in type(config).model_fields if name.endswith(("lrate", "_lr")) and name not in training]
        given = [f"{name} ({getattr(config, name):g})" for name in rates if getattr(config, name)]
        ways = [f"lower {' or '.join(given)}"] if given else []
        ways += [f"lower lrate ({config.lrate:g})"] if isinstance(config, TrainConfig) else []
    if learner.runtime.autocast_dtype is not None:
        ways.append('set "precision" to "fp32"')
    return ", or ".join(ways) or "look for such values in the images and in the weight file"


def _finite(value: Tensor) -> Tensor:
    """Whether all numbers are. By the extremes, which NaN takes over: a mask and what is compared would take twice the
    memory of the value again, of 4.9 GB of factors on the card."""
    return torch.stack(value.detach().aminmax()).isfinite().all()


def _place(learner: "Learner") -> str:
    return f"in task {learner.task.index + 1} of seed {learner.config.seeds[0]}"


def _quantities(learner: "Learner") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all weights, buffers and statistics."""
    yield from learner.named_parameters()
    yield from learner.named_buffers()
    for name, part in parts_of(learner):
        yield from _within(name, part.state_dict())


def _within(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _within(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _within(f"{name}[{index}]", item)
