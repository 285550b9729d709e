"""SSF: the reference's features and gradients, the switch, the merge."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from convs.ssf import ScaleShift, add_ssf, merge_ssf
from tests.conftest import reference
from tests.convs.vits import check_forward, ssf_parameters, stored_vit
from utils.errors import ConfigError

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 0}


@pytest.mark.parity
def test_forward_and_gradients_of_the_reference():
    arrays = reference("aper/ssf_forward")
    model = stored_vit(arrays)
    add_ssf(model)
    check_forward(model.double(), ssf_parameters(model), arrays, atol=1e-11)


@pytest.mark.parity
def test_the_start_of_the_reference():
    arrays = reference("aper/init")
    ssf = ScaleShift(100_000)
    for tensor, name in ((ssf.scale, "scale"), (ssf.shift, "shift")):
        mean, std = arrays[f"ssf/{name}_mean_std"]
        assert abs(tensor.mean().item() - mean) < 0.005 and abs(tensor.std().item() / std - 1) < 0.05


def test_a_vit_b_has_205824_numbers():
    with torch.device("meta"):
        found = add_ssf(timm.create_model("vit_base_patch16_224", num_classes=0))
    assert sum(p.numel() for ssf in found for p in ssf.parameters()) == 205_824


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_merged_and_switched_off(bias, dynamic):
    model = VisionTransformer(**VIT, qkv_bias=bias, dynamic_img_size=dynamic).double().eval()
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    before = model(images)
    found = add_ssf(model.double())
    model.double()
    tuned = model(images)
    assert not torch.allclose(tuned, before, atol=1e-4)
    for ssf in found:
        ssf.active = False
    assert torch.equal(model(images), before)
    for ssf in found:
        ssf.active = True
    merge_ssf(model)
    torch.testing.assert_close(model(images), tuned, atol=1e-12, rtol=0)
    merge_ssf(model)
    torch.testing.assert_close(model(images), tuned, atol=1e-12, rtol=0)


def test_a_merged_state_stays_merged():
    model, other = (VisionTransformer(**VIT).eval() for _ in range(2))
    add_ssf(model), add_ssf(other)
    merge_ssf(model)
    other.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(model(images), other(images))


def test_only_the_scales_and_shifts_train():
    model = VisionTransformer(**VIT)
    found = add_ssf(model)
    assert [p for p in model.parameters() if p.requires_grad] == [p for ssf in found for p in ssf.parameters()]


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_a_network_without_the_places_is_refused(name):
    with torch.device("meta"), pytest.raises(ConfigError, match="choose a ViT of timm"):
        add_ssf(timm.create_model(name, num_classes=0))
