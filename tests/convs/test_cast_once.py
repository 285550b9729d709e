"""A frozen weight is cast once for autocast, and again whenever it has been written to."""

import copy

import pytest
import torch
from torch import nn

from convs.cast_once import CastOnceLinear, cast_frozen_once


@pytest.fixture
def layer() -> CastOnceLinear:
    torch.manual_seed(0)
    return CastOnceLinear(nn.Linear(8, 4)).requires_grad_(False)


def run(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return layer(x)


def plain(layer: CastOnceLinear) -> nn.Linear:
    other = nn.Linear(layer.in_features, layer.out_features)
    other.load_state_dict(layer.state_dict())
    return other


def test_the_copy_stays_between_passes_and_changes_no_number(layer):
    x = torch.randn(3, 8, requires_grad=True)
    first = run(layer, x)
    kept = layer.low_precision
    assert kept is not None
    assert torch.equal(run(layer, x), first)
    assert layer.low_precision is kept
    assert torch.equal(first, run(plain(layer), x))
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], torch.autograd.grad(run(plain(layer), x).sum(), x)[0])


def write_in_place(layer):
    with torch.no_grad():
        layer.weight.add_(1)


def load(layer):
    layer.load_state_dict({name: value + 1 for name, value in layer.state_dict().items()})


def replace(layer):
    layer.weight = nn.Parameter(layer.weight + 1, requires_grad=False)


def write_to_a_view(layer):
    with torch.no_grad():
        layer.weight[2:].copy_(layer.weight[2:] + 1)


@pytest.mark.parametrize("change", [write_in_place, load, replace, write_to_a_view])
def test_a_weight_that_was_written_to_is_cast_again(layer, change):
    x = torch.randn(3, 8)
    before = run(layer, x)
    change(layer)
    assert torch.equal(run(layer, x), run(plain(layer), x))
    assert not torch.equal(run(layer, x), before)


def test_a_copied_layer_does_not_take_the_copy_of_a_weight_that_has_moved_on(layer):
    x = torch.randn(3, 8)
    run(layer, x)
    with torch.no_grad():
        layer.weight.add_(1)
    other = copy.deepcopy(layer)
    assert other.low_precision is None
    assert torch.equal(run(other, x), run(plain(layer), x))


def test_a_weight_that_trains_and_full_precision_keep_no_copy(layer):
    x = torch.randn(3, 8)
    layer(x)
    assert layer.low_precision is None
    layer.requires_grad_(True)
    run(layer, x).sum().backward()
    assert layer.low_precision is None
    assert layer.weight.grad is not None


def test_a_copy_made_in_inference_serves_training(layer):
    with torch.inference_mode():
        run(layer, torch.randn(3, 8))
    x = torch.randn(3, 8, requires_grad=True)
    run(layer, x).sum().backward()
    assert x.grad is not None


def test_the_plain_linear_layers_of_a_network_are_replaced_under_their_names():
    model = nn.Sequential(nn.Linear(8, 4), nn.ModuleDict({"inner": nn.Linear(4, 2, bias=False)}), nn.ReLU())
    names = list(model.state_dict())
    cast_frozen_once(model)
    assert list(model.state_dict()) == names
    assert [type(m) for m in model.modules() if isinstance(m, nn.Linear)] == [CastOnceLinear, CastOnceLinear]


def test_a_copy_does_not_outlive_training():
    """Fused optimisers move a weight without a trace in its version: freeze, read, train, freeze reads the new one."""
    layer = CastOnceLinear(nn.Linear(4, 4))
    x = torch.rand(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        layer.requires_grad_(False)
        layer(x)
        layer.requires_grad_(True)
        layer(x)
        layer.weight.data.add_(1.0)  # leaves the version as it is
        layer.requires_grad_(False)
        expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert torch.equal(layer(x), expected)
