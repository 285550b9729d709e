"""Growing networks: MEMO's split of a ViT against the reference's, branches, heads, their state."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from convs.backbones import BackboneInfo, make_backbone
from convs.expanding import Branches, ExpandingNetwork, split_backbone
from convs.weights import RANDOM
from tests.conftest import TINY_VIT, reference
from utils.errors import ConfigError


def tiny(width: int = 5) -> ExpandingNetwork:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.BatchNorm1d(width))
    info = BackboneInfo("tiny", width, 4, (0.0,) * 3, (1.0,) * 3, RANDOM)
    return ExpandingNetwork(Branches(nn.Identity(), branch), info, "none")


def test_old_parts_are_kept_and_copied():
    network, images = tiny(), torch.rand(6, 3, 4, 4)
    network.head.grow(3)
    network.train()(images)
    before, weight = network.features(images), network.head.weight.data.clone()
    network.grow()
    network.head.grow(5)
    network.renew_aux_head(3)
    assert network.feature_dim == 10 and network.head.weight.shape == (5, 10)
    assert torch.equal(network.head.weight[:3, :5], weight) and network.head.weight[:3, 5:].abs().max() > 0
    bound = (3 / 10) ** 0.5  # Kaiming, linear gain, of the new width
    assert network.head.weight[:, 5:].abs().max() <= bound < 1.3 * network.head.weight[:, 5:].abs().max()
    first, second = network.branches.branches
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not first.training and second.training
    assert not any(p.requires_grad for p in first.parameters()) and all(p.requires_grad for p in second.parameters())
    logits, auxiliary = network.train()(images, auxiliary=True)
    assert logits.shape == (6, 5) and auxiliary.shape == (6, 3) and not first.training
    assert before.shape == (6, 5)


def test_state_brings_its_own_size():
    network = tiny()
    network.head.grow(3)
    network.grow()
    network.head.grow(4)
    network.renew_aux_head(2)
    again = tiny()
    again.load_state_dict(network.state_dict())
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(again.eval()(images), network.eval()(images)) and again.feature_dim == 10
    network.head.grow(5)
    small = tiny()
    small.head.grow(2)
    again.load_state_dict(small.state_dict())
    assert again.feature_dim == 5 and len(again.branches.branches) == 1


@pytest.mark.parity
def test_memo_of_a_vit():
    """Features, logits and gradients through all branches into the shared part, 2e-5."""
    arrays = reference("classic/memo_vit")
    size, patch, width, depth, heads = arrays["arch"].tolist()
    backbone = make_backbone(
        {"name": "vit", "img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads},
        "random", None,
    )  # fmt: skip
    state = {key[7:]: torch.from_numpy(value).float() for key, value in arrays.items() if key.startswith("params/")}
    backbone.model.load_state_dict(state)
    images = torch.from_numpy(arrays["images"])
    whole = backbone.eval()(images)
    shared, tail = split_backbone(backbone.model)
    torch.testing.assert_close(tail(shared(images)), whole)
    network = ExpandingNetwork(Branches(shared, tail), backbone.info, "none").eval()
    tasks = sorted({int(match[1]) for key in arrays if (match := re.match(r"(\d+)/features", key))})
    for task in tasks:
        if task:
            network.grow()
        branch = network.branches.branches[task]
        special = {key.split("/")[2]: value for key, value in arrays.items() if key.startswith(f"special/{task}/")}
        renamed = {re.sub(r"blocks\.\d+", "block", key): torch.from_numpy(value) for key, value in special.items()}
        branch.load_state_dict(renamed)
        rows = len(arrays[f"{task}/head.bias"])
        network.head.grow(rows)
        network.renew_aux_head(len(arrays[f"{task}/aux_head.bias"]))
        for head in ("head", "aux_head"):
            for name in ("weight", "bias"):
                getattr(getattr(network, head), name).data.copy_(torch.from_numpy(arrays[f"{task}/{head}.{name}"]))
        network.requires_grad_(True).zero_grad()
        logits, auxiliary = network(images, auxiliary=True)
        nn.functional.cross_entropy(logits, torch.from_numpy(arrays[f"{task}/labels"])).backward()
        found = {
            "base_features": shared(images), "features": network.features(images), "logits": logits,
            "aux_logits": auxiliary, "grad/special.norm.weight": branch.norm.weight.grad,
            "grad/shared.cls_token": shared.model.cls_token.grad,
        }  # fmt: skip
        for name, value in found.items():
            np.testing.assert_allclose(value.detach(), arrays[f"{task}/{name}"], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ["small_vit", "small_convnext", "small_swin", "small_resnet32"])
def test_the_two_parts_are_the_whole(name):
    backbone, images = make_backbone(name, "random", None).eval(), torch.rand(2, 3, 32, 32)
    whole, numbers = backbone(images), sum(p.numel() for p in backbone.parameters())
    shared, tail = split_backbone(backbone.model)
    torch.testing.assert_close(tail(shared(images)), whole)
    assert sum(p.numel() for part in (shared, tail) for p in part.parameters()) == numbers


def test_random_last_block_leaves_the_shared_part_alone():
    backbone = make_backbone(TINY_VIT, "random", None)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    norm = backbone.model.norm.weight
    shared, tail = split_backbone(backbone.model, "random")
    assert tail.norm.weight is norm
    for name, value in shared.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not torch.equal(tail.block.mlp.fc1.weight, before["blocks.1.mlp.fc1.weight"])
    bound = tail.block.mlp.fc1.in_features**-0.5
    assert 0.9 * bound < tail.block.mlp.fc1.weight.abs().max() <= bound and tail.block.mlp.fc1.bias.abs().max() > 0


def test_other_networks_are_answered():
    backbone = make_backbone("small_lenet", None, None)
    with pytest.raises(ConfigError, match="LeNet has no known last block for MEMO"):
        split_backbone(backbone.model)
