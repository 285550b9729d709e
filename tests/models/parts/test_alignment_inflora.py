"""InfLoRA+CA's statistics and alignment against its reference, float32."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.parts.alignment import Alignment, Draws, align, head_of_column, mean_decay, normalised, upstream_tasks
from models.parts.gaussians import ClassGaussians
from tests.conftest import reference

CASES = ("ca_stage_logitnorm", "ca_stage_plain")


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
@pytest.mark.parametrize("name", CASES)
def test_whole_stage(name):  # README: 1e-5
    ref, gaussians, tau = stage(name)
    epochs, stored, count = len(ref["loss_per_step"]), len(ref["samples"]), ref["samples"].shape[2]

    def draws(epoch: int) -> Draws:
        epoch = min(epoch, stored - 1)  # the plain file ends after two epochs; later losses are not compared
        return Draws(ref["samples"][epoch], torch.empty(0), ref["perm"][epoch].long())

    weight, bias = ref["head_w_init"].flatten(0, 1), ref["head_b_init"].flatten()
    settings = Alignment(epochs, 0.01, 5e-4, 0.9, count, tau)
    aligned = align(weight, bias, ref["task_sizes"].tolist(), gaussians, settings, draws=draws)
    torch.testing.assert_close(aligned.losses[:stored], ref["loss_per_step"][:stored], rtol=0, atol=1e-5)
    if "head_w_final" in ref:
        torch.testing.assert_close(aligned.weight, ref["head_w_final"].flatten(0, 1), rtol=0, atol=1e-5)
        torch.testing.assert_close(aligned.bias, ref["head_b_final"].flatten(), rtol=0, atol=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
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
