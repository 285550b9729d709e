"""On a CUDA device: every learner runs, in bf16 and fp32, resumes, and agrees with the CPU."""

import json

import numpy as np
import pytest
import torch

import main
from models.base import LEARNERS
from models.parts.gaussians import CHUNK, ClassGaussians
from predictor import Predictor
from tests.conftest import tiny_values
from tests.test_pretend_cuda import VARIANTS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def run(tmp_path, name: str, *arguments: str, **keys) -> dict:
    path = tmp_path / "run.json"
    values = {key: value for key, value in tiny_values(tmp_path, **keys).items() if value is not None}
    path.write_text(json.dumps(values))
    assert main.main(["--config", str(path), "--output", str(tmp_path / name), *arguments]) == 0
    return json.loads((tmp_path / name / "seed1993" / "result.json").read_text())


@pytest.mark.parametrize("learner", list(LEARNERS))
def test_every_learner_runs_in_bf16(learner, tmp_path):
    result = run(tmp_path, "out", model_name=learner, device="cuda")
    assert result["environment"]["precision"] == "bf16" and result["peak_memory_mib"] > 0


@pytest.mark.parametrize("case", [*((name, {}) for name in LEARNERS), *VARIANTS.values()], ids=[*LEARNERS, *VARIANTS])
def test_fp32_trains_and_predicts_as_the_cpu_does(case, tmp_path):
    """Trained on the card, a run answers the same there and on the host: all scores, to the rounding of fp32. Losses of
    two runs do not compare: new heads, dropout and mixtures are drawn on the device."""
    learner, keys = case
    result = run(tmp_path, "out", model_name=learner, device="cuda", precision="fp32", **keys)
    assert result["environment"]["precision"] == "fp32"
    folder = tmp_path / "out" / "seed1993"
    with np.load(tmp_path / "stream.npz") as stream:
        images = stream["x_test"]
    scores = [Predictor(folder, device=device)(images).scores for device in ("cpu", "cuda")]
    largest = np.abs(scores[0][np.isfinite(scores[0])]).max()
    np.testing.assert_allclose(scores[1], scores[0], atol=2e-3 * largest)


@pytest.mark.parametrize("learner", list(LEARNERS))
def test_a_finished_run_is_skipped_and_an_unfinished_one_goes_on(learner, tmp_path):
    run(tmp_path, "out", model_name=learner, device="cuda")
    assert run(tmp_path, "out", "--resume", model_name=learner, device="cuda")["finished"]


def test_last_accuracy_agrees_with_the_cpu(tmp_path):
    keys = {"optimizer": "sgd", "lrate": 0.02, "precision": "fp32"}
    cpu, cuda = (run(tmp_path, device, device=device, **keys) for device in ("cpu", "cuda"))
    assert abs(cpu["last_acc"] - cuda["last_acc"]) <= 100 / 24 + 1e-9, "at most one of 24 images"


def test_the_landscape_agrees_with_the_cpu(tmp_path):
    """Same weights, images and directions on both; the small numbers of curvature to a few per cent."""
    run(tmp_path, "out", device="cpu", precision="fp32")
    found = []
    for device in ("cpu", "cuda"):
        command = ["landscape", str(tmp_path / "out"), "--grid", "3", "--output", str(tmp_path / device)]
        assert main.main([*command, "--device", device]) == 0
        found.append(json.loads((tmp_path / device / "seed1993" / "landscape" / "task3.json").read_text()))
    for key in ("loss", "gradient_norm", "sharpness_10", "top_eigenvalue"):
        assert found[1][key] == pytest.approx(found[0][key], rel=0.03)


def test_covariances_on_the_host_cost_two_places_on_the_card():
    """Equal draws from either side; while they are fetched, the card holds two pieces of them and not all."""
    device, width, classes = torch.device("cuda"), 256, 256
    features, labels = (
        torch.randn(4 * classes, width, device=device),
        torch.arange(4 * classes, device=device) % classes,
    )
    drawn, peaks = [], []
    for on_host in (False, True):
        gaussians = ClassGaussians(width).to(device)
        if on_host:
            gaussians.hold_on_host()
        gaussians.add(features, labels, task=0)
        assert gaussians.covariances.factors.all()[0].is_pinned() == on_host
        out = torch.empty(classes, 8, width, device=device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for seed in range(3):
            gaussians.draw(gaussians.means, 8, torch.Generator(device).manual_seed(seed), out=out)
            drawn.append(out.cpu())
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del gaussians
    assert all(torch.equal(*pair) for pair in zip(drawn[:3], drawn[3:], strict=True))
    piece = 4 * CHUNK["cuda"] * width**2
    assert 2 * piece <= peaks[1] - peaks[0] < 3 * piece
