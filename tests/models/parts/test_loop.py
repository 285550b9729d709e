import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.loading import EpochLoader, extract_features
from models.parts.loop import begin, fit
from models.parts.optim import build_scheduler
from tests.conftest import build_tiny, in_processes, tiny_values
from utils import checkpoint
from utils.errors import TrainingError

ROOT = Path(__file__).resolve().parents[3]


def first_task(tmp_path, **keys):
    manager, learner = build_tiny(tmp_path, **keys)
    begin(learner, manager[0])
    return manager[0], learner


def test_fit_equals_a_bare_pytorch_loop(tmp_path):
    """Same batches, same optimiser: the same weights to the last bit."""
    keys = {
        "optimizer": "sgd",
        "lrate": 0.1,
        "weight_decay": 0.01,
        "scheduler": "cosine",
        "train_transform": "pad_crop",
    }
    task, learner = first_task(tmp_path, **keys)
    _, twin = first_task(tmp_path, **keys)
    twin.load_state_dict(learner.state_dict())
    fit(learner, task)
    network, epochs = twin.network.train(), twin.config.epochs
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    from utils.seed import mix

    loader = EpochLoader(task.train.view("train"), 4, twin.runtime, mix(1993, 0))
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 + math.cos(math.pi * epoch / epochs)) / 2
        for images, targets, _, _ in loader.epoch(epoch, 0):
            optimizer.zero_grad()
            F.cross_entropy(network(images), targets).backward()
            optimizer.step()
    for mine, bare in zip(learner.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(mine, bare, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ({"scheduler": "constant"}, [1, 1, 1, 1]),
        ({"scheduler": "multistep", "milestones": [1, 3], "lrate_decay": 0.1}, [1, 0.1, 0.1, 0.01]),
        ({"scheduler": "cosine", "min_lr": 0.2}, [0.2 + 0.8 * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]),
    ],
)
def test_learning_rates_by_hand(scheduler, expected, tmp_path):
    manager, learner = build_tiny(tmp_path, optimizer="sgd", **scheduler)
    stage = learner.stages(manager[0])[0]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_scheduler(stage, optimizer)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)


def test_features_come_in_the_order_of_the_view(tmp_path):
    task, learner = first_task(tmp_path, batch_size=3)
    view = task.train.view("test")
    learner.eval()
    features, labels = extract_features(learner.network.features, view, learner.runtime, batch_size=3)
    assert labels.tolist() == view.labels.tolist()
    one, _ = view[4]
    torch.testing.assert_close(features[4], learner.network.features(one[None].float() / 255)[0].detach())


def test_loader_processes_change_nothing(tmp_path):
    seen = []
    for workers in (0, 2):
        task, learner = first_task(tmp_path, train_transform="pad_crop")
        learner.runtime._num_workers = workers
        loader = EpochLoader(task.train.view("train"), 4, learner.runtime, seed=7)
        seen.append([batch[0].clone() for epoch in (0, 1) for batch in loader.epoch(epoch, 0)])
    for alone, helped in zip(*seen, strict=True):
        assert torch.equal(alone, helped)


def test_a_broken_loss_is_reported(tmp_path):
    task, learner = first_task(tmp_path)
    learner.loss = lambda net, images, targets: net(images).sum() * float("nan")
    with pytest.raises(TrainingError, match="task 1 of seed 1993, epoch 1: lower lrate"):
        fit(learner, task)


def test_missing_hooks_say_what_to_write(tmp_path):
    from models.base import Learner

    task, learner = first_task(tmp_path)
    with pytest.raises(NotImplementedError, match=r"grow\(task.total_classes\)"):
        Learner.before_task(learner, task)
    with pytest.raises(NotImplementedError, match="cross_entropy"):
        Learner.loss(learner, learner.network, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, {"sam": {"rho": 0.05, "damping": 25}}], ids=["sgd", "sam"])
def test_two_processes_equal_one(keys, tmp_path):
    """Same global batches over gloo: the same accuracy, weights equal up to rounding."""
    import json

    # 14 images in batches of 5: the last is ragged. SGD: Adam blows rounding up where a gradient is zero.
    values = tiny_values(tmp_path, train_transform="pad_crop", batch_size=5, optimizer="sgd", lrate=0.02, **keys)
    folders = in_processes(tmp_path, values)
    one, two = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert one["acc"] == two["acc"] and two["environment"]["processes"] == 2
    losses = [[json.loads(line)["loss"] for line in (folder / "epochs.jsonl").open()] for folder in folders]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    states = [checkpoint.load(folder / "checkpoint" / "last.pt")[1]["learner"]["module"] for folder in folders]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, atol=1e-5, rtol=1e-3)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_trains_to_the_same_weights(tmp_path, monkeypatch):
    # Its own cache: what a killed compilation leaves in the shared one cannot be loaded.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    weights = []
    for compiled in (False, True):
        task, learner = first_task(tmp_path, optimizer="sgd", lrate=0.02, epochs=1)
        learner.runtime._compile = compiled
        fit(learner, task)
        weights.append([p.detach().clone() for p in learner.network.parameters()])
    for plain, compiled in zip(*weights, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-4)
