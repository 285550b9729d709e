"""A frozen weight is cast once for autocast, and again whenever it has been written to."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vmap

from convs.cast_once import CastOnceLinear, cast_frozen_once
from tests.pretend_cuda import CUDA, pretended


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


def test_a_card_keeps_the_copies_too(layer):
    """Pretended, as kernels are counted: the casts would be launched in every pass."""
    with pretended() as recorder:
        layer, x = layer.to(CUDA), torch.randn(3, 8).to(CUDA)
        counts = []
        for _ in range(3):
            before = recorder.kernels["aten::_to_copy"]
            with torch.autocast("cuda", dtype=torch.bfloat16):
                layer(x)
            counts.append(recorder.kernels["aten::_to_copy"] - before)
    assert set(layer.low_precision) == {"weight", "bias"}
    assert counts == [3, 1, 1], "weight, bias and images; then the images alone"


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


def load_other_tensors(layer, name):
    layer.load_state_dict({key: value + (key == name) for key, value in layer.state_dict().items()}, assign=True)


def write_behind_autograd(layer, name):
    getattr(layer, name).data.add_(1)


def exchange_the_memory(layer, name):
    """Twice: the second may get the address of the first."""
    for shift in (2, -1):
        getattr(layer, name).data = getattr(layer, name).data + shift


def average(layer, name):
    """As teachers follow: mostly written with `.data`."""
    own = getattr(layer, name)
    own.data.mul_(0.5).add_(own.data + 1, alpha=0.5).add_(0.5)


def write_many(layer, name):
    with torch.no_grad():
        torch._foreach_lerp_([getattr(layer, name)], [torch.full_like(getattr(layer, name), 3.0)], 0.5)


def write_in_inference(layer, name):
    with torch.inference_mode():
        getattr(layer, name).add_(1)


def swap(layer, name):
    own = getattr(layer, name)
    torch.utils.swap_tensors(own, nn.Parameter(own.detach() + 1, requires_grad=False))


def write_through_another_layer(layer, name):
    """Which reads its new values before this one does."""
    other = CastOnceLinear(layer)
    run(other, torch.randn(2, 8))
    getattr(other, name).data.add_(1)
    run(other, torch.randn(2, 8))


CHANGES = [
    write_in_place, load, load_other_tensors, replace, write_to_a_view, write_behind_autograd, exchange_the_memory,
    average, write_many, write_in_inference, swap, write_through_another_layer,
]  # fmt: skip


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_was_written_to_is_cast_again(layer, change, name):
    x = torch.randn(3, 8)
    before = run(layer, x)
    change(layer, name)
    assert torch.equal(run(layer, x), run(plain(layer), x))
    assert not torch.equal(run(layer, x), before)


def on_meta(layer):
    return layer.to("meta")


def doubled(layer):
    return layer.double()


def halved(layer):
    return layer.half()


def made_in_inference(layer):
    with torch.inference_mode():
        return CastOnceLinear(nn.Linear(8, 4)).requires_grad_(False)


def copied_in_inference(layer):
    with torch.inference_mode():
        return copy.deepcopy(layer)


def parametrised(layer):
    torch.nn.utils.parametrizations.weight_norm(layer)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("make", [on_meta, doubled, halved, made_in_inference, copied_in_inference, parametrised])
def test_a_layer_answers_wherever_a_plain_one_does(make, layer):
    """float64 is left alone by autocast, and some tensors count no writes."""
    made = make(layer)
    x = torch.randn(3, 8).to(device=made.bias.device, dtype=made.bias.dtype)
    with torch.inference_mode(made.bias.is_inference()):
        found, expected = run(made, x), torch.autocast("cpu", torch.bfloat16)(F.linear)(x, made.weight, made.bias)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert found.is_meta or torch.equal(found, expected)


def test_other_tensors_may_stand_in_the_place_of_parameters_for_a_while(layer):
    x = torch.randn(3, 8)
    before = run(layer, x)
    several = {name: torch.stack([value, value + 1]) for name, value in layer.state_dict().items()}
    answers = []
    for module in (layer, plain(layer)):
        with torch.autocast("cpu", torch.bfloat16):
            answers.append(vmap(lambda values, module=module: functional_call(module, values, (x,)))(several))
    assert torch.equal(*answers)
    assert torch.equal(run(layer, x), before)


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
