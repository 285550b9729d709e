"""APER: whole runs of the reference, and that predictions stand still."""

import pytest
import torch

from models.factory import config_from
from models.parts.loop import learn
from tests.conftest import build_tiny, tiny_values
from tests.models.first_sessions import check_session, session_keys, start_session, tuned_parameters
from tests.models.stored_runs import StoredRun, near
from utils.errors import ConfigError

RUNS = {
    "run_adapter": {"petl": "adapter", "adapter_dropout": 0.0},
    "run_ssf": {"petl": "ssf"},
    "run_vpt_deep": {"petl": "vpt_deep"},
    "run_vpt_shallow": {"petl": "vpt_shallow"},
    "run_finetune": {"petl": "finetune"},
    "run_adam": {"petl": "ssf", "optimizer": "adamw"},
}
TOLERANCE = {"run_finetune": 1e-6, "run_adam": 1e-8}


@pytest.mark.parity
@pytest.mark.parametrize("name", list(RUNS))
def test_whole_run_of_the_reference(name, tmp_path, monkeypatch):
    run = StoredRun(f"aper/{name}", "aper", tmp_path, monkeypatch, **RUNS[name], **session_keys(f"aper/{name}"))
    arrays, learner, tolerance = run.arrays, run.learner, TOLERANCE.get(name, 1e-9)
    for task in run.tasks:
        losses = run.learn(task, lambda index: start_session(run) if index == 0 else None)
        if task.index == 0:
            assert set(tuned_parameters(learner.network)) == set(arrays["trained"].tolist())
            check_session(run, losses, tolerance)
        assert task.index == 0 or not losses
        near(learner.class_means.exact_means, arrays[f"prototypes/{task.index}"], tolerance)
        near(run.predict(task), arrays[f"logits/{task.index}"], tolerance)


@pytest.mark.parametrize("petl", ["adapter", "ssf", "vpt_deep", "vpt_shallow", "finetune"])
def test_predictions_and_means_stand_still_after_the_session(petl, tmp_path):
    """Bit for bit: twice the same scores, and means that measuring again does not change."""
    bottleneck = 4 if petl == "adapter" else None
    manager, learner = build_tiny(tmp_path, "aper", petl=petl, bottleneck=bottleneck, epochs=2, optimizer=None)
    for task in manager:
        learn(learner, task)
    images = torch.rand(5, 3, 16, 16)
    learner.eval()
    first = learner.predict(images, {})
    assert torch.equal(learner.predict(images, {}), first)
    assert torch.equal(learner.predict(None, learner.frozen(images, learner.frozen_names)), first)
    means = learner.class_means.exact_means.clone()
    learner.class_means.sums.zero_(), learner.class_means.counts.zero_()
    for task in manager:
        learner.class_means.update(learner.features, task.train.view("test"), learner.runtime, 256)
    assert torch.equal(learner.class_means.exact_means, means)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"init_epoch": 3}, 'aper trains in the first task alone; call it "epochs"'),
        ({"petl": "ssf", "bottleneck": 4}, '"bottleneck" has no effect unless "petl" is "adapter"'),
        ({"petl": "none"}, '"petl" must be "adapter" | "ssf"'),
        ({"petl": "adapter", "backbone": "resnet18", "image_size": 32}, "no plain transformer blocks; choose a ViT"),
    ],
)
def test_wrong_keys_are_answered(keys, sentence, tmp_path):
    with pytest.raises(ConfigError) as caught:
        build_tiny(tmp_path, "aper", **keys)
    assert sentence in str(caught.value)


def test_upstream_starts_prompts_at_zero(tmp_path):
    values = tiny_values(tmp_path, "aper", petl="vpt_deep", bottleneck=None, upstream=True)
    assert config_from(values, "test").prompt_init == "zeros"
    assert config_from(values | {"prompt_init": "uniform"}, "test").prompt_init == "uniform"
    assert config_from(values | {"upstream": False}, "test").prompt_init == "uniform"
