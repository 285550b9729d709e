"""A finished run classifies without its data set and its weight file, to the last digit of its accuracy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from models.factory import learner_class
from predictor import Predictor
from tests.conftest import TINY_VIT, tiny_values, write_stream

pytestmark = pytest.mark.smoke


def finished(tmp_path: Path, name: str, **keys) -> tuple[Path, dict[str, np.ndarray]]:
    """(folder of a finished run whose data set and weight file are gone, its test images and labels)."""
    from timm.models.vision_transformer import VisionTransformer

    arguments = {key: value for key, value in TINY_VIT.items() if key != "name"}
    torch.manual_seed(1)
    torch.save(VisionTransformer(num_classes=0, **arguments).state_dict(), tmp_path / "start.pth")
    domains = "class" not in learner_class(name).streams
    data = write_stream(tmp_path / "stream.npz", domains=3 if domains else 0)
    stream = {"dataset": data} | ({"shuffle": False, "increment": None} if domains else {})
    values = tiny_values(tmp_path, name, weights=str(tmp_path / "start.pth"), epochs=2, **stream, **keys)
    (tmp_path / "run.json").write_text(json.dumps(values))
    assert main.main(["--config", str(tmp_path / "run.json"), "--output", str(tmp_path / "out")]) == 0
    path = Path(data.removeprefix("npz:"))
    with np.load(path) as archive:
        arrays = {key: archive[key] for key in archive.files}
    path.unlink()
    (tmp_path / "start.pth").unlink()
    return tmp_path / "out", arrays


@pytest.mark.slow
def test_the_predictor_has_the_run_s_accuracy(learner_name, tmp_path):
    out, arrays = finished(tmp_path, learner_name)
    result = json.loads((out / "seed1993" / "result.json").read_text())
    found = Predictor(out, "cpu")(arrays["x_test"])
    right = (found.labels == arrays["y_test"]).sum()
    assert 100.0 * right / len(found.labels) == result["last_acc"]
    assert found.names == [str(label) for label in found.labels] and found.scores.shape == (len(found.labels), 6)
    single = Predictor(out / "seed1993", "cpu")(Image.fromarray(arrays["x_test"][5]))
    np.testing.assert_allclose(single.scores[0], found.scores[5], atol=1e-4)
