"""COIL: the reference's run, what transport may read."""

import numpy as np
import pytest
import torch

from models.coil import learner as coil_module
from models.coil.learner import loss_terms
from models.parts.loop import begin, learn
from tests.conftest import build_tiny
from tests.models.classic_runs import WholeRun, budget, schedule


class CoilRun(WholeRun):
    """Also both transports and the three terms of the loss."""

    def make_optimizer(self, hook):
        task = self.learner.task.index
        if task > 0:
            given = {name: self.arrays[f"t{task - 1}/{name}"] for name in ("V", "prototypes")}
            np.testing.assert_allclose(self.learner.rows.new, given["V"], atol=3e-6)
        self.taken, self.found = [], None
        return super().make_optimizer(hook)

    def terms(self, *args):
        self.found = loss_terms(*args)
        return self.found

    def compare_step(self):
        super().compare_step()
        if self.found is not None:
            found = [term.item() for term in self.found]
            np.testing.assert_allclose(found, self.arrays[self.prefix + "terms"][self.step], atol=self.atol)
        if self.step in self.keys(self.prefix).get("U_steps", ()):
            self.taken.append(self.learner.rows.old)

    def after_stage(self, hook, task):
        super().after_stage(hook, task)
        if task.index > 0:  # the reference's U has the calibration as a factor, which no cosine sees
            rows, given = torch.stack(self.taken), self.arrays[self.prefix + "U"]
            gamma = float(self.arrays[f"t{task.index - 1}/calibration"])
            np.testing.assert_allclose(gamma * rows, given, atol=3e-6)


@pytest.mark.parity
def test_run_of_the_reference(tmp_path, monkeypatch):
    def keys(s):
        own = {name: s[name] for name in ("sinkhorn", "norm_term", "reg_term")}
        decay = {"weight_decay": 5e-4}  # constant in the reference
        return schedule(s, first=False) | budget(s) | own | decay | {"temperature": float(s["T"])}

    run = CoilRun("gem_coil/coil_run", "coil", tmp_path, keys)
    monkeypatch.setattr(coil_module, "loss_terms", run.terms)
    run.run(monkeypatch)


@pytest.mark.parametrize("upstream", [False, True])
def test_old_classes_are_known_by_their_exemplars(upstream, tmp_path, monkeypatch):
    """Upstream: by all their images."""
    read = []
    manager, learner = build_tiny(tmp_path, "coil", exemplars={"per_class": 2}, upstream=upstream)
    learn(learner, manager[0])
    kept, original = set(learner.exemplars.rows.tolist()), coil_module.extract_features

    def watched(features, view, *rest):
        read.append(set(view._rows))
        return original(features, view, *rest)

    monkeypatch.setattr(coil_module, "extract_features", watched)
    begin(learner, manager[1])
    assert read == [set(manager[0].train.rows) if upstream else kept, set(manager[1].train.rows)]
    torch.testing.assert_close(learner.network.head.weight[2:], learner.rows.new)
    lengths = learner.network.head.weight.norm(dim=1)
    torch.testing.assert_close(lengths[2:].mean(), lengths[:2].mean())
