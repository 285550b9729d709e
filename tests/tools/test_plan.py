"""What --check says of memory: of everything that training holds."""

import pytest

from models.parts.loop import begin
from tests.conftest import build_tiny
from tools.plan import _memory_bytes
from utils.runtime import Runtime


def planned_bytes(folder, **keys):
    """(what the plan counts, bytes of the trainable weights)."""
    manager, learner = build_tiny(folder, **keys)
    begin(learner, manager[0])
    trainable = [p for p in learner.parameters() if p.requires_grad]
    return _memory_bytes(learner, learner.stage, trainable), 4 * sum(p.numel() for p in trainable)


@pytest.mark.parametrize(
    ("keys", "copies"),
    [({"optimizer": "adam"}, 1), ({"optimizer": "sgd", "sam": {"rho": 0.05, "damping": 25}}, 2)],
    ids=["Adam's second moment", "SAM's weights and gradient"],
)
def test_optimisers_that_keep_more_are_counted(keys, copies, tmp_path):
    plain, trainable = planned_bytes(tmp_path, optimizer="sgd")
    more, _ = planned_bytes(tmp_path, **keys)
    assert more - plain == pytest.approx(copies * trainable)


def test_a_batch_in_parts_needs_the_activations_of_one(tmp_path):
    def activations(**keys):
        counted, trainable = planned_bytes(tmp_path, batch_size=8, optimizer="sgd", **keys)
        return counted - 3 * trainable  # all weights train: themselves, gradients, momenta

    assert activations(accumulate=4) == pytest.approx(activations() / 4)


def test_the_low_precision_copies_of_frozen_weights_are_counted_once(tmp_path):
    manager, learner = build_tiny(tmp_path, model_name="inflora", rank=2)
    learner.runtime = Runtime("cpu", "bf16", num_workers=0)
    begin(learner, manager[0])
    trainable = [p for p in learner.parameters() if p.requires_grad]
    slots = 4 * (2 if learner.config.optimizer == "sgd" else 3)
    activations = {}
    for batch_size in (4, 8):
        learner.config = learner.config.model_copy(update={"batch_size": batch_size})
        counted = _memory_bytes(learner, learner.stage, trainable)
        copies = [c for m in learner.modules() for c in getattr(m, "low_precision", {}).values()]
        held = sum(c.numel() * c.element_size() for c in copies)
        weights = 4 * sum(p.numel() for p in learner.parameters())
        assert held > 0
        activations[batch_size] = counted - held - weights - slots * sum(p.numel() for p in trainable)
    assert activations[8] == pytest.approx(2 * activations[4])
