"""What every registered learner must do, whatever it computes."""

import pytest
import torch

from models.base import LEARNERS
from models.parts.loop import evaluate, fit
from tests.conftest import build_tiny

pytestmark = pytest.mark.smoke

STREAMS = {
    "unequal tasks": {"task_sizes": [3, 1, 2], "increment": None},  # the second task has one class
    "equal tasks": {"increment": 2},
}


def learn(learner, task):
    learner.task = task
    learner.before_task(task)
    fit(learner, task)
    learner.after_task(task)


@pytest.fixture(params=[pytest.param((name, stream), id=f"{name}-{stream}") for name in LEARNERS for stream in STREAMS])
def stream(request, tmp_path):
    """(tasks, learner): 7 images a class in batches of 4, so some task ends in a batch of one."""
    name, protocol = request.param
    return build_tiny(tmp_path, name, **STREAMS[protocol])


def test_learns_and_counts_every_test_image_once(stream):
    manager, learner = stream
    for task in manager:
        learner.task = task
        learner.before_task(task)
        assert evaluate(learner, manager[: task.index + 1]).shape == (2, task.index + 1)  # before any training
        fit(learner, task)
        learner.after_task(task)
        correct = evaluate(learner, manager[: task.index + 1])
        sizes = [len(seen.test) for seen in manager[: task.index + 1]]
        assert ((correct >= 0) & (correct <= sizes)).all()
        assert (correct[1] >= correct[0]).all()  # fewer rivals with the task known
    accuracy = 100 * correct[1].sum() / sum(sizes)
    assert accuracy > 60, "flat colours with the task known are easy: chance is 33 to 50"


def test_predictions_do_not_depend_on_the_batch(stream):
    manager, learner = stream
    for task in manager[:2]:
        learn(learner, task)
    learner.eval()
    view = manager[1].test.view("test")
    images = torch.stack([view[i][0] for i in range(len(view))]).float() / 255
    with torch.inference_mode():
        whole = learner.predict(images)
        for size in (1, 7, 64):
            parts = torch.cat([learner.predict(part) for part in images.split(size)])
            torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
        order = torch.randperm(len(images))
        torch.testing.assert_close(learner.predict(images[order]), whole[order], atol=1e-5, rtol=1e-5)


def test_state_is_restored_to_equal_scores(stream, tmp_path):
    manager, learner = stream
    for task in manager[:2]:
        learn(learner, task)
    torch.save(learner.state_dict(), tmp_path / "state.pt")
    other = LEARNERS[learner.config.model_name](learner.config, _same_backbone(learner), learner.runtime)
    other.task = manager[1]
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    images = torch.rand(5, 3, 16, 16)
    with torch.inference_mode():
        assert torch.equal(other.eval().predict(images), learner.eval().predict(images))


def test_only_what_is_in_param_groups_changes_in_training(stream):
    manager, learner = stream
    for task in manager[:2]:
        learner.task = task
        learner.before_task(task)
        before = {name: value.detach().clone() for name, value in learner.named_parameters()}
        trained = {id(p) for group in learner.param_groups() for p in group["params"]}
        fit(learner, task)
        for name, parameter in learner.named_parameters():
            if id(parameter) not in trained:
                assert torch.equal(parameter, before[name]), f"{name} is in no group, yet it changed"
        learner.after_task(task)


def test_loss_can_be_called_twice_on_a_batch(stream):
    """SAM needs two passes: the loss may not change any state."""
    manager, learner = stream
    learner.task = manager[0]
    learner.before_task(manager[0])
    if learner.epochs(manager[0]) == 0:
        pytest.skip("trains nothing")
    learner.eval()
    images, targets = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 1, 0])
    inputs, labels = learner.prepare(images, targets)
    first, second = (learner.loss(learner.network, inputs, labels) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", list(LEARNERS))
def test_runs_on_a_domain_incremental_stream(name, tmp_path):
    from tests.conftest import write_stream

    dataset = write_stream(tmp_path / "domains.npz", classes=3, domains=3)
    manager, learner = build_tiny(tmp_path, name, dataset=dataset, shuffle=False, increment=None, init_cls=None)
    assert len(manager) == 3
    for task in manager:
        learn(learner, task)
    assert evaluate(learner, manager[:]).sum(axis=1)[0] > 12, "of 36; chance is 12"


def _same_backbone(learner):
    import copy

    backbone = copy.deepcopy(learner.network.backbone)
    return lambda: (backbone, learner.backbone_info)
