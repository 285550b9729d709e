"""Killed anywhere and resumed, a run ends in the same numbers, to the last digit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main
import trainer
from models.factory import load_config
from tests.conftest import TINY_VIT, tiny_values
from utils.interrupt import StopSignal
from utils.runtime import Runtime

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = ("seconds", "images_per_second", "peak_memory_mib", "images_evaluated", "date")


class Killed(BaseException):
    """Stands for kill -9 where a real one would be hard to aim: nothing may catch it."""


@pytest.fixture
def config(tmp_path):
    """A config file: augmentation and dropout draw random numbers all the time."""

    def write(**keys):
        backbone = TINY_VIT | {"proj_drop_rate": 0.2}
        values = tiny_values(tmp_path, **({"backbone": backbone, "train_transform": "pad_crop"} | keys))
        path = tmp_path / "run.json"
        path.write_text(json.dumps(values))
        return path

    return write


def run(config: Path, output: Path, *arguments: str) -> dict:
    assert main.main(["--config", str(config), "--output", str(output), *arguments]) == 0
    return numbers(output)


def numbers(output: Path) -> dict:
    result = json.loads((output / "seed1993" / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in TIMINGS}


def epoch_lines(output: Path) -> list[dict]:
    path = output / "seed1993" / "epochs.jsonl"  # not there where nothing is trained
    lines = path.read_text().splitlines() if path.is_file() else []
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def kill_after(monkeypatch, owner, name: str, calls: int) -> None:
    """Let `owner.name` die at the end of its n-th call."""
    original, count = getattr(owner, name), iter(range(1, 10_000))

    def method(*args, **kwargs):
        value = original(*args, **kwargs)
        if next(count) == calls:
            raise Killed
        return value

    monkeypatch.setattr(owner, name, method)


# 14 images a task in batches of 4: 4 steps an epoch, 16 a task, 3 tasks.
POINTS = {
    "second step of task 2, saved at every step": (trainer.SeedRun, "step_done", 18, 1e-9),
    "inside the third epoch of task 2": (trainer.SeedRun, "step_done", 27, 1e-9),
    "last step of an epoch": (trainer.SeedRun, "step_done", 20, 1e-9),
    "inside task 2, nothing saved since task 1": (trainer.SeedRun, "step_done", 22, 10.0),
    "after the epoch line was written": (trainer.SeedRun, "epoch_done", 6, 10.0),
    "trained, not yet evaluated": (trainer.SeedRun, "save", 3, 10.0),
    "in the evaluation of task 2": (trainer, "evaluate", 2, 10.0),
    "after task 2": (trainer.SeedRun, "save", 4, 10.0),
    "before the final report": (trainer.SeedRun, "save", 6, 10.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_kill_and_resume_gives_the_same_numbers(point, config, tmp_path, monkeypatch):
    owner, name, calls, minutes = POINTS[point]
    path = config(checkpoint_minutes=minutes)
    whole = run(path, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_after(patch, owner, name, calls)
        with pytest.raises(Killed):
            main.main(["--config", str(path), "--output", str(tmp_path / "cut")])
    assert run(path, tmp_path / "cut", "--resume") == whole
    assert epoch_lines(tmp_path / "cut") == epoch_lines(tmp_path / "whole")


def test_several_seeds_resume_where_they_stopped(config, tmp_path, monkeypatch):
    path = config(seed=[1, 2])
    with monkeypatch.context() as patch:
        kill_after(patch, trainer.SeedRun, "save", 8)  # in the second seed
        with pytest.raises(Killed):
            main.main(["--config", str(path), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "summary.json").exists()
    finished = (tmp_path / "out" / "seed1" / "result.json").stat().st_mtime_ns
    assert main.main(["--config", str(path), "--output", str(tmp_path / "out"), "--resume"]) == 0
    assert (tmp_path / "out" / "seed1" / "result.json").stat().st_mtime_ns == finished
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["last_acc"]["n"] == 2


def test_a_process_that_does_not_write_knows_that_it_was_saved(config, tmp_path):
    """Else it stays due for ever, and every process saves at every agreement from then on."""
    runtime = Runtime("cpu", "fp32", num_workers=0)
    runtime.rank = 1
    seed_run = trainer.SeedRun(load_config(str(config())), tmp_path / "out", runtime, StopSignal())
    seed_run.saved_at = 0.0
    seed_run.save("fit")
    assert seed_run.saved_at > 0 and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_real_kill_9_inside_task_2(config, tmp_path):
    path = config(checkpoint_minutes=1e-9, epochs=40)
    whole = run(path, tmp_path / "whole")
    process = start(path, tmp_path / "cut")
    wait_for_task_2(process, tmp_path / "cut")
    process.kill()
    process.wait()
    assert json.loads((tmp_path / "cut" / "seed1993" / "result.json").read_text())["finished"] is False
    assert run(path, tmp_path / "cut", "--resume") == whole


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_saves_and_exits_with_3(number, workers, config, tmp_path):
    """To the whole process group, as a terminal or a cluster sends it: loader processes get it too."""
    path = config(epochs=40, num_workers=workers)
    whole = run(path, tmp_path / "whole")
    process = start(path, tmp_path / "cut")
    wait_for_task_2(process, tmp_path / "cut")
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert "--resume continues" in errors and "Traceback" not in errors
    assert run(path, tmp_path / "cut", "--resume") == whole


def start(config: Path, output: Path) -> subprocess.Popen:
    command = [sys.executable, "main.py", "--config", str(config), "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def wait_for_task_2(process: subprocess.Popen, output: Path) -> None:
    """Until task 2 is under way: 43 epoch lines of 120."""
    log = output / "seed1993" / "epochs.jsonl"
    for _ in range(6000):
        if log.is_file() and log.read_text().count("\n") >= 43:
            return
        assert process.poll() is None, "ended before it could be stopped"
        time.sleep(0.01)
    raise AssertionError("task 2 did not begin within a minute")
