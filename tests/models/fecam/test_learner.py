"""FeCAM: the whole run of LAMDA-PILOT, the authors' rule through the learner, its answers."""

import pytest
import torch
import torch.nn.functional as F

from models.fecam.metric import by_variance, moments, shrunk
from models.parts.loop import learn
from tests.conftest import build_tiny
from tests.models.first_sessions import check_session, session_keys, start_session
from tests.models.stored_runs import StoredRun, near
from utils.errors import ConfigError

NO_TRAINING = {
    "petl": "none", "epochs": None, "batch_size": None, "optimizer": None, "lrate": None, "bottleneck": None,
}  # fmt: skip


@pytest.mark.parity
def test_whole_run_of_pilot(tmp_path, monkeypatch):
    keys = session_keys("fecam/run") | {"upstream": "pilot", "adapter_dropout": 0.0}
    run = StoredRun("fecam/run", "fecam", tmp_path, monkeypatch, **keys)
    arrays, learner = run.arrays, run.learner
    for task in run.tasks:
        losses = run.learn(task, lambda index: start_session(run) if index == 0 else None)
        if task.index == 0:
            check_session(run, losses, 1e-9)
        near(learner.features(task.train.images), arrays[f"features/{task.index}"], 1e-9)
        near(learner.features(run.test_images(task)), arrays[f"test_features/{task.index}"], 1e-9)
        near(-run.predict(task), arrays[f"distances/{task.index}"], 1e-9)


@pytest.mark.parametrize(("normalise", "tukey"), [(True, None), (False, None), (True, 0.5)])
def test_the_authors_rule(normalise, tukey, tmp_path):
    keys = NO_TRAINING | {"normalise": normalise, "tukey": tukey, "shrink": [2.0, 1.0]}
    manager, learner = build_tiny(tmp_path, "fecam", **keys)
    learner.double()
    learn(learner, manager[0])
    view = manager[0].train.view("test")
    images = torch.stack([view[i][0] for i in range(len(view))]).double() / 255

    def transformed(images):
        f = learner.network.features(images)
        f = f if tukey is None else f.abs().sqrt() * f.sign()
        return F.normalize(f, dim=1) if normalise else f

    _, means, covs = moments(transformed(images), torch.from_numpy(manager[0].train.labels))
    u = transformed(images[:5])
    inverses = torch.stack([torch.linalg.inv(by_variance(shrunk(cov, 2.0, 1.0))) for cov in covs])
    offsets = u[:, None] - means
    expected = -torch.einsum("bcd,cde,bce->bc", offsets, inverses, offsets)
    near(learner.predict(images[:5], {}), expected.detach(), 1e-6)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"shrink": [1, 2]}, '"shrink" must not have its second number above its first, got [1.0, 2.0]'),
        (
            {"correlation": "rows", "shrink": None, "tukey": 0.5},
            '"tukey" has no effect unless "correlation" is "variance"',
        ),
        ({"epochs": 3}, '"epochs" has no effect with "petl": "none"'),
    ],
)
def test_wrong_keys_are_answered(keys, sentence, tmp_path):
    with pytest.raises(ConfigError) as caught:
        build_tiny(tmp_path, "fecam", **(NO_TRAINING | keys))
    assert sentence in str(caught.value)
