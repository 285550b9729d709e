"""What no stored number shows: where a dropout acts, and that what is trained stands still afterwards."""

from typing import Any

import torch
from torch import Tensor

from models.parts.loop import begin, learn
from tests.conftest import build_tiny


def training_passes(tmp_path: Any, name: str, rate: float, **keys: Any) -> tuple[Tensor, Tensor]:
    """The losses of one batch, twice, in training mode and with adapters that have moved."""
    manager, learner = build_tiny(tmp_path, name, adapter_dropout=rate, epochs=2, lrate=0.5, optimizer=None, **keys)
    begin(learner, manager[0])
    for parameter in learner.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.5) if parameter.dim() > 1 else None
    learner.train()
    images, targets = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
    first, second = (learner.loss(learner.network, *learner.prepare(images, targets)).detach() for _ in range(2))
    return first, second


def check_dropout(tmp_path: Any, name: str, **keys: Any) -> None:
    first, second = training_passes(tmp_path, name, 0.1, **keys)
    assert not torch.equal(first, second)
    first, second = training_passes(tmp_path, name, 0.0, **keys)
    assert torch.equal(first, second)


def check_standing_still(tmp_path: Any, name: str, **keys: Any) -> None:
    """Scores twice, and frozen values of the first task's images after every later task: bit for bit the same."""
    manager, learner = build_tiny(tmp_path, name, adapter_dropout=0.1, epochs=2, optimizer=None, **keys)
    images = torch.rand(5, 3, 16, 16)
    before: dict[str, Tensor] = {}
    for task in manager:
        learn(learner, task)
        learner.eval()
        with torch.no_grad():
            now = {name: learner.frozen(images, [name])[name] for name in learner.frozen_names}
            scores = [learner.predict(images, learner.frozen(images, learner.frozen_names)) for _ in range(2)]
        assert torch.equal(*scores)
        assert all(torch.equal(now[name], value) for name, value in before.items())
        before = now
