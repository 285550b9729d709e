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
    kept = dict(layer.low_precision)
    assert set(kept) == {"weight", "bias"}
    assert torch.equal(run(layer, x), first)
    assert all(layer.low_precision[name] is kept[name] for name in kept)
    assert torch.equal(first, run(plain(layer), x))
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], torch.autograd.grad(run(plain(layer), x).sum(), x)[0])


def write_in_place(layer, name):
    with torch.no_grad():
        getattr(layer, name).add_(1)


def load(layer, name):
    layer.load_state_dict({key: value + (key == name) for key, value in layer.state_dict().items()})


def replace(layer, name):
    setattr(layer, name, nn.Parameter(getattr(layer, name) + 1, requires_grad=False))


def write_to_a_view(layer, name):
    with torch.no_grad():
        getattr(layer, name)[2:].add_(1)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("change", [write_in_place, load, replace, write_to_a_view])
def test_what_was_written_to_is_cast_again(layer, change, name):
    x = torch.randn(3, 8)
    before = run(layer, x)
    change(layer, name)
    assert torch.equal(run(layer, x), run(plain(layer), x))
    assert not torch.equal(run(layer, x), before)


def test_a_copied_layer_does_not_take_the_copy_of_a_weight_that_has_moved_on(layer):
    x = torch.randn(3, 8)
    run(layer, x)
    with torch.no_grad():
        layer.weight.add_(1)
    other = copy.deepcopy(layer)
    assert not other.low_precision
    assert torch.equal(run(other, x), run(plain(layer), x))


def test_a_weight_that_trains_and_full_precision_keep_no_copy(layer):
    x = torch.randn(3, 8)
    layer(x)
    assert not layer.low_precision
    layer.requires_grad_(True)
    run(layer, x).sum().backward()
    assert not layer.low_precision
    assert layer.weight.grad is not None


def test_a_bias_that_trains_beside_a_frozen_weight_gets_its_gradient(layer):
    layer.bias.requires_grad_(True)
    run(layer, torch.randn(3, 8)).sum().backward()
    assert set(layer.low_precision) == {"weight"} and layer.bias.grad is not None


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
