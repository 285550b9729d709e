"""The learner that docs/adding-a-learner.md walks through works as printed."""

import json
import re
from pathlib import Path

import pytest

import main
import trainer
from models.base import LEARNERS
from models.parts.loop import evaluate
from tests.conftest import build_tiny, tiny_values
from tests.models.test_contract import learn
from tests.test_resume import Killed, kill_after, numbers

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "adding-a-learner.md").read_text()


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL).group(1)


@pytest.fixture
def lwf():
    exec(compile(block("python"), "docs/adding-a-learner.md", "exec"), {"__name__": "lwf"})
    yield
    LEARNERS._table.pop("lwf")


def test_the_example_is_about_thirty_lines_of_learner():
    code = block("python")
    body = code[code.index("@LEARNERS.register") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 32


def test_the_example_learns_and_distils(lwf, tmp_path):
    manager, learner = build_tiny(tmp_path, "lwf")
    for task in manager:
        learn(learner, task)
    assert evaluate(learner, manager[:])[1].sum() > 14, "of 24 with the task known; chance is 12"
    assert learner.teacher.network.head.num_classes == 4


def test_the_example_resumes_with_its_teacher(lwf, tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_values(tmp_path, "lwf", checkpoint_minutes=1e-9)))
    command = ["--config", str(path), "--output"]
    assert main.main([*command, str(tmp_path / "whole")]) == 0
    with monkeypatch.context() as patch:
        kill_after(patch, trainer.Progress, "step_done", 38)  # inside task 3
        with pytest.raises(Killed):
            main.main([*command, str(tmp_path / "cut")])
    assert main.main([*command, str(tmp_path / "cut"), "--resume"]) == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_the_example_s_experiment_is_valid(lwf):
    from utils.factory import config_from

    values = json.loads(block("json"))
    values.pop("$schema")
    assert config_from(values, "docs").kd_weight == 3.0
