"""Adapters and their replicas: the reference's numbers, and that shared work changes nothing."""

import re

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from convs.adapters import BranchedAdapter, ReplicaNetwork, add_adapters
from convs.heads import CosineHead
from tests.conftest import bare_backbone, reference
from utils.errors import ConfigError

TENSORS = ("down_w", "down_b", "up_w", "up_b")
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 0}


class GivenMask(torch.nn.Module):
    """A dropout with a stored keep-mask (replicas, B, N, b)."""

    def __init__(self, mask: torch.Tensor, p: float = 0.1):
        super().__init__()
        self.mask, self.p = mask, p

    def forward(self, hidden):
        return hidden * self.mask[: len(hidden)] / (1 - self.p)


def tensors(arrays, prefix: str) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(arrays[f"{prefix}{name}"]) for name in TENSORS}


def adapter_of(arrays, prefix: str) -> BranchedAdapter:
    branches, bottleneck, width = arrays[f"{prefix}down_w"].shape
    adapter = BranchedAdapter(width, bottleneck, branches).double()
    adapter.load_state_dict(tensors(arrays, prefix) | {"_extra_state": {"frozen": 0}})
    return adapter.eval()


def close(ours, stored, atol: float, name: str = "") -> None:
    np.testing.assert_allclose(np.asarray(ours.detach()), stored, atol=atol, rtol=0, err_msg=name)


@pytest.mark.parity
def test_forward_and_gradients_of_the_reference():
    arrays = reference("raa/adapter_forward")
    for branches in arrays["K_values"].tolist():
        key = f"K{branches}_"
        modes = {name[len(key) :].removesuffix("_alpha") for name in arrays if re.match(rf"{key}\w+_alpha$", name)}
        assert modes >= {"eval", "train"}
        for mode in modes:
            adapter = adapter_of(arrays, key)
            if f"{key}{mode}_mask" in arrays:
                mask = torch.from_numpy(arrays[f"{key}{mode}_mask"])
                adapter.dropout = GivenMask(mask.unflatten(0, (branches + 1, -1)))
            x = torch.from_numpy(arrays[f"{key}x"]).requires_grad_()
            replicas = x.unflatten(0, (branches + 1, -1))
            own = adapter.outputs(replicas[:branches], 0, branches)
            alpha = torch.from_numpy(arrays[f"{key}{mode}_alpha"])
            mixed = adapter.amalgam("upstream", list(own), replicas[branches], alpha)
            y = torch.cat([own.flatten(0, 1), mixed])
            close(y, arrays[f"{key}{mode}_y"], 1e-12)
            y.backward(torch.from_numpy(arrays[f"{key}grad_out"]))
            close(x.grad, arrays[f"{key}{mode}_grad_x"], 1e-12)
            for name in TENSORS:
                close(getattr(adapter, name).grad, arrays[f"{key}{mode}_grad_{name}"], 1e-12, name)
        adapter = adapter_of(arrays, key)
        close(adapter(torch.from_numpy(arrays[f"{key}x"])), arrays[f"{key}single_y"], 1e-12)
        alpha = torch.from_numpy(arrays[f"{key}eval_alpha"])
        last = torch.from_numpy(arrays[f"{key}x"]).unflatten(0, (branches + 1, -1))[branches]
        close(adapter.amalgam("parameter", [], last, alpha), arrays[f"{key}param_space_y"], 1e-12)


@pytest.mark.parity
def test_merge_and_freeze_of_the_reference():
    arrays = reference("raa/adapter_merge")
    for branches in arrays["K_values"].tolist():
        steps = sorted(key for key in arrays if re.fullmatch(rf"K{branches}_t\d+_trainable", key))
        assert steps
        for step in steps:
            prefix = step.removesuffix("trainable")
            adapter = adapter_of(arrays, f"{prefix}before_")
            adapter.merge()
            for name in TENSORS:
                close(getattr(adapter, name), arrays[f"{prefix}after_{name}"], 1e-14, name)
            adapter.freeze(1)
            network = ReplicaNetwork(*tiny_parts(), amalgam="upstream")
            assert trains(network, branches).tolist() == arrays[step].astype(bool).tolist()


def tiny_parts():
    torch.manual_seed(0)
    model = VisionTransformer(**VIT)

    def head(width: int) -> CosineHead:
        made = CosineHead(width)
        made.grow(3)
        return made

    return bare_backbone(model, VIT["embed_dim"]), head, "half"


def trains(network: ReplicaNetwork, branches: int) -> torch.Tensor:
    """(K,): whether a backward pass through the frozen network moves a branch."""
    adapters = add_adapters(network.backbone.model, branches, 4, 0.1, 0.0)
    for adapter in adapters:
        torch.nn.init.normal_(adapter.up_w)
        adapter.freeze(1)
    network(network.prefix(torch.rand(2, 3, 16, 16))).square().sum().backward()
    return torch.stack([a.down_w.grad.flatten(1).any(dim=1) for a in adapters]).all(dim=0)


def stored_network(arrays, amalgam="upstream") -> ReplicaNetwork:
    size, patch, width, depth, heads = arrays["arch"].tolist()
    model = VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
    ).double()
    model.load_state_dict({k[5:]: torch.from_numpy(v) for k, v in arrays.items() if k.startswith("timm.")})
    branches, bottleneck, _ = arrays["adapter0.down_w"].shape
    adapters = add_adapters(model, branches, bottleneck, 0.1, 0.0)
    for layer, adapter in enumerate(adapters):
        adapter.double().load_state_dict(tensors(arrays, f"adapter{layer}.") | {"_extra_state": {"frozen": 0}})
    network = ReplicaNetwork(bare_backbone(model, width), CosineHead, "none", amalgam=amalgam)
    network.mixtures = lambda like: torch.from_numpy(arrays["alpha"])
    return network


@pytest.mark.parity
@pytest.mark.parametrize("frozen", [0, 1])
def test_network_of_the_reference(frozen):
    """With branch 0 frozen: the same features, the same gradients of the others, none of branch 0."""
    arrays = reference("raa/vit_forward")
    network = stored_network(arrays)
    images = torch.from_numpy(arrays["x"])
    close(network.features(images), arrays["features"], 1e-11)
    adapters = [block.adapter for block in network.blocks]
    for adapter in adapters:
        adapter.freeze(frozen)
    features = network.replica_features(network.prefix(images))
    close(features, arrays["features_train"], 1e-11)
    features.backward(torch.from_numpy(arrays["grad_out"]))
    for layer, adapter in enumerate(adapters):
        for name in TENSORS:
            grad = getattr(adapter, name).grad
            assert not grad[:frozen].any()
            if not frozen:
                close(grad, arrays[f"grad{layer}.{name}"], 1e-11, name)


@pytest.mark.parametrize("amalgam", ["upstream", "parameter", "none"])
@pytest.mark.parametrize(("branches", "frozen"), [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_shared_work_changes_nothing(amalgam, branches, frozen):
    """Against replicas that go through the plain blocks one by one, gradients included."""
    network = ReplicaNetwork(*tiny_parts(), amalgam=amalgam).double()
    adapters = add_adapters(network.backbone.model, branches, 4, 0.1, 0.0)
    for adapter in adapters:
        adapter.double().freeze(frozen)
        for parameter in adapter.parameters():
            torch.nn.init.normal_(parameter)
    images, depth = torch.rand(2, 3, 16, 16, dtype=torch.float64), len(adapters)
    alpha = torch.rand(depth, branches, dtype=torch.float64)
    network.mixtures = lambda like: alpha
    ours = network(network.prefix(images))
    probe = torch.randn_like(ours)
    parameters = [p for adapter in adapters for p in adapter.parameters()]
    grads = torch.autograd.grad(ours, parameters, probe)

    vit = network.backbone.model
    streams = [vit._pos_embed(vit.patch_embed(network.normalise(images)))] * (branches + (amalgam != "none"))
    for block, adapter, weights in zip(network.blocks, adapters, alpha, strict=True):
        x1 = [x + block.attn(block.norm1(x)) for x in streams]
        outputs = [by_hand(adapter, x, i) for i, x in enumerate(x1[:branches])]
        if amalgam == "upstream":
            outputs.append(sum(w * out for w, out in zip(weights, outputs, strict=True)))
        elif amalgam == "parameter":
            mixed = [torch.einsum("k,k...->...", weights, p) for p in (getattr(adapter, name) for name in TENSORS)]
            outputs.append(bottleneck(x1[-1], *mixed))
        streams = [x + block.mlp(block.norm2(x)) + out for x, out in zip(x1, outputs, strict=True)]
    plain = torch.cat([network.head(vit.norm(x)[:, 0]) for x in streams])
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-10)
    for mine, straight in zip(grads, torch.autograd.grad(plain, parameters, probe), strict=True):
        torch.testing.assert_close(mine[frozen:], straight[frozen:], atol=1e-12, rtol=1e-10)
        assert not mine[:frozen].any()


def by_hand(adapter: BranchedAdapter, x: torch.Tensor, branch: int) -> torch.Tensor:
    return bottleneck(x, *(getattr(adapter, name)[branch] for name in TENSORS))


def bottleneck(x, down_w, down_b, up_w, up_b):
    return 0.1 * ((x @ down_w.T + down_b).relu() @ up_w.T + up_b)


def test_branches_start_as_the_identity_and_differ_in_their_first_layer():
    adapter = BranchedAdapter(8, 4, branches=3)
    x = torch.randn(2, 5, 8)
    assert not adapter(x).any() and not adapter.amalgam("parameter", [], x, torch.ones(3)).any()
    assert not torch.equal(adapter.down_w[0], adapter.down_w[1])
    assert sum(p.numel() for p in adapter.parameters()) == 3 * (2 * 4 * 8 + 4 + 8)


def test_mixtures_are_fresh_in_training_and_the_mean_in_evaluation():
    network = ReplicaNetwork(*tiny_parts())
    add_adapters(network.backbone.model, 3, 4, 0.1, 0.1)
    like = torch.zeros(1)
    first, second = network.train().mixtures(like), network.mixtures(like)
    assert first.shape == (VIT["depth"], 3) and not torch.equal(first, second)
    assert torch.allclose(first.sum(dim=1), torch.ones(3)) and (first > 0).all()
    assert torch.allclose(network.eval().mixtures(like), torch.full((3, 3), 1 / 3))


def test_dropout_is_that_of_each_branch():
    """In training the amalgam of upstream reads the branches' own masks."""
    network = ReplicaNetwork(*tiny_parts())
    adapter = add_adapters(network.backbone.model, 2, 4, 0.1, 0.5)[0].train()
    torch.nn.init.normal_(adapter.up_w)
    x = torch.randn(2, 1, 5, 16)
    own = adapter.outputs(x, 0, 2)
    assert not torch.equal(own, adapter.outputs(x, 0, 2))
    mixed = adapter.amalgam("upstream", list(own), x[0], torch.tensor([0.25, 0.75]))
    assert torch.allclose(mixed, 0.25 * own[0] + 0.75 * own[1])


def test_frozen_branches_survive_a_checkpoint():
    adapter, other = BranchedAdapter(8, 4, 2), BranchedAdapter(8, 4, 2)
    adapter.freeze(1)
    other.load_state_dict(adapter.state_dict())
    assert other.frozen == 1


def test_average_pooling_keeps_every_token():
    model = VisionTransformer(**VIT, global_pool="avg")
    add_adapters(model, 2, 4, 0.1, 0.1)
    assert model.blocks[-1].keep is None


def test_a_network_without_plain_blocks_is_refused():
    for name in ("resnet18", "swin_tiny_patch4_window7_224"):
        with torch.device("meta"), pytest.raises(ConfigError, match="no plain transformer blocks; choose a ViT"):
            add_adapters(timm.create_model(name, num_classes=0), 2, 4, 0.1, 0.1)
