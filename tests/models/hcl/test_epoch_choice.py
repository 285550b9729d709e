"""The epoch whose network a task ends with."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from models.hcl.epoch_choice import EpochChoice
from tests.conftest import reference


def numbered(value: float) -> nn.Linear:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, value)
    return layer


@pytest.mark.parity
def test_the_reference_s_rule_and_the_best_epoch():
    arrays = reference("hcl/selection")
    scores = (arrays["class_il"] + arrays["task_il"]) / 2
    for rule, key in (("slack", "selected_epoch"), ("best", "argmax_epoch")):
        for task, row in enumerate(scores):
            selection = EpochChoice(rule, float(arrays["slack"]))
            for epoch, score in enumerate(row):
                selection.offer(epoch, float(score), nn.Linear(1, 1))
            assert selection.epoch == arrays[key][task], (rule, task)


@pytest.mark.parametrize("restore", [False, True])
def test_the_chosen_network_comes_back_and_the_last_one_after_it(restore):
    selection, network = EpochChoice("best"), numbered(0)
    for epoch, score in enumerate([10.0, 50.0, 50.0, 20.0]):
        network.load_state_dict(numbered(epoch).state_dict())
        selection.offer(epoch, score, network)
    if restore:
        saved, selection = selection.state_dict(), EpochChoice("best")
        selection.load_state_dict(saved)
    selection.finish(network, keep_last=True)
    assert selection.epoch == 1 and network.weight.item() == 1
    selection.recall_last(network)
    assert network.weight.item() == 3
    selection.restart()
    selection.recall_last(network)
    assert network.weight.item() == 3


def test_last_and_no_number_keep_the_last_epoch():
    for rule, score in (("last", 90.0), ("best", math.nan), ("slack", math.nan)):
        selection, network = EpochChoice(rule), numbered(7)
        assert not selection.offer(0, score, network)
        nn.init.constant_(network.weight, 8)
        selection.finish(network)
        assert network.weight.item() == 8 and selection.epoch is None


def test_slack_ratchets_down():
    selection = EpochChoice("slack", 0.2)
    for epoch, score in enumerate(60 - 0.15 * np.arange(12)):
        assert selection.offer(epoch, float(score), nn.Linear(1, 1))
    assert torch.tensor(selection.epoch).item() == 11
