"""Killed anywhere and resumed, every learner ends in the same numbers, epoch lines and weights, to the last digit."""

import json
from pathlib import Path

import pytest
import torch

import main
import trainer
from models.factory import learner_class
from tests.conftest import TINY_VIT, tiny_values, write_stream
from tests.test_resume import Killed, epoch_lines, kill_after, numbers
from utils import checkpoint

pytestmark = pytest.mark.smoke


def write_config(tmp_path: Path, name: str, epochs: int = 2) -> Path:
    """Augmentation and dropout draw random numbers all the time; every step may be saved."""
    domains = "class" not in learner_class(name).streams
    stream = {"dataset": write_stream(tmp_path / "d.npz", domains=3), "shuffle": False, "increment": None}
    keys = {"backbone": TINY_VIT | {"proj_drop_rate": 0.2}, "train_transform": "pad_crop", "checkpoint_minutes": 1e-9}
    keys["epochs"] = epochs
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_values(tmp_path, name, **keys, **(stream if domains else {}))))
    return path


def run(config: Path, output: Path) -> None:
    assert main.main(["--config", str(config), "--output", str(output), "--resume"]) == 0


def final_state(output: Path):
    return checkpoint.load(output / "seed1993" / "checkpoint" / "last.pt")[1]["learner"]


def same(a, b, where: str = "state") -> None:
    """Equal to the last bit, entry by entry."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), f"{where} differs"
    elif isinstance(a, dict):
        assert set(a) == set(b), f"{where} has other entries"
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), f"{where} has another length"
        for index, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}[{index}]")
    else:
        assert a == b or a != a, f"{where} differs: {a}, {b}"


def killed_and_resumed(config: Path, output: Path, monkeypatch, points) -> int:
    """Run until the end, dying at each of the points in turn; how often it died."""
    deaths = 0
    for owner, name, calls in points:
        with monkeypatch.context() as patch:
            kill_after(patch, owner, name, calls)
            try:
                main.main(["--config", str(config), "--output", str(output), "--resume"])
            except Killed:
                deaths += 1
    run(config, output)
    return deaths


def check(config: Path, tmp_path: Path, monkeypatch, points) -> int:
    run(config, tmp_path / "whole")
    deaths = killed_and_resumed(config, tmp_path / "cut", monkeypatch, points)
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert epoch_lines(tmp_path / "cut") == epoch_lines(tmp_path / "whole")
    same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    return deaths


@pytest.mark.slow
def test_every_learner_resumes(learner_name, tmp_path, monkeypatch):
    """Inside a task, behind its training, across the boundary to the next, inside that one."""
    config = write_config(tmp_path, learner_name)
    points = [(trainer.SeedRun, "step_done", 5), (trainer, "evaluate", 1)] * 2
    points = [point for point in points if trains(config) or point[1] == "evaluate"]
    assert check(config, tmp_path, monkeypatch, points) >= 2, "it was hardly killed"


@pytest.mark.long
def test_every_learner_resumes_inside_every_task(learner_name, tmp_path, monkeypatch):
    """Each run dies where the one before went on: in the first steps of a task, behind an epoch, behind a stage, in
    after_task, in the evaluation, behind the task; three tasks long."""
    config = write_config(tmp_path, learner_name, epochs=4)
    learner = learner_class(learner_name)
    training = [
        (trainer.SeedRun, "step_done", 2),
        (trainer.SeedRun, "step_done", 3),
        (trainer.SeedRun, "epoch_done", 2),
        (trainer.SeedRun, "stage_done", 1),
    ]
    behind = [(learner, "after_task", 1), (trainer, "evaluate", 1), (trainer.SeedRun, "save", 1)]
    deaths = check(config, tmp_path, monkeypatch, [*(training if trains(config) else []), *behind] * 4)
    assert deaths >= (12 if trains_later(tmp_path / "whole") else 6), "it was hardly killed"


def trains(config: Path) -> bool:
    return "epochs" in json.loads(config.read_text())


def trains_later(output: Path) -> bool:
    """Whether a task behind the first has epochs: learners with a first session alone have none."""
    return any(line["task"] > 1 for line in epoch_lines(output))
