"""A run that begins behind another one's first task ends with the same digits as one that trained it itself."""

import json

import pytest

import main
from tests.conftest import tiny_values, write_stream

# What tells one run from another without being measured, or is a clock.
UNLIKE = {"config", "seconds", "images_per_second", "date", "peak_memory_mib"}


def run(tmp_path, name, status=0, **keys):
    values = tiny_values(tmp_path, **({"dataset": stream(tmp_path)} | keys))
    (tmp_path / f"{name}.json").write_text(json.dumps(values))
    assert main.main(["--config", str(tmp_path / f"{name}.json"), "--output", str(tmp_path / name)]) == status
    return tmp_path / name / "seed1993"


def stream(tmp_path):
    path = tmp_path / "shared.npz"
    return f"npz:{path}" if path.is_file() else write_stream(path, classes=8)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """(folder that tests may make runs in, finished run of finetune: 4 + 2 + 2 classes)."""
    folder = tmp_path_factory.mktemp("plain")
    return folder, run(folder, "source", increment=2, **B50)


def numbers(folder):
    result = json.loads((folder / "result.json").read_text())
    return {key: value for key, value in result.items() if key not in UNLIKE}


B50 = {"init_cls": 4, "epochs": 1, "keep_checkpoints": "first"}


@pytest.mark.slow
@pytest.mark.parametrize("learner, keys", [
    ("finetune", {}), ("aper", {}), ("ranpac", {}), ("icarl", {}),
])  # fmt: skip
def test_equal_to_the_digit_with_a_run_that_trained_it_itself(tmp_path, learner, keys):
    """Other tasks behind the same first one: classes of 4 + 2 + 2 there, 4 + 1 + 1 + 1 + 1 here."""
    common = {"model_name": learner, **B50, **keys}
    source = run(tmp_path, "source", increment=2, **common)
    alone = run(tmp_path, "alone", increment=1, **common)
    behind = run(tmp_path, "behind", increment=1, init_from=str(source.parent), **common)
    assert numbers(behind) == numbers(alone)
    assert "the first task is that of" in (behind / "train.log").read_text()
    lines = [(folder / "epochs.jsonl").read_text().count("\n") for folder in (behind, alone)]
    assert lines[0] == lines[1]


SESSION = {"bottleneck": 4, "petl": "adapter", "init_cls": 4, "increment": 2, "epochs": 1, "keep_checkpoints": "first"}


@pytest.mark.parametrize("source, taker", [
    ({"model_name": "ranpac"}, {"model_name": "aper"}),
    ({"model_name": "aper"}, {"model_name": "fecam", "increment": 1}),
    ({"model_name": "fecam"}, {"model_name": "ranpac", "projection": 20}),
    ({"model_name": "ranpac"}, {"model_name": "ranpac", "projection": 0}),
])  # fmt: skip
def test_a_first_session_is_shared_by_learners_that_begin_with_one(tmp_path, source, taker):
    """The training alone: what each measures afterwards is its own."""
    source = run(tmp_path, "source", **(SESSION | source))
    alone = run(tmp_path, "alone", **(SESSION | taker))
    behind = run(tmp_path, "behind", init_from=str(source), **(SESSION | taker))
    assert numbers(behind) == numbers(alone)
    assert "the first task is that of" in (behind / "train.log").read_text()


def test_another_first_session_is_refused(tmp_path, capsys):
    source = run(tmp_path, "source", model_name="ranpac", **SESSION)
    values = SESSION | {"model_name": "aper", "bottleneck": 8, "init_from": str(source)}
    run(tmp_path, "behind", status=2, **values)
    assert '"bottleneck" is 4 there, 8 here' in capsys.readouterr().err


def test_later_tasks_may_have_another_schedule(plain, tmp_path):
    keys = {"dataset": stream(plain[0]), "increment": 2, "epochs": 2, "init_epoch": 1, "lrate": 0.001, "init_lr": 0.005}
    behind = run(tmp_path, "behind", init_from=str(plain[1]), **(B50 | keys))
    assert numbers(behind) == numbers(run(tmp_path, "alone", **(B50 | keys)))


@pytest.mark.parametrize("keys, told", [
    ({"init_cls": 2}, "it has 4 classes, this one 2"),
    ({"epochs": 3}, '"epochs" of the first task is 1 there, 3 here'),
    ({"normalize": "none"}, '"normalize" is "half" there, "none" here'),
    ({"model_name": "slca"}, '"model_name" is "finetune" there, "slca" here'),
    ({"class_order_seed": 3}, '"class_order_seed" is null there, 3 here'),
    ({"batch_size": 8}, '"batch_size" is 4 there, 8 here'),
])  # fmt: skip
def test_another_first_task_is_refused_with_the_reason(plain, capsys, keys, told):
    folder, source = plain
    run(folder, "behind", status=2, init_from=str(source), **(B50 | {"increment": 2} | keys))
    assert told in capsys.readouterr().err


def test_other_data_are_refused(plain, capsys):
    folder, source = plain
    other = write_stream(folder / "other.npz", classes=8, seed=1)
    values = {"increment": 2, "dataset": other, "init_from": str(source)}
    run(folder, "behind", status=2, **(B50 | values))
    assert "its data are others" in capsys.readouterr().err


def test_a_run_that_kept_no_checkpoint_is_named(tmp_path, capsys):
    source = run(tmp_path, "source", increment=2, **(B50 | {"keep_checkpoints": "last"}))
    run(tmp_path, "behind", status=2, increment=2, init_from=str(source), **B50)
    assert '"keep_checkpoints": "first" in its config keeps it' in capsys.readouterr().err
    run(tmp_path, "nowhere", status=2, increment=2, init_from=str(tmp_path / "none"), **B50)
    assert "holds no run of seed 1993" in capsys.readouterr().err
