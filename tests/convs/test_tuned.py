"""A ViT tuned once: what trains, and that the plain ViT can still be read."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from convs.heads import CosineHead
from convs.tuned import TunedNetwork
from tests.convs.vits import backbone_of

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}
KINDS = ("adapter", "ssf", "vpt_deep", "vpt_shallow", "finetune")


def tuned_network(petl: str, keep_plain: bool = True, **keys) -> TunedNetwork:
    """With tuned parameters far from their start."""
    torch.manual_seed(0)
    backbone = backbone_of(VisionTransformer(**VIT, proj_drop_rate=0.5))
    network = TunedNetwork(backbone, CosineHead, "none", petl, bottleneck=4, keep_plain=keep_plain, **keys)
    network.head.grow(3)
    with torch.no_grad():
        for parameter in network.tuned_parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return network.eval()


@pytest.mark.parametrize("petl", KINDS)
def test_both_are_the_plain_and_the_tuned_vit(petl):
    network, images = tuned_network(petl), torch.rand(2, 3, 16, 16)
    torch.manual_seed(0)
    plain = VisionTransformer(**VIT).eval()(images)
    features = network.features(images)
    torch.testing.assert_close(network.plain_features(images), plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(network.both(images), torch.cat([plain, features], dim=1), atol=1e-5, rtol=0)
    assert not torch.allclose(plain, features, atol=1e-2)


@pytest.mark.parametrize("petl", (*KINDS, "none"))
def test_what_trains(petl):
    network = tuned_network(petl, keep_plain=False)
    trained = {id(p) for p in network.parameters() if p.requires_grad} - {id(p) for p in network.head.parameters()}
    assert trained == {id(p) for p in network.tuned_parameters()} and bool(trained) == (petl != "none")
    network.train()
    assert {type(m).__name__ for m in network.modules() if m.training} <= {"BranchedAdapter", "Dropout"}
    network.finish()
    assert not any(p.requires_grad for p in network.parameters())


def test_dropout_of_the_adapters_alone():
    network, images = tuned_network("adapter").train(), torch.rand(2, 3, 16, 16)
    assert not torch.equal(network.features(images), network.features(images))
    for block in network.blocks:
        block.adapter.dropout.p = 0.0
    assert torch.equal(network.features(images), network.features(images))


def test_merged_scales_keep_the_features():
    network, images = tuned_network("ssf"), torch.rand(2, 3, 16, 16)
    before = network.features(images)
    network.finish(merge=True)
    torch.testing.assert_close(network.features(images), before, atol=1e-5, rtol=0)
