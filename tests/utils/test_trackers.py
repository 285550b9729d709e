"""Loggers are fed from the records of a run, and a missing package is named before anything is trained."""

import json
import sys

import pytest

import main
from tests.conftest import tiny_values
from tests.made_results import made_config, made_result
from utils.errors import UserError
from utils.trackers import Trackers, epoch_numbers, open_trackers, task_numbers


class Kept:
    """A tracker that remembers."""

    def __init__(self):
        self.epochs, self.tasks, self.closed = [], [], False

    def epoch(self, line, number):
        self.epochs.append((number, dict(line)))

    def task(self, result, epochs):
        self.tasks.append((epochs, result["last_acc"]))

    def close(self):
        self.closed = True


def run(tmp_path, *more, **keys):
    (tmp_path / "run.json").write_text(json.dumps(tiny_values(tmp_path, epochs=2, **keys)))
    return main.main(["--config", str(tmp_path / "run.json"), "--output", str(tmp_path / "out"), *more])


def test_what_is_logged_is_what_the_files_hold(tmp_path, monkeypatch):
    kept = Kept()
    monkeypatch.setattr("trainer.open_trackers", lambda *_: Trackers([kept]))
    assert run(tmp_path, log_to=["tensorboard"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "seed1993" / "epochs.jsonl").read_text().splitlines()]
    result = json.loads((tmp_path / "out" / "seed1993" / "result.json").read_text())
    assert kept.epochs == list(enumerate(lines, 1))
    assert [accuracy for _, accuracy in kept.tasks] == result["curve"]
    assert [epochs for epochs, _ in kept.tasks] == [2, 4, 6] and kept.closed


def test_a_logger_that_fails_stops_no_run(tmp_path, monkeypatch, capsys):
    class Broken(Kept):
        def epoch(self, line, number):
            raise ConnectionError("no network")

    broken, kept = Broken(), Kept()
    monkeypatch.setattr("trainer.open_trackers", lambda *_: Trackers([broken, kept]))
    assert run(tmp_path, log_to=["wandb"]) == 0
    assert capsys.readouterr().out.count("takes no more records: ConnectionError: no network") == 1
    assert len(kept.epochs) == 6 and not broken.closed


def test_numbers_of_records():
    line = {"task": 1, "stage": "boost", "epoch": 2, "epochs": 3, "loss": 0.5, "lr": 0.1}
    assert epoch_numbers(line) == {"epoch/loss": 0.5, "epoch/lr": 0.1}
    found = task_numbers(made_result(made_config()))
    assert found["task/last_acc"] == 90.0 and found["seconds/total"] == 13.0 and found["task/stored_bytes"] == 300.0
    assert "task/finished" not in found


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard.writer"), ("wandb", "wandb")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {name}"):
        open_trackers([name], tmp_path, {}, 0)


def test_a_missing_package_stops_a_run_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(tmp_path, log_to=["wandb"]) == 2
    assert 'needs the package "wandb"' in capsys.readouterr().err
    assert not (tmp_path / "out" / "seed1993" / "epochs.jsonl").exists()


def test_unknown_loggers_are_refused(tmp_path, capsys):
    assert run(tmp_path, log_to=["mlflow"]) == 2
    assert "log_to" in capsys.readouterr().err


def test_tensorboard_files_hold_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(tmp_path, log_to=["tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "out" / "seed1993" / "tensorboard"))
    events.Reload()
    result = json.loads((tmp_path / "out" / "seed1993" / "result.json").read_text())
    values = [event.value for event in events.Scalars("task/last_acc")]
    assert values == pytest.approx(result["curve"])
    assert [event.step for event in events.Scalars("epoch/loss")] == list(range(1, 7))
