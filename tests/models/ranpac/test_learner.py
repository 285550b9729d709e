"""RanPAC: whole runs of the reference, its draws, its split, its answers."""

import numpy as np
import pytest
import torch

import models.ranpac.learner as ranpac
from models.factory import config_from
from models.parts.loop import learn
from models.ranpac.ridge import ridge_losses
from tests.conftest import build_tiny, reference, tiny_values, write_stream
from tests.models.first_sessions import check_session, session_keys, start_session
from tests.models.stored_runs import StoredRun, near
from utils.errors import ConfigError

RUNS = {
    "run": {"adapter_dropout": 0.0},
    "run_no_projection": {"adapter_dropout": 0.0},
    "run_no_first_session": {
        "petl": "none", "epochs": None, "lrate": None, "batch_size": None, "weight_decay": None, "min_lr": None,
    },
    "run_pilot": {"adapter_dropout": 0.0, "upstream": "pilot"},
}  # fmt: skip


NO_TRAINING = {"epochs": None, "batch_size": None, "optimizer": None, "lrate": None, "bottleneck": None}


@pytest.mark.parity
@pytest.mark.parametrize("name", list(RUNS))
def test_whole_run_of_the_reference(name, tmp_path, monkeypatch):
    """README: sums 1e-10, losses 1e-6 relative, choice exact, weight and logits 1e-6."""
    stored = reference(f"ranpac/{name}")
    width = stored["W_rand"].shape[1] if "W_rand" in stored else 0
    keys = RUNS[name] | session_keys(f"ranpac/{name}") | {"projection": width}
    run = StoredRun(f"ranpac/{name}", "ranpac", tmp_path, monkeypatch, **keys)
    arrays, learner, total = run.arrays, run.learner, sum(stored["sizes"])
    seen: list[np.ndarray] = []

    def watched(h, labels, ridges):
        losses = ridge_losses(h, labels, ridges)
        seen.append(losses.numpy() * len(labels.unique()) / total)
        return losses

    def draw(width, generator):
        type(learner.ridge).draw(learner.ridge, width, generator)
        if width:
            learner.ridge.projection.copy_(torch.from_numpy(arrays["W_rand"]))

    monkeypatch.setattr(ranpac, "ridge_losses", watched)
    learner.ridge.draw = draw
    learner._order = torch.arange
    for task in run.tasks:
        session = task.index == 0 and "start/head.weight" in arrays
        losses = run.learn(task, lambda index, session=session: start_session(run) if session else None)
        if session:
            check_session(run, losses, 1e-9)
        index, ridge = task.index, learner.ridge
        view = task.train.view("test")
        near(learner.features(view.images), arrays[f"features/{index}"], 1e-10, "features")
        near(ridge.gram, arrays[f"G/{index}"], 1e-10, "G")
        near(ridge.sums.mT, arrays[f"Q/{index}"][:, : task.total_classes], 1e-10, "Q")
        np.testing.assert_allclose(seen[index], arrays["ridge_losses"][index], rtol=1e-6)
        assert ridge.chosen[index].item() == pytest.approx(arrays["ridges"][index])
        near(ridge.weight, arrays[f"weight/{index}"], 1e-6, "weight")
        sigma = arrays[f"sigma/{index}"].item() if f"sigma/{index}" in arrays else 1.0
        near(sigma * run.predict(task), arrays[f"logits/{index}"], 1e-6, "logits")


def test_the_split_holds_every_class_and_repeats(tmp_path):
    """Rows sorted by class go in; the reference's shuffling loader is a seeded permutation here."""
    orders = []
    for _ in range(2):
        manager, learner = build_tiny(tmp_path, "ranpac", petl="none", projection=20, **NO_TRAINING)
        drawn = learner._order
        learner._order = lambda count, drawn=drawn: orders.append(drawn(count)) or orders[-1]
        for task in manager:
            learn(learner, task)
    half = len(orders) // 2
    assert all(torch.equal(a, b) for a, b in zip(orders[:half], orders[half:], strict=True))
    assert any(not torch.equal(order, orders[0]) for order in orders[1:])
    for task, order in zip(manager, orders, strict=False):
        labels = task.train.labels[order[: int(0.8 * len(order))].numpy()]
        assert set(labels) == set(task.classes)


def test_domains_go_on_with_the_sums(tmp_path):
    dataset = write_stream(tmp_path / "d.npz", classes=3, domains=2)
    keys = NO_TRAINING | {"increment": None}
    manager, learner = build_tiny(tmp_path, "ranpac", dataset=dataset, shuffle=False, petl="none", projection=0, **keys)
    for task in manager:
        learn(learner, task)
    features = torch.cat([learner.features(every(task)) for task in manager]).double()
    torch.testing.assert_close(learner.ridge.gram, features.mT @ features, rtol=1e-6, atol=1e-6)
    assert learner.ridge.counts.tolist() == [14.0] * 3 and len(learner.report().numbers["ridges"]) == 2


def every(task) -> torch.Tensor:
    view = task.train.view("test")
    return torch.stack([view[i][0] for i in range(len(view))]).float() / 255


@pytest.mark.parametrize(("exponent", "warned"), [(-12, True), (0, False)])
def test_a_lambda_below_the_rounding_is_said(exponent, warned, tmp_path, caplog):
    keys = NO_TRAINING | {"petl": "none", "projection": 500, "ridges": [exponent, exponent]}
    manager, learner = build_tiny(tmp_path, "ranpac", **keys)
    learn(learner, manager[0])
    assert ("task 1: lambda 1e-12 lies below the rounding" in caplog.text) == warned


def test_nearest_mean_ablation(tmp_path):
    manager, learner = build_tiny(tmp_path, "ranpac", petl="none", head="ncm", projection=None, **NO_TRAINING)
    learn(learner, manager[0])
    images = torch.rand(4, 3, 16, 16)
    means = torch.stack(
        [
            learner.features(every(manager[0]))[torch.from_numpy(manager[0].train.labels) == label].mean(dim=0)
            for label in manager[0].classes
        ]
    )
    expected = torch.nn.functional.cosine_similarity(learner.features(images)[:, None], means, dim=2)
    torch.testing.assert_close(learner.predict(images, {}).float(), expected, atol=1e-5, rtol=0)


def test_upstream(tmp_path):
    def config(**keys):
        return config_from(tiny_values(tmp_path, "ranpac", **keys), "test")

    assert (config(upstream="pilot").head, config(upstream=True).head) == ("cosine", "linear")
    assert (config(upstream=True).torch_seed, config(upstream="pilot").torch_seed) == (1, 1993)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"petl": "none"}, '"epochs" has no effect with "petl": "none", which trains nothing'),
        ({"ridges": [3, 1]}, '"ridges" is empty, [3, 1]: give the smaller exponent first'),
        ({"head": "ncm", "projection": 50}, '"projection" has no effect unless "head" is "linear" or "cosine"'),
    ],
)
def test_wrong_keys_are_answered(keys, sentence, tmp_path):
    with pytest.raises(ConfigError) as caught:
        build_tiny(tmp_path, "ranpac", **keys)
    assert sentence in str(caught.value)
