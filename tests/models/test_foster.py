"""FOSTER: the reference's runs, its weights by hand, its two networks and their student."""

import numpy as np
import pytest
import torch

from models.foster import balanced, effective_weights
from models.parts.loop import begin, learn
from tests.conftest import build_tiny
from tests.models.classic_runs import WholeRun, budget
from utils.errors import ConfigError


class FosterRun(WholeRun):
    """Also the class weights; the loaded rows are zeroed as the learner zeroes its own."""

    def loaded(self):
        task, config = self.learner.task, self.learner.config
        if self.learner.stage.name == "boost" and config.oofc == "az":
            self.learner.network.head.weight.data[task.known_classes :, : self.learner.network.branch_dim] = 0
        if f"{self.prefix}class_weights" in self.arrays:
            beta = config.beta1 if self.learner.stage.name == "boost" else config.beta2
            weights = self.learner._class_weights(beta)
            np.testing.assert_allclose(weights, self.arrays[f"{self.prefix}class_weights"], atol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["foster", "foster_align", "foster_bn"])
def test_run_of_the_reference(name, tmp_path, monkeypatch):
    def keys(s):
        return budget(s) | {
            "init_lr": s["init_lr"], "init_weight_decay": s["init_weight_decay"], "init_epoch": s["init_epochs"],
            "lrate": s["lr"], "weight_decay": s["weight_decay"], "epochs": s["boosting_epochs"],
            "compression_epochs": s["compression_epochs"], "temperature": float(s["T"]), "scheduler": "cosine",
            "beta1": s["beta1"], "beta2": s["beta2"], "lambda_okd": s["lambda_okd"], "oofc": s["oofc"],
            "align_teacher": s["is_teacher_wa"], "align_student": s["is_student_wa"],
            "wa_value": float(s["wa_value"]) if s["is_teacher_wa"] or s["is_student_wa"] else None,
        }  # fmt: skip

    run = FosterRun(f"classic/{name}_run", "foster", tmp_path, keys)
    if "dataset" in run.settings:
        run.learner.config = run.learner.config.model_copy(update={"dataset": run.settings["dataset"]})
    run.run(monkeypatch)


def test_class_weights_by_hand():
    weights = effective_weights(np.array([1, 2]), 0.5)  # 1 and 0.5 / 0.75
    torch.testing.assert_close(weights, torch.tensor([1.2, 0.8], dtype=torch.float64))
    assert effective_weights(np.array([3, 900]), 0.0).tolist() == [1.0, 1.0]


def test_counts_are_those_of_the_images_trained_on(tmp_path):
    """Upstream: the budget's share, and sums of positions in the training split."""
    manager, learner = build_tiny(tmp_path, "foster", exemplars={"total": 8})
    learn(learner, manager[0])
    begin(learner, manager[1])
    assert learner._counts().tolist() == [4, 4, 7, 7]
    rows, labels = manager[1].train.rows, manager[1].train.labels
    assert learner._upstream_counts().tolist() == [4, 4, rows[labels == 2].sum(), rows[labels == 3].sum()]


def test_balanced_targets_have_sum_one():
    wanted = balanced(torch.tensor([[0.0, 0.0]]), torch.tensor([1.5, 0.5]), temperature=2.0)
    torch.testing.assert_close(wanted, torch.tensor([[0.75, 0.25]]))


def test_the_student_goes_on_and_both_are_scored(tmp_path):
    manager, learner = build_tiny(tmp_path, "foster")
    images = torch.rand(2, 3, 16, 16)
    learn(learner, manager[0])
    scores = learner.eval().predict(images, {})
    assert list(scores) == ["teacher", "student", "nme"] and torch.equal(scores["teacher"], scores["student"])
    learn(learner, manager[1])
    scores = learner.eval().predict(images, {})
    assert not torch.allclose(scores["teacher"], scores["student"])
    begin(learner, manager[2])
    learner.eval()
    torch.testing.assert_close(learner.network.old_head(learner.network.features(images)[:, :16]), scores["student"])
    learner.config = learner.config.model_copy(update={"predict": "student"})
    assert next(iter(learner.predict(images, {}))) == "student"


def test_a_factor_of_no_alignment_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='"wa_value" has no effect unless "align_teacher" or "align_student" is true'):
        build_tiny(tmp_path, "foster", wa_value=0.9)
