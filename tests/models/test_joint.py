import torch

from models.parts.evaluation import evaluate
from models.parts.loop import begin, learn
from tests.conftest import build_tiny


def test_trains_on_the_images_of_all_tasks(tmp_path):
    manager, learner = build_tiny(tmp_path, "joint")
    assert [len(learner.train_data(task)) for task in manager] == [14, 28, 42]


def test_restart_begins_from_the_pretrained_weights_and_a_fresh_head(tmp_path):
    manager, learner = build_tiny(tmp_path, "joint", epochs=1)
    start = {name: value.clone() for name, value in learner.network.backbone.state_dict().items()}
    learn(learner, manager[0])
    trained = learner.network.head.weight.detach().clone()
    begin(learner, manager[1])
    assert all(torch.equal(value, start[name]) for name, value in learner.network.backbone.state_dict().items())
    assert not torch.equal(learner.network.head.weight[:2], trained)
    assert learner.network.head.num_classes == 4


def test_without_restart_the_network_goes_on(tmp_path):
    manager, learner = build_tiny(tmp_path, "joint", epochs=1, restart=False)
    learn(learner, manager[0])
    before = learner.network.head.weight.detach().clone()
    learner.before_task(manager[1])
    assert torch.equal(learner.network.head.weight[:2], before)


def test_does_not_forget_what_it_keeps_training_on(tmp_path):
    manager, learner = build_tiny(tmp_path, "joint", epochs=8)
    for task in manager:
        learn(learner, task)
    assert evaluate(learner, manager[:]).main[0].sum() >= 20, "of 24"
