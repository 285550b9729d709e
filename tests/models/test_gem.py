"""GEM: its projection against quadprog and the reference, its constraints, its answers."""

import builtins
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import models.gem as gem
from models.gem import project, solve, solve_exactly
from models.parts.loop import begin, learn
from models.parts.losses import slice_cross_entropy
from tests.conftest import build_tiny, reference
from tests.models.classic_runs import WholeRun, budget, schedule
from utils.errors import UserError


@pytest.mark.parity
def test_projected_steps_of_the_reference():
    """Raw and projected gradients, the duals, the weights after the epoch: 1e-6."""
    arrays = reference("gem_coil/gem_projection")
    names = ["a.weight", "a.bias", "b.weight", "b.bias"]
    weights = [torch.from_numpy(arrays[f"before/{name}"]).requires_grad_() for name in names]
    rates = {name: float(arrays[name]) for name in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD(weights, **rates)
    size, task = int(arrays["classes_per_task"]), int(arrays["current_task"])
    memory_x, memory_y = torch.from_numpy(arrays["memory_x"]), torch.from_numpy(arrays["memory_y"])

    def gradient(x, y, classes):
        a, a_bias, b, b_bias = weights
        logits = F.linear(torch.tanh(F.linear(x, a, a_bias)), b, b_bias)[:, classes]
        grads = torch.autograd.grad(F.cross_entropy(logits, y - classes.start), weights)
        return torch.cat([grad.flatten() for grad in grads])

    violated = 0
    for step, (x, y) in enumerate(zip(arrays["batch_x"], arrays["batch_y"], strict=True)):
        ranges = [slice(k * size, (k + 1) * size) for k in range(task)]
        members = [(memory_y >= r.start) & (memory_y < r.stop) for r in ranges]
        past = torch.stack([gradient(memory_x[m], memory_y[m], r) for m, r in zip(members, ranges, strict=True)])
        current = slice(task * size, (task + 1) * size)
        raw = gradient(torch.from_numpy(x), torch.from_numpy(y), current)
        np.testing.assert_allclose(torch.cat([past, raw[None]]), arrays["raw_grads"][step], atol=1e-6)
        assert (past @ raw < 0).any() == arrays["violated"][step]
        if arrays["violated"][step]:
            v = solve(arrays["qp_gram"][violated], arrays["qp_linear"][violated])
            np.testing.assert_allclose(v, arrays["qp_v"][violated], rtol=1e-6, atol=1e-12)
            violated += 1
        used = project(raw, past)
        np.testing.assert_allclose(used, arrays["used_grads"][step], atol=1e-6)
        for weight, part in zip(weights, used.split([w.numel() for w in weights]), strict=True):
            weight.grad = part.view_as(weight)
        optimizer.step()
    for name, weight in zip(names, weights, strict=True):
        np.testing.assert_allclose(weight.detach(), arrays[f"after/{name}"], atol=1e-6)


def case(seed: int):
    """g (P,), M (T, P); every third M is singular: a row repeated, reversed or zero."""
    rng = np.random.RandomState(seed)
    tasks, numbers = rng.randint(1, 8), rng.randint(10, 40)
    past = torch.from_numpy(rng.standard_normal((tasks, numbers)))
    if seed % 3 == 0 and tasks > 1:
        past[-1] = past[0] * (-0.5, 2.0, 0.0)[seed % 9 // 3]
    return torch.from_numpy(rng.standard_normal(numbers)), past


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_every_constraint_holds(eps, caplog):
    """200 random cases: M g~ >= 0 to rounding without a ridge, to TOLERANCE of |M g| with one; and no smaller step
    towards the constraints would do (the projection is the nearest point)."""
    for seed in range(200):
        gradient, past = case(seed)
        projected = project(gradient, past, eps=eps)
        limit = (1e-8 if eps == 0 else gem.TOLERANCE) * (past @ gradient).abs().max()
        assert (past @ projected).min() >= -limit, seed
        exact = gradient + torch.from_numpy(solve_exactly((past @ past.T).numpy(), (past @ gradient).numpy())) @ past
        error = (projected - exact).norm() / gradient.norm()
        assert error < (1e-6 if eps == 0 else 0.05), seed


def test_nothing_violated_is_left_alone():
    gradient = torch.tensor([1.0, 2.0])
    assert project(gradient, torch.tensor([[1.0, 0.0], [0.0, 3.0]])) is gradient


def test_one_past_task_by_hand():
    """One constraint m: g~ = g - (m . g / |m|^2) m; a margin of v adds to it."""
    gradient, past = torch.tensor([1.0, 1.0]), torch.tensor([[-2.0, 0.0]])
    torch.testing.assert_close(project(gradient, past), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(project(gradient, past, margin=0.75), torch.tensor([-0.5, 1.0]))
    np.testing.assert_allclose(solve_exactly(np.array([[4.0]]), np.array([-2.0]), margin=0.75), [0.75])


def test_products_are_summed_in_parts(monkeypatch):
    monkeypatch.setattr(gem, "COLUMNS_AT_ONCE", 7)
    _, past = case(5)
    torch.testing.assert_close(gem.gram(past), past @ past.T)


def test_a_singular_matrix_is_solved_with_a_warning(caplog):
    gem._warn.cache_clear()  # once a run
    past = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        projected = project(torch.tensor([-1.0, 1.0], dtype=torch.float64), past)
    torch.testing.assert_close(projected, torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert "quadprog gave no projection" in caplog.text


def test_missing_package_is_named(monkeypatch):
    importing = builtins.__import__

    def without(name, *args, **keys):
        if name == "quadprog":
            raise ImportError(name)
        return importing(name, *args, **keys)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install quadprog"):
        solve(np.eye(1), -np.ones(1))


class GemRun(WholeRun):
    """Also what the optimiser gets, the losses of past tasks, which steps violate one, and the duals."""

    def __init__(self, monkeypatch, *args):
        super().__init__(*args)
        self.past, self.duals, self.solved = [], [], False
        monkeypatch.setattr(gem, "slice_cross_entropy", self.slice_cross_entropy)
        monkeypatch.setattr(gem, "solve", self.solve)

    def slice_cross_entropy(self, logits, targets, classes):
        value = slice_cross_entropy(logits, targets, classes)
        if classes != self.learner.task.classes:
            self.past.append(value.item())
        return value

    def solve(self, *args):
        self.duals.append(solve(*args))
        return self.duals[-1]

    def compare_step(self):
        super().compare_step()
        for name, steps in self.keys(self.prefix + "grad/").items():
            module, ours = self.named(name)
            np.testing.assert_allclose(module.get_parameter(ours).grad, steps[self.step], atol=self.atol, err_msg=name)
        if self.learner.task.index > 0:
            violated = self.arrays[self.prefix + "violated"]
            np.testing.assert_allclose(self.past, self.arrays[self.prefix + "past_losses"][self.step], atol=self.atol)
            assert len(self.duals) == violated[: self.step + 1].sum()
        self.past = []

    def after_stage(self, hook, task):
        super().after_stage(hook, task)
        if task.index > 0:
            np.testing.assert_allclose(self.duals, self.arrays[self.prefix + "qp_v"], rtol=1e-4, atol=1e-7)
        self.duals = []


@pytest.mark.parity
def test_run_of_the_reference(tmp_path, monkeypatch):
    keys = lambda s: schedule(s) | budget(s) | {"gem_eps": 0.0}  # noqa: E731
    GemRun(monkeypatch, "gem_coil/gem_run", "gem", tmp_path, keys).run(monkeypatch)


def test_a_step_hurts_no_past_task(tmp_path):
    """The gradient that the optimiser gets lowers, or keeps, every past task's loss; exemplars train nothing."""
    manager, learner = build_tiny(tmp_path, "gem", exemplars={"per_class": 3}, gem_eps=0.0)
    for task in manager[:2]:
        learn(learner, task)
    task = manager[2]
    begin(learner, task)
    assert set(learner.train_data(task)._rows) == set(task.train.rows)
    images, targets = torch.rand(4, 3, 16, 16), torch.tensor([4, 5, 5, 4])
    inputs, labels = learner.prepare(images, targets)
    assert [len(y) for _, y, _ in learner._memories] == [6, 6] and learner._past.shape[0] == 2
    learner.loss(learner.network, inputs, labels).backward()
    learner.after_backward()
    moved = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten()
                       for p in learner.network.parameters()])  # fmt: skip
    products = learner._past @ moved
    assert products.min() > -1e-4 * learner._past.norm(dim=1).max() * moved.norm()
