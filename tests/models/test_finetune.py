import pytest
import torch
import torch.nn.functional as F

from models.parts.costs import stored_bytes
from models.parts.loop import begin, fit, learn
from tests.conftest import build_tiny


def second_task(tmp_path, **keys):
    manager, learner = build_tiny(tmp_path, "finetune", epochs=1, **keys)
    learn(learner, manager[0])
    begin(learner, manager[1])
    return learner, torch.rand(4, 3, 16, 16), torch.tensor([2, 3, 3, 2])


def test_mask_new_is_cross_entropy_over_the_new_columns(tmp_path):
    learner, images, targets = second_task(tmp_path, mask="new")
    learner.eval()
    logits = learner.network(images)
    assert learner.loss(learner.network, images, targets) == F.cross_entropy(logits[:, 2:], targets - 2)
    learner.loss(learner.network, images, targets).backward()
    assert torch.count_nonzero(learner.network.head.weight.grad[:2]) == 0


def test_mask_seen_pushes_old_logits_down(tmp_path):
    learner, images, targets = second_task(tmp_path, mask="seen")
    learner.eval()
    assert learner.loss(learner.network, images, targets) == F.cross_entropy(learner.network(images), targets)
    learner.loss(learner.network, images, targets).backward()
    assert (learner.network.head.bias.grad[:2] > 0).all()


def test_trainable_head_leaves_the_backbone_alone(tmp_path):
    manager, learner = build_tiny(tmp_path, "finetune", trainable="head")
    before = {name: value.clone() for name, value in learner.network.backbone.state_dict().items()}
    begin(learner, manager[0])
    fit(learner, manager[0])
    assert all(torch.equal(value, before[name]) for name, value in learner.network.backbone.state_dict().items())
    head = sum(p.numel() for p in learner.network.head.parameters())
    assert sum(p.numel() for group in learner.param_groups() for p in group["params"]) == head
    assert stored_bytes(learner) == 4 * head


def test_backbone_rate_is_a_share_of_the_head_s(tmp_path):
    manager, learner = build_tiny(tmp_path, "finetune", lrate=0.4, init_lr=0.2, backbone_lr_factor=0.1)
    for task, rate in zip(manager[:2], (0.2, 0.4), strict=True):
        begin(learner, task)
        assert [group["lr"] for group in learner.param_groups()] == pytest.approx([0.1 * rate, rate])
