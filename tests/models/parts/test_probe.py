"""Probes of a frozen body, for every learner."""

import json

import numpy as np
import pytest
import torch

import main
from models.base import LEARNERS
from models.factory import config_from
from models.parts.loop import learn
from models.parts.probe import knn_scores, probe, train_linear
from tests.conftest import build_tiny, reference, tiny_values
from tests.test_resume import numbers
from utils.errors import ConfigError


@pytest.mark.parity
def test_weighted_nearest_neighbours():
    arrays = reference("hcl/knn")
    query, bank, labels = (torch.from_numpy(arrays[key]) for key in ("query", "bank", "bank_labels"))
    classes = arrays["scores"].shape[1]
    scores = knn_scores(query, bank, labels, classes, int(arrays["k"]), float(arrays["temperature"]))
    theirs = arrays["scores"]
    assert np.abs(scores.numpy() - theirs).max() / max(1, np.abs(theirs).max()) <= 1e-5


def test_a_linear_layer_separates_what_is_separable():
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(5, 12, generator=generator)
    labels = torch.arange(5).repeat_interleave(40)
    features = centres[labels] + torch.randn(200, 12, generator=generator)
    weight, bias = train_linear(features, labels, 5, 0.1, seed=1)
    assert ((features @ weight.T + bias).argmax(dim=1) == labels).float().mean() > 0.95
    again, _ = train_linear(features, labels, 5, 0.1, seed=1)
    assert torch.equal(weight, again)


@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "linear") for name in LEARNERS), ("finetune", "linear_raw"), ("finetune", "knn")]
)
def test_every_learner_can_be_probed(name, kind, tmp_path):
    manager, learner = build_tiny(tmp_path, name)
    for task in manager[:2]:
        learn(learner, task)
    before = torch.get_rng_state()
    parameters = {key: value.clone() for key, value in learner.named_parameters()}
    found = probe(learner, learner.data, kind, None)
    assert found.shape == (2,) and (found <= 8).all()
    assert found.sum() > (8 if kind != "linear_raw" else 3), "flat colours: chance is 4 of 16"
    assert torch.equal(torch.get_rng_state(), before), "the run goes on as without a probe"
    assert all(torch.equal(value, parameters[key]) for key, value in learner.named_parameters())


def test_the_result_holds_the_probe_and_nothing_else_changes(tmp_path):
    results = {}
    for kind in (None, "linear"):
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps(tiny_values(tmp_path, probe=kind)))
        assert main.main(["--config", str(path), "--output", str(tmp_path / str(kind))]) == 0
        results[kind] = numbers(tmp_path / str(kind))
    probed = results["linear"]
    assert probed["probe"]["kind"] == "linear" and len(probed["probe"]["acc"]) == 3
    assert probed["last_probe"] == probed["probe"]["curve"][-1] >= 50
    assert probed["acc"] == results[None]["acc"] and "probe" not in results[None]
    summary = json.loads((tmp_path / "linear" / "summary.json").read_text())
    assert summary["last_probe"]["mean"] == probed["last_probe"]


def test_a_rate_without_a_linear_probe_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='"probe_lrate" has no effect unless "probe" is "linear"'):
        config_from(tiny_values(tmp_path, probe="knn", probe_lrate=0.1), source="test")
