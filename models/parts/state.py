"""The state of a learner, found and not listed: what a checkpoint holds of it.

    module       parameters, buffers and extra state of the learner as a torch module
    parts        every other attribute that has state_dict and load_state_dict
    generators   every attribute that draws random numbers (torch.Generator, numpy's RandomState)

Left out: what the harness sets, what is derived from config and task in `build`, and what `transient` names.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

if TYPE_CHECKING:
    from models.base import Learner

HARNESS = frozenset({"config", "runtime", "task", "data", "stage", "progress"})


def learner_state(learner: "Learner") -> dict[str, Any]:
    """Everything that training has changed, in types that `torch.load(weights_only=True)` accepts."""
    return {
        "task": learner.task.state_dict(),
        "module": learner.state_dict(),
        "parts": {name: part.state_dict() for name, part in parts_of(learner)},
        "generators": {name: _drawn(generator) for name, generator in _generators(learner)},
        "requires_grad": [name for name, parameter in learner.named_parameters() if parameter.requires_grad],
    }


def restore(learner: "Learner", state: dict[str, Any]) -> None:
    """Make a learner, built for the task of the state, what it was when the state was taken."""
    learner.load_state_dict(state["module"])
    trainable = set(state["requires_grad"])
    for name, parameter in learner.named_parameters():
        parameter.requires_grad_(name in trainable)
    for name, part in parts_of(learner):
        part.load_state_dict(state["parts"][name])
    for name, generator in _generators(learner):
        _draw_on(generator, state["generators"][name])
    clear_transient(learner)


def clear_transient(learner: "Learner") -> None:
    """Drop what lives within a step or a task."""
    for name in learner.transient:
        setattr(learner, name, None)


def parts_of(learner: "Learner") -> Iterator[tuple[str, Any]]:
    """(name, object) of the attributes that are no modules and have a state."""
    for name, value in sorted(vars(learner).items()):
        kept = name not in HARNESS and name not in learner.transient and not isinstance(value, nn.Module)
        if kept and hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
            yield name, value


def _generators(learner: "Learner") -> Iterator[tuple[str, Any]]:
    for name, value in sorted(vars(learner).items()):
        if name not in learner.transient and isinstance(value, torch.Generator | np.random.RandomState):
            yield name, value


def _drawn(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    kind, keys, position, has_gauss, gauss = generator.get_state(legacy=True)
    return kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss


def _draw_on(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
        return
    kind, keys, position, has_gauss, gauss = state
    generator.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
