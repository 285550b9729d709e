"""What is not finite ends a run where it arises, with its name and advice that is true for it."""

import logging

import pytest
import torch

from models.parts.evaluation import evaluate
from models.parts.finite import refuse_not_finite
from models.parts.loop import learn
from tests.conftest import build_tiny
from utils.errors import TrainingError

ALIGNED = {
    "slca": {"ca_epochs": 2},
    "slcapp": {"ca_epochs": 2},
    "inflora": {"ca_epochs": 2},
    "raa": {"ca_epochs": 2},
    "mos": {"ca_epochs": 2},
}


@pytest.mark.parametrize("name", ALIGNED)
def test_alignment_that_diverges_is_named_in_its_own_task(name, tmp_path):
    manager, learner = build_tiny(tmp_path, name, epochs=1, **ALIGNED[name] | {"ca_lrate": 1e30})
    with pytest.raises(TrainingError, match=r"in task [12] of seed 1993, behind what follows training: lower ca_lrate"):
        for task in manager[:2]:
            learn(learner, task)


@pytest.mark.parametrize("keys", [{"lrate": 1e30}, {"init_lr": 1e30}])
def test_training_that_diverges_names_the_rate_that_acted(keys, tmp_path):
    manager, learner = build_tiny(tmp_path, "finetune", epochs=3, optimizer="sgd", **keys)
    with pytest.raises(TrainingError, match=f"in task 1 of seed 1993.*: lower {next(iter(keys))} \\(1e\\+30\\)$"):
        learn(learner, manager[0])


def test_a_large_loss_is_said(tmp_path, caplog):
    manager, learner = build_tiny(tmp_path, "finetune", epochs=2)
    usual = learner.loss
    learner.loss = lambda net, images, targets: 1e7 * usual(net, images, targets)
    with caplog.at_level(logging.WARNING):
        learn(learner, manager[0])
    assert len([r for r in caplog.records if "training diverges" in r.getMessage()]) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["network.head", "gaussians"])
def test_weights_and_statistics_are_named(name, value, tmp_path):
    manager, learner = build_tiny(tmp_path, "slca", epochs=1)
    learn(learner, manager[0])
    if name == "gaussians":
        learner.gaussians.means[0][0] = value
    else:
        with torch.no_grad():
            next(learner.network.head.parameters())[0, 0] = value
    with pytest.raises(TrainingError, match=f"^{name}.* is not finite in task 1 of seed 1993, behind here"):
        refuse_not_finite(learner, "here")


def test_bf16_is_named_to_one_who_has_it(tmp_path):
    manager, learner = build_tiny(tmp_path, "finetune", epochs=1)
    learn(learner, manager[0])
    with torch.no_grad():
        next(learner.parameters()).fill_(float("nan"))
    for dtype, said in ((None, False), (torch.bfloat16, True)):
        learner.runtime.autocast_dtype = dtype
        with pytest.raises(TrainingError) as caught:
            refuse_not_finite(learner, "here")
        assert ("fp32" in str(caught.value)) == said


def test_scores_that_are_no_numbers_are_no_accuracy(tmp_path):
    manager, learner = build_tiny(tmp_path, "finetune", epochs=1)
    learn(learner, manager[0])
    usual = learner.predict
    learner.predict = lambda images, frozen: usual(images, frozen) * float("nan")
    with pytest.raises(TrainingError, match="the scores of 8 test images are no numbers behind task 1 of seed 1993"):
        evaluate(learner, manager[:1])
