"""Replay: the reference's run, streams of domains, several processes, budgets that do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest

from models.factory import config_from
from models.parts.loop import learn
from tests.conftest import build_tiny, in_processes, tiny_values, write_stream
from tests.models.classic_runs import WholeRun, budget, schedule
from utils.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parity
def test_run_of_the_reference(tmp_path, monkeypatch):
    WholeRun("classic/replay_run", "replay", tmp_path, lambda s: schedule(s) | budget(s)).run(monkeypatch)


def test_an_epoch_is_the_task_and_the_memory(tmp_path):
    """And nothing else: what is joined names at most the budget's rows outside the task."""
    manager, learner = build_tiny(tmp_path, "replay", exemplars={"total": 9})
    for task in manager:
        old = set(learner.train_data(task)._rows) - set(task.train.rows)
        assert len(old) == (0, 8, 8)[task.index]  # 9 over 2 classes, then over 4
        learn(learner, task)


def test_domains_keep_every_class(tmp_path):
    dataset = write_stream(tmp_path / "d.npz", classes=3, domains=2)
    manager, learner = build_tiny(
        tmp_path, "replay", dataset=dataset, shuffle=False, increment=None, exemplars={"total": 12}
    )
    for task in manager:
        learn(learner, task)
    assert learner.exemplars.labels.tolist() == [0, 0, 1, 1, 2, 2] * 2
    domain = np.isin(learner.exemplars.rows, manager[1].train.rows)
    assert domain.tolist() == [False] * 6 + [True] * 6


def test_a_budget_too_small_for_the_stream_is_answered(tmp_path):
    with pytest.raises(ConfigError, match='"total" 5 keeps none of 6 classes: give at least 6'):
        build_tiny(tmp_path, "replay", exemplars={"total": 5})


@pytest.mark.parametrize(
    ("keys", "answer"),
    [
        ({"memory_size": 2000}, '"exemplars": {"total": N}'),
        ({"fixed_memory": True, "memory_per_class": 20}, '"exemplars": {"per_class": N}'),
        ({"exemplars": {"total": 5, "per_class": 2}}, '"exemplars"'),
    ],
)
def test_keys_of_other_toolboxes_are_answered(tmp_path, keys, answer):
    with pytest.raises(ConfigError, match=answer):
        config_from(tiny_values(tmp_path, "replay", **keys), source="test")


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["replay", "icarl"])
def test_two_processes_equal_one(learner, tmp_path):
    """Over gloo: the same exemplars, the same accuracy by either score."""
    values = tiny_values(tmp_path, learner, batch_size=5, optimizer="sgd", lrate=0.02)
    folders = in_processes(tmp_path, values)
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert results[1]["environment"]["processes"] == 2
    for name in ("acc", "last_acc_nme" if learner == "replay" else "last_acc_logits"):
        assert results[0][name] == results[1][name], name
