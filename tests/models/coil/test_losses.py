"""COIL's losses against the reference's, step by step, with the optimiser between: 1e-6."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from convs.heads import CosineHead
from models.coil.learner import COIL
from tests.conftest import reference

pytestmark = pytest.mark.parity


def test_losses_gradients_and_steps():
    arrays = reference("gem_coil/coil_losses")
    known, total, epochs = int(arrays["known"]), int(arrays["total"]), int(arrays["epochs"])
    teacher = {key[8:]: torch.from_numpy(value) for key, value in arrays.items() if key.startswith("teacher/")}
    names = {"backbone.a.weight": "a", "backbone.a.bias": "b", "head.weight": "w", "head.sigma": "sigma"}
    p = {ours: torch.from_numpy(arrays[f"params/{name}"][0]).requires_grad_() for name, ours in names.items()}
    head = CosineHead(p["w"].shape[1], learn_scale=True)
    head.scale.data.copy_(teacher["head.sigma"][0])
    head.grow(total)
    np.testing.assert_allclose(head.scale.detach(), arrays["sigma_after_growth"])

    def answer(x, weights):
        features = torch.tanh(F.linear(x, weights["a"], weights["b"]))
        return weights["sigma"] * F.linear(F.normalize(features, dim=1), F.normalize(weights["w"], dim=1)), features

    class Stub(SimpleNamespace):
        loss = COIL.loss

    learner = Stub(
        config=SimpleNamespace(temperature=float(arrays["T"]), reg_term=float(arrays["reg_term"])),
        stage=SimpleNamespace(epochs=epochs), progress=SimpleNamespace(epoch=0),
        rows=SimpleNamespace(new=torch.from_numpy(arrays["V"]), old=torch.from_numpy(arrays["U"])),
    )  # fmt: skip
    rates = {name: float(arrays[name]) for name in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(p.values(), **rates)
    for step, (x, y) in enumerate(zip(arrays["x"], arrays["y"], strict=True)):
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        for name, ours in names.items():
            np.testing.assert_allclose(p[ours].detach(), arrays[f"params/{name}"][step], atol=1e-6)
        old = {ours: teacher[name] for name, ours in names.items()}
        learner.progress.epoch = int(arrays["epoch"][step])
        logits, features = answer(x, p)
        loss = learner.loss(lambda x, with_features: answer(x, p), (x, answer(x, old)[0]), y)
        optimizer.zero_grad()
        loss.backward()
        found = {"logits": logits, "features": features, "loss": loss}
        found |= {f"grad/{name}": p[ours].grad for name, ours in names.items()}
        for name, value in found.items():
            np.testing.assert_allclose(value.detach(), arrays[name][step], atol=1e-6, err_msg=f"{name}, step {step}")
        optimizer.step()
    for name, ours in names.items():
        np.testing.assert_allclose(p[ours].detach(), arrays[f"after/{name}"], atol=1e-6)
    assert logits.shape[1] == total and old["w"].shape[0] == known
