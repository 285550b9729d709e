"""Stopped after any task and resumed, SLCA ends in the same numbers: aligned heads are recalled by the next task."""

import json

import pytest

import main
import trainer
from tests.conftest import tiny_values


class Stopped(BaseException):
    """Stands for a kill that nothing may catch."""


def numbers(folder) -> dict:
    result = json.loads((folder / "seed1993" / "result.json").read_text())
    return {key: result[key] for key in ("acc", "acc_task_il", "curve", "finished", "parameters")}


@pytest.mark.parametrize("model_name", ["slca", "slcapp"])
@pytest.mark.parametrize("after", [1, 2])
def test_stopped_after_a_task_and_resumed(model_name, after, tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    values = tiny_values(tmp_path, model_name, optimizer="sgd", lrate=0.05, ca_epochs=2, ca_samples=16)
    path.write_text(json.dumps(values))
    arguments = ["--config", str(path), "--output"]
    assert main.main([*arguments, str(tmp_path / "whole")]) == 0

    save, done = trainer.SeedRun._save, []

    def save_and_stop(self, stage, *state):
        save(self, stage, *state)
        if stage == "start":  # a task is finished: what comes next is the start of another
            done.append(self.done)
            if len(done) == after:
                raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(trainer.SeedRun, "_save", save_and_stop)
        with pytest.raises(Stopped):
            main.main([*arguments, str(tmp_path / "cut")])
    assert main.main([*arguments, str(tmp_path / "cut"), "--resume"]) == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
