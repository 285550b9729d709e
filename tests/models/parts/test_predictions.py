"""Predictions that a run keeps: those that its accuracies were counted from."""

import json

import numpy as np
import pytest
from PIL import Image

import main
from models.parts.predictions import confusion
from tests.conftest import tiny_values


def finished(tmp_path, **keys):
    (tmp_path / "run.json").write_text(json.dumps(tiny_values(tmp_path, epochs=1, save_predictions=True, **keys)))
    assert main.main(["--config", str(tmp_path / "run.json"), "--output", str(tmp_path / "out")]) == 0
    return tmp_path / "out" / f"seed{keys.get('seed', 1993)}"


@pytest.mark.parametrize("learner", ["finetune", "icarl"])
def test_accuracies_are_those_of_the_predictions(tmp_path, learner):
    run = finished(tmp_path, model_name=learner)
    result = json.loads((run / "result.json").read_text())
    for task, accuracy in enumerate(result["curve"], 1):
        with np.load(run / "predictions" / f"task{task}.npz") as arrays:
            right = arrays["label"] == arrays["prediction"]
            assert 100 * right.mean() == pytest.approx(accuracy)
            assert arrays["scores"].shape == (len(right), 2 * task) and arrays["scores"].dtype == np.float32
            assert (arrays["scores"].argmax(axis=1) == arrays["prediction"]).all()
            assert all(len(arrays[name]) == len(right) for name in arrays.files)
            assert len(set(arrays["file"])) == len(right)
            names = {f"scores_{name}" for name in result["scores"][1:]}
            assert names <= set(arrays.files)
    assert (run / "plots" / "confusion.png").is_file() and (run / "plots" / "confusion_tasks.png").is_file()


def test_files_are_named_where_images_are_files(tmp_path):
    rng = np.random.RandomState(0)
    for half, count in (("train", 4), ("test", 2)):
        for name in ("ant", "bee", "cat", "dog"):
            (tmp_path / "images" / half / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.randint(0, 255, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / half / name / f"{number}.png")
    run = finished(tmp_path, dataset=f"folder:{tmp_path / 'images'}", test_transform="none", shuffle=False)
    with np.load(run / "predictions" / "task2.npz") as arrays:
        names = [file.rsplit("/", 2)[1] for file in arrays["file"]]
        assert names == [("ant", "bee", "cat", "dog")[label] for label in arrays["label"]]


def test_a_run_without_the_key_keeps_none(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(tiny_values(tmp_path, epochs=1)))
    assert main.main(["--config", str(tmp_path / "run.json"), "--output", str(tmp_path / "out")]) == 0
    run = tmp_path / "out" / "seed1993"
    assert not (run / "predictions").exists() and not (run / "plots" / "confusion.png").exists()


def test_confusion_by_hand():
    counts = confusion(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
