"""Heads of SLCA++: separate per task, scaled by age, backed up around alignment and recalled."""

import numpy as np
import pytest
import torch

from convs.heads import TaskHeads
from tests.conftest import reference


def load(heads: TaskHeads, arrays, prefix: str) -> None:
    """The reference's parameters into our heads; its scales are parameters, ours a buffer."""
    count = len(heads.sizes)
    weights, biases = ([torch.from_numpy(arrays[f"{prefix}/heads.{t}.0.{p}"]) for t in range(count)]
                       for p in ("weight", "bias"))  # fmt: skip
    heads.set_stacked(torch.cat(weights), torch.cat(biases))
    heads.scales.copy_(torch.cat([torch.from_numpy(arrays[f"{prefix}/scales.{t}.weight"]) for t in range(count)]))


@pytest.mark.parity
def test_grow_align_scale_and_recall_of_the_reference():
    arrays = reference("slca/head")
    x, mu = torch.from_numpy(arrays["x"]), float(arrays["mu"])
    heads = TaskHeads(x.shape[1])
    for task, size in enumerate(arrays["sizes"].tolist()):
        heads.grow(heads.num_classes + size)
        flags = arrays["requires_grad"][task]
        assert [float(p.requires_grad) for p in heads.parameters()] == flags[flags >= 0].tolist()

        load(heads, arrays, f"recalled_params/{task}")
        torch.testing.assert_close(heads(x), torch.from_numpy(arrays[f"logits_unscaled/{task}"]), atol=1e-6, rtol=0)
        heads.backup()
        load(heads, arrays, f"aligned_params/{task}")
        heads.scale_by_age(mu)
        np.testing.assert_allclose(heads.scales.numpy(), arrays[f"scales/{task}"], atol=1e-6, rtol=0)
        torch.testing.assert_close(heads(x), torch.from_numpy(arrays[f"logits_scaled/{task}"]), atol=1e-6, rtol=0)
        heads.recall()
        torch.testing.assert_close(heads(x), torch.from_numpy(arrays[f"logits_recalled/{task}"]), atol=1e-6, rtol=0)
        assert torch.equal(heads.scales, torch.ones(task + 1))


def test_stacked_is_what_set_stacked_wrote():
    heads = TaskHeads(4)
    for total in (2, 5):
        heads.grow(total)
    weight, bias = torch.randn(5, 4), torch.randn(5)
    heads.set_stacked(weight, bias)
    assert all(torch.equal(*pair) for pair in zip(heads.stacked(), (weight, bias), strict=True))
    assert torch.allclose(heads(torch.eye(4)), torch.eye(4) @ weight.T + bias)


def test_recall_survives_a_checkpoint():
    heads = TaskHeads(4)
    heads.grow(2)
    before = heads.stacked()[0].clone()
    heads.backup()
    heads.set_stacked(torch.zeros(2, 4), torch.zeros(2))
    other = TaskHeads(4)
    other.load_state_dict(heads.state_dict())
    assert not other.stacked()[0].any()
    other.recall()
    assert torch.equal(other.stacked()[0], before)
