"""BiC: the reference's runs, the images kept apart, what the correction moves."""

import numpy as np
import pytest
import torch

from models import bic as bic_module
from models.bic import BiasLayers
from models.parts.loop import begin, learn
from tests.conftest import build_tiny
from tests.models.classic_runs import WholeRun, budget, schedule


@pytest.mark.parity
@pytest.mark.parametrize("name", ["bic", "bic_fixed", "bic_bn"])
def test_run_of_the_reference(name, tmp_path, monkeypatch):
    """Which images are kept apart is drawn: their number of each class is ours, the images are the reference's."""
    keys = lambda s: schedule(s, first=False) | budget(s) | {  # noqa: E731
        "temperature": float(s["T"]), "split_ratio": s["split_ratio"], "split_memory": s["memory_size"],
    }  # fmt: skip
    run = WholeRun(f"classic/{name}_run", "bic", tmp_path, keys)

    def given(labels, count, seed):
        task = run.learner.data
        apart = run.arrays[f"t{task.index}/val_rows"]
        positions = np.flatnonzero(np.isin(run.learner.exemplars.join(task).rows, apart))
        assert np.bincount(labels[positions]).tolist() == [count] * task.total_classes
        return positions

    monkeypatch.setattr(bic_module, "draw", given)
    run.run(monkeypatch)


@pytest.mark.parametrize(("total", "ratio", "apart"), [(24, 0.3, 3), (24, 0.9, 6), (6, 0.1, 1)])
def test_as_many_of_every_class_are_kept_apart(total, ratio, apart, tmp_path):
    """floor(ratio total / K), but at least one, and fewer than the smallest class has where it can be."""
    manager, learner = build_tiny(tmp_path, "bic", exemplars={"total": total}, split_ratio=ratio)
    learn(learner, manager[0])
    begin(learner, manager[1])
    views = []
    for stage in learner.stages(manager[1]):
        learner.stage = stage
        views.append(learner.train_data(manager[1]))
    assert np.bincount(views[1].labels).tolist() == [apart] * 4
    both = np.concatenate([view._rows for view in views])
    assert sorted(both) == sorted(learner.exemplars.join(manager[1]).rows) and len(set(both)) == len(both)


def test_only_the_last_layer_corrects(tmp_path):
    manager, learner = build_tiny(tmp_path, "bic")
    for task in manager:
        learn(learner, task)
        layers = [(layer.alpha.item(), layer.beta.item()) for layer in learner._correction.layers]
        assert layers[0] == (1.0, 0.0) and len(layers) == task.index + 1
    assert layers[1] != (1.0, 0.0) and layers[2] != (1.0, 0.0)


def test_layers_by_hand_and_their_state():
    layers = BiasLayers()
    layers.grow(2)
    layers.grow(3)
    with torch.no_grad():
        layers.layers[1].alpha.fill_(2.0)
        layers.layers[1].beta.fill_(-1.0)
    assert layers(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[1.0, 2.0, 5.0]]
    again = BiasLayers()
    again.load_state_dict(layers.state_dict())
    assert again(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[1.0, 2.0, 5.0]]
