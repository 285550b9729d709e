"""Evaluation: what counts as right, several scores, frozen values that are computed once."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data.loading import View
from models.parts.evaluation import evaluate, right_predictions
from models.parts.frozen_store import FrozenStore
from models.parts.loop import begin, learn
from tests.conftest import build_tiny, write_stream


def test_right_predictions_by_hand():
    scores = torch.tensor([[3.0, 1, 2], [0, 1, 2], [5, 1, 2]])
    foreign = torch.tensor([[True, False, False]] * 3)  # the task has the classes 1 and 2
    # all classes: predicted 0, 2, 0; among classes 1 and 2 alone: 2, 2, 2
    class_il, task_il, top5 = right_predictions(scores, torch.tensor([0, 2, 2]), foreign)
    assert class_il.tolist() == [True, True, False] and task_il.tolist() == [False, True, True] and top5.all()


def test_top_five_of_seven_by_hand():
    scores = torch.arange(7.0)[None]
    for target, expected in ((6, True), (2, True), (1, False)):
        found = right_predictions(scores, torch.tensor([target]), torch.zeros(1, 7, dtype=torch.bool))
        assert bool(found[2]) == expected


def test_evaluation_counts_by_the_true_task(tmp_path):
    manager, learner = build_tiny(tmp_path)
    begin(learner, manager[0])
    learner.predict = lambda images, frozen: torch.tensor([0.0, 1.0]).expand(len(images), 2)
    found = evaluate(learner, manager[:1])
    assert found.main.tolist() == [[4.0], [4.0], [8.0]]  # all of class 1, none of class 0; both among the best
    assert found.by_class.tolist() == [[0, 4, 0, 0, 0, 0]] and found.images == 8 and found.names == ("logits",)


def test_tasks_that_share_a_test_set_are_passed_once(tmp_path):
    domains = write_stream(tmp_path / "d.npz", classes=3, domains=3)
    for task_count in (1, 3):
        manager, learner = build_tiny(tmp_path, dataset=domains, shuffle=False, increment=None)
        for task in manager[:task_count]:
            learn(learner, task)
        tasks = [replace(task, test=manager[0].test) for task in manager[:task_count]]
        found = evaluate(learner, tasks)
        assert found.images == len(manager[0].test) and (found.main == found.main[:, :1]).all()


def passes(monkeypatch) -> list[int]:
    """Rows that are read from views from now on."""
    read: list[int] = []
    original = View.__getitems__
    monkeypatch.setattr(View, "__getitems__", lambda self, batch: read.extend(batch.rows) or original(self, batch))
    return read


def test_stored_values_spare_the_pass_over_the_images(tmp_path, monkeypatch):
    """A stream of 3 tasks of 8 test images: 24 images are read instead of 8 + 16 + 24."""
    manager, learner = build_tiny(tmp_path, "simplecil")
    store, expected = FrozenStore(1e6), []
    for task in manager:
        learn(learner, task)
        expected.append(evaluate(learner, manager[: task.index + 1]).correct)
    manager, learner = build_tiny(tmp_path, "simplecil")
    read = passes(monkeypatch)
    for task in manager:
        learn(learner, task)
        read.clear()
        found = evaluate(learner, manager[: task.index + 1], store)
        assert (found.correct == expected[task.index]).all()
        assert len(read) == 8, "only the new task's images are not stored yet"
        read.clear()
        assert (evaluate(learner, manager[: task.index + 1], store).correct == expected[task.index]).all()
        assert not read, "everything is stored, and the learner needs no images"


@pytest.mark.parametrize("kind", ["memory", "file", "nowhere"])
def test_values_are_kept_in_memory_then_in_a_file_then_not_at_all(kind, tmp_path):
    split = build_tiny(tmp_path)[0][0].test.split
    limit, folder = {"memory": (1e9, None), "file": (0, tmp_path / "cache"), "nowhere": (0, None)}[kind]
    store, rows = FrozenStore(limit, folder), np.array([3, 1])
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype)
        store.put(split, rows, str(dtype), values)
        assert store.has(split, rows, str(dtype)) == (kind != "nowhere")
        assert not store.has(split, np.array([0, 1]), str(dtype))
        if kind != "nowhere":
            found = store.get(split, rows[::-1].copy(), str(dtype), torch.device("cpu"))
            assert torch.equal(found, values.flip(0)) and found.dtype == dtype
    assert kind != "file" or not list((tmp_path / "cache").iterdir()), "the file goes with the program"
