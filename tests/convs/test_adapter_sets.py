"""An adapter and its copies: the reference's features, merges and gradients; state; one pass for all copies."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

import convs.adapters
from convs.adapter_sets import TENSORS, Merging, add_adapter_sets, begin_task, settled
from convs.adapters import AdaptedBlock, AdapterNetwork, BranchedAdapter, add_adapters
from convs.heads import CosineHead
from tests.conftest import reference
from tests.convs.vits import (
    adapter_parameters,
    backbone_of,
    bottleneck_of,
    check_forward,
    close,
    fill,
    group,
    numbers,
    stored_vit,
)

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}
NAME = r"adapter/(\d+)/"


def network_of(model, **sizes) -> AdapterNetwork:
    adapters = add_adapter_sets(model, **{"bottleneck": 4, "scale": 0.1, "dropout": 0.0} | sizes)
    for adapter in adapters:
        adapter.to(model.cls_token.dtype)
    return AdapterNetwork(backbone_of(model), CosineHead, "none").eval()


def stored_network(arrays) -> AdapterNetwork:
    return network_of(stored_vit(arrays), bottleneck=bottleneck_of(arrays))


def with_copies(arrays, sets) -> AdapterNetwork:
    network = stored_network(arrays)
    for j in sets:
        fill(adapter_parameters(network.backbone.model), group(arrays, f"adapter/{j}/"))
        for block in network.blocks:
            block.adapter.keep()
    return network


def copies(network: AdapterNetwork) -> dict[str, torch.Tensor]:
    """All copies, stacked, under the fixtures' names."""
    theirs = ("down.weight", "down.bias", "up.weight", "up.bias")
    return {
        f"blocks.{i}.adapter.{name}": getattr(block.adapter, f"kept_{ours}")
        for i, block in enumerate(network.blocks)
        for ours, name in zip(TENSORS, theirs, strict=True)
    }


def same(ours, theirs, atol=1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        close(value, theirs[name], atol, name)


@pytest.mark.parity
def test_adapter_of_the_reference():
    """Forward and gradients in the ViT, and the module alone with a stored dropout mask."""
    arrays = reference("aper/adapter_forward")
    model = stored_vit(arrays)
    scale, rate = arrays["scale"].item(), arrays["dropout"].item()
    add_adapters(model, 1, bottleneck_of(arrays), scale, rate)
    check_forward(model.double().eval(), adapter_parameters(model), arrays, atol=1e-11)
    adapter, x = model.blocks[0].adapter, torch.from_numpy(arrays["module_x"])
    close(adapter(x), arrays["module_eval"], 1e-12)
    mask = torch.from_numpy(arrays["module_mask"])
    adapter.dropout.forward = lambda hidden: hidden * mask / (1 - rate)
    close(adapter(x), arrays["module_train"], 1e-12)


@pytest.mark.parity
def test_starts_of_the_reference():
    arrays = reference("aper/init")
    width = int(arrays["adapter/width"])
    bound, adapter = width**-0.5, BranchedAdapter(width, 256, 1)
    assert abs(adapter.down_w.std().item() / arrays["adapter/down_std"] - 1) < 0.05
    assert adapter.down_w.abs().max() < bound and arrays["adapter/down_abs_max"] < bound
    others = max(p.abs().max().item() for n, p in adapter.named_parameters() if n != "down_w")
    assert others == arrays["adapter/others_abs_max"]
    head = CosineHead(width, init="uniform", learn_scale=True)
    head.grow(500)
    assert abs(head.weight.std().item() / arrays["head/weight_std"] - 1) < 0.05 and head.weight.abs().max() < bound
    assert head.scale.item() == arrays["head/sigma"].item()


@pytest.mark.parity
@pytest.mark.parametrize("rows", [1, 7, 1024])
def test_subspaces_of_the_reference(rows, monkeypatch):
    """EASE: the newest set trains; all sets, behind the plain ViT, in one pass, in some and one by one."""
    monkeypatch.setattr(convs.adapters, "ROWS", rows)
    arrays = reference("ease/forward")
    sets = numbers(arrays, NAME)
    network, x = with_copies(arrays, sets), torch.from_numpy(arrays["x"])
    close(network.features(x), arrays["train"], 1e-11)
    close(network.subspaces(x, 0, len(sets)).transpose(0, 1), arrays["test"], 1e-11)
    close(network.subspaces(x, 0, len(sets), plain=True).transpose(0, 1), arrays["test_with_pretrained"], 1e-11)
    for j in sets:
        close(network.subspaces(x, j, j + 1)[0], arrays[f"proto/{j}"], 1e-11)
    close(network.subspaces(x, 0, 0, plain=True)[0], arrays["proto/-1"], 1e-11)


@pytest.mark.parity
def test_merges_of_the_reference():
    """MOS: one merge; a pass with a merge before every block, and what it leaves behind."""
    arrays = reference("mos/forward")
    sets, x, momentum = numbers(arrays, NAME), torch.from_numpy(arrays["x"]), arrays["momentum"].item()
    network = with_copies(arrays, sets)
    close(network.subspaces(x, 0, 0, plain=True)[0], arrays["pretrained"], 1e-11)
    for j, features in enumerate(network.subspaces(x, 0, len(sets))):
        close(features, arrays[f"pure/{j}"], 1e-11)
    logits = network.features(x) @ torch.from_numpy(arrays["head.weight"]).T + torch.from_numpy(arrays["head.bias"])
    close(logits, arrays["logits"], 1e-11)

    network = with_copies(arrays, sets[:-1])
    own = adapter_parameters(network.backbone.model)
    fill(own, group(arrays, f"adapter/{sets[-1]}/"))
    adapters = [block.adapter for block in network.blocks]
    begin_task(adapters, momentum, every_pass=True)
    merging = Merging(adapters, momentum)
    merging.merge()
    same(own, group(arrays, "merged/"))
    close(network.features(x), arrays["upstream/train"], 1e-11)
    merging.merge(times=len(adapters))
    same(own, group(arrays, "upstream/after_train/"))


@pytest.mark.parity
def test_copies_at_the_limit_of_merging():
    arrays = reference("mos/converged")
    sets = numbers(arrays, NAME)
    network, x = with_copies(arrays, sets), torch.from_numpy(arrays["x"])
    for block in network.blocks:
        block.adapter.converged = True
    for j, features in enumerate(network.subspaces(x, 0, len(sets))):
        same({k: settled(v)[j] for k, v in copies(network).items()}, group(arrays, f"converged/{j}/"), 1e-9)
        close(features, arrays[f"features/{j}"], 1e-9)


def randomised(network: AdapterNetwork) -> None:
    for block in network.blocks:
        for parameter in block.adapter.parameters():
            torch.nn.init.normal_(parameter)


def test_gradients_of_a_pulled_pass_are_those_at_the_merged_weights():
    torch.manual_seed(0)
    images, momentum = torch.rand(2, 3, 16, 16, dtype=torch.float64), 0.3
    network = network_of(VisionTransformer(**VIT).double())
    randomised(network)
    adapters = [block.adapter for block in network.blocks]
    for adapter in adapters:
        adapter.keep()
    randomised(network)
    begin_task(adapters, momentum, every_pass=True)
    parameters = [p for adapter in adapters for p in adapter.parameters()]
    pulled = torch.autograd.grad(network.features(images).square().sum(), parameters)
    begin_task(adapters, momentum, every_pass=False)
    for number, adapter in enumerate(adapters):
        Merging([adapter], momentum).merge(number + 1)
    at_merged = torch.autograd.grad(network.features(images).square().sum(), parameters)
    for ours, theirs in zip(pulled, at_merged, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_copies_are_frozen_state_that_any_network_takes_up():
    network, other = (network_of(VisionTransformer(**VIT)) for _ in range(2))
    images = torch.rand(2, 3, 16, 16)
    for _ in range(3):
        randomised(network)
        for block in network.blocks:
            block.adapter.keep()
    before = network.subspaces(images, 0, 3, plain=True)
    randomised(network)
    assert torch.equal(network.subspaces(images, 0, 3, plain=True), before)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other.subspaces(images, 0, 3, plain=True), before)
    trained = {name for name, p in network.named_parameters() if p.requires_grad and "backbone" in name}
    assert len(trained) == 4 * VIT["depth"] and all(".adapter." in name for name in trained)
    network.blocks[0].adapter.restart()
    assert not network.blocks[0].adapter.up_w.any() and network.blocks[0].adapter.down_w.any()


@pytest.mark.parametrize("variant", [{}, {"global_pool": "avg"}, {"reg_tokens": 2}])
def test_subspaces_are_those_of_single_passes(variant):
    model = VisionTransformer(**VIT, **variant).double().eval()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    expected = [model(images)]
    network = network_of(model)
    for _ in range(2):
        randomised(network)
        expected.append(network.features(images))
        for block in network.blocks:
            block.adapter.keep()
    torch.testing.assert_close(network.subspaces(images, 0, 2, plain=True), torch.stack(expected), atol=1e-12, rtol=0)
    for block in network.blocks:
        block.adapter.active = False
    torch.testing.assert_close(network.features(images), expected[0], atol=1e-12, rtol=0)


def test_the_vit_stays_in_evaluation_mode():
    network = network_of(VisionTransformer(**VIT, proj_drop_rate=0.5), dropout=0.5)
    randomised(network)
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(network.features(images), network.features(images))
    network.train()
    assert not torch.equal(network.features(images), network.features(images))
    modes = {type(m) for m in network.modules() if m.training}
    assert AdaptedBlock not in modes
