"""BatchNorm: its running statistics move in the passes that count, and in whole batches."""

import pytest
import torch
from torch import nn

from convs.norms import batch_norms, frozen_statistics
from models.parts.loop import learn
from tests.conftest import build_tiny, write_stream
from utils.errors import UserError
from utils.runtime import Runtime

RESNET = {"backbone": "small_resnet18", "image_size": 32}


def test_a_frozen_pass_normalises_by_the_batch_and_keeps_the_statistics():
    layer, images = nn.BatchNorm1d(3), torch.randn(8, 3)
    moving = nn.BatchNorm1d(3)
    with frozen_statistics([layer]):
        found = layer(images)
    torch.testing.assert_close(found, moving(images))
    assert torch.equal(layer.running_mean, torch.zeros(3)) and layer.num_batches_tracked == 0
    layer(images)
    assert layer.num_batches_tracked == 1 and layer.track_running_stats


@pytest.mark.parametrize("sam", [None, {"rho": 0.05, "damping": 0.0}])
def test_sam_s_second_pass_moves_no_statistics(sam, tmp_path):
    """As many updates as steps, with SAM and without: 14 images in batches of 4, a step of which takes two more."""
    stream = write_stream(tmp_path / "d.npz", classes=2, size=32)
    keys = RESNET | {"dataset": stream, "epochs": 1, "optimizer": "sgd", "sam": sam}
    manager, learner = build_tiny(tmp_path, "finetune", **keys)
    learn(learner, manager[0])
    norms = batch_norms(learner.network)
    assert norms and all(int(layer.num_batches_tracked) == 4 for layer in norms)


def test_a_task_that_leaves_one_image_trains_under_batch_norm(tmp_path):
    stream = write_stream(tmp_path / "d.npz", classes=1, train=9, size=32)
    manager, learner = build_tiny(tmp_path, "finetune", **RESNET | {"dataset": stream, "increment": 1, "epochs": 1})
    learn(learner, manager[0])
    assert all(int(layer.num_batches_tracked) == 2 for layer in batch_norms(learner.network))


def test_a_batch_in_parts_is_refused():
    runtime = Runtime("cpu", "fp32")
    runtime.world = 2
    with pytest.raises(UserError, match="BatchNorm would see each batch in 2 parts"):
        runtime.wrap(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
