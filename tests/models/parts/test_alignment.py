"""Classifier alignment: the reference's whole stage with its draws, and each rule by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.parts.alignment import (
    Alignment,
    Draws,
    align,
    distance_factor,
    head_logits,
    head_of_column,
    mean_decay,
    normalised,
    upstream_tasks,
)
from models.parts.gaussians import ClassGaussians
from tests.conftest import reference

CASES = ("alignment_slca", "alignment_slca_no_norm", "alignment_slcapp")


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array))


def float32_factor_error(covs: torch.Tensor) -> float:
    """How far float32 factors put a sample from the exact one: 4 u ||cov|| / sqrt(smallest eigenvalue), 4 the largest
    normal draw.

    The reference factors in float32, so its samples carry this error (its digits differ from processor to processor);
    ours are factored in float64. Where few images leave the ridge as the smallest eigenvalue it exceeds 1e-5.
    """
    values = torch.linalg.eigvalsh(covs.double())
    return float((4 * 2**-24 * values[..., -1] / values[..., 0].sqrt()).max())


class Case:
    """A stored alignment stage: its Gaussians, heads, draws and settings."""

    def __init__(self, name: str):
        self.arrays = arrays = reference(f"slca/{name}")
        self.plus_plus = "uniform" in arrays
        self.sizes = arrays["sizes"].tolist()
        means, covs = tensor(arrays["means"]), tensor(arrays["covs"])
        self.labels = torch.arange(len(means))
        self.gaussians = ClassGaussians(means.shape[1])
        self.gaussians.add_moments(means, covs, self.labels, task=0)
        self.current = len(self.sizes) - 1
        self.tasks = upstream_tasks(self.labels, self.sizes[-1])
        self.samples = arrays["eps"].shape[2]
        self.settings = Alignment(
            epochs=int(arrays["ca_epochs"]), lrate=float(arrays["lr"]), samples=self.samples,
            weight_decay=float(arrays["weight_decay"]), tau=float(arrays["tau"]),
            distance_mu=float(arrays["mu"]) if self.plus_plus else 0.0,
        )  # fmt: skip
        self.mean_factor = None if self.plus_plus else mean_decay(self.tasks, self.current)
        self.ages = self.current - self.tasks

    def heads(self, when: str) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = range(len(self.sizes))
        weight, bias = ([tensor(self.arrays[f"{when}/heads.{t}.0.{p}"]) for t in blocks] for p in ("weight", "bias"))
        return torch.cat(weight), torch.cat(bias)

    def draws(self, epoch: int) -> Draws:
        arrays = self.arrays
        uniform = tensor(arrays["uniform"][epoch]) if self.plus_plus else torch.empty(0)
        return Draws(tensor(arrays["eps"][epoch]), uniform, tensor(arrays["perm"][epoch]))


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_whole_stage_of_the_reference(name):
    case = Case(name)
    weight, bias = case.heads("before")
    aligned = align(weight, bias, case.sizes, case.gaussians, case.settings, mean_factor=case.mean_factor,
                    ages=case.ages, draws=case.draws)  # fmt: skip
    expected_weight, expected_bias = case.heads("after")
    np.testing.assert_allclose(aligned.losses.flatten().numpy(), case.arrays["losses"], atol=5e-6, rtol=0)
    assert torch.allclose(aligned.weight, expected_weight, atol=5e-6, rtol=0)
    assert torch.allclose(aligned.bias, expected_bias, atol=5e-6, rtol=0)
    assert torch.equal(weight, case.heads("before")[0])


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_first_step_of_the_reference(name):
    case = Case(name)
    draws = case.draws(0)
    factor = 1 if case.mean_factor is None else case.mean_factor[:, None]
    rows = case.gaussians.draw(case.gaussians.means * factor, case.samples, draws.eps)
    if case.plus_plus:
        rows = rows * distance_factor(case.ages, draws.uniform, case.settings.distance_mu)[..., None]
    batch = draws.order[: case.samples]
    rows, targets = rows.flatten(0, 1)[batch], case.labels.repeat_interleave(case.samples)[batch]
    tolerance = max(5e-6, float32_factor_error(tensor(case.arrays["covs"])))
    np.testing.assert_allclose(rows.numpy(), case.arrays["first_input"], atol=tolerance, rtol=0)
    logits = F.linear(tensor(case.arrays["first_input"]), *case.heads("before")).requires_grad_()
    np.testing.assert_allclose(logits.detach().numpy(), case.arrays["first_logits"], atol=5e-6, rtol=0)
    heads = head_of_column(case.sizes, logits)
    tau = case.settings.tau
    F.cross_entropy(normalised(logits, heads, tau) if tau > 0 else logits, targets).backward()
    np.testing.assert_allclose(logits.grad.numpy(), case.arrays["first_grad_logits"], atol=5e-6, rtol=0)


@pytest.mark.parity
def test_scaling_of_the_reference_and_where_its_task_rule_goes_wrong():
    stored = reference("slca/scaling")
    mu = float(stored["mu"])
    streams = sorted({key.split("/")[0] for key in stored if "/" in key})
    half = torch.tensor([[0.5]])
    for stream in streams:
        sizes = stored[f"{stream}/sizes"]
        for key in (key for key in stored if key.startswith(f"{stream}/slca/")):
            current = int(key.rsplit("/", 1)[1])
            so_far = sizes[: current + 1]
            labels = torch.arange(int(so_far.sum()))
            true = torch.arange(current + 1).repeat_interleave(torch.from_numpy(so_far))
            theirs = upstream_tasks(labels, int(so_far[-1]))
            slca, slcapp = mean_decay(theirs, current), distance_factor(current - theirs, half, mu)[:, 0]
            np.testing.assert_allclose(slca.numpy(), stored[key], atol=1e-6)
            np.testing.assert_allclose(slcapp.numpy(), stored[key.replace("/slca/", "/slcapp/")], atol=1e-6)
            assert torch.equal(true, theirs) == (len(set(so_far.tolist())) == 1)


def test_mean_decay_by_hand():  # three tasks: 0.9 + 0.1 / 3, 0.9 + 0.2 / 3, 1
    expected = torch.tensor([0.9 + 0.1 / 3, 0.9 + 0.2 / 3, 1.0], dtype=torch.float64)
    assert torch.allclose(mean_decay(torch.tensor([0, 1, 2]), current=2), expected)


def test_logit_norm_by_hand():  # heads (3, 4) and (5): norms 5 and 5
    logits = torch.tensor([[3.0, 4.0, -5.0]])
    expected = logits / (0.1 * (5 + 1e-7))
    assert torch.allclose(normalised(logits, head_of_column([2, 1], logits), 0.1), expected)


def test_logit_norm_of_a_zero_head_has_a_finite_gradient():
    logits = torch.zeros(2, 3, requires_grad=True)
    F.cross_entropy(normalised(logits, head_of_column([2, 1], logits), 0.1), torch.tensor([0, 2])).backward()
    assert torch.isfinite(logits.grad).all()


def test_cosine_logits_are_scaled_or_normalised():
    rows, weight = torch.randn(4, 5), torch.randn(3, 5)
    cosine = F.normalize(rows, dim=1) @ F.normalize(weight, dim=1).T
    heads = head_of_column([3], rows)
    plain = head_logits(rows, weight, None, Alignment(cosine=True, scale=20.0), heads)
    assert torch.allclose(plain, 20 * cosine)
    normed = head_logits(rows, weight, None, Alignment(cosine=True, scale=20.0, tau=0.5), heads)
    assert torch.allclose(normed, normalised(cosine, heads, 0.5))


def two_classes() -> ClassGaussians:
    gaussians = ClassGaussians(2)
    centres = torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    gaussians.add_moments(centres, 0.1 * torch.eye(2).expand(2, 2, 2), torch.tensor([0, 1]), task=0)
    return gaussians


def test_alignment_separates_what_it_draws_and_leaves_its_arguments_alone():
    weight, bias = torch.zeros(2, 2), torch.zeros(2)
    settings = Alignment(epochs=3, lrate=0.1, samples=64)
    aligned = align(weight, bias, [1, 1], two_classes(), settings, generator=torch.Generator().manual_seed(0))
    assert float(aligned.losses[-1, -1]) < 0.5 * float(aligned.losses[0, 0])
    assert aligned.weight[0, 0] > 0 > aligned.weight[1, 0]
    assert not weight.any() and not bias.any()
    again = align(weight, bias, [1, 1], two_classes(), settings, generator=torch.Generator().manual_seed(0))
    assert torch.equal(aligned.weight, again.weight)


def test_reduced_outputs_vote_for_one_class():
    """Two heads of two classes each; either may answer, so the best of both decides."""
    weight = 0.01 * torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    settings, generator = Alignment(epochs=3, lrate=0.1, samples=64, tau=0.1), torch.Generator().manual_seed(0)

    def best(logits):
        return logits.view(-1, 2, 2).amax(dim=1)

    aligned = align(weight, None, [2, 2], two_classes(), settings, reduce=best, generator=generator)
    scores = best(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]) @ aligned.weight.T)
    assert scores.argmax(dim=1).tolist() == [0, 1] and aligned.bias is None


def test_distance_scaling_needs_ages():
    with pytest.raises(ValueError, match="ages"):
        align(torch.zeros(2, 2), None, [2], two_classes(), Alignment(distance_mu=0.02))
