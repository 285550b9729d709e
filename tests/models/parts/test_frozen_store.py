"""Stored values: an image passes once per name, and no image is read whose values are all there."""

import numpy as np
import torch

import models.parts.evaluation as evaluation
from models.parts.evaluation import evaluate, scored
from models.parts.frozen_store import FrozenStore
from models.parts.loop import learn
from tests.conftest import build_tiny


def watch(learner, monkeypatch) -> dict[str, list]:
    """Images read, and images that each name was computed for."""
    seen: dict[str, list] = {"read": []}
    frozen, passing = learner.frozen, evaluation.pass_over

    def computed(images, names):
        for name in names:
            seen.setdefault(name, []).append(len(images))
        return frozen(images, names)

    def read(view, positions, *rest):
        seen["read"].append(len(positions))
        yield from passing(view, positions, *rest)

    monkeypatch.setattr(learner, "frozen", computed)
    monkeypatch.setattr(evaluation, "pass_over", read)
    return seen


def test_each_image_passes_once_for_each_name(tmp_path, monkeypatch):
    """EASE: a subspace more in every task, wanted for old images and new ones. Batches that mix them cost nothing."""
    manager, learner = build_tiny(tmp_path, "ease", epochs=1, test_batch_size=3)
    seen, store = watch(learner, monkeypatch), FrozenStore(1e9)
    for task in manager:
        learn(learner, task)
        evaluate(learner, task.seen, store)
    images = sum(len(task.test) for task in manager)
    assert {name: sum(seen[name]) for name in learner.frozen_names} == dict.fromkeys(learner.frozen_names, images)
    assert sum(seen["read"]) == sum(len(t.test) for task in manager for t in task.seen)
    seen["read"].clear()
    evaluate(learner, manager[:], store)
    assert not sum(seen["read"])


def test_features_that_never_change_are_read_once(tmp_path, monkeypatch):
    manager, learner = build_tiny(tmp_path, "simplecil", test_batch_size=3)
    seen, store = watch(learner, monkeypatch), FrozenStore(1e9)
    for task in manager:
        learn(learner, task)
        evaluate(learner, task.seen, store)
    images = sum(len(task.test) for task in manager)
    assert sum(seen["read"]) == sum(seen["features"]) == images


def test_without_room_every_image_passes_every_time(tmp_path):
    manager, learner = build_tiny(tmp_path, "simplecil", test_batch_size=3)
    learn(learner, manager[0])
    store = FrozenStore(0)
    with_room, without = (
        torch.cat([scores["logits"] for scores, _, _ in scored(learner, manager[0].test, s)])
        for s in (FrozenStore(1e9), store)
    )
    assert torch.equal(with_room, without)
    assert not store.there(manager[0].test.split, np.arange(3), "features").any()
