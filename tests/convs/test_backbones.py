import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from convs.backbones import NAMED, input_size, make_backbone
from convs.network import Network
from convs.weights import load_weights
from data.transforms import MEAN_STD
from tests.conftest import TINY_VIT
from utils.errors import ConfigError, WeightsError

ARGUMENTS = {key: value for key, value in TINY_VIT.items() if key != "name"}


def vit(**changes) -> VisionTransformer:
    torch.manual_seed(1)
    return VisionTransformer(num_classes=0, **(ARGUMENTS | changes))


def test_constructor_object_gives_timm_s_own_network():
    backbone = make_backbone(TINY_VIT, "random", None)
    assert backbone.info.feature_dim == 16 and backbone.info.image_size == 16
    assert backbone(torch.rand(2, 3, 16, 16)).shape == (2, 16)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_any_timm_architecture_gives_features_of_its_width(name):
    spec = {"name": name} | ({"img_size": 32} if name.startswith("vit") else {})
    backbone = make_backbone(spec, "random", None)
    size = 32
    assert backbone(torch.rand(2, 3, size, size)).shape == (2, backbone.info.feature_dim)


def test_arguments_that_break_a_constructor_are_not_taken_for_a_missing_network():
    with pytest.raises(ConfigError, match=r'"convnext_atto" cannot be built with .*depths'):
        make_backbone({"name": "convnext_atto", "depths": [1, 1, 1], "dims": [8, 8, 8]}, "random", None)


def test_input_size_is_known_without_building():
    assert input_size("small_vit") == 32
    assert input_size("vit_base_patch16_224.augreg_in21k") == 224
    assert input_size(TINY_VIT) == 16
    with pytest.raises(ConfigError, match="vit_base_patch16_224"):
        input_size("vit_base_patch16_225")


def test_image_size_changes_the_grid_of_a_transformer():
    backbone = make_backbone({"name": "vit_tiny_patch16_224"}, "random", 64)
    assert backbone.info.image_size == 64 and backbone(torch.rand(1, 3, 64, 64)).shape == (1, 192)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_state_dict_loads_completely(suffix, tmp_path):
    source, target = vit(), vit()
    torch.nn.init.normal_(source.cls_token)
    path = tmp_path / f"w{suffix}"
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    report = load_weights(target, path)
    assert report.matched == 1 and not report.missing and not report.unexpected and len(report.sha256) == 64
    assert all(torch.equal(target.state_dict()[key], value) for key, value in state.items())


def test_wrappers_and_heads_of_self_supervised_files_are_stripped(tmp_path):
    state = {f"module.base_encoder.{key}": value for key, value in vit().state_dict().items()}
    state |= {"module.base_encoder.head.0.weight": torch.ones(2), "module.momentum_encoder.cls_token": torch.ones(1)}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "moco.pth")
    assert load_weights(vit(), tmp_path / "moco.pth").matched == 1


def test_positions_of_another_image_size_are_resampled(tmp_path):
    torch.save(vit(img_size=32).state_dict(), tmp_path / "large.pth")
    target = vit()
    assert load_weights(target, tmp_path / "large.pth").matched == 1
    assert target.pos_embed.shape[1] == 1 + 2 * 2


def test_a_part_of_a_network_is_refused(tmp_path):
    state = {key: value for key, value in vit().state_dict().items() if not key.startswith("blocks.1")}
    torch.save(state, tmp_path / "half.pth")
    target = vit()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(WeightsError, match=r"do not fit the backbone: missing: blocks\.1.*\"depth\": 1"):
        load_weights(target, tmp_path / "half.pth")
    assert all(torch.equal(target.state_dict()[key], value) for key, value in before.items()), "nothing was loaded"


def test_a_final_norm_that_timm_counts_to_the_head_is_loaded(tmp_path):
    source, target = (timm.create_model("convnext_atto", num_classes=classes) for classes in (3, 0))
    torch.nn.init.normal_(source.head.norm.weight)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    assert load_weights(target, tmp_path / "a.pth").missing == ()
    torch.testing.assert_close(target.head.norm.weight, source.head.norm.weight)


def test_the_bundled_networks_match_their_files():
    for name in NAMED:
        backbone = make_backbone(name, None, None)
        report = backbone.info.report
        assert report.matched == 1 and not report.missing and not report.unexpected
        assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, backbone.info.feature_dim)


def test_normalisation_is_inside_the_network():
    backbone = make_backbone(TINY_VIT, "random", None)
    images = torch.rand(2, 3, 16, 16)
    plain = Network(backbone, lambda width: torch.nn.Identity(), "none")
    shifted = Network(backbone, lambda width: torch.nn.Identity(), "cifar")
    by_hand = (images - torch.tensor(MEAN_STD["cifar"][0]).view(3, 1, 1)) / torch.tensor(MEAN_STD["cifar"][1]).view(
        3, 1, 1
    )
    torch.testing.assert_close(shifted.features(images), plain.features(by_hand))


def test_tags_of_the_papers_are_known_to_timm():
    for tag in ("vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k_ft_in1k"):
        assert timm.is_model_pretrained(tag)
