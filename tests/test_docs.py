"""The learners that docs/adding-a-learner.md walks through work as printed, the second one in a package of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from models.base import LEARNERS
from models.factory import config_from
from models.parts.evaluation import evaluate
from models.parts.loop import learn
from tests.conftest import build_tiny
from tests.contract import test_resume

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "adding-a-learner.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def lwf():
    exec(compile(blocks("python")[0], "docs/adding-a-learner.md", "exec"), {"__name__": "my_lwf"})
    yield "my_lwf"
    LEARNERS._table.pop("my_lwf")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """my_package.balanced outside the checkout, on the Python path."""
    (tmp_path / "path" / "my_package").mkdir(parents=True)
    (tmp_path / "path" / "my_package" / "__init__.py").touch()
    (tmp_path / "path" / "my_package" / "balanced.py").write_text(blocks("python")[1])
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    yield "my_package.balanced:Balanced"
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        sys.modules.pop(name)


def test_the_example_is_about_thirty_lines_of_learner():
    code = blocks("python")[0]
    body = code[code.index("@LEARNERS.register") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 32


def test_the_example_learns_and_distils(lwf, tmp_path):
    manager, learner = build_tiny(tmp_path, lwf)
    for task in manager:
        learn(learner, task)
    assert evaluate(learner, manager[:]).main[1].sum() > 14, "of 24 with the task known; chance is 12"
    assert learner.teacher.network.head.num_classes == 4


def test_the_example_resumes_with_its_teacher(lwf, tmp_path, monkeypatch):
    test_resume.test_every_learner_resumes(lwf, tmp_path, monkeypatch)


def test_the_example_s_experiment_is_valid(lwf):
    values = json.loads(blocks("json")[0])
    values.pop("$schema")
    assert config_from(values, "docs").kd_weight == 3.0


def test_the_example_outside_the_checkout_learns_two_scores_in_two_stages(package, tmp_path):
    manager, learner = build_tiny(tmp_path, package)
    for task in manager:
        learn(learner, task)
        assert [stage.name for stage in learner.stages(task)] == ["train", "balance"]
    found = evaluate(learner, manager[:])
    assert found.names == ("logits", "nme") and (found.correct[:, 1].sum(axis=1) > 14).all()
    assert len(learner.kept.rows) == 3 * 6


@pytest.mark.slow
def test_one_option_runs_the_contract_on_a_learner_outside_the_checkout(package, tmp_path):
    command = [sys.executable, "-m", "pytest", "tests/contract", "-q", "-p", "no:cacheprovider", "-m", "not long"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "path"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--learner", package], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
