"""The claim itself: branches of later tasks hardly move what a projection makes of the first task's inputs."""

import pytest
import torch

from benchmarks.inflora_interference import allowed, change, hit, key_value, learn
from tests.conftest import build_tiny, write_stream

LAMB = 0.99
WIDE = {"name": "vit", "img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2}


def after_three_tasks(tmp_path, **keys):
    """(learner, moments of the first task's inputs, key and value weights after the first task and after the last)."""
    data = write_stream(tmp_path / "claim.npz", train=12)
    manager, learner = build_tiny(tmp_path, "inflora", dataset=data, backbone=WIDE, rank=4, epochs=6, **keys)
    learn(learner, manager[0])
    moments, before = learner.input_moments(manager[0]).double(), key_value(learner)
    for task in manager[1:]:
        learn(learner, task)
    return learner, moments, before, key_value(learner)


def first_left_out(moments: torch.Tensor, share: float) -> torch.Tensor:
    """(L,): share of the direction with which the first task's memory would have reached `share` (it stops before)."""
    values = torch.linalg.eigvalsh(moments).flip(1)
    shares = values / values.sum(dim=1, keepdim=True)
    kept = (shares.cumsum(dim=1) < share).sum(dim=1, keepdim=True)
    return shares.gather(1, kept)[:, 0]


@pytest.mark.parametrize("memory", ["dualgpm", "gpm"])
def test_outputs_on_old_inputs_move_less_than_the_threshold_allows(tmp_path, memory):
    _, moments, before, after = after_three_tasks(tmp_path, memory=memory, energy="paper", lamb=LAMB, lame=LAMB)
    assert bool(((after - before).norm(dim=(1, 2)) > 1e-3).all())  # something was trained
    limit = 1 - LAMB + first_left_out(moments, LAMB)
    assert bool((hit(before, after, moments) <= limit).all())


def test_plain_lora_moves_them_clearly_more(tmp_path):
    results = {}
    for memory, keys in (("dualgpm", {"energy": "paper", "lamb": LAMB, "lame": LAMB}), ("none", {})):
        _, moments, before, after = after_three_tasks(tmp_path, memory=memory, **keys)
        results[memory] = hit(before, after, moments), change(before, after, moments)
        limit = 1 - LAMB + first_left_out(moments, LAMB)
    assert bool((results["none"][0] > 2 * limit).all())
    assert bool((results["none"][1] > 5 * results["dualgpm"][1]).all())


def test_without_the_memory_the_same_branches_would_interfere(tmp_path, monkeypatch):
    """The test sees a broken projection: with an empty memory the later branches lie in the old inputs."""
    from models.parts.subspace import GPM

    monkeypatch.setattr(GPM, "update", lambda *_: None)
    learner, moments, before, after = after_three_tasks(tmp_path, energy="paper", lamb=LAMB, lame=LAMB)
    assert bool((allowed(learner, moments) > 0.999).all())
    assert bool((hit(before, after, moments) > 1 - LAMB + first_left_out(moments, LAMB)).all())
