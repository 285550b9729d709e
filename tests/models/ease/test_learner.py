"""EASE: whole runs of the reference, its subspaces as they are stored, its answers."""

import pytest
import torch

from models.parts.loop import learn
from tests.conftest import build_tiny, reference
from tests.convs.vits import adapter_parameters, bottleneck_of, close, fill, group
from tests.models.properties import check_dropout, check_standing_still
from tests.models.stored_runs import StoredRun
from utils.errors import ConfigError

TOLERANCE = 1e-9
RUNS = {"run": {}, "run_pretrained": {"use_init_ptm": True, "recalc_sim": False}}


def run_of(name: str, tmp_path, monkeypatch) -> StoredRun:
    """The reference's `later_` values hold from the second task on where the first has another size."""
    stored = reference(f"ease/{name}")
    keys = RUNS[name] | {
        "adapter_dropout": 0.0, "upstream": True, "alpha": stored["alpha"].item(),
        "bottleneck": bottleneck_of(stored),
    }  # fmt: skip
    if keys.get("use_init_ptm"):
        keys["beta"] = stored["beta"].item()
    if stored["first"] != stored["step"]:
        keys |= {
            "init_lr": stored["lr"].item(), "lrate": stored["later_lr"].item(),
            "init_epoch": int(stored["epochs"]), "epochs": int(stored["later_epochs"]),
        }  # fmt: skip
    return StoredRun(f"ease/{name}", "ease", tmp_path, monkeypatch, **keys)


@pytest.mark.parity
@pytest.mark.parametrize("name", list(RUNS))
def test_whole_run_of_the_reference(name, tmp_path, monkeypatch):
    run = run_of(name, tmp_path, monkeypatch)
    arrays, network = run.arrays, run.learner.network

    def start(index: int) -> None:
        stored = group(arrays, f"start/{index}/")
        network.head.set_stacked(stored.pop("proxy.weight"))
        fill(adapter_parameters(run.model), stored)

    losses: list[float] = []
    for task in run.tasks:
        losses += run.learn(task, start)
        stored = group(arrays, f"tuned/{task.index}/")
        close(network.head.weight, stored.pop("proxy.weight"), TOLERANCE)
        close(network.head.scale, stored.pop("proxy.sigma"), TOLERANCE)
        for parameter, value in adapter_parameters(run.model).items():
            close(value, stored[parameter], TOLERANCE, parameter)
        close(run.learner.prototypes.matrix, arrays[f"matrix/{task.index}"], TOLERANCE)
        close(run.predict(task), arrays[f"logits/{task.index}"], TOLERANCE)
    close(torch.tensor(losses, dtype=torch.float64), arrays["losses"], TOLERANCE)


def test_dropout_and_finished_subspaces(tmp_path):
    check_dropout(tmp_path, "ease")
    check_standing_still(tmp_path, "ease", use_init_ptm=True)


@pytest.mark.parametrize("plain", [False, True])
def test_stored_subspaces_in_any_parts(plain, tmp_path):
    """All at once, one by one, or with holes: the same features, and the same scores."""
    manager, learner = build_tiny(tmp_path, "ease", use_init_ptm=plain, epochs=1, bottleneck=4, optimizer=None)
    for task in manager:
        learn(learner, task)
    learner.eval()
    images, names = torch.rand(5, 3, 16, 16), learner.frozen_names
    assert names == (("plain",) if plain else ()) + ("0", "1", "2")
    whole = learner.frozen(images, names)
    for some in ([name] for name in names):
        torch.testing.assert_close(learner.frozen(images, some)[some[0]], whole[some[0]], atol=1e-5, rtol=0)
    for name, value in learner.frozen(images, [names[-1], names[0]]).items():
        torch.testing.assert_close(value, whole[name], atol=1e-5, rtol=0)
    assert torch.equal(learner.predict(None, whole), learner.predict(images, whole))


def test_diagonal_fills_the_own_subspace_alone(tmp_path):
    manager, learner = build_tiny(tmp_path, "ease", use_diagonal=True, epochs=1, bottleneck=4, optimizer=None)
    for task in manager:
        learn(learner, task)
    filled = learner.prototypes.matrix.any(dim=2)
    assert torch.equal(filled, torch.eye(3, dtype=torch.bool).repeat_interleave(2, dim=0))


def test_each_task_begins_with_fresh_adapters_and_a_head_of_its_own(tmp_path):
    manager, learner = build_tiny(
        tmp_path, "ease", task_sizes=[3, 2, 1], increment=None, epochs=2, bottleneck=4, optimizer=None
    )
    for task in manager:
        learn(learner, task)
        assert learner.network.head.num_classes == len(task.classes)
    learner.before_task(manager[2])
    assert not any(adapter.up_w.any() for adapter in learner.adapters)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"beta": 1.0}, '"beta" has no effect unless "use_init_ptm" is true'),
        ({"use_reweight": False, "alpha": 0.5}, '"alpha" has no effect unless "use_reweight" is true'),
        ({"use_diagonal": True, "recalc_sim": False}, '"recalc_sim" has no effect unless "use_diagonal" is false'),
    ],
)
def test_wrong_keys_are_answered(keys, sentence, tmp_path):
    with pytest.raises(ConfigError) as caught:
        build_tiny(tmp_path, "ease", **keys)
    assert sentence in str(caught.value)
