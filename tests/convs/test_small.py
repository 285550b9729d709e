"""The networks for small images: parameters of the published designs, all sizes, LeNet's own numbers."""

import numpy as np
import pytest
import torch
from torch import nn

from convs.backbones import input_size, make_backbone
from convs.heads import LinearHead
from convs.network import Network
from convs.small import SMALL, LeNet
from tests.conftest import reference
from utils.errors import ConfigError

# The fixture's names -> ours. Its swin, of a design of its own, has timm's as a stand-in.
OURS = {
    "lenet": "small_lenet", "alexnet": "small_alexnet", "vgg16": "small_vgg16", "inception": "small_inception",
    "resnet18": "small_resnet18", "resnext": "small_resnext29", "densenet": "small_densenet121",
    "senet": "small_senet18", "regnet": "small_regnetx_200mf",
}  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize("name", OURS)
def test_counts_of_the_reference_networks(name):
    arrays = reference("hcl/backbones")
    row = dict(zip(arrays["columns"], arrays["table"][arrays["names"].tolist().index(name)], strict=True))
    classes = int(arrays["num_classes"])
    for size in (32, 64):
        model = SMALL[OURS[name]](size)
        width = model.num_features
        total = sum(p.numel() for p in model.parameters()) + classes * (width + 1)
        assert (width, total) == (row["feature_dim"], row[f"params_{size}"])
        if size == 32:
            kinds = (nn.BatchNorm2d, nn.Conv2d, nn.LayerNorm)
            found = [sum(isinstance(m, kind) for m in model.modules()) for kind in kinds]
            assert found == [row["batchnorm2d"], row["conv2d"], row["layernorm"]]


def start_of(model: nn.Module) -> dict[tuple, list[tuple[float, ...]]]:
    """(kind, is weight, shape) -> (mean, std, min, max) of each parameter."""
    found: dict[tuple, list[tuple[float, ...]]] = {}
    for module in model.modules():
        kind = next((n for n, c in enumerate((nn.Conv2d, nn.Linear, nn.BatchNorm2d)) if isinstance(module, c)), 3)
        for name, value in module.named_parameters(recurse=False):
            key = kind, int(name == "weight"), (*value.shape, *[0] * (4 - value.dim()))
            flat = value.detach().double()
            std = float(flat.std(correction=0))
            found.setdefault(key, []).append((float(flat.mean()), std, float(flat.min()), float(flat.max())))
    return found


@pytest.mark.parity
@pytest.mark.parametrize("name", OURS)
def test_networks_start_as_the_reference_networks_do(name):
    """Every parameter but the head's, as multisets of statistics; constants exactly."""
    arrays = reference("hcl/init")
    theirs: dict[tuple, list[tuple[float, ...]]] = {}
    for row, shape in enumerate(arrays[f"{name}/shape"].tolist()):
        key = int(arrays[f"{name}/kind"][row]), int(arrays[f"{name}/is_weight"][row]), tuple(shape)
        statistics = [float(arrays[f"{name}/{what}"][0, row]) for what in ("mean", "std", "min", "max")]
        theirs.setdefault(key, []).append(tuple(statistics))
    torch.manual_seed(0)
    model = SMALL[OURS[name]](32)
    width = model.num_features
    for head in ((1, 1, (100, width, 0, 0)), (1, 0, (100, 0, 0, 0))):
        assert len(theirs.pop(head)) == 1
    ours = start_of(model)
    assert {key: len(values) for key, values in ours.items()} == {key: len(values) for key, values in theirs.items()}
    for key, values in ours.items():
        count = np.prod([side for side in key[2] if side])
        for mine, other in zip(
            sorted(values, key=lambda v: v[1]), sorted(theirs[key], key=lambda v: v[1]), strict=True
        ):
            if other[2] == other[3]:
                assert mine[2:] == other[2:], key
                continue
            assert abs(mine[1] - other[1]) <= (0.03 + 5 / count**0.5) * other[1], key
            assert abs(mine[0] - other[0]) <= 2 * 6 * other[1] / count**0.5, key


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("name", SMALL)
def test_every_network_runs_at_every_size(name, size):
    backbone = make_backbone(name, None, size)
    assert backbone.info.report.matched == 0 and input_size(name) == 32
    with torch.inference_mode():
        features = backbone.eval()(torch.rand(1, 3, size, size))
    assert features.shape == (1, backbone.info.feature_dim) and features.isfinite().all()


@pytest.mark.parity
def test_lenet_forward():
    arrays = reference("hcl/lenet")
    model, head = LeNet(arrays["image"].shape[-1]), LinearHead(84)
    state = {key[4:]: torch.from_numpy(arrays[key]) for key in arrays if key.startswith("net.")}
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
    head.load_state_dict({key[3:]: value for key, value in state.items() if key.startswith("fc.")})
    with torch.inference_mode():
        features = model.double()(torch.from_numpy(arrays["image"]).double())
        logits = head.double()(features)
    for ours, theirs in ((features, arrays["features"]), (logits, arrays["logits"])):
        assert np.abs(ours.numpy() - theirs).max() / max(1, np.abs(theirs).max()) <= 1e-10


def test_arguments_are_refused():
    with pytest.raises(ConfigError, match='"small_lenet" takes no arguments, got depth'):
        make_backbone({"name": "small_lenet", "depth": 3}, None, 32)
    with pytest.raises(ConfigError, match="did you mean"):
        make_backbone("small_lenett", None, 32)


def test_a_network_resizes_to_its_own_input_size():
    backbone = make_backbone("small_lenet", None, 64)
    network = Network(backbone, LinearHead, "cifar10", image_size=64).eval()
    network.head.grow(4)
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    logits = network(images)
    assert logits.shape == (2, 4)
    torch.testing.assert_close(network.from_normalised(network.normalise(images)), logits)
    torch.testing.assert_close(network.pixels(network.normalise(images)), images)
    logits.sum().backward()
    assert images.grad.abs().sum() > 0
