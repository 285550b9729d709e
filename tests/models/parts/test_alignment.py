"""Classifier alignment: the reference's whole stage with its draws, and each rule by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.parts.alignment import (
    AlignmentSettings,
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
        self.settings = AlignmentSettings(
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
    plain = head_logits(rows, weight, None, AlignmentSettings(cosine=True, scale=20.0), heads)
    assert torch.allclose(plain, 20 * cosine)
    normed = head_logits(rows, weight, None, AlignmentSettings(cosine=True, scale=20.0, tau=0.5), heads)
    assert torch.allclose(normed, normalised(cosine, heads, 0.5))


def two_classes() -> ClassGaussians:
    gaussians = ClassGaussians(2)
    centres = torch.tensor([[2.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    gaussians.add_moments(centres, 0.1 * torch.eye(2).expand(2, 2, 2), torch.tensor([0, 1]), task=0)
    return gaussians


def test_alignment_separates_what_it_draws_and_leaves_its_arguments_alone():
    weight, bias = torch.zeros(2, 2), torch.zeros(2)
    settings = AlignmentSettings(epochs=3, lrate=0.1, samples=64)
    aligned = align(weight, bias, [1, 1], two_classes(), settings, generator=torch.Generator().manual_seed(0))
    assert float(aligned.losses[-1, -1]) < 0.5 * float(aligned.losses[0, 0])
    assert aligned.weight[0, 0] > 0 > aligned.weight[1, 0]
    assert not weight.any() and not bias.any()
    again = align(weight, bias, [1, 1], two_classes(), settings, generator=torch.Generator().manual_seed(0))
    assert torch.equal(aligned.weight, again.weight)


def test_reduced_outputs_vote_for_one_class():
    """Two heads of two classes each; either may answer, so the best of both decides."""
    weight = 0.01 * torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    settings, generator = AlignmentSettings(epochs=3, lrate=0.1, samples=64, tau=0.1), torch.Generator().manual_seed(0)

    def best(logits):
        return logits.view(-1, 2, 2).amax(dim=1)

    aligned = align(weight, None, [2, 2], two_classes(), settings, reduce=best, generator=generator)
    scores = best(torch.tensor([[2.0, 0.0], [-2.0, 0.0]]) @ aligned.weight.T)
    assert scores.argmax(dim=1).tolist() == [0, 1] and aligned.bias is None


def test_distance_scaling_needs_ages():
    with pytest.raises(ValueError, match="ages"):
        align(torch.zeros(2, 2), None, [2], two_classes(), AlignmentSettings(distance_mu=0.02))


CASES_INFLORA = ("ca_stage_logitnorm", "ca_stage_plain")


def stage(name: str):
    """(arrays as tensors, Gaussians of zero mean and unit covariance, whose samples are their noise, tau).

    So the stored samples can be handed in as the noise of a `Draws`.
    """
    ref = {key: torch.from_numpy(np.asarray(value)) for key, value in reference(f"inflora/{name}").items()}
    classes, width = ref["scaled_means"].shape
    gaussians = ClassGaussians(width)
    unit = torch.eye(width).expand(classes, -1, -1)
    gaussians.add_moments(torch.zeros(classes, width, dtype=torch.float64), unit, torch.arange(classes), task=0)
    return ref, gaussians, max(0.0, float(ref["tau"]))


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES_INFLORA)
def test_whole_stage(name):  # README: 1e-5
    ref, gaussians, tau = stage(name)
    epochs, stored, count = len(ref["loss_per_step"]), len(ref["samples"]), ref["samples"].shape[2]

    def draws(epoch: int) -> Draws:
        epoch = min(epoch, stored - 1)  # the plain file ends after two epochs; later losses are not compared
        return Draws(ref["samples"][epoch], torch.empty(0), ref["perm"][epoch].long())

    weight, bias = ref["head_w_init"].flatten(0, 1), ref["head_b_init"].flatten()
    settings = AlignmentSettings(epochs, 0.01, 5e-4, 0.9, count, tau)
    aligned = align(weight, bias, ref["task_sizes"].tolist(), gaussians, settings, draws=draws)
    torch.testing.assert_close(aligned.losses[:stored], ref["loss_per_step"][:stored], rtol=0, atol=1e-5)
    if "head_w_final" in ref:
        torch.testing.assert_close(aligned.weight, ref["head_w_final"].flatten(0, 1), rtol=0, atol=1e-5)
        torch.testing.assert_close(aligned.bias, ref["head_b_final"].flatten(), rtol=0, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES_INFLORA)
def test_first_step(name):  # README: logits 1e-5, loss and gradient 1e-6
    ref, gaussians, tau = stage(name)
    batch = ref["perm"][0, : ref["samples"].shape[2]].long()
    rows = ref["samples"][0].flatten(0, 1)[batch]
    targets = gaussians.labels.repeat_interleave(ref["samples"].shape[2])[batch]
    assert torch.equal(targets, ref["step0_targets"].long())
    logits = F.linear(rows, ref["head_w_init"].flatten(0, 1), ref["head_b_init"].flatten()).requires_grad_()
    torch.testing.assert_close(logits.detach(), ref["step0_logits"], rtol=0, atol=1e-5)
    read = normalised(logits, head_of_column(ref["task_sizes"].tolist(), logits), tau) if tau else logits
    torch.testing.assert_close(read.detach(), ref["step0_ce_input"], rtol=0, atol=1e-5)
    loss = F.cross_entropy(read, targets)
    loss.backward()
    assert abs(loss.item() - float(ref["loss_per_step"][0, 0])) < 1e-6
    torch.testing.assert_close(logits.grad, ref["step0_grad_logits"], rtol=0, atol=1e-6)


@pytest.mark.parity
def test_statistics_and_scaled_means():  # README: 1e-5
    ref, _, _ = stage("ca_stage_logitnorm")
    labels = torch.arange(len(ref["feat_counts"])).repeat_interleave(ref["feat_counts"])
    sizes = ref["task_sizes"]
    gaussians = ClassGaussians(ref["feats"].shape[1])
    gaussians.add(ref["feats"], labels, task=0)
    torch.testing.assert_close(gaussians.means, ref["class_mean"], rtol=0, atol=1e-5)
    torch.testing.assert_close(gaussians.dense_covariances(), ref["class_cov"], rtol=0, atol=1e-5)
    tasks = upstream_tasks(gaussians.labels, int(sizes[-1]))
    scaled = gaussians.means * mean_decay(tasks, len(sizes) - 1)[:, None]
    torch.testing.assert_close(scaled.float(), ref["scaled_means"], rtol=0, atol=1e-5)


RIDGE = 1e-3


@pytest.mark.parity
def test_class_statistics_of_the_reference():
    """README: 1e-11, in float64 throughout."""
    arrays = reference("raa/class_stats")
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    gaussians = ClassGaussians(x.shape[1], ridge=RIDGE).double()
    seen = 0
    for task in range(sum(key.endswith("_means") for key in arrays)):
        total = len(arrays[f"t{task}_means"])
        chosen = (y >= seen) & (y < total)
        gaussians.add(x[chosen], y[chosen], task)
        np.testing.assert_allclose(gaussians.means.numpy(), arrays[f"t{task}_means"], atol=1e-11, rtol=0)
        covs = gaussians.dense_covariances()
        np.testing.assert_allclose(covs.numpy(), arrays[f"t{task}_covs"], atol=1e-11, rtol=0)
        if task == 0:
            traces = (covs.diagonal(dim1=1, dim2=2) - RIDGE + 1e-4).sum(dim=1)
            assert math.sqrt(traces.mean()) == pytest.approx(float(arrays["radius_times_sqrt768"]), abs=1e-11)
        seen = total


@pytest.mark.parity
@pytest.mark.parametrize("prefix", ["", "norm_"])
def test_whole_stage_of_the_reference_of_raa(prefix):
    """README: 1e-5, float32; "norm_" is the logit normalisation in place of the scale."""
    arrays = reference("raa/classifier_alignment")
    sizes = arrays["sizes"].tolist()
    labels = torch.arange(sum(sizes))
    gaussians = ClassGaussians(arrays["means"].shape[1])
    gaussians.add_moments(torch.from_numpy(arrays["means"]), torch.from_numpy(arrays["covs"]), labels, task=0)
    factor = mean_decay(upstream_tasks(labels, int(arrays["task_size"])), len(sizes) - 1)
    np.testing.assert_allclose(factor.numpy(), arrays["mean_factor"], atol=1e-12, rtol=0)
    settings = AlignmentSettings(
        epochs=int(arrays["epochs"]), lrate=float(arrays["lr"]), weight_decay=float(arrays["weight_decay"]),
        samples=int(arrays["per_class"]), tau=float(arrays["norm_temperature"]) if prefix else 0.0,
        cosine=True, scale=float(arrays["scale"]),
    )  # fmt: skip

    def draws(epoch: int) -> Draws:
        perm = torch.from_numpy(arrays["perm"][epoch]).long()
        return Draws(torch.from_numpy(arrays["eps"][epoch]), torch.empty(0), perm)

    weight = torch.from_numpy(arrays["w0"])
    aligned = align(weight, None, sizes, gaussians, settings, mean_factor=factor, draws=draws)
    np.testing.assert_allclose(aligned.losses.numpy(), arrays[f"{prefix}losses"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(aligned.weight.numpy(), arrays[f"{prefix}w_final"], atol=1e-5, rtol=0)
