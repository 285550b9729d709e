"""DER++, Dark Experience Replay and ER against mammoth, step by step; the reservoir with logits."""

import numpy as np
import pytest
import torch
from torch import nn

from convs.backbones import Backbone, BackboneInfo
from convs.weights import RANDOM
from models.derpp import LogitReservoir, square_distance
from tests.conftest import reference, tiny_values
from tests.models.classic_runs import Layer, given_learner

ATOL = 2e-6


class GivenReservoir(LogitReservoir):
    """The reference's random numbers; what our rule asks for is compared with what its rule asked for."""

    def __init__(self, arrays):
        super().__init__(int(arrays["buffer_size"]), seed=0)
        self.arrays, self.asked, self.draws = arrays, 0, []

    def _draw(self, number):
        assert number + 1 == self.arrays["reservoir_high"][self.asked]
        self.asked += 1
        return int(self.arrays["reservoir_draws"][self.asked - 1])

    def _choice(self, count):
        chosen = self.draws.pop(0)
        assert len(chosen) == count
        return torch.from_numpy(chosen)


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["derpp", "dark", "er"])
def test_run_of_the_reference(variant, tmp_path):
    """Losses, weights and the buffer's logits 2e-6; slots and rows exact."""
    arrays = reference(f"classic/{variant}_run")
    arrays |= {f"{kind}_test": arrays[f"{kind}_train"] for kind in "xy"}
    start = {key[6:]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith("start/")}

    def make_backbone():
        model = Layer(arrays["start/backbone.a.weight"], norm=False)
        size = arrays["x_train"].shape[1]
        info = BackboneInfo("given", model.a.out_features, size, (0.0,) * 3, (1.0,) * 3, RANDOM)
        return Backbone(model, info)

    keys = {name: float(arrays[name]) for name in ("alpha", "beta") if name in arrays}
    keys = {"derpp": keys, "dark": {"alpha": keys.get("alpha")}, "er": {}}[variant]
    values = tiny_values(
        tmp_path, "derpp", increment=len(start["head.bias"]), shuffle=False, upstream=True, full_head=True,
        variant=variant, optimizer="sgd", normalize="none", image_size=arrays["x_train"].shape[1],
        memory_size=int(arrays["buffer_size"]), minibatch_size=int(arrays["minibatch_size"]), **keys,
    )  # fmt: skip
    learner, (task,) = given_learner(arrays, values, make_backbone, tmp_path)
    learner.memory = memory = GivenReservoir(arrays)
    learner.before_task(task)
    network = learner.network
    state = {name.replace("backbone.a", "backbone.model.a"): value for name, value in start.items()}
    network.load_state_dict(state, strict=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=float(arrays["lr"]))
    images = torch.from_numpy(arrays["x_train"]).permute(0, 3, 1, 2).float() / 255
    labels, slots = torch.from_numpy(arrays["y_train"]), []
    memory._slot, slot = lambda: slots.append(slot()) or slots[-1], memory._slot
    for step, rows in enumerate(arrays["batches"]):
        rows = torch.from_numpy(rows[rows >= 0])
        memory.draws = [arrays[key][step - 1] for key in ("draws/0", "draws/1") if step and key in arrays]
        both = torch.cat([images[rows], images[rows]], dim=1)
        loss = learner.loss(network, *learner.prepare(both, labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        learner.after_step(both, labels[rows])
        assert not memory.draws
        np.testing.assert_allclose(loss.item(), arrays["losses"][step], atol=ATOL)
        for name in start:
            ours = network.state_dict()[name.replace("backbone.a", "backbone.model.a")]
            np.testing.assert_allclose(ours, arrays[f"step/{name}"][step], atol=ATOL, err_msg=f"{name}, step {step}")
    assert slots == arrays["slots"].tolist() and memory.asked == len(arrays["reservoir_draws"])
    stored = (images[arrays["buffer/rows"]] * 255).round().to(torch.uint8)
    assert torch.equal(memory.images, stored)
    assert torch.equal(memory.labels, labels[arrays["buffer/rows"]])
    if variant != "er":  # which reads no logits
        np.testing.assert_allclose(memory.logits, arrays["buffer/logits"], atol=ATOL)


def test_old_entries_are_compared_in_the_columns_they_have():
    memory = LogitReservoir(4, seed=0)
    image = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    memory.insert_all(image, torch.tensor([0]), torch.tensor([[1.0, 2.0]]))
    memory.insert_all(image, torch.tensor([2]), torch.tensor([[1.0, 2.0, 3.0]]))
    assert memory.logits.shape == (2, 3) and memory.widths.tolist() == [2, 3]
    logits = torch.tensor([[2.0, 2.0, 7.0], [1.0, 0.0, 3.0]], requires_grad=True)
    distance = square_distance(logits, memory.logits, memory.widths)
    distance.backward()
    assert distance == (1 + 4) / 5 and logits.grad[0, 2] == 0
    full, ones, widths = torch.randn(2, 3), torch.ones(2, 3), torch.full((2,), 3)
    torch.testing.assert_close(square_distance(full, ones, widths), nn.functional.mse_loss(full, ones))
    again = LogitReservoir(4, seed=1)
    again.load_state_dict(memory.state_dict())
    assert torch.equal(again.logits, memory.logits) and again.widths.tolist() == [2, 3] and again.seen == 2


def test_every_item_stays_equally_often():
    """Three items offered to one place: a third of the runs each."""
    counts = np.zeros(3)
    for seed in range(900):
        memory = LogitReservoir(1, seed)
        memory.insert_all(torch.zeros(3, 3, 1, 1), torch.arange(3), torch.zeros(3, 2))
        counts[int(memory.labels[0])] += 1
    assert (abs(counts - 300) < 5 * np.sqrt(200)).all()
