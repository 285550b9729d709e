"""Heads of SLCA++: separate per task, scaled by age, backed up around alignment and recalled."""

import numpy as np
import pytest
import torch

from convs.heads import HEADS, CosineHead, LinearHead, TaskHeads
from tests.conftest import reference

KINDS = {**HEADS, "task": TaskHeads, "cosine, zeros": lambda dim: CosineHead(dim, init="zeros")}


@pytest.fixture(params=KINDS)
def head(request):
    torch.manual_seed(0)
    return KINDS[request.param](5)


def test_growing_keeps_the_scores_of_old_classes(head):
    x = torch.randn(3, 5)
    head.grow(2)
    before = head(x)
    head.grow(5)
    assert head.num_classes == 5 and head(x).shape == (3, 5)
    torch.testing.assert_close(head(x)[:, :2], before)


def test_growing_to_a_size_already_there_does_nothing(head):
    head.grow(3)
    state = {key: value for key, value in head.state_dict().items() if isinstance(value, torch.Tensor)}
    head.grow(3)
    head.grow(2)
    for key, value in state.items():
        assert torch.equal(head.state_dict()[key], value)


def test_a_fresh_head_takes_the_sizes_of_a_saved_one(head, request):
    head.grow(2)
    head.grow(3)
    other = KINDS[request.node.callspec.params["head"]](5)
    other.load_state_dict(head.state_dict())
    x = torch.randn(3, 5)
    assert torch.equal(other(x), head(x))
    other.grow(4)
    assert other.num_classes == 4


def test_new_linear_rows_are_kaiming_uniform_and_biases_zero():
    head = LinearHead(300)
    head.grow(200)
    bound = (3 / 300) ** 0.5  # gain 1
    assert head.weight.abs().max() <= bound and head.weight.abs().max() > 0.99 * bound
    assert torch.count_nonzero(head.bias) == 0


def test_task_heads_freeze_the_old_and_train_the_new():
    head = TaskHeads(5)
    head.grow(2)
    head.grow(4)
    assert [p.requires_grad for p in head.parameters()] == [False, False, True, True]


def test_scales_multiply_the_features_not_the_bias():
    head = TaskHeads(2)
    head.grow(1)
    head.grow(2)
    with torch.no_grad():
        for linear in head.heads:
            linear.weight.fill_(1)
            linear.bias.fill_(10)
    head.scale_by_age(0.5)
    assert head.scales.tolist() == [1.5, 1.0]
    assert head(torch.tensor([[1.0, 2.0]])).tolist() == [[14.5, 13.0]]


def test_recall_undoes_what_came_after_backup_even_when_saved_and_loaded_in_between():
    head = TaskHeads(3)
    head.grow(2)
    x = torch.randn(4, 3)
    before = head(x)
    head.backup()
    with torch.no_grad():
        head.heads[0].weight.add_(1)
    head.scale_by_age(0.3)
    other = TaskHeads(3)
    other.load_state_dict(head.state_dict())
    for each in (head, other):
        assert not torch.equal(each(x), before)
        each.recall()
        assert torch.equal(each(x), before)
        each.recall()  # nothing is saved any more
        assert torch.equal(each(x), before)


def test_cosine_scores_lie_within_one_and_ignore_lengths():
    head = CosineHead(5)
    head.grow(4)
    x = torch.randn(6, 5)
    assert head(x).abs().max() <= 1 + 1e-6
    torch.testing.assert_close(head(3 * x), head(x))


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


@pytest.mark.parity
def test_cosine_head():
    arrays = {key: torch.from_numpy(value) for key, value in reference("raa/cosine_head").items()}
    head = CosineHead(arrays["weight"].shape[1]).double()
    for total in arrays["sizes"].cumsum(0).tolist():
        head.grow(total)
    head.set_stacked(arrays["weight"])
    x = arrays["x"].requires_grad_()
    logits = head(x)
    torch.testing.assert_close(logits, arrays["logits"], atol=1e-12, rtol=0)
    logits.backward(arrays["grad_out"])
    torch.testing.assert_close(x.grad, arrays["grad_x"], atol=1e-12, rtol=0)
    grad = torch.cat([block.grad for block in head.blocks])
    torch.testing.assert_close(grad, arrays["grad_weight"], atol=1e-12, rtol=0)
