"""SAM and SAM+: the reference's steps, by hand, around every optimiser, in every learner."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD, Adam, AdamW

import models.parts.optim as optim
from data.loading import num_batches
from models.base import LEARNERS
from models.factory import config_from
from models.parts.loop import begin, fit
from models.parts.optim import SAM, build_optimizer, build_scheduler, damping_factors, group, hold_rows
from models.parts.stages import Stage
from tests.conftest import build_tiny, reference, tiny_values
from utils.errors import ConfigError


class StoredNetwork:
    """y = last(tanh(frozen(tanh(first(x))))); `idle` is a head that gets a zero gradient."""

    def __init__(self, arrays):
        self.names = [str(name) for name in arrays["names"]]
        self.weights = {n: torch.nn.Parameter(torch.from_numpy(arrays[f"init.{n}"]).clone()) for n in self.names}

    def loss(self, x, y):
        w = self.weights
        hidden = torch.tanh(F.linear(x, w["first.weight"], w["first.bias"]))
        hidden = torch.tanh(F.linear(hidden, w["frozen.weight"], w["frozen.bias"]))
        return F.cross_entropy(F.linear(hidden, w["last.weight"]), y) + 0 * w["idle.weight"].sum()


@pytest.mark.parity
@pytest.mark.parametrize("prefix", ["", "rep_", "zero_"])
def test_steps_of_the_reference(prefix, monkeypatch):
    """rep_: one batch again and again; zero_: frozen tensors carry zero gradients. Tolerance 1e-11."""
    arrays = reference("raa/sam_steps")
    net = StoredNetwork(arrays)
    moving = [n for n in net.names if not n.startswith("frozen") or prefix == "zero_"]
    for name in net.names:
        net.weights[name].requires_grad_(not name.startswith("frozen"))
    base = SGD(
        [net.weights[name] for name in moving], lr=float(arrays["lr"]), momentum=float(arrays["momentum"]),
        weight_decay=float(arrays["weight_decay"]),
    )  # fmt: skip
    optimizer = SAM(base, float(arrays["rho"]), float(arrays["T"]))
    factors, passes = [], []

    def spy(*given):
        factors.append(damping_factors(*given))
        return factors[-1]

    monkeypatch.setattr(optim, "damping_factors", spy)

    def close(found, stored, key):
        np.testing.assert_allclose(found.detach().numpy(), stored, atol=1e-11, rtol=0, err_msg=key)

    for step in range(int(arrays["steps"])):
        batch = 0 if prefix == "rep_" else step
        x, y = torch.from_numpy(arrays["X"][batch]), torch.from_numpy(arrays["Y"][batch])

        def closure(x=x, y=y, step=step):
            optimizer.zero_grad()
            loss = net.loss(x, y)
            loss.backward()
            for name in net.names:
                if prefix == "zero_" and name.startswith("frozen"):
                    net.weights[name].grad = torch.zeros_like(net.weights[name])
            passes.append(loss.item())
            number = 2 - len(passes) % 2
            for name in moving:
                if not prefix and (key := f"step{step}.grad{number}.{name}") in arrays:
                    close(net.weights[name].grad, arrays[key], key)
            return loss.detach()

        before = {name: net.weights[name].detach().clone() for name in moving}
        assert optimizer.step(closure) == passes[-1]
        if not prefix and f"step{step}.param.{net.names[0]}" in arrays:
            for name in net.names:
                close(net.weights[name], arrays[f"step{step}.param.{name}"], name)
        assert any(not torch.equal(before[name], net.weights[name]) for name in moving)
    np.testing.assert_allclose(passes, arrays[f"{prefix}losses"].reshape(-1), atol=1e-11, rtol=0)
    np.testing.assert_allclose(torch.stack(factors).numpy(), arrays[f"{prefix}scales"], atol=1e-11, rtol=0)
    for name in net.names:
        close(net.weights[name], arrays[f"{prefix}final.{name}"], name)
        if f"{prefix}momentum.{name}" in arrays:
            close(base.state[net.weights[name]]["momentum_buffer"], arrays[f"{prefix}momentum.{name}"], name)


@pytest.mark.parity
def test_learning_rates_of_the_reference(tmp_path):
    arrays = reference("raa/schedule")
    assert arrays
    for key, rates in arrays.items():
        epochs, floor = key.removeprefix("T").split("_floor")
        stage = Stage("train", int(epochs), 0.01, 0.0, scheduler="cosine", min_lr=float(floor))
        optimizer = build_optimizer(stage, [group([torch.nn.Parameter(torch.zeros(1))], 0.01, 0.0)], fused=False)
        scheduler = build_scheduler(stage, optimizer)
        found = []
        for _ in range(int(epochs)):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        np.testing.assert_allclose(found, rates, atol=1e-15, rtol=0, err_msg=key)


def quadratic(weight: torch.nn.Parameter, optimizer):
    """L = ||w||^2 / 2, so that the gradient is w."""

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum() / 2
        loss.backward()
        return loss.detach()

    return closure


def test_plain_sam_by_hand():
    """w = (3, 4), rho 1: the gradient at w + (0.6, 0.8) is (3.6, 4.8); half of it is taken away."""
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM(SGD([weight], lr=0.5), rho=1.0, damping=0.0)
    loss = optimizer.step(quadratic(weight, optimizer))
    assert loss.item() == pytest.approx(18.0) and torch.allclose(weight, torch.tensor([1.2, 1.6]))


def test_a_step_along_the_ascent_is_skipped():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM(SGD([weight], lr=0.5, momentum=0.9), rho=1.0, damping=25.0)
    optimizer.step(quadratic(weight, optimizer))
    assert torch.allclose(weight, torch.tensor([3.0, 4.0]), atol=1e-5)


def test_factors_by_hand():
    """cos 1, 0.98, 0.5, and of a zero vector; 25 (1 - exp(-0.02)) = 0.495."""
    ascent = torch.tensor([1.0, 0.0])
    down = [torch.tensor(v) for v in ([2.0, 0.0], [0.98, 0.19899749], [0.5, 0.8660254], [0.0, 0.0], [1.0, 1.0])]
    found = damping_factors(down, [ascent] * 4 + [torch.zeros(2)], 25.0)
    assert torch.allclose(found, torch.tensor([0.0, 0.49503, 1.0, 1.0, 1.0]), atol=1e-4)
    weak = damping_factors(down[3:], [ascent, torch.zeros(2)], 1.0)
    assert torch.allclose(weak, torch.full((2,), 1 - np.exp(-1.0), dtype=torch.float32))


def test_stacked_parameters_are_damped_branch_by_branch():
    """One parameter of two rows moves as two parameters do; as one tensor it would not."""

    def train(parameters, optimizer):
        target = torch.tensor([[1.0, 0.2], [0.3, 2.0]])
        for _ in range(3):

            def closure():
                optimizer.zero_grad()
                w = parameters[0] if len(parameters) == 1 else torch.stack(list(parameters))
                loss = ((w - target) * torch.tensor([[1.0, 1.0], [5.0, 0.1]])).square().sum()
                loss.backward()
                return loss.detach()

            optimizer.step(closure)
        return torch.stack(list(parameters)).detach().view(2, 2)

    def start():
        return torch.nn.Parameter(torch.zeros(2, 2))

    keys = {"lr": 0.01, "momentum": 0.9}
    rows = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    apart = train(rows, SAM(SGD(rows, **keys), 0.1, 25.0))
    found = {}
    for stacked in (True, False):
        weight = start()
        found[stacked] = train([weight], SAM(SGD([{"params": [weight], "stacked": stacked}], **keys), 0.1, 25.0))
    assert torch.allclose(found[True], apart, atol=1e-7)
    assert not torch.allclose(found[False], apart, atol=1e-4)


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
def test_without_radius_and_damping_it_is_the_optimiser_itself(make):
    first = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    second = copy.deepcopy(first)
    plain, sam = make([first], lr=0.1, weight_decay=0.01), SAM(make([second], lr=0.1, weight_decay=0.01), 1e-30, 0.0)
    for _ in range(3):
        quadratic(first, plain)()
        plain.step()
        sam.step(quadratic(second, sam))
    assert torch.equal(first, second)


@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
def test_damping_shortens_the_step_of_any_optimiser(make):
    """The step goes along the ascent here, up to Adam's signs: at most a part of it is left."""
    steps = []
    for damping in (0.0, 25.0):
        weight = torch.nn.Parameter(torch.tensor([3.0, 3.0]))
        optimizer = SAM(make([weight], lr=0.1), 0.5, damping)
        optimizer.step(quadratic(weight, optimizer))
        steps.append((weight.detach() - 3.0).norm().item())
    assert steps[0] > 0.1 and steps[1] < 0.01 * steps[0]


def test_weights_without_a_gradient_are_left_alone():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = SAM(SGD([used, unused], lr=0.1, momentum=0.9, weight_decay=0.1), 0.1, 25.0)
    optimizer.step(quadratic(used, optimizer))
    assert torch.equal(unused, torch.ones(2)) and unused.grad is None and unused not in optimizer.state


def test_state_is_the_optimiser_s_own_and_goes_on_where_it_was():
    weight = torch.nn.Parameter(torch.tensor([3.0, 1.0]))

    def make(w):
        return SAM(SGD([{"params": [w], "lr": 0.1}], momentum=0.9), 0.1, 25.0)

    optimizer = make(weight)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    optimizer.step(quadratic(weight, optimizer))
    scheduler.step()
    twin = torch.nn.Parameter(weight.detach().clone())
    other = make(twin)
    later = torch.optim.lr_scheduler.CosineAnnealingLR(other, 4)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    later.load_state_dict(scheduler.state_dict())
    for w, o, s in ((weight, optimizer, scheduler), (twin, other, later)):
        for _ in range(2):
            o.step(quadratic(w, o))
            s.step()
    assert torch.equal(weight, twin) and optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] < 0.1


@pytest.mark.parametrize("sam", [False, True])
@pytest.mark.parametrize("make", [SGD, Adam, AdamW])
def test_held_rows_stay_whatever_decays(make, sam):
    weight = torch.nn.Parameter(torch.ones(3, 2))
    base = make([{"params": [weight], "stacked": True}], lr=0.1, weight_decay=0.1)
    optimizer = SAM(base, 0.1, 25.0) if sam else base
    hold_rows(optimizer, [weight], 1)

    def closure():
        optimizer.zero_grad()
        loss = (weight[1:] * torch.tensor([1.0, 2.0])).square().sum()
        loss.backward()
        return loss.detach()

    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(weight[0], torch.ones(2)) and (weight[1:] < 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("damping", [0, 25])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("name", list(LEARNERS))
def test_every_learner_trains_a_task_with_sam(name, optimizer, damping, tmp_path, monkeypatch):
    keys = {"sam": {"rho": 0.05, "damping": damping}, "optimizer": optimizer, "lrate": 0.005, "epochs": 2}
    manager, learner = build_tiny(tmp_path, name, **keys)
    begin(learner, manager[0])
    if not learner.stages(manager[0]):
        pytest.skip("trains nothing")
    steps = []
    step = SAM.step
    monkeypatch.setattr(SAM, "step", lambda *given: steps.append(1) or step(*given))
    before = [p.detach().clone() for p in learner.parameters()]
    fit(learner, manager[0])
    batches = num_batches(len(manager[0].train), learner.config.batch_size, learner.config.drop_last)
    assert len(steps) == 2 * batches, "every step goes through SAM, in both epochs"
    after = list(learner.parameters())
    assert any(not torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert all(torch.isfinite(p).all() for p in after)


def test_sam_under_bf16_autocast_keeps_the_weights_type(tmp_path):
    from utils.runtime import Runtime

    manager, learner = build_tiny(tmp_path, "raa", sam={"rho": 0.05}, epochs=1)
    learner.runtime = Runtime("cpu", "bf16", num_workers=0)
    begin(learner, manager[0])
    fit(learner, manager[0])
    trained = [p for p in learner.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and torch.isfinite(p).all() for p in trained)


@pytest.mark.parametrize(
    ("sam", "sentence"),
    [
        ({"rho": 0}, r'"sam" must be object \{"rho": number > 0, "damping": number >= 0\} or null, got 0'),
        ({"damping": -1}, "got -1"),
        ({"roh": 0.1}, 'got the unknown "roh"'),
        (0.05, "got 0.05"),
    ],
)
def test_wrong_values_are_answered(sam, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        config_from(tiny_values(tmp_path, sam=sam), "test")
