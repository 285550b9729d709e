"""What is varied in a loss landscape, and under which loss."""

import torch
import torch.nn.functional as F

from models.parts.loop import learn
from tests.conftest import build_tiny


def test_over_seen_classes(tmp_path):
    """Also of an older task than the head's last: over the classes that it had seen."""
    manager, learner = build_tiny(tmp_path, "der")
    for task in manager[:2]:
        learn(learner, task)
    learner.task = manager[0].info
    varied, images, targets = learner.eval().landscape(), torch.rand(3, 3, 16, 16), torch.tensor([0, 1, 1])
    expected = F.cross_entropy(learner.network(images)[:, :2], targets)
    torch.testing.assert_close(varied.loss(images, targets), expected)
    names = {name for name, p in learner.network.named_parameters() if p.requires_grad}
    assert set(varied.weights) == names and not any(name.startswith("backbone.model.branches.0") for name in names)
