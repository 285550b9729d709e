"""LwF: the reference's run, its loss by hand."""

import pytest
import torch
import torch.nn.functional as F

from models.parts.loop import begin, learn
from tests.conftest import build_tiny
from tests.models.classic_runs import WholeRun, schedule


@pytest.mark.parity
def test_run_of_the_reference(tmp_path, monkeypatch):
    keys = lambda s: schedule(s) | {"temperature": float(s["T"]), "lamda": float(s["lamda"])}  # noqa: E731
    WholeRun("classic/lwf_run", "lwf", tmp_path, keys).run(monkeypatch)


def test_loss_by_hand(tmp_path):
    """CE on the new slice and lamda times the cross-entropy with the previous network's soft answers."""
    manager, learner = build_tiny(tmp_path, "lwf", temperature=3.0, lamda=0.5)
    learn(learner, manager[0])
    begin(learner, manager[1])
    learner.eval()
    images, targets = torch.rand(4, 3, 16, 16), torch.tensor([2, 3, 3, 2])
    logits, old = learner.network(images), learner.teacher(images)
    soft = -((old / 3).softmax(1) * (logits[:, :2] / 3).log_softmax(1)).sum(1).mean()
    expected = F.cross_entropy(logits[:, 2:], targets - 2) + 0.5 * soft
    torch.testing.assert_close(learner.loss(learner.network, *learner.prepare(images, targets)), expected)
