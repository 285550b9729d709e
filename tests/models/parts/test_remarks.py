"""What a config asks for in vain is said in --check and in the log, once."""

import json

import pytest

import main
from tests.conftest import tiny_values

CASES = {
    "milestones": ({"scheduler": "multistep", "milestones": [1, 4, 9]}, "milestones: 4, 9 lie beyond the 4 epochs"),
    "one class": ({"increment": None, "task_sizes": [3, 1, 2]}, "task 2: one class"),
    "a seed twice": ({"seed": [5, 7, 5]}, "a seed that stands twice runs once (5, 7)"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_said(case, tmp_path, capsys):
    keys, sentence = CASES[case]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_values(tmp_path, **keys)))
    assert main.main(["--config", str(path), "--check"]) == 0
    assert sentence in capsys.readouterr().out
    if case != "a seed twice":
        assert main.main(["--config", str(path), "--output", str(tmp_path / "out")]) == 0
        assert capsys.readouterr().out.count(sentence) == 1


def test_nothing_is_said_of_what_acts(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_values(tmp_path, scheduler="multistep", milestones=[2, 3])))
    assert main.main(["--config", str(path), "--check"]) == 0
    assert "note  " not in capsys.readouterr().out


@pytest.mark.parametrize(("keys", "status"), [({"min_lr": 0.004}, 0), ({"min_lr": 0.006}, 2)])
def test_a_floor_above_a_rate_is_refused(keys, status, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_values(tmp_path, epochs=1, **keys)))
    assert main.main(["--config", str(path), "--output", str(tmp_path / "out")]) == status
    assert ("min_lr" in capsys.readouterr().err) == bool(status)
    assert main.main(["--config", str(path), "--check"]) == status


@pytest.mark.parametrize(("name", "status"), [("slca", 2), ("raa", 2), ("mos", 2)])
def test_a_covariance_of_too_few_images_is_refused_before_the_run(name, status, tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_values(tmp_path, name, ca_epochs=1, cov_ridge=0.0)))
    for rest in (["--check"], ["--output", str(tmp_path / "out")]):
        assert main.main(["--config", str(path), *rest]) == status
        assert "is 0 with 7 images of a class and 16 features" in capsys.readouterr().err


def test_a_matrix_that_cannot_be_factored_is_a_sentence(tmp_path, capsys, monkeypatch):
    import torch

    path = tmp_path / "run.json"
    path.write_text(json.dumps(tiny_values(tmp_path, "slca", epochs=1, ca_epochs=1)))

    def fail(*arguments):
        raise torch.linalg.LinAlgError("linalg.cholesky: the input is not positive-definite")

    monkeypatch.setattr("models.slca.SLCA.after_task", fail)
    assert main.main(["--config", str(path), "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("a matrix is singular in task 1 of seed 1993") and "raise cov_ridge (0.0001)" in said
